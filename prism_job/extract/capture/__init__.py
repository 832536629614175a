"""Per-example gradients by layer type."""
