"""The rows of a work unit in the store: JSON lines under zstd, named by the digest of the rows. Does not interpret rows.

Extraction, report, evaluation and export read rows here, so that none of them needs the data files or their formats.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from prism_job.data.readers import Row
from prism_job.errors import DataError
from prism_job.storage.objects import Store

_REDO = "delete that object and run again: the plan writes it again"


def staged_names(store: Store) -> set[str]:
    """Names of all staged rows, from one listing."""
    return {listed.key.removeprefix("rows/").partition(".")[0] for listed in store.list("rows/")}


def stage_rows(store: Store, unit_rows: list[Row], staged: set[str], as_text: dict[str, str] | None = None) -> str:
    """Write the rows, unless their name is in `staged`. Returns the name and adds it to `staged`.

    A value that JSON lacks (timestamp, decimal, bytes) becomes text. Its column and type are added to `as_text`.
    """
    lines = [_json_line(row, {} if as_text is None else as_text) for row in unit_rows]
    name = _digest(lines)
    if name not in staged:
        store.put(rows_key(name), _pack(lines))
        staged.add(name)
    return name


def read_rows(store: Store, name: str) -> list[Row]:
    """The rows of that name. Raises DataError: missing or damaged; names the object."""
    where = store.uri(rows_key(name))
    try:
        with pa.CompressedInputStream(pa.BufferReader(store.get(rows_key(name))), "zstd") as stream:
            text = stream.read().decode("utf-8", "surrogatepass")
        lines = [line for line in text.split("\n") if line]
        unit_rows = [json.loads(line) for line in lines]
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"damaged rows: {error}", where=where, fix=_REDO) from error
    if _digest(lines) != name:
        raise DataError("damaged rows: their digest is not their name", where=where, fix=_REDO)
    return unit_rows


_as_json = json.JSONEncoder(ensure_ascii=False).encode
_as_json_or_text = json.JSONEncoder(ensure_ascii=False, default=str).encode
"""Made once: making one costs as much as encoding a short row."""


def _json_line(row: Row, as_text: dict[str, str]) -> str:
    try:
        return _as_json(row)
    except TypeError:
        for column, value in row.items():
            for name in _types_without_json(value):
                as_text.setdefault(column, name)
        return _as_json_or_text(row)


def _types_without_json(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _types_without_json(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _types_without_json(item)
    elif not isinstance(value, str | int | float | None):
        yield type(value).__name__


def _pack(lines: list[str]) -> bytes:
    text = "\n".join([*lines, ""])
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))
    return sink.getvalue().to_pybytes()


def rows_key(name: str) -> str:
    """Key of the rows of that name."""
    return f"rows/{name}.jsonl.zst"


def _digest(lines: list[str]) -> str:
    """Digest of the rows as one JSON array, built from the lines: no row is encoded twice."""
    return hashlib.sha256(f"[{', '.join(lines)}]".encode("utf-8", "surrogatepass")).hexdigest()[:32]
