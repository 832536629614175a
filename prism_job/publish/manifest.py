"""The manifest of a selection, and the id that follows from the request. Does not read or write files.

A selection lies under <output>/<run>/<selection id>/. Its manifest is written last and never overwritten; it holds the checksum
of every file beside it, so whoever finds a manifest can prove the selection whole.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from prism_job.plan.plan import Plan, SourceLayout
from prism_job.publish.audit_sentence import NOTHING_TO_AUDIT, audit_sentence
from prism_job.spec.digest import digest
from prism_job.spec.document import SelectionRun

MANIFEST_FORMAT = "prism-selection/2"
"""Any change of how scores or choices follow from shards makes a new version; it is part of the selection id."""

FileName = Literal[
    "selected.parquet", "scores.parquet", "targets.parquet", "quarantine.jsonl", "plan.json", "spec.yaml", "report.html"
]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Plain):
    """Checksum and size of a file beside the manifest."""

    sha256: str
    bytes: int


class Counts(_Plain):
    """Numbers of rows, unless the name states otherwise. `candidates` includes rows quarantined by plan or extraction."""

    candidates: int
    quarantined: int
    duplicates: int
    taken_by_budget: int
    selected: int
    selected_tokens: int
    tokens: int
    target_pairs: int
    units: int
    cut: int = 0  # candidates that go on beyond extraction.maxLength; 0 in older manifests, which did not count them
    cut_pairs: int = 0  # pairs of which a side does


class TargetSetFacts(_Plain):
    """One named set of targets."""

    name: str
    pairs: int
    weight: float
    sign: int
    preference: dict[str, float]  # five-number summary of π of its pairs
    norm: float  # ‖g_k‖ of its own direction, before weight and curvature
    # of the combined direction g, ⟨sign·weight·g_k, g⟩ / ‖g‖²; over all sets they add up to 1; None: similarity nearest
    share: float | None


class PreferenceModelFacts(_Plain):
    """The model that π comes from where it is not the reference. Its address is in the spec."""

    extractor: str  # digest under which its losses lie
    extractor_parts: dict[str, Any]
    reference: dict[str, float]  # five-number summary of the reference's own π, which weighs nothing


class Used(_Plain):
    """What the run had used when its reduction began. It follows from how the run went, not from what it selects."""

    gpu_hours: float  # GPUs × hours for which they were held
    gpu: str | None = None  # name of the GPUs, as their driver gives it
    price: float | None = None  # by spec.gpuHourPrice


class Manifest(_Plain):
    """The document that describes a selection, with the checksums of its files."""

    format: Literal["prism-selection/2"] = "prism-selection/2"
    run: str
    selection_id: str
    spec: SelectionRun
    extractor: str  # digest under which the shards lie
    extractor_parts: dict[str, Any]  # all that it covers
    work: str  # digest of the plan: data, units, targets
    layers: dict[
        str, int | float
    ] = {}  # number captured, and their share of what was asked for and of the model's matrices
    counts: Counts
    layouts: list[SourceLayout] = []  # how the rows of each candidate file were read
    target_layouts: list[SourceLayout] = []
    threshold: float | None  # score of the last row that the budget took
    scores: dict[str, float]  # five-number summary
    preference: dict[str, float]  # five-number summary
    preference_model: PreferenceModelFacts | None = Field(None, exclude_if=lambda it: it is None)
    warnings: list[str] = Field([], exclude_if=lambda it: not it)  # for people (publish/warnings.py)
    target_sets: list[TargetSetFacts]  # the part of each named set in the direction
    curvature: dict[str, Any]  # kind, λ and the tokens it rests on
    evaluation: dict[str, Any] | None = None  # of spec.evaluation (evaluate/comparison.py), or the reason why not
    audit: dict[str, Any] | None = None  # how far the ranking can be trusted (evaluate/audit.py); None: switched off
    rules: dict[str, Any] | None = None  # what shares of the budget and dedupe: near moved (score/selection.py)
    previous: str | None = None  # selection id that the report compares with: the newest earlier one of this run
    used: Used | None = Field(None, exclude_if=lambda it: it is None)  # None: whoever ran the stages did not count it
    code_version: str
    files: dict[FileName, FileDigest] = {}

    @property
    def audit_sentence(self) -> str | None:
        """What the audit found, or why there is none; None where it is switched off."""
        if self.spec.spec.scoring.is_forward_only:
            return NOTHING_TO_AUDIT
        return audit_sentence(self.audit) if self.audit else None

    def outcome(self, uri: str) -> dict[str, Any]:
        """The result of a run, as its last event reports it."""
        return {
            "manifest": uri,
            "selected": self.counts.selected,
            "candidates": self.counts.candidates,
            "badRows": self.counts.quarantined,
            "cutRows": self.counts.cut,
            "audit": self.audit_sentence,
            **({"warnings": self.warnings} if self.warnings else {}),
        }


def selection_id(run: SelectionRun, plan: Plan) -> str:
    """16 hex digits of all that decides the outcome: the work, weight and sign of each target set, the scoring, the selection,
    this format.

    The store counts too: a selection's rows are exported from the store that its own spec names. So does an evaluation,
    whose figures the manifest holds.
    """
    spec = run.spec
    # The work covers what the preference model computes, as it does the reference; where its files lie changes nothing.
    scoring = spec.scoring.model_dump(mode="json", exclude={"preference_model"})
    selection = spec.selection.settings()
    sets = [[each.name, each.weight, each.sign] for each in spec.targets.as_sets()]
    bad = spec.candidates.max_bad_fraction
    decided = [MANIFEST_FORMAT, plan.work_digest(), sets, scoring, selection, bad, spec.store, spec.audit.model_dump()]
    decided += [spec.evaluation.model_dump(mode="json")] if spec.evaluation else []
    return digest(decided)[:16]


def folder_key(run: SelectionRun, chosen_id: str) -> str:
    return f"{run.metadata.name}/{chosen_id}"


def summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Five-number summary and mean, for people. Leaves the values in another order, which saves a copy of them."""
    if not len(values):
        return {}
    mean = float(values.mean())
    points = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], overwrite_input=True)
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return {**{name: float(point) for name, point in zip(names, points, strict=True)}, "mean": mean}
