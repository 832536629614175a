"""Text from data, made safe for a terminal, and columns of it. Knows nothing of what it means."""

import re
from collections.abc import Sequence

# What moves a cursor, breaks a line or reverses the reading order.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters, which could move the cursor, written out as escapes."""
    return _CONTROL.sub(
        lambda match: f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}", text
    )


def one_line(text: str) -> str:
    """As printable, on one line."""
    return printable(" ".join(text.split()))


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Lines of cells as wide as their column's longest. `right`: all but the first column are aligned to the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


MARKS = "⟦⟧"
"""Begin and end of what is marked, where there is no colour."""

_MARKED = "\x1b[7;32m"  # reversed, so that white space shows too
_PLAIN = "\x1b[0m"


def marked(text: str) -> str:
    """The text between marks, each line for itself; the end of a line is shown as ↵. It holds no marks of its own."""
    lines = text.split("\n")
    shown = [f"{line}↵" for line in lines[:-1]] + lines[-1:]
    return "\n".join(f"{MARKS[0]}{line}{MARKS[1]}" if line else "" for line in shown)


def without_marks(text: str) -> str:
    """The text with the marks that are its own written out as escapes."""
    return re.sub(f"[{MARKS}]", lambda match: f"\\u{ord(match[0]):04x}", text)


def coloured(text: str) -> str:
    """Printable text with colour in place of marks."""
    return text.replace(MARKS[0], _MARKED).replace(MARKS[1], _PLAIN)
