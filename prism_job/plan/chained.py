"""Another run's selection as a source: a manifest -> its selected rows in plan order, all columns, as `prism export` does.

The rows come from the store of that run. The manifest's checksums prove its plan and scores, the rows' names prove the rows.
Reads the manifest as plain JSON: the class is publish/'s.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_job.data.data_files import Source
from prism_job.data.readers import Numbered, Row
from prism_job.errors import DataError, RequestError
from prism_job.plan.plan import Plan
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.objects import Store
from prism_job.store import staged_rows


def is_manifest(uri: str) -> bool:
    return split_uri(uri)[1] == "manifest.json"


def selected_source(uri: str) -> Source:
    """The selected rows of the manifest at `uri`, numbered from 1.

    Raises:
        RequestError: there is no manifest.
        DataError: it is damaged, or (while it is read) the plan, the scores or the rows that it stands for are.
    """
    parent, name = split_uri(uri)
    folder = open_store(parent)
    if not folder.exists(name):
        fix = "give the path that `prism run` printed last; it ends in /manifest.json"
        raise RequestError("no manifest there", where=uri, fix=fix)
    try:
        manifest = json.loads(folder.get(name))
        digests = {file: manifest["files"][file]["sha256"] for file in ("plan.json", "scores.parquet")}
        store = open_store(manifest["spec"]["spec"]["store"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "name a manifest.json that PRISM published; a data file needs another name"
        raise DataError(f"not the manifest of a selection: {error!r}", where=uri, fix=fix) from error
    return Source(folder.uri(name), lambda: _checked_rows(folder, digests, store))


def selected_rows(plan: Plan, selected_N: NDArray[Any], store: Store) -> Iterator[tuple[int, Row]]:
    """The selected candidates' own rows, all columns, in plan order, each with its number in that order from 0."""
    start = 0
    for unit in plan.candidates:
        chosen = np.flatnonzero(selected_N[start : start + unit.num_rows])
        rows = staged_rows.read_rows(store, unit.rows) if len(chosen) else []
        for position in chosen.tolist():
            yield start + position, rows[position]
        start += unit.num_rows


def _checked_rows(folder: Store, digests: dict[str, str], store: Store) -> Iterator[Numbered]:
    try:
        with _checked(folder, "plan.json", digests) as path:
            plan = Plan.model_validate_json(path.read_bytes())
    except ValueError as error:
        fix = "export its rows with the version of PRISM that made it, or run that selection again"
        raise DataError("a plan of another version of PRISM", where=folder.uri("plan.json"), fix=fix) from error
    with _checked(folder, "scores.parquet", digests) as path:
        selected_N = pq.ParquetFile(path).read(["selected"])["selected"].to_numpy()
    for position, (_, row) in enumerate(selected_rows(plan, selected_N, store), start=1):
        yield position, row


@contextmanager
def _checked(folder: Store, name: str, digests: dict[str, str]) -> Iterator[Path]:
    """A path to read the file at, without holding it in memory."""
    with folder.as_file(name) as path:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != digests[name]:
            fix = "copy the whole folder of that selection again, or run it again"
            what = f"checksum mismatch: {name} is not the file that the manifest beside it describes"
            raise DataError(what, where=folder.uri(name), fix=fix)
        yield path
