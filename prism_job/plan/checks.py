"""What a plan refuses: too many bad rows, bad or missing targets, labels that cannot be used, output inside the data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prism_job.data import examples
from prism_job.data.data_files import Row
from prism_job.errors import DataError, RequestError
from prism_job.plan.plan import Quarantined, Unit
from prism_job.spec.document import RunSpec
from prism_job.spec.evaluation import EvaluationSpec


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


def refuse_output_inside_data(spec: RunSpec) -> None:
    """The store holds rows and the output json: inside a data folder the next plan would read them as examples."""
    for name, own in (("spec.store", spec.store), ("spec.output", spec.output)):
        for uri in (*spec.candidates.uris, *spec.targets.all_uris()):
            place, folder = (value if "://" in value else str(Path(value).resolve()) for value in (own, uri))
            if f"{place.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/"):
                fix = "give it a folder or prefix of its own, beside the data"
                raise RequestError(f"{name} {own} lies inside the data at {uri}", where=name, fix=fix)


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


class Labels:
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
