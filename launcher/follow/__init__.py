"""What a person sees of a run: bars, tables, live watch, logs of many pods."""
