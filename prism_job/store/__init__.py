"""What lies in a gradient store: shards, codec, staged rows, inventory."""
