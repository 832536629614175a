"""The digest of any plain value."""

import hashlib
import json
from typing import Any

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
"""Made once: making it costs as much as encoding a short example."""


def digest(value: Any) -> str:
    """32 hex digits (128 bits of SHA-256) of a plain value's canonical JSON: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]
