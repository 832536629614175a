"""Small pieces of a page, as HTML that is safe whatever the data hold."""

import html
import json
import re
from typing import Any

MAX_ROWS = 50
"""Rows of the long tables (quarantine, sources, ignored files)."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def safe(text: str) -> str:
    """Untrusted text as HTML: escaped; lone surrogates (no UTF-8) and control characters become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n")))


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def meter(share: float, colour: str, tick: float | None = None) -> str:
    """A bar filled by share (cut to 0..1), with a tick where one is given."""
    at = "" if tick is None else f'<s style="left:{100 * tick:.1f}%"></s>'
    return (
        f'<span class="meter"><i class="{colour}" style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i>{at}</span>'
    )


def path(source: str) -> str:
    folder, slash, name = source.rpartition("/")
    return f'<bdi class="path">{safe(folder + slash)}<b>{safe(name)}</b></bdi>'


def more(total: int, what: str) -> str:
    return f'<p class="note">{total - MAX_ROWS:,} more {what} are not listed.</p>' if total > MAX_ROWS else ""


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


def flat(value: str | dict[str, Any]) -> str:
    """A mapping as `name value` pairs; text as it is."""
    if isinstance(value, str):
        return value
    return " · ".join(f"{name} {part if isinstance(part, str) else json.dumps(part)}" for name, part in value.items())


def percent(part: float, whole: float) -> str:
    if not whole:
        return "–"
    value = 100 * part / whole
    return "&lt;0.1\u202f%" if 0 < value < 0.05 else f"{value:.1f}\u202f%".replace("-", "−")
