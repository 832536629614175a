"""What a person sees of a run: bars, tables, live watch, merged logs of its pods."""
