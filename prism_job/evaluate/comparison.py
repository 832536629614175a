"""A ranking of candidates compared with their labels, beside its rivals.

Shapes: A rows of the plan, N ranked ones (usable, duplicates left out), Q target pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.data.labels import OF_CANDIDATES, OF_TARGETS, label_of, refuse_one_sided
from prism_job.evaluate.metrics import Measure, auroc, preference_figures, ranking_figures, with_intervals
from prism_job.evaluate.rivals import Outcome, Rival, rivals
from prism_job.plan.plan import Plan, Unit
from prism_job.spec.document import RunSpec
from prism_job.spec.ranking import EvaluationSpec
from prism_job.storage.objects import Store
from prism_job.store import staged_rows

Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

PERCENTS = (1, 2, 5, 10, 20, 50)
"""Budgets at which precision and recall are reported, beside the run's own, in percent of the ranked candidates."""

AT_ALL_BUDGETS = ("", "loss_", "loss_sum_")
"""Prefixes of the rankings that are compared there; the others are at the run's own budget."""


def compare(outcome: Outcome, plan: Plan, store: Store, spec: RunSpec, evaluation: EvaluationSpec) -> dict[str, Any]:
    """Figures of the ranking beside those of its rivals, of π, and of each source; plain values.

    The score is oriented by the selection: under `keep: highest` and `drop: lowest` a good candidate should score high.
    `rivals` lists the rankings beside it: name, prefix of the figures, and why there are none, or None. `precision_at_5` is
    the share of good ones among those that a budget of 5 % keeps, or of bad ones among those that it drops; `recall_at_5`
    how many of all good ones are kept, of all bad ones dropped; `taken_at_5` its rows. A budget of no row is left out,
    and rivals other than the losses have figures of the run's own alone. Every figure of a ranking has a 95 % bootstrap
    interval, `_low` to `_high`, or Wilson's where it is 0 or 1 in every resample. So has `auroc_over_loss`, the difference of
    `auroc` and `loss_auroc` in the same resamples, and so on for each rival: where it holds 0, neither ranking can be called
    the better one. All these are of the ranking alone; under limits of the groups' shares the budget takes other rows, and
    `precision_within_shares` is theirs. For the figures of π see `preference_figures`.

    Raises:
        RequestError: a ranked row without a readable label (names source and line), or all labels equal.
        DataError: staged rows are missing or damaged.
    """
    column, positive = evaluation.label, evaluation.positive
    good_N = _read_labels(plan.candidates, plan.sources, store, outcome.ranked_A, column, positive, OF_CANDIDATES)
    num_ranked, num_good = len(good_N), int(good_N.sum())
    selection = spec.selection
    keeps = selection.keep is not None
    limited = {}
    if selection.shares and outcome.num_taken:
        limited = {"precision_within_shares": float((good_N == keeps)[outcome.selected_N == keeps].mean())}
    refuse_one_sided(num_good, num_ranked, evaluation.label, ", ".join(plan.sources[:3]))
    sign = 1.0 if (selection.keep == "highest" or selection.drop == "lowest") else -1.0
    taken = {"budget": outcome.num_taken} | {str(percent): round(percent / 100 * num_ranked) for percent in PERCENTS}
    taken = {name: num_taken for name, num_taken in taken.items() if num_taken}
    num_right = num_good if keeps else num_ranked - num_good
    measures: dict[Sequence[str], Measure] = {}
    trials: dict[str, int] = {}
    beside: list[Rival] = []
    for rival in chain([Rival("PRISM's score", "", sign * outcome.score_N)], rivals(outcome, plan, store, spec, sign)):
        if rival.ranking_N is not None:
            budgets = list(taken) if rival.prefix in AT_ALL_BUDGETS else [name for name in taken if name == "budget"]
            figures = ranking_figures(rival.ranking_N, good_N, keeps, [taken[name] for name in budgets])
            names = _names(rival.prefix, budgets)
            measures[names] = figures
            # AUROC: each of the rarer kind with one of the other kind, no row twice.
            rarer, sizes = min(num_good, num_ranked - num_good), [taken[name] for name in budgets]
            trials |= zip(names, [rarer, *sizes, *[num_right] * len(budgets)], strict=True)
        beside.append(replace(rival, ranking_N=None))  # resampling needs the orders alone
    prefixes = [rival.prefix for rival in beside if rival.reason is None]
    # A run's own budget that takes nothing has figures of None.
    nothing = {f"{name}{end}": None for prefix in prefixes for name in _names(prefix, ["budget"]) for end in _ENDS}
    differences = {f"auroc_over_{prefix[:-1]}": ("auroc", f"{prefix}auroc") for prefix in prefixes[1:]}
    known_Q = ~np.isnan(outcome.preference_Q)
    target_column, right_Q = evaluation.target_label, None
    if target_column is not None:
        right_Q = _read_labels(plan.targets, plan.target_sources, store, known_Q, target_column, None, OF_TARGETS)
    return {
        "label": evaluation.label,
        "num_examples": num_ranked,
        "num_positive": num_good,
        "action": f"keep {selection.keep}" if selection.keep else f"drop {selection.drop}",
        "taken_by_budget": outcome.num_taken,
        **limited,
        **{f"taken_at_{name}": num_taken for name, num_taken in taken.items() if name != "budget"},
        **nothing,
        "rivals": [rival.facts() for rival in beside[1:]],
        **with_intervals(measures, num_ranked, trials, differences),
        "by_source": _by_source(outcome, plan, sign, good_N, keeps),
        "target_label": target_column,
        **preference_figures(outcome.preference_Q[known_Q], right_Q),
    }


def _read_labels(
    units: list[Unit],
    sources: list[str],
    store: Store,
    wanted_A: Bools,
    column: str,
    positive: str | None,
    field: str,
) -> Bools:
    """Whether the column calls them good: of the wanted ones among the A rows of the units."""
    good: list[bool] = []
    is_wanted = iter(wanted_A.tolist())
    for unit in units:
        for line, row in zip(unit.line_numbers(), staged_rows.read_rows(store, unit.rows), strict=True):
            if next(is_wanted):
                good.append(label_of(row, column, positive, f"{sources[unit.source]} line {line}", field))
    return np.array(good, np.bool_)


_ENDS = ("", "_low", "_high")


def _names(prefix: str, budgets: list[str]) -> tuple[str, ...]:
    """Names of the figures of a ranking, in the order of `ranking_figures`."""
    return (
        f"{prefix}auroc",
        *(f"{prefix}precision_at_{name}" for name in budgets),
        *(f"{prefix}recall_at_{name}" for name in budgets),
    )


def _by_source(outcome: Outcome, plan: Plan, sign: float, good_N: Bools, keeps: bool) -> list[dict[str, Any]]:
    """A row for each source with a ranked candidate. Precision is that of its rows that the budget took; None without any."""
    source_A = np.repeat([unit.source for unit in plan.candidates], [unit.num_rows for unit in plan.candidates])
    # Rows are in plan order, so each source is one run of them.
    present, starts = np.unique(source_A[outcome.ranked_A], return_index=True)
    taken_N, right_N = outcome.selected_N == keeps, good_N == keeps
    rows = []
    for source, start, stop in zip(present.tolist(), starts, [*starts[1:], len(good_N)], strict=True):
        part = slice(start, stop)
        num_taken = int(taken_N[part].sum())
        rows.append(
            {
                "source": plan.sources[source],
                "candidates": int(stop - start),
                "good": int(good_N[part].sum()),
                "selected": int(outcome.selected_N[part].sum()),
                "precision": int((taken_N & right_N)[part].sum()) / num_taken if num_taken else None,
                "auroc": auroc(sign * outcome.score_N[part], good_N[part]),
            }
        )
    return rows
