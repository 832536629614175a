"""What a source holds, row by row: layouts, rendered texts, tokens that carry loss. Without a model it imports no torch."""
