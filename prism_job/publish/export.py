"""The selected subset as a data file: the candidates' own rows, all columns, in plan order."""

import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_job.data.readers import Row
from prism_job.errors import RequestError
from prism_job.plan.plan import Plan
from prism_job.publish.published import load
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.folder import local_errors
from prism_job.storage.objects import Store
from prism_job.store import staged_rows


def export(manifest_uri: str, destination: str) -> dict[str, Any]:
    """Write the subset to a path or s3:// address ending in .jsonl, .jsonl.gz, .jsonl.zst or .parquet.

    Raises:
        RequestError: another ending, or the file exists already: an export overwrites nothing.
        DataError: the selection, or the rows the store keeps for it, are damaged.
    """
    parent, name = split_uri(destination)
    writer = next((write for ending, write in _WRITERS.items() if name.endswith(ending)), None)
    if writer is None:
        raise RequestError("no known file ending", where=destination, fix=f"end it in {', '.join(_WRITERS)}")
    target = open_store(parent)
    if target.exists(name):
        raise RequestError("the file exists already", where=destination, fix="remove it, or choose another name")
    selection = load(manifest_uri).check()
    selected_N = selection.table("scores.parquet")["selected"].to_numpy()
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        path = Path(folder) / name
        store = open_store(selection.manifest.spec.spec.store)
        with local_errors(str(path), writing=True):
            num_rows = writer(path, destination, _selected_rows(selection.plan(), store, selected_N))
        target.put_file(name, path)
    return {"written": target.uri(name), "rows": num_rows}


def _selected_rows(plan: Plan, store: Store, selected_N: Any) -> Iterator[list[Row]]:
    start = 0
    for unit in plan.candidates:
        chosen = np.flatnonzero(selected_N[start : start + unit.num_rows])
        start += unit.num_rows
        if len(chosen):
            rows = staged_rows.read_rows(store, unit.rows)
            yield [rows[row] for row in chosen]


def _write_jsonl(path: Path, destination: str, parts: Iterator[list[Row]]) -> int:
    count = 0
    with _text_sink(path) as sink:
        for rows in parts:
            for row in rows:
                sink.write(_json_line(row))
                count += 1
    return count


def _json_line(row: Row) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8, but JSON can write it out
        return (json.dumps(row) + "\n").encode()


def _text_sink(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "wb")
    if path.name.endswith(".zst"):
        return pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd")
    return path.open("wb")


def _write_parquet(path: Path, destination: str, parts: Iterator[list[Row]]) -> int:
    # One schema for the whole file: a column may first appear in a late row.
    rows = [row for part in parts for row in part]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
            pq.write_table(pa.table({"": columns[name].slice(0, 0)}), pa.BufferOutputStream())
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            fix = "export to .jsonl, which holds any row"
            what = f"column {name!r} does not fit a table: {error}"
            raise RequestError(what, where=destination, fix=fix) from error
    pq.write_table(pa.table(columns), path, compression="zstd")
    return len(rows)


_WRITERS = {".jsonl": _write_jsonl, ".jsonl.gz": _write_jsonl, ".jsonl.zst": _write_jsonl, ".parquet": _write_parquet}
