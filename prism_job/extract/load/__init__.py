"""Weights of the reference: config, dtype, quantisation, adapter. Does not know rows or ranks."""
