"""Two selections compared: their rows, their inputs, and both as the facts of `prism diff`."""
