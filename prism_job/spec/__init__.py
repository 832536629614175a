"""The document: frozen pydantic models, SpecError, digests. Does no input or output; knows neither torch nor numpy."""
