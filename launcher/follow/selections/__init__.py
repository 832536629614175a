"""What `prism diff` and `prism explain` print of published selections."""
