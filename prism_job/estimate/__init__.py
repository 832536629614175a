"""Tokens, bytes, FLOPs and memory of a run before it starts, on the meta device."""
