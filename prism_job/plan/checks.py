"""What a plan refuses: too many bad rows, bad or missing targets, labels that cannot be used, output inside the data."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from prism_job.data import labels
from prism_job.data.bad_row import describe_columns
from prism_job.data.columns import columns_line, columns_name
from prism_job.data.target_layouts import NO_PAIR
from prism_job.errors import DataError, PrismError, RequestError
from prism_job.plan.plan import Quarantined, SourceLayout, Unit
from prism_job.plan.sources import list_sources
from prism_job.plan.units import Example
from prism_job.spec.data import HOW_TO_WRITE_PAIRS
from prism_job.spec.document import RunSpec
from prism_job.spec.ranking import BudgetSpec, EvaluationSpec, SelectionSpec, SharesSpec


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
    fix = "correct those rows, or raise candidates.maxBadFraction if they may be left out"
    if not num_good:
        fix = (
            "no row is usable, and the reason says why; `prism inspect FILE` shows the rows as a run reads them, and "
            "candidates.columns names the columns where they have other names (docs/data.md)"
        )
    raise DataError(
        f"{len(bad)} of {len(bad) + num_good} candidate rows are unusable, more than maxBadFraction {allowed:g}: "
        + _reasons(bad),
        where=_first_rows(bad),
        fix=fix,
    )


def _reasons(bad: list[Quarantined]) -> str:
    """The three most common ones, counted."""
    return "; ".join(f"{count} × {reason}" for reason, count in Counter(row.reason for row in bad).most_common(3))


def _first_rows(bad: list[Quarantined]) -> str:
    """Where the first three stand."""
    return ", ".join(f"{row.source} line {row.line}" for row in bad[:3])


def refuse_short_budget(budget: BudgetSpec, num_ranked: int, num_tokens: int | None) -> None:
    """Raises RequestError: the budget asks for more than these rows are, each content once where `dedupe` says so.

    Args:
        num_tokens: of their responses; None: not known.
    """
    for name, asked, there, of in (
        ("count", budget.count, num_ranked, "examples"),
        ("tokens", budget.tokens, num_tokens, "response tokens"),
    ):
        if asked is not None and there is not None and asked > there:
            what = f"the budget is {asked} {of}, and there are {there} to rank"
            where = f"spec.selection.budget.{name}"
            raise RequestError(what, where=where, fix="lower it, or use budget.fraction")


def most_of_a_group(shares: SharesSpec, where: str, sizes: Iterable[int], budget: int, in_tokens: bool) -> int:
    """What each group of the budget takes at most, rounded up to whole rows; tokens are never exceeded.

    Args:
        where: the field of the document. sizes: of all groups, in rows or in response tokens, as the budget.

    Raises RequestError: the groups cannot fill the budget.
    """
    if shares.max is None:
        return budget
    most = Fraction(repr(shares.max)) * budget
    cap = math.floor(most) if in_tokens else math.ceil(most)
    room = sum(min(size, cap) for size in sizes)
    if room < budget:
        unit = "response tokens" if in_tokens else "examples"
        what = f"max {shares.max:g} leaves room for {room:,} of the budget's {budget:,} {unit}"
        fix = "raise it, lower the budget, or add data to the small groups"
        raise RequestError(what, where=f"{where}.max", fix=fix)
    return cap


def nothing_selected(num_taken: int, num_usable: int) -> RequestError:
    what = f"nothing would be selected: the budget takes {num_taken} of {num_usable} examples"
    return RequestError(what, where="spec.selection", fix="widen the budget, or drop less")


def refuse_output_inside_data(spec: RunSpec) -> None:
    """The next plan would read the store's rows and the output's JSON as examples. Raises RequestError."""
    for name, written in (("spec.store", spec.store), ("spec.output", spec.output)):
        for uri in (*spec.candidates.uris, *spec.targets.all_uris()):
            inner, outer = (value if "://" in value else str(Path(value).resolve()) for value in (written, uri))
            if f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/"):
                fix = "give it a folder or prefix of its own, beside the data"
                raise RequestError(f"{name} {written} lies inside the data at {uri}", where=name, fix=fix)


def check_targets(units: list[Unit], bad: list[Quarantined], target_sets: list[str], spec: RunSpec) -> None:
    """Raises DataError for a bad target, RequestError for a set without targets or for targets that are no pairs."""
    if bad and not units and all(row.reason.startswith(NO_PAIR) for row in bad):
        exchanged = "are candidates and targets exchanged? The first candidate has chosen and rejected; else: "
        raise RequestError(
            f"the targets hold no pairs: {len(bad)} row(s), the first: {bad[0].reason}",
            where=f"{bad[0].source} line {bad[0].line}",
            fix=(exchanged if _first_candidate_is_a_pair(spec) else "") + HOW_TO_WRITE_PAIRS,
        )
    if bad:
        raise DataError(
            f"{len(bad)} unusable target(s): {_reasons(bad)}",
            where=_first_rows(bad),
            fix="correct or remove those rows: every target must be good, because each one has a large weight",
        )
    filled = {target_sets[unit.source] for unit in units}
    for target_set in spec.targets.as_sets():
        name = target_set.name
        if name not in filled:
            what = f"there are no targets{f' in the set {name}' if name else ''}: no rows in any file"
            fix = f"check targets.{'sets' if name else 'uris'}; {HOW_TO_WRITE_PAIRS}"
            raise RequestError(what, where=", ".join(target_set.uris), fix=fix)


def _first_candidate_is_a_pair(spec: RunSpec) -> bool:
    """False where the first address is not on this disk: a sentence is not worth a download."""
    first = spec.candidates.uris[0]
    if not Path(first).exists():
        return False
    with contextlib.suppress(PrismError):  # what is wrong there is not the error that is reported
        for source in list_sources([first])[0][:1]:
            _, row = next(source.read(), (0, None))
            return isinstance(row, dict) and {"chosen", "rejected"} <= row.keys()
    return False


def check_columns(layouts: list[SourceLayout], target_layouts: list[SourceLayout], spec: RunSpec) -> None:
    """Raises RequestError: `columns` names columns that no row has, so it changed nothing."""
    of_sets = [("targets.columns", target_set.columns, target_layouts) for target_set in spec.targets.as_sets()]
    for name, columns, found in (("candidates.columns", spec.candidates.columns, layouts), *of_sets):
        if columns is not None and not any(each.layout == columns_name(columns) for each in found):
            others = ", ".join(dict.fromkeys(each.layout for each in found))
            what = f"no row has the columns that {name} names, {columns_line(columns)}; all were read as {others}"
            raise RequestError(what, where=f"spec.{name}", fix="correct the names, or remove columns from the document")


class Labels:
    """Checks the labels that `spec.evaluation` names while rows are read, so that errors come before the extraction."""

    def __init__(self, evaluation: EvaluationSpec | None) -> None:
        self.evaluation = evaluation
        self.num_rows = self.num_good = 0

    def check_candidate(self, example: Example) -> None:
        if self.evaluation:
            self.num_rows += 1
            column, positive = self.evaluation.label, self.evaluation.positive
            self.num_good += labels.label_of(example.row, column, positive, example.where)

    def check_target(self, example: Example) -> None:
        if self.evaluation and self.evaluation.target_label:
            labels.label_of(example.row, self.evaluation.target_label, None, example.where, labels.OF_TARGETS)

    def check_both_kinds(self) -> None:
        if self.evaluation:
            labels.refuse_one_sided(self.num_good, self.num_rows, self.evaluation.label, where="spec.evaluation.label")


MAX_GROUPS = 10_000
"""Groups that a column may make: with more, a column was named that tells examples apart, not groups."""


class GroupShares:
    """Checks `selection.perSource` and `selection.perGroup` while rows are read, so that errors come before the extraction."""

    def __init__(self, selection: SelectionSpec) -> None:
        self.selection, self.column = selection, selection.per_group.group_by if selection.per_group else None
        self.groups: set[str | int | None] = set()
        self.columns = ""

    def check_candidate(self, example: Example) -> str | int | None:
        """The group of the row, None without one. Raises RequestError: a value that is no group, or too many groups."""
        if self.column is not None:
            group = labels.group_of(example.row, self.column, example.where)
            if not self.columns and group is None:
                self.columns = describe_columns(example.row, self.column)
            self.groups.add(group)
            if len(self.groups) > MAX_GROUPS:
                what = f"column '{self.column}' has more than {MAX_GROUPS:,} values"
                raise RequestError(what, where="spec.selection.perGroup.groupBy", fix="name a column with fewer")
            return group
        if self.selection.per_source:
            self.groups.add(example.source)
            return example.source
        return None

    def check_shares(self) -> None:
        """Raises RequestError: no row has the column, or the groups cannot share a whole budget."""
        shares, num_groups = self.selection.shares, len(self.groups)
        if shares is None:
            return
        where = self.selection.where_shares
        if self.column and self.groups == {None}:
            what = f"no candidate has a value in '{self.column}'; {self.columns}"
            raise RequestError(what, where=f"{where}.groupBy", fix="name a column of the candidates")
        kind = "groups" if self.column else "sources"
        if shares.max is not None and shares.max * num_groups < 1 - 1e-9:
            what = f"{num_groups} {kind} of at most {shares.max:g} each cannot fill the budget"
            raise RequestError(
                what, where=f"{where}.max", fix=f"raise it to at least {math.ceil(1e6 / num_groups) / 1e6:g}"
            )
        if shares.min is not None and shares.min * num_groups > 1 + 1e-9:
            what = f"{num_groups} {kind} of at least {shares.min:g} each take more than the whole budget"
            raise RequestError(
                what, where=f"{where}.min", fix=f"lower it to at most {math.floor(1e6 / num_groups) / 1e6:g}"
            )
