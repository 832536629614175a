"""Rows -> a data file: JSON lines, plain or compressed, or parquet. Notes each column whose JSON type cannot be kept.

Does not know where the rows come from.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_job.data.readers import Row
from prism_job.errors import RequestError
from prism_job.publish.export.notes import Notes

NOT_FINITE = "NaN or infinite numbers, written as NaN and Infinity, which not every JSON reader takes"
FILLED = "null where a row lacks the column, or a key within it"

MAX_LEVELS = 100
"""Of lists and objects within each other that a table takes; Arrow's own limits differ by value and reader."""

Writer = Callable[[Path, str, Iterable[Row], Notes], None]
"""Writes the rows to the path; errors name the address (str) that the file goes to."""


def writer_of(destination: str) -> Writer:
    """By the ending of the address. Raises RequestError: another ending."""
    for ending, writer in _WRITERS.items():
        if destination.endswith(ending):
            return writer
    raise RequestError("no known file ending", where=destination, fix=f"end it in {', '.join(_WRITERS)}")


def _write_jsonl(path: Path, destination: str, rows: Iterable[Row], notes: Notes) -> None:
    with _text_sink(path) as sink:
        for row in rows:
            sink.write(_json_line(row, notes))


def _json_line(row: Row, notes: Notes) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8, but JSON can write it out
        return (json.dumps(row) + "\n").encode()
    except ValueError:
        notes.add(NOT_FINITE, *(name for name, value in row.items() if not _is_json(value)))
        return (json.dumps(row) + "\n").encode()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _text_sink(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "wb")
    if path.name.endswith(".zst"):
        return pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd")
    return path.open("wb")


def _write_parquet(path: Path, destination: str, rows: Iterable[Row], notes: Notes) -> None:
    # One schema for the whole file: a column may first appear in a late row.
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            if any(_is_deeper(value, MAX_LEVELS) for value in values):
                raise RecursionError(f"a value of more than {MAX_LEVELS} levels")
            columns[name] = pa.array(values)
            pq.write_table(pa.table({name: columns[name].slice(0, 0)}), pa.BufferOutputStream())
            is_filled = any(name not in row for row in rows) or _is_filled(columns[name], values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, RecursionError) as error:
            fix = "export to .jsonl, which holds any row"
            what = f"column {name!r} does not fit a table: {error}"
            raise RequestError(what, where=destination, fix=fix) from error
        if is_filled:
            notes.add(FILLED, name)
    pq.write_table(pa.table(columns), path, compression="zstd")


def _is_deeper(value: Any, levels: int) -> bool:
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 1 or _is_deeper(item, levels - 1) for item in nested if isinstance(item, dict | list))


def _is_filled(column: Any, values: list[Any]) -> bool:
    return pa.types.is_nested(column.type) and any(map(_has_more_keys, column.to_pylist(), values))


def _has_more_keys(stored: Any, value: Any) -> bool:
    # All rows of a table have the same keys at every depth.
    if isinstance(value, dict):
        return len(stored) > len(value) or any(_has_more_keys(stored[key], item) for key, item in value.items())
    return isinstance(value, list) and any(map(_has_more_keys, stored, value))


_WRITERS: dict[str, Writer] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_jsonl,
    ".jsonl.zst": _write_jsonl,
    ".parquet": _write_parquet,
}
