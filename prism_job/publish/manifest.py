"""What a run publishes: tables, the replaying spec, the report, and last of all the manifest that vouches for them.

Everything lies under <output>/<run>/<selection id>/. The manifest is written last and never overwritten; it holds the
checksum of every file beside it, so that whoever finds a manifest can prove the selection whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from prism_job.errors import DataError, RequestError, TransientError
from prism_job.evaluate import audit
from prism_job.plan.plan import Plan
from prism_job.spec.digest import digest
from prism_job.spec.document import SelectionRun
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.objects import Store

MANIFEST_FORMAT = "prism-selection/2"
"""Any change of how scores or choices follow from shards makes a new version; it is part of the selection id."""

FileName = Literal[
    "selected.parquet",
    "scores.parquet",
    "targets.parquet",
    "quarantine.jsonl",
    "plan.json",
    "spec.yaml",
    "report.html",
]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Plain):
    """What the manifest states of a file beside it."""

    sha256: str
    bytes: int


class Counts(_Plain):
    """Rows, unless the name says otherwise. `candidates` counts the quarantined, in plan and extraction, too."""

    candidates: int
    quarantined: int
    duplicates: int
    taken_by_budget: int
    selected: int
    selected_tokens: int
    tokens: int
    target_pairs: int
    units: int


class TargetSetFacts(_Plain):
    """One named set of targets.

    Attributes:
        preference: five-number summary of π of its pairs.
        norm: ‖g_k‖ of its own direction, before weight and curvature.
        share: of the combined direction g, ⟨sign·weight·g_k, g⟩ / ‖g‖²; over all sets they add up to 1.
    """

    name: str
    pairs: int
    weight: float
    sign: int
    preference: dict[str, float]
    norm: float
    share: float


class Manifest(_Plain):
    """The document that vouches for a selection.

    Attributes:
        extractor: digest under which the shards lie; `extractor_parts`: all that it covers.
        work: digest of the plan: data, units, targets.
        threshold: score of the last row that the budget took.
        target_sets: where targets are in named sets, what each of them is in the direction.
        scores, preference: five-number summaries; curvature: kind, λ and the tokens it rests on.
        evaluation: agreement with the labels that `spec.evaluation` names (`evaluate.compare`), or the reason
            why there is none; None where it names none.
        audit: how far the ranking can be trusted (evaluate/audit.py), and what it took to know that; None: switched off.
    """

    format: Literal["prism-selection/2"] = "prism-selection/2"
    run: str
    selection_id: str
    spec: SelectionRun
    extractor: str
    extractor_parts: dict[str, Any]
    work: str
    counts: Counts
    threshold: float | None
    scores: dict[str, float]
    preference: dict[str, float]
    target_sets: list[TargetSetFacts]
    curvature: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    code_version: str
    files: dict[FileName, FileDigest] = {}

    def outcome(self, uri: str) -> dict[str, Any]:
        """What a run says of its selection in the end."""
        return {
            "manifest": uri,
            "selected": self.counts.selected,
            "candidates": self.counts.candidates,
            "badRows": self.counts.quarantined,
            "audit": audit.sentence(self.audit) if self.audit else None,
        }


def selection_id(run: SelectionRun, plan: Plan) -> str:
    """16 hex digits of all that decides the outcome: the work, weight and sign of each target set, the scoring, the selection,
    this format.

    The store counts too: a selection's rows are exported from the store that its own spec names. So does an evaluation,
    whose figures the manifest holds.
    """
    spec = run.spec
    scoring, selection = spec.scoring.model_dump(mode="json"), spec.selection.model_dump(mode="json")
    sets = [[one.name, one.weight, one.sign] for one in spec.targets.as_sets()]
    bad = spec.candidates.max_bad_fraction
    decided = [MANIFEST_FORMAT, plan.work_digest(), sets, scoring, selection, bad, spec.store, spec.audit.model_dump()]
    decided += [spec.evaluation.model_dump(mode="json")] if spec.evaluation else []
    return digest(decided)[:16]


def folder_key(run: SelectionRun, chosen_id: str) -> str:
    return f"{run.metadata.name}/{chosen_id}"


def write_table(path: Path, parts: Iterable[Mapping[str, Any]]) -> Path:
    """A parquet file of these columns, a row group a part; the same parts give the same bytes. Returns the path.

    Raises:
        TransientError: no room for it.
    """
    waiting = (pa.table(dict(columns)) for columns in parts)
    first = next(waiting)
    try:
        with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
            for table in chain([first], waiting):
                writer.write_table(table)
    except OSError as error:
        fix = "free about 100 bytes a candidate there (16 more for each target set), or point TMPDIR to a larger disk"
        raise TransientError(f"cannot be written: {error}", where=str(path), fix=fix) from error
    return path


def publish(output: Store, folder: str, files: Mapping[FileName, bytes | Path], manifest: Manifest) -> dict[str, Any]:
    """Put the files (bytes, or where they lie), then the manifest with their checksums. Returns the outcome."""
    stated: dict[FileName, FileDigest] = {}
    for name, content in files.items():
        if isinstance(content, bytes):
            output.put(f"{folder}/{name}", content)
            stated[name] = FileDigest(sha256=_sha256(content), bytes=len(content))
        else:
            output.put_file(f"{folder}/{name}", content)
            stated[name] = FileDigest(sha256=_sha256_of_file(content), bytes=content.stat().st_size)
    vouching = manifest.model_copy(update={"files": stated})
    document = {**vouching.model_dump(mode="json", exclude={"spec"}), "spec": manifest.spec.to_document()}
    key = f"{folder}/manifest.json"
    output.put(key, json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode())
    return manifest.outcome(output.uri(key))


@dataclass(frozen=True)
class Published:
    """A selection as it lies there: its manifest, and its folder, whose files are checked as they are read."""

    uri: str
    manifest: Manifest
    folder: Store

    def read(self, name: FileName) -> bytes:
        """A file beside the manifest. Raises DataError where it is missing or not the one vouched for."""
        content = self.folder.get(name)
        self._refuse_other(name, _sha256(content))
        return content

    def _refuse_other(self, name: FileName, sha256: str) -> None:
        stated = self.manifest.files.get(name)
        if stated is None or sha256 != stated.sha256:
            raise DataError(
                f"{name} is not what the manifest beside it vouches for",
                where=self.folder.uri(name),
                fix="a published selection is never overwritten: remove that folder, or choose another spec.output",
            )

    def table(self, name: FileName) -> pa.Table:
        return pq.read_table(io.BytesIO(self.read(name)))

    def plan(self) -> Plan:
        return Plan.model_validate_json(self.read("plan.json"))

    def check(self) -> Published:
        """Itself, after reading every file that the manifest names; none of them is held in memory."""
        for name in self.manifest.files:
            with self.folder.as_file(name) as path:
                self._refuse_other(name, _sha256_of_file(path))
        return self


def find_published(output: Store, folder: str) -> Published | None:
    """A selection already published whole, or None. Raises DataError where a manifest is there and something is damaged."""
    key = f"{folder}/manifest.json"
    return load(output.uri(key)).check() if output.exists(key) else None


def load(manifest_uri: str) -> Published:
    """The selection of a manifest; its files are not looked at yet.

    Raises:
        RequestError: there is no manifest.
        DataError: it is damaged, or of another format.
    """
    parent, name = split_uri(manifest_uri)
    folder = open_store(parent)
    if name != "manifest.json" or not folder.exists(name):
        fix = "give the path that `prism run` printed last; it ends in /manifest.json"
        raise RequestError("no manifest there", where=manifest_uri, fix=fix)
    try:
        return Published(manifest_uri, Manifest.model_validate_json(folder.get(name)), folder)
    except ValueError as error:
        what = f"damaged manifest, or one of another version: {' '.join(str(error).split())[:300]}"
        raise DataError(what, where=manifest_uri, fix="remove its folder and run the selection again") from error


def summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Five-number summary and mean, for people. Leaves the values in another order, which saves a copy of them."""
    if not len(values):
        return {}
    mean = float(values.mean())
    points = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], overwrite_input=True)
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return {**{name: float(point) for name, point in zip(names, points, strict=True)}, "mean": mean}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
