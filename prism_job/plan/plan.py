"""Listed data + spec -> ordered work units with fixed ids, and which of them the store lacks. Not: how many GPUs there are.

The plan reads each candidate object once, brings bad rows to quarantine, and stages every unit's rows in the store
under the digest of their bytes, so that extraction needs neither the sources nor their formats.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prism_job import projection
from prism_job.data import data_files, examples
from prism_job.data.data_files import Row, Source, Unreadable
from prism_job.data.examples import BadRow, Content
from prism_job.errors import DataError, RequestError
from prism_job.progress import Meter, event
from prism_job.spec.document import EvaluationSpec, RunSpec, SelectionRun, digest
from prism_job.storage import model_files
from prism_job.storage.objects import Store, open_store
from prism_job.store import shards, staged_rows

PLAN_FORMAT = "prism-plan/2"
PAIRS_PER_UNIT = 16
"""Target pairs of one unit: unfolded rows are large (3.4 MB a pair for 135M parameters at dim 64)."""

FACTOR_UNIT_SHARE = 8
"""One unit in this many, by a hash of its id, carries factor sums; with 1,024 rows a unit they stay under 6 % of a store."""


MIN_FACTOR_ROWS = 1024
"""Curvature never rests on fewer examples than this, where the pool has them: a last unit may hold a single row."""

TEMPLATE_DATE = "2025-01-01"
"""What chat templates that print today's date are told: a row must not depend on the day of its extraction."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Block(_Plain):
    """Rows that are extracted, stored and lost together.

    Attributes:
        id: over the rows' content ids in order; names the shard.
        rows: digest of the staged rows, carried columns included; names the staged object.
    """

    id: str
    rows: str
    num_rows: int


class Unit(Block):
    """Rows of one source.

    Attributes:
        source: position in `Plan.sources`.
        lines: runs of places in the source, (first, how many).
    """

    source: int
    lines: list[tuple[int, int]]

    def line_numbers(self) -> Iterator[int]:
        for first, count in self.lines:
            yield from range(first, first + count)


class Quarantined(_Plain):
    """A row that cannot be used."""

    source: str
    line: int
    reason: str


class Audit(_Plain):
    """What is stored again, in the form of `audit_spec`, and what the store lacked of it.

    Attributes:
        extractor: digest of that form.
        units: the sample's rows, smallest example id first.
        places: for each of these rows its place in plan order, the first where it stands there more than once.
        factors: units of the sample that carry factor sums.
        missing_sums: target units whose weighted sums the store lacked.
    """

    extractor: str
    units: list[Block]
    places: list[int]
    factors: list[str]
    missing_candidates: list[str]
    missing_sums: list[str]
    missing_factors: list[str]


class Plan(_Plain):
    """The whole work of a run, and what the store lacked of it when the plan was made.

    Attributes:
        target_sets: name of the set of each target source, "" where sets are not named. A file in two sets is two sources.
    """

    format: Literal["prism-plan/2"] = "prism-plan/2"
    request: str
    extractor: str
    extractor_parts: dict[str, Any]
    sources: list[str]
    ignored: list[str]
    candidates: list[Unit]
    target_sources: list[str]
    target_sets: list[str]
    targets: list[Unit]
    factors: list[str]
    quarantine: list[Quarantined]
    missing_candidates: list[str]
    missing_targets: list[str]
    missing_factors: list[str]
    audit: Audit | None = None

    @property
    def num_examples(self) -> int:
        return sum(unit.num_rows for unit in self.candidates)

    @property
    def num_pairs(self) -> int:
        return sum(unit.num_rows for unit in self.targets)

    @property
    def num_missing(self) -> int:
        """Units that need the model: candidates without rows or without the factors asked for, and targets; the audit's too."""
        own = len(set(self.missing_candidates) | set(self.missing_factors)) + len(set(self.missing_targets))
        if self.audit is None:
            return own
        sampled = set(self.audit.missing_candidates) | set(self.audit.missing_factors)
        return own + len(sampled) + len(set(self.audit.missing_sums))

    @property
    def num_units(self) -> int:
        """Units of candidates and targets, and those of the audit: sample and targets in its form. Equal ones are one."""
        candidates, targets = ({unit.id for unit in units} for units in (self.candidates, self.targets))
        audited = 0 if self.audit is None else len(self.audit.units) + len(targets)
        return len(candidates) + len(targets) + audited

    def settled(self) -> Plan:
        """Without what the store lacked when it was made, which is no part of the outcome."""
        audit = self.audit and self.audit.model_copy(
            update={"missing_candidates": [], "missing_sums": [], "missing_factors": []}
        )
        return self.model_copy(
            update={"missing_candidates": [], "missing_targets": [], "missing_factors": [], "audit": audit}
        )

    def work_digest(self) -> str:
        """Of everything but what the store happened to hold: two plans of the same data have the same."""
        return digest(self.settled().model_dump(mode="json", exclude={"request"}))


def make_plan(run: SelectionRun) -> Plan:
    """Read the data, name the units, stage their rows, and list what is missing. Writes the plan last.

    Raises:
        RequestError: nothing to read, empty pool, empty targets, a row without the label that `evaluation` names.
        DataError: a bad target, or more bad candidates than `maxBadFraction`.
    """
    spec = run.spec
    _refuse_feedback(spec)
    # Asked before anything is read: a bucket that is not there is better known now than after hours.
    next(open_store(spec.output).list(f"{run.metadata.name}/"), None)
    store = open_store(spec.store)
    parts = extractor_parts(spec)
    extractor = digest(parts)
    known = staged_rows.staged_names(store)

    labels = _Labels(spec.evaluation)
    target_sources, target_sets = list_targets(spec)
    needs_rejected = spec.scoring.weighting == "preference"
    targets, bad_targets = cut_units(
        target_sources,
        lambda row: examples.target_content(row, needs_rejected),
        PAIRS_PER_UNIT,
        store,
        known,
        lambda row, _, where: labels.check_target(row, where),
    )
    check_targets(targets, bad_targets, target_sets, spec)

    sources, ignored = data_files.list_sources(spec.candidates.uris)
    for uri in ignored:
        event("ignored", uri=uri, reason="not a kind of data file that PRISM reads")
    sample = Sample(spec.audit.examples)

    def shown(row: Row, example_id: str, where: str) -> None:
        labels.check_candidate(row, where)
        sample.add(example_id, row)

    candidates, quarantine = cut_units(
        sources, examples.candidate_content, spec.extraction.examples_per_shard, store, known, shown
    )
    check_bad_fraction(quarantine, sum(unit.num_rows for unit in candidates), spec)
    labels.check_both_kinds()

    factors = factor_units(candidates) if spec.scoring.curvature.kind == "kfac" else []
    present = shards.units_present(store, extractor)
    plan = Plan(
        request=digest(spec.model_dump(mode="json")),
        extractor=extractor,
        extractor_parts=parts,
        sources=[source.uri for source in sources],
        ignored=ignored,
        candidates=candidates,
        target_sources=[source.uri for source in target_sources],
        target_sets=target_sets,
        targets=targets,
        factors=factors,
        quarantine=quarantine,
        missing_candidates=_lacking([unit.id for unit in candidates], present["candidates"]),
        missing_targets=_lacking([unit.id for unit in targets], present["targets"]),
        missing_factors=_lacking(factors, present["factors"]),
        audit=_plan_audit(spec, parts, store, known, sample, targets) if spec.audit.examples else None,
    )
    open_store(spec.output).put(plan_key(run), plan.model_dump_json(indent=1).encode())
    return plan


def read_plan(run: SelectionRun) -> Plan:
    """The plan that `make_plan` left for this run.

    Raises:
        RequestError: there is none.
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
    if plan.request != digest(run.spec.model_dump(mode="json")):
        fix = "run the plan stage again; two runs at the same time need two names"
        raise RequestError("the plan there is of another document under the same name", where=where, fix=fix)
    return plan


def plan_key(run: SelectionRun) -> str:
    return f"{run.metadata.name}/plan.json"


def extractor_parts(spec: RunSpec) -> dict[str, Any]:
    """Everything that changes a number in a row. Not: batch sizes, unit sizes, paths, world sizes."""
    extraction = spec.extraction
    return {
        "format": shards.FORMAT,
        "projection_version": projection.VERSION,
        "model": model_files.identify(spec.model.uri, spec.model.revision),
        "adapter": model_files.identify(spec.model.adapter, is_adapter=True) if spec.model.adapter else None,
        "dtype": spec.model.dtype,
        # Told of bfloat16 alone: float32 rows kept their numbers, and stores of them their digest.
        **({"products": spec.model.product_dtype} if spec.model.product_dtype != "float32" else {}),
        "attention": spec.model.attention,
        "loss_on": "assistant",
        "template_date": TEMPLATE_DATE,
        "max_length": extraction.max_length,
        "layers": list(extraction.layers),
        **_form_parts(spec),
    }


def _form_parts(spec: RunSpec) -> dict[str, Any]:
    projected, codec = spec.extraction.projection, spec.extraction.codec
    return {
        "projection": projected.model_dump(),
        "codec": {"kind": codec.kind, "dims": codec.dims} if codec.kind == "sign" else {"kind": codec.kind},
    }


def audit_spec(spec: RunSpec) -> RunSpec:
    """The request in the audit's form: another seed, twice the dims. So each source of noise in a row (projection, folding,
    signs) is drawn anew, with half its variance."""
    projected, codec = spec.extraction.projection, spec.extraction.codec
    extraction = spec.extraction.model_copy(
        update={
            "projection": projected.model_copy(update={"dim": 2 * projected.dim, "seed": (projected.seed + 1) % 2**63}),
            "codec": codec.model_copy(update={"dims": 2 * codec.dims}),
        }
    )
    return spec.model_copy(update={"extraction": extraction})


def _plan_audit(
    spec: RunSpec, parts: dict[str, Any], store: Store, known: set[str], sample: Sample, targets: list[Unit]
) -> Audit:
    extractor = digest({**parts, **_form_parts(audit_spec(spec))})
    units, places = sample.stage(spec.extraction.examples_per_shard, store, known)
    names = [unit.id for unit in units]
    factors = names if spec.scoring.curvature.kind == "kfac" else []
    present = shards.units_present(store, extractor)
    return Audit(
        extractor=extractor,
        units=units,
        places=places,
        factors=factors,
        missing_candidates=_lacking(names, present["candidates"]),
        missing_sums=_lacking([unit.id for unit in targets], present["sums"]),
        missing_factors=_lacking(factors, present["factors"]),
    )


def factor_units(candidates: list[Unit]) -> list[str]:
    """Units that carry factor sums: one in FACTOR_UNIT_SHARE by a hash of the id, and enough to hold MIN_FACTOR_ROWS."""
    sizes = {unit.id: unit.num_rows for unit in candidates}
    by_chance = sorted(sizes, key=lambda unit_id: (int(unit_id[:8], 16) % FACTOR_UNIT_SHARE != 0, unit_id))
    chosen: list[str] = []
    rows_chosen = 0
    for unit_id in by_chance:
        if int(unit_id[:8], 16) % FACTOR_UNIT_SHARE != 0 and rows_chosen >= MIN_FACTOR_ROWS:
            break
        chosen.append(unit_id)
        rows_chosen += sizes[unit_id]
    return chosen


def check_bad_fraction(bad: list[Quarantined], num_good: int, spec: RunSpec) -> None:
    """Fail where too few rows are good.

    Raises:
        RequestError: there was no row at all.
        DataError: more than `maxBadFraction` of the rows are bad; counts the reasons and names the first.
    """
    if not bad and not num_good:
        where = ", ".join(spec.candidates.uris)
        raise RequestError("the pool is empty: no rows in any file", where=where, fix="check candidates.uris")
    allowed = spec.candidates.max_bad_fraction
    if num_good and len(bad) <= allowed * (len(bad) + num_good):
        return
    reasons = Counter(entry.reason for entry in bad).most_common(3)
    raise DataError(
        f"{len(bad)} of {len(bad) + num_good} candidate rows are unusable, more than maxBadFraction {allowed:g}: "
        + "; ".join(f"{count} × {reason}" for reason, count in reasons),
        where=", ".join(f"{entry.source} line {entry.line}" for entry in bad[:3]),
        fix="mend those rows, or raise candidates.maxBadFraction if they may be left out",
    )


def _refuse_feedback(spec: RunSpec) -> None:
    """The store holds rows and the output json: inside a data folder the next plan would read them as examples."""
    for name, own in (("spec.store", spec.store), ("spec.output", spec.output)):
        for uri in (*spec.candidates.uris, *spec.targets.all_uris()):
            place, folder = (value if "://" in value else str(Path(value).resolve()) for value in (own, uri))
            if f"{place.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/"):
                fix = "give it a folder or prefix of its own, beside the data"
                raise RequestError(f"{name} {own} lies inside the data at {uri}", where=name, fix=fix)


def list_targets(spec: RunSpec) -> tuple[list[Source], list[str]]:
    """The data files of all target sets, set by set, and the name of the set of each."""
    listed = [(source, one.name) for one in spec.targets.as_sets() for source in data_files.list_sources(one.uris)[0]]
    return [source for source, _ in listed], [name for _, name in listed]


def check_targets(units: list[Unit], bad: list[Quarantined], target_sets: list[str], spec: RunSpec) -> None:
    """Raises DataError where a target is bad, RequestError where a set has none."""
    if bad:
        raise DataError(
            f"{len(bad)} unusable target(s), the first: {bad[0].reason}",
            where=f"{bad[0].source} line {bad[0].line}",
            fix="mend or remove that row: every target must be good, they are few and weigh much",
        )
    filled = {target_sets[unit.source] for unit in units}
    for one in spec.targets.as_sets():
        if one.name not in filled:
            named, place = (f" in the set {one.name}", "targets.sets") if one.name else ("", "targets.uris")
            what = f"there are no targets{named}: no rows in any file"
            raise RequestError(what, where=", ".join(one.uris), fix=f"check {place}")


class _Labels:
    """What `spec.evaluation` asks of the rows, looked at while they are read: known before anything is extracted."""

    def __init__(self, asked: EvaluationSpec | None) -> None:
        self.asked = asked
        self.num_rows = self.num_good = 0

    def check_candidate(self, row: Row, where: str) -> None:
        if self.asked:
            self.num_rows += 1
            self.num_good += examples.label_of(row, self.asked.label, self.asked.positive, where)

    def check_target(self, row: Row, where: str) -> None:
        if self.asked and self.asked.target_label:
            examples.label_of(row, self.asked.target_label, None, where)

    def check_both_kinds(self) -> None:
        if self.asked:
            examples.refuse_one_sided(self.num_good, self.num_rows, self.asked.label, "spec.evaluation.label")


class Sample:
    """The rows with the smallest example ids of all that are shown to it, equal ones once; holds no others.

    Ids are digests of the content, so these rows are drawn uniformly from the distinct ones, and few of them change when
    data are added.
    """

    def __init__(self, size: int) -> None:
        self.size, self.num_seen = size, 0
        self.largest_first: list[int] = []
        self.kept: dict[int, tuple[int, str, Row]] = {}

    def add(self, example_id: str, row: Row) -> None:
        place, number = self.num_seen, int(example_id, 16)
        self.num_seen += 1
        if number in self.kept or not self.size:
            return
        if len(self.kept) < self.size:
            heapq.heappush(self.largest_first, -number)
        elif number < -self.largest_first[0]:
            del self.kept[-heapq.heapreplace(self.largest_first, -number)]
        else:
            return
        self.kept[number] = (place, example_id, row)

    @property
    def places(self) -> list[int]:
        """Of the rows in the order of their ids: the place at which each was first shown."""
        return [self.kept[number][0] for number in sorted(self.kept)]

    def stage(self, size: int, store: Store, known: set[str]) -> tuple[list[Block], list[int]]:
        """Units of `size` of the sample's rows in the order of their ids, staged; and the places of these rows."""
        rows_kept = [self.kept[number] for number in sorted(self.kept)]
        units = []
        for start in range(0, len(rows_kept), size):
            part = rows_kept[start : start + size]
            name = staged_rows.stage_rows(store, [row for _, _, row in part], known)
            unit_id = shards.unit_id_of([example_id for _, example_id, _ in part])
            units.append(Block(id=unit_id, rows=name, num_rows=len(part)))
        return units, self.places


def cut_units(
    sources: list[Source],
    parse: Callable[[Row], Content],
    size: int,
    store: Store,
    known: set[str],
    show: Callable[[Row, str, str], None] = lambda row, example_id, where: None,
) -> tuple[list[Unit], list[Quarantined]]:
    """Read the sources, cut their good rows into units of `size`, stage those that are not `known`; and the bad rows.

    Args:
        show: is shown each good row with its id and place, in plan order; what it raises ends the reading.
    """
    units: list[Unit] = []
    bad: list[Quarantined] = []
    meter = Meter("plan", len(sources))
    for position, source in enumerate(sources):
        waiting: list[tuple[int, Row, str]] = []
        for line, row in data_files.read_rows(source):
            try:
                if isinstance(row, Unreadable):
                    raise BadRow(row.reason)
                example_id = examples.example_id(parse(row))
            except (BadRow, ValueError, TypeError, RecursionError) as error:
                # Lone surrogates, dates within messages, endless nesting: nothing in a row may end the run.
                reason = str(error)[:500].encode("utf-8", "backslashreplace").decode()
                bad.append(Quarantined(source=source.uri, line=line, reason=reason))
                continue
            show(row, example_id, f"{source.uri} line {line}")
            waiting.append((line, row, example_id))
            if len(waiting) == size:
                units.append(_stage(position, waiting, store, known))
                waiting = []
        if waiting:
            units.append(_stage(position, waiting, store, known))
        meter.add(1)
    return units, bad


def _stage(source: int, waiting: list[tuple[int, Row, str]], store: Store, known: set[str]) -> Unit:
    name = staged_rows.stage_rows(store, [row for _, row, _ in waiting], known)
    lines: list[tuple[int, int]] = []
    for line, _, _ in waiting:
        if lines and line == sum(lines[-1]):
            lines[-1] = (lines[-1][0], lines[-1][1] + 1)
        else:
            lines.append((line, 1))
    unit_id = shards.unit_id_of([example_id for _, _, example_id in waiting])
    return Unit(id=unit_id, rows=name, num_rows=len(waiting), source=source, lines=lines)


def _lacking(wanted: list[str], present: set[str]) -> list[str]:
    return [unit_id for unit_id in dict.fromkeys(wanted) if unit_id not in present]
