"""What a plan refuses: too many bad rows, bad or missing targets, labels that cannot be used, output inside the data."""

from collections import Counter
from pathlib import Path

from prism_job.data import labels
from prism_job.data.content import COLUMNS
from prism_job.errors import DataError, RequestError
from prism_job.plan.plan import Quarantined, SourceLayout, Unit
from prism_job.plan.units import Example
from prism_job.spec.document import RunSpec
from prism_job.spec.ranking import EvaluationSpec


def check_bad_fraction(bad: list[Quarantined], num_good: int, spec: RunSpec) -> None:
    """Refuse a pool with too few good rows.

    Raises:
        RequestError: there was no row at all.
        DataError: more than `maxBadFraction` of the rows are bad; counts the reasons and names the first rows.
    """
    if not bad and not num_good:
        where = ", ".join(spec.candidates.uris)
        raise RequestError("the pool is empty: no rows in any file", where=where, fix="check candidates.uris")
    allowed = spec.candidates.max_bad_fraction
    if num_good and len(bad) <= allowed * (len(bad) + num_good):
        return
    reasons = Counter(row.reason for row in bad).most_common(3)
    raise DataError(
        f"{len(bad)} of {len(bad) + num_good} candidate rows are unusable, more than maxBadFraction {allowed:g}: "
        + "; ".join(f"{count} × {reason}" for reason, count in reasons),
        where=", ".join(f"{row.source} line {row.line}" for row in bad[:3]),
        fix="correct those rows, or raise candidates.maxBadFraction if they may be left out",
    )


def refuse_output_inside_data(spec: RunSpec) -> None:
    """The next plan would read the store's rows and the output's JSON as examples. Raises RequestError."""
    for name, written in (("spec.store", spec.store), ("spec.output", spec.output)):
        for uri in (*spec.candidates.uris, *spec.targets.all_uris()):
            inner, outer = (value if "://" in value else str(Path(value).resolve()) for value in (written, uri))
            if f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/"):
                fix = "give it a folder or prefix of its own, beside the data"
                raise RequestError(f"{name} {written} lies inside the data at {uri}", where=name, fix=fix)


def check_targets(units: list[Unit], bad: list[Quarantined], target_sets: list[str], spec: RunSpec) -> None:
    """Raises DataError for a bad target, RequestError for a set without targets."""
    if bad:
        raise DataError(
            f"{len(bad)} unusable target(s), the first: {bad[0].reason}",
            where=f"{bad[0].source} line {bad[0].line}",
            fix="correct or remove that row: every target must be good, because each one has a large weight",
        )
    filled = {target_sets[unit.source] for unit in units}
    for target_set in spec.targets.as_sets():
        name = target_set.name
        if name not in filled:
            what = f"there are no targets{f' in the set {name}' if name else ''}: no rows in any file"
            fix = "check targets.sets" if name else "check targets.uris"
            raise RequestError(what, where=", ".join(target_set.uris), fix=fix)


def check_columns(layouts: list[SourceLayout], target_layouts: list[SourceLayout], spec: RunSpec) -> None:
    """Raises RequestError: `columns` names columns that no row has, so it changed nothing."""
    of_targets = any(target_set.columns for target_set in spec.targets.as_sets())
    for name, is_given, found in (
        ("candidates.columns", bool(spec.candidates.columns), layouts),
        ("targets.columns", of_targets, target_layouts),
    ):
        if is_given and not any(each.layout.startswith(COLUMNS) for each in found):
            others = ", ".join(dict.fromkeys(each.layout for each in found))
            what = f"no row has the columns that {name} names; all were read as {others}"
            raise RequestError(what, where=f"spec.{name}", fix="correct the names, or remove columns from the document")


class Labels:
    """Checks the labels that `spec.evaluation` names while rows are read, so that errors come before the extraction."""

    def __init__(self, evaluation: EvaluationSpec | None) -> None:
        self.evaluation = evaluation
        self.num_rows = self.num_good = 0

    def check_candidate(self, example: Example) -> None:
        if self.evaluation:
            self.num_rows += 1
            self.num_good += labels.label_of(
                example.row, self.evaluation.label, self.evaluation.positive, example.where
            )

    def check_target(self, example: Example) -> None:
        if self.evaluation and self.evaluation.target_label:
            labels.label_of(example.row, self.evaluation.target_label, None, example.where)

    def check_both_kinds(self) -> None:
        if self.evaluation:
            labels.refuse_one_sided(self.num_good, self.num_rows, self.evaluation.label, where="spec.evaluation.label")
