"""The plan of a run: ordered work units with fixed ids, and which of them the store lacked.

`stages/plan.py` makes it; every later stage reads it. Does not know how many GPUs there are.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from prism_job.errors import DataError, RequestError
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage.address import open_store


class _Plain(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class Block(_Plain):
    """Rows that are extracted and stored together."""

    id: str  # digest of the rows' content ids in order; names the shard
    rows: str  # digest of the staged rows, carried columns included; names the staged object
    num_rows: int


class Unit(Block):
    """Rows of one source."""

    source: int  # index in `Plan.sources`
    lines: list[tuple[int, int]]  # runs of line numbers in the source: (first, how many)

    def line_numbers(self) -> Iterator[int]:
        for first, count in self.lines:
            yield from range(first, first + count)


UNUSABLE_ROWS = "unusable rows"
"""In place of the layout of a file without a good row."""


class SourceLayout(_Plain):
    """How the good rows of a data file were read: their layout, how many they are, and what carries the loss.

    A file without a good row has one of its own, UNUSABLE_ROWS.
    """

    uri: str
    layout: str
    rows: int
    loss: str


class Quarantined(_Plain):
    """A row that cannot be used, and why."""

    source: str
    line: int
    reason: str


class Audit(_Plain):
    """What the audit extracts under `audit_spec`, whose digest `extractor` is, and what the store lacked of it."""

    extractor: str
    units: list[Block]  # the sample's rows, smallest example id first
    positions: list[int] = Field(alias="places")  # of each of these rows in plan order; of equal rows the first
    factors: list[str]  # units of the sample that carry factor sums
    missing_candidates: list[str]
    missing_sums: list[str]  # target units of which the store lacked what the audit needs, see `Plan.audit_kind`
    missing_factors: list[str]


class Preference(_Plain):
    """The model that π comes from where it is not the reference, and what the store lacked of its losses."""

    extractor: str
    extractor_parts: dict[str, Any]
    missing: list[str]  # target units


class Plan(_Plain):
    """All work of a run, and what the store lacked of it when the plan was made."""

    format: Literal["prism-plan/2"] = "prism-plan/2"
    spec_digest: str = Field(alias="request")  # by digest_of; tells two documents under one name apart
    extractor: str
    extractor_parts: dict[str, Any]
    sources: list[str]
    pinned: dict[str, str] = {}  # an address on the hub in the document -> the same at the commit that was read
    ignored: list[str]
    candidates: list[Unit]
    target_sources: list[str]
    target_sets: list[str]  # the set of each target source, "" for plain uris; a file in two sets is two sources
    targets: list[Unit]
    factors: list[str]  # ids of the units that carry factor sums
    quarantine: list[Quarantined]
    layouts: list[SourceLayout] = []  # of the candidates, source by source; a source may hold several
    target_layouts: list[SourceLayout] = []
    as_text: dict[str, str] | None = None  # columns staged as text -> type; None: planned before this was recorded
    missing_candidates: list[str]
    missing_targets: list[str]
    missing_factors: list[str]
    audit: Audit | None = None
    preference: Preference | None = Field(None, exclude_if=lambda it: it is None)  # so that ids without it stay

    @property
    def audit_kind(self) -> Literal["sums", "targets"]:
        """What the audit needs of a target unit: its weighted sums, or, for any weights, each pair's row."""
        return "targets" if self.preference else "sums"

    @property
    def num_examples(self) -> int:
        return sum(unit.num_rows for unit in self.candidates)

    @property
    def num_pairs(self) -> int:
        return sum(unit.num_rows for unit in self.targets)

    @property
    def num_missing(self) -> int:
        """Units that need the model, those of the audit included. A unit that lacks its rows and its factors is one."""
        own = len(set(self.missing_candidates) | set(self.missing_factors)) + len(set(self.missing_targets))
        own += len(set(self.preference.missing)) if self.preference else 0
        if self.audit is None:
            return own
        sampled = set(self.audit.missing_candidates) | set(self.audit.missing_factors)
        return own + len(sampled) + len(set(self.audit.missing_sums))

    @property
    def num_units(self) -> int:
        """Distinct units of candidates and targets, those of the audit (its sample, and the targets once more), and the
        targets once more for the preference model."""
        candidates, targets = ({unit.id for unit in units} for units in (self.candidates, self.targets))
        audited = 0 if self.audit is None else len(self.audit.units) + len(targets)
        return len(candidates) + len(targets) + audited + (len(targets) if self.preference else 0)

    @property
    def missing_rows(self) -> dict[str, int]:
        """Rows of the units that need the model, by what they are extracted for. What the audit needs of a pair comes out of
        the passes of the pair itself."""
        audit, preference = self.audit, self.preference
        found = {
            "preferenceModel": _rows_of(self.targets, preference.missing if preference else []),
            "pairs": _rows_of(self.targets, [*self.missing_targets, *(audit.missing_sums if audit else [])]),
            "candidates": _rows_of(self.candidates, [*self.missing_candidates, *self.missing_factors]),
            "audit": _rows_of(audit.units, [*audit.missing_candidates, *audit.missing_factors]) if audit else 0,
        }
        return {name: number for name, number in found.items() if number}

    def settled(self) -> Self:
        """Without what the store lacked when it was made, which does not change the outcome."""
        audit = self.audit and self.audit.model_copy(
            update={"missing_candidates": [], "missing_sums": [], "missing_factors": []}
        )
        nothing: list[str] = []
        preference = self.preference and self.preference.model_copy(update={"missing": nothing})
        missing = dict.fromkeys(("missing_candidates", "missing_targets", "missing_factors"), nothing)
        return self.model_copy(update={**missing, "audit": audit, "preference": preference})

    def work_digest(self) -> str:
        """Of everything except what the store lacked: two plans of the same data have the same digest.

        Not of the layouts and types of columns either: the ids of units and rows cover what they give. Nor of
        `pinned`: the sources name their commits.
        """
        left_out = {"spec_digest", "layouts", "target_layouts", "as_text", "pinned"}
        return digest(self.settled().model_dump(mode="json", exclude=left_out))


def _rows_of(units: Sequence[Block], wanted: Collection[str]) -> int:
    """What stands in several target sets is one unit."""
    ids = set(wanted)
    return sum({unit.id: unit.num_rows for unit in units if unit.id in ids}.values())


def read_plan(run: SelectionRun) -> Plan:
    """The plan that `make_plan` wrote for this run.

    Raises:
        RequestError: there is none, or it is of another document.
        DataError: it is damaged.
    """
    output = open_store(run.spec.output)
    where = output.uri(plan_key(run))
    if not output.exists(plan_key(run)):
        raise RequestError("this run has no plan yet", where=where, fix="run the plan stage first")
    try:
        plan = Plan.model_validate_json(output.get(plan_key(run)))
    except ValueError as error:
        raise DataError(f"damaged plan: {error}", where=where, fix="run the plan stage again") from error
    if plan.spec_digest != digest_of(run.spec):
        fix = "run the plan stage again; two runs at the same time need two names"
        raise RequestError("this plan was made for another document of the same name", where=where, fix=fix)
    return plan


def digest_of(spec: RunSpec) -> str:
    """Of all that a plan is made for: the price of a GPU-hour may change afterwards."""
    return digest(spec.model_dump(mode="json", exclude={"gpu_hour_price"}))


def plan_key(run: SelectionRun) -> str:
    return f"{run.metadata.name}/plan.json"
