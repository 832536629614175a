"""`columns:` of the document applied to a row: part of an example -> value. Does not know layouts or tokens."""

import math
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from prism_job.data.bad_row import BadRow, describe_columns, line_of, wrong_type
from prism_job.spec.data import WHOLE_COLUMNS, ColumnsSpec, template_parts

OPTIONAL = frozenset({"system", "tools", "rejected"})
"""Parts that a row may lack; where `rejected` is needed, its layout asks for it."""

Part = tuple[str, str, tuple[tuple[str, str | None], ...]]
"""Name of a part, its kind (column, list or template), and pieces: text before a column, and the column."""


def mapped(row: Mapping[str, Any], columns: ColumnsSpec) -> dict[str, Any] | None:
    """The parts of this row; None where it holds nothing in any of the named columns, so its own layout counts.

    A null is an absent column: parquet fills absent ones. Numbers become text. An optional part that is absent is left out.

    Raises BadRow: a column is absent while others are there, or a value cannot be part of a text.
    """
    parts, names = _compiled(columns)
    if all(row.get(name) is None for name in names):
        return None
    found = {}
    for name, kind, pieces in parts:
        value = _value(row, name, kind, pieces)
        if value is not None:
            found[name] = value
        elif name not in OPTIONAL:
            missing = next(column for _, column in pieces if column is not None and row.get(column) is None)
            raise BadRow(f"no '{missing}', which columns names for {name}; {describe_columns(row, missing)}")
    return found


@lru_cache(maxsize=256)
def _compiled(columns: ColumnsSpec) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    parts: list[Part] = []
    for name, source in columns.given().items():
        if isinstance(source, tuple):
            parts.append((name, "list", tuple(("", column) for column in source)))
        elif "{" in source or "}" in source:
            parts.append((name, "template", template_parts(source)))
        else:
            parts.append((name, "column", (("", source),)))
    names = (column for _, _, pieces in parts for _, column in pieces if column is not None)
    return tuple(parts), tuple(dict.fromkeys(names))


def _value(row: Mapping[str, Any], name: str, kind: str, pieces: tuple[tuple[str, str | None], ...]) -> Any:
    if kind == "column":
        value = row.get(str(pieces[0][1]))
        return (
            value if value is None or (name in WHOLE_COLUMNS and isinstance(value, list | dict)) else _text(value, name)
        )
    if kind == "list":
        texts = [_text(row[column], name) for _, column in pieces if column is not None and row.get(column) is not None]
        return "\n".join(text for text in texts if text.strip()) if texts else None
    if any(column is not None and row.get(column) is None for _, column in pieces):
        return None
    return "".join(text + ("" if column is None else _text(row[column], name)) for text, column in pieces)


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    raise wrong_type(value, name, "text or a number")


def columns_parts(columns: ColumnsSpec) -> dict[str, str | list[str]]:
    """Part of an example -> its column, columns or template, as a document holds them."""
    return {name: list(source) if isinstance(source, tuple) else source for name, source in columns.given().items()}


def columns_line(columns: ColumnsSpec) -> str:
    """`columns` as YAML in one line, as a document could hold it."""
    return line_of(**columns_parts(columns))


def columns_name(columns: ColumnsSpec) -> str:
    """The name of the layout that `columns` makes."""
    return f"columns: {columns_line(columns)}"
