"""The rows of a work unit as the store keeps them: JSON lines under zstd, named by a digest of the rows. Not: what a row means.

Extraction, the report, evaluation and export read rows here: none of them needs the sources, or their formats, again.
"""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa

from prism_job.errors import DataError
from prism_job.storage.objects import Store
from prism_job.storage.rows import Row

_REDO = "delete that object and run again: the plan writes it anew"


def staged_names(store: Store) -> set[str]:
    """Names of the rows already there, from one listing."""
    return {listed.key.removeprefix("rows/").partition(".")[0] for listed in store.list("rows/")}


def stage_rows(store: Store, unit_rows: list[Row], known: set[str]) -> str:
    """Keep the rows, unless `known` names them already. Returns their name and adds it to `known`."""
    name = _digest(unit_rows)
    if name not in known:
        store.put(rows_key(name), _pack(unit_rows))
        known.add(name)
    return name


def read_rows(store: Store, name: str) -> list[Row]:
    """The rows of that name.

    Raises:
        DataError: missing, damaged, or not the rows that the name stands for; names the object.
    """
    where = store.uri(rows_key(name))
    try:
        with pa.CompressedInputStream(pa.BufferReader(store.get(rows_key(name))), "zstd") as stream:
            text = stream.read().decode("utf-8", "surrogatepass")
        unit_rows = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"damaged rows: {error}", where=where, fix=_REDO) from error
    if _digest(unit_rows) != name:
        raise DataError("damaged rows: their digest does not fit their name", where=where, fix=_REDO)
    return unit_rows


def _pack(unit_rows: list[Row]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in unit_rows)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))
    return sink.getvalue().to_pybytes()


def rows_key(name: str) -> str:
    """Where the rows of that name lie."""
    return f"rows/{name}.jsonl.zst"


def _digest(unit_rows: list[Row]) -> str:
    text = json.dumps(unit_rows, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
