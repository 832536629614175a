"""JSON of any depth. An API server takes objects that nest 10,000 levels deep, Python's parser about 1,000."""

import json
import re
from typing import Any

MAX_LEVELS = 200
"""Levels that are kept of a document which nests deeper than Python can read."""

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]')


def loads(text: str) -> Any:
    """The parsed text. Where Python cannot read it, null stands below `MAX_LEVELS` levels: one object must not stop a list.

    Raises:
        ValueError: this is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(_without_deep_levels(text))


def _without_deep_levels(text: str) -> str:
    """JSON with null in place of all that lies deeper than `MAX_LEVELS` levels."""
    parts, depth, kept_to = [], 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth == MAX_LEVELS + 1:
                parts.append(text[kept_to : token.start()])
        elif token[0] in "]}":
            if depth == MAX_LEVELS + 1:
                parts.append("null")
                kept_to = token.end()
            depth -= 1
    return "".join((*parts, text[kept_to:]))
