"""What a run publishes: tables, the replaying spec, the report, and last of all the manifest that vouches for them.

Everything lies under <output>/<run>/<selection id>/. The manifest is written last and never overwritten; it holds the
checksum of every file beside it, so that whoever finds a manifest can prove the selection whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_job.errors import DataError, RequestError
from prism_job.plan import Plan
from prism_job.spec import SelectionRun, digest
from prism_job.storage.objects import Store, open_store, split_uri

MANIFEST_FORMAT = "prism-selection/1"
"""Any change of how scores or choices follow from shards makes a new version; it is part of the selection id."""


def selection_id(run: SelectionRun, plan: Plan) -> str:
    """16 hex digits of all that decides the outcome: the work, the scoring, the selection, this format."""
    scoring = run.spec.scoring.model_dump(mode="json")
    selection = run.spec.selection.model_dump(mode="json")
    return digest([MANIFEST_FORMAT, plan.work_digest(), scoring, selection])[:16]


def folder_key(run: SelectionRun, chosen_id: str) -> str:
    return f"{run.metadata.name}/{chosen_id}"


def table_bytes(columns: Mapping[str, Any]) -> bytes:
    """A parquet file of these columns; the same columns give the same bytes."""
    sink = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd", row_group_size=2**20)
    return sink.getvalue()


def publish(output: Store, folder: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Put the files, then the manifest that holds their checksums."""
    for name, content in files.items():
        output.put(f"{folder}/{name}", content)
    checksums = {name: {"sha256": sha256(content), "bytes": len(content)} for name, content in files.items()}
    text = json.dumps({**manifest, "files": checksums}, indent=1, sort_keys=True, ensure_ascii=False)
    output.put(f"{folder}/manifest.json", text.encode())


def find_published(output: Store, folder: str) -> dict[str, Any] | None:
    """The manifest of a selection already published whole, or None.

    Raises:
        DataError: a manifest is there, but a file beside it is missing or not what it vouches for.
    """
    key = f"{folder}/manifest.json"
    if not output.exists(key):
        return None
    return verify(output.uri(key))


def outcome(manifest: Mapping[str, Any], output: Store, folder: str) -> dict[str, Any]:
    """What a run says of its selection in the end."""
    counts = manifest["counts"]
    return {
        "manifest": output.uri(f"{folder}/manifest.json"),
        "selected": counts["selected"],
        "candidates": counts["candidates"],
        "badRows": counts["quarantined"],
    }


def verify(manifest_uri: str) -> dict[str, Any]:
    """Read a manifest and check every file beside it.

    Raises:
        RequestError: there is no manifest.
        DataError: it, or a file beside it, is damaged or missing.
    """
    manifest, beside = load(manifest_uri)
    for name, stated in manifest["files"].items():
        if sha256(beside.get(name)) != stated["sha256"]:
            raise DataError(
                f"the output already holds this selection, but its {name} is not what the manifest vouches for",
                where=beside.uri(name),
                fix="a published selection is never overwritten: remove that folder, or choose another spec.output",
            )
    return manifest


def load(manifest_uri: str) -> tuple[dict[str, Any], Store]:
    """A manifest and the folder it lies in, unchecked. Raises RequestError or DataError as `verify`."""
    parent, name = split_uri(manifest_uri)
    beside = open_store(parent)
    if name != "manifest.json" or not beside.exists(name):
        fix = "give the path that `prism run` printed last; it ends in /manifest.json"
        raise RequestError("no manifest there", where=manifest_uri, fix=fix)
    try:
        manifest = json.loads(beside.get(name))
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this version reads {MANIFEST_FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged manifest: {error}", where=manifest_uri, fix="run the selection again") from error
    return dict(manifest), beside


def read_table(beside: Store, manifest: Mapping[str, Any], name: str) -> pa.Table:
    """One parquet file of a selection, checked against the manifest. Raises DataError if it does not fit."""
    content = beside.get(name)
    if sha256(content) != manifest["files"][name]["sha256"]:
        fix = "run the selection again into another spec.output"
        raise DataError("not the file the manifest vouches for", where=beside.uri(name), fix=fix)
    return pq.read_table(io.BytesIO(content))


def summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Five-number summary and mean, for people."""
    if not len(values):
        return {}
    points = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return {**{name: float(point) for name, point in zip(names, points, strict=True)}, "mean": float(values.mean())}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
