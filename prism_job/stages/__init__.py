"""The three stages, plan, extract and reduce, each read from the top."""
