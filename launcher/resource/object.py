"""A Kubernetes object as plain data: what the API server sends, and what we render."""

from typing import Any

Object = dict[str, Any]
