"""Custom resource <-> spec; status, labels, names; the CRD from the pydantic schema."""
