"""Tables, manifest, export and report of a selection; reads back what it published."""
