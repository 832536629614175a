"""What `prism diff` prints of published selections."""
