"""Export of a selection as training data: the rows, in the format that a trainer reads, and what goes beside them."""
