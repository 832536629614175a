"""What is to be extracted: the units that the store lacked at the time of the plan, and the shards to write of each.

Does not know ranks, models or passes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prism_job.extract.capture.row_format import HIDDEN_STATES, NO_ROWS, RowFormat
from prism_job.plan.extractor import audit_spec
from prism_job.plan.plan import Block, Plan, Unit
from prism_job.spec.data import ColumnsSpec
from prism_job.spec.document import RunSpec
from prism_job.store import shards


@dataclass(frozen=True)
class Output:
    """A kind of shard, under the extractor that names its folder. `for_audit`: only the audit needs it, not the run."""

    kind: shards.Kind
    extractor: str
    row_format: RowFormat
    for_audit: bool = False


@dataclass(frozen=True)
class Task:
    """One unit and the shards to write of it, all from the same passes. `origin`: of its rows, for messages."""

    unit: Block
    origin: str
    columns: ColumnsSpec | None  # of its rows
    outputs: tuple[Output, ...]

    @property
    def row_formats(self) -> tuple[RowFormat, ...]:
        return tuple(dict.fromkeys(output.row_format for output in self.outputs))

    @property
    def is_targets(self) -> bool:
        return self.outputs[0].kind in ("targets", "sums", "nll")

    @property
    def is_for_audit(self) -> bool:
        """The run itself needs none of it."""
        return all(output.for_audit for output in self.outputs)

    @property
    def where(self) -> str:
        return f"{self.origin}, unit {self.unit.id}"


def missing_tasks(spec: RunSpec, plan: Plan) -> list[Task]:
    """For the reference, in the order of the work: target pairs, candidates, and the audit's sample of the candidates last.

    The audit has a row format of its own. What it needs of a target pair comes out of the same passes as the run's rows.
    """
    folded, unfolded = _row_formats(spec)
    of_targets = {Output("targets", plan.extractor, unfolded): set(plan.missing_targets)}
    # Factors first: whoever sees a unit's rows may trust that the factors the plan wanted are there too.
    of_candidates = {
        Output("factors", plan.extractor, folded): set(plan.missing_factors),
        Output("candidates", plan.extractor, folded): set(plan.missing_candidates),
    }
    sample: list[Task] = []
    if plan.audit is not None:
        extractor, (folded, unfolded) = plan.audit.extractor, _row_formats(audit_spec(spec))
        of_targets[Output(plan.audit_kind, extractor, unfolded, for_audit=True)] = set(plan.audit.missing_sums)
        of_sample = {
            Output("factors", extractor, folded, for_audit=True): set(plan.audit.missing_factors),
            Output("candidates", extractor, folded, for_audit=True): set(plan.audit.missing_candidates),
        }
        sample = list(_tasks(plan.audit.units, of_sample, [("the audit's sample", spec.candidates.columns)]))
    return [
        *_tasks(plan.targets, of_targets, _target_sources(spec, plan)),
        *_tasks(plan.candidates, of_candidates, [(uri, spec.candidates.columns) for uri in plan.sources]),
        *sample,
    ]


def preference_tasks(spec: RunSpec, plan: Plan) -> list[Task]:
    """For the preference model: the losses of target pairs. Empty where the document names none."""
    if plan.preference is None:
        return []
    missing = {Output("nll", plan.preference.extractor, NO_ROWS): plan.preference.missing}
    return list(_tasks(plan.targets, missing, _target_sources(spec, plan)))


def _target_sources(spec: RunSpec, plan: Plan) -> list[tuple[str, ColumnsSpec | None]]:
    columns_of = spec.targets.columns_by_set()
    return [(uri, columns_of[name]) for uri, name in zip(plan.target_sources, plan.target_sets, strict=True)]


def _tasks(
    units: Sequence[Block],
    missing: Mapping[Output, Collection[str]],
    sources: Sequence[tuple[str, ColumnsSpec | None]],
) -> Iterator[Task]:
    """`sources`: address and columns of each; a sample has one."""
    once = {unit.id: unit for unit in units}  # what stands in several target sets is one unit
    for unit in once.values():
        outputs = tuple(output for output, unit_ids in missing.items() if unit.id in unit_ids)
        if outputs:
            yield Task(unit, *sources[unit.source if isinstance(unit, Unit) else 0], outputs)


def _row_formats(spec: RunSpec) -> tuple[RowFormat, RowFormat]:
    """Of candidates, and of targets, whose rows stay unfolded: curvature is applied to their sum."""
    if spec.scoring.is_forward_only:
        return HIDDEN_STATES, HIDDEN_STATES
    projection, codec = spec.extraction.projection, spec.extraction.codec
    fold_dims = codec.dims if codec.kind == "sign" else None
    return RowFormat(projection.dim, projection.seed, fold_dims), RowFormat(projection.dim, projection.seed, None)
