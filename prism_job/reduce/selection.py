"""Scores -> which rows are selected. Deterministic: ties break by example id, duplicates by plan order.

Shapes: N rows in plan order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.spec import SelectionSpec
from prism_job.storage.shards import hex_array

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Selected:
    """The outcome.

    Attributes:
        selected_N: rows in the subset.
        duplicate_N: rows that repeat an earlier row's content (never selected; all False where dedupe is none).
        order: positions of the selected rows, highest score first.
        threshold: score of the last row that the budget took; None where it took none.
        num_taken: rows the budget took, kept or dropped.
    """

    selected_N: Bools
    duplicate_N: Bools
    order: NDArray[np.int64]
    threshold: float | None
    num_taken: int


def select(
    scores_N: NDArray[np.float64],
    ids_N: NDArray[np.void],
    tokens_N: NDArray[np.int32],
    usable_N: Bools,
    spec: SelectionSpec,
) -> Selected:
    """Rank usable rows and let the budget take from one end.

    Args:
        ids_N: 16 raw bytes a row (dtype V16), compared as bytes.
        usable_N: False for rows quarantined in extraction; they are neither ranked nor selected.
    """
    duplicate_N = _duplicates(ids_N, usable_N) if spec.dedupe == "exact" else np.zeros(len(scores_N), np.bool_)
    pool = np.flatnonzero(usable_N & ~duplicate_N)
    by_id = pool[np.argsort(hex_array(ids_N[pool]), kind="stable")]
    highest_first = by_id[np.argsort(-scores_N[by_id], kind="stable")]
    end = spec.keep or spec.drop
    ranked = highest_first if end == "highest" else by_id[np.argsort(scores_N[by_id], kind="stable")]
    num_taken = _within_budget(ranked, tokens_N, spec)
    taken_N = np.zeros(len(scores_N), np.bool_)
    taken_N[ranked[:num_taken]] = True
    selected_N = taken_N if spec.keep else ~taken_N
    selected_N = selected_N & usable_N & ~duplicate_N
    return Selected(
        selected_N=selected_N,
        duplicate_N=duplicate_N,
        order=highest_first[selected_N[highest_first]],
        threshold=float(scores_N[ranked[num_taken - 1]]) if num_taken else None,
        num_taken=num_taken,
    )


def _within_budget(ranked: NDArray[np.int64], tokens_N: NDArray[np.int32], spec: SelectionSpec) -> int:
    budget = spec.budget
    if budget.count is not None:
        if budget.count > len(ranked):
            raise RequestError(
                f"the budget is {budget.count} examples, and there are {len(ranked)} to rank",
                where="spec.selection.budget.count",
                fix="lower it, or use budget.fraction",
            )
        return budget.count
    if budget.fraction is not None:
        return round(budget.fraction * len(ranked))
    assert budget.tokens is not None
    total = int(tokens_N[ranked].sum(dtype=np.int64))
    if budget.tokens > total:
        raise RequestError(
            f"the budget is {budget.tokens} response tokens, and there are {total} to rank",
            where="spec.selection.budget.tokens",
            fix="lower it, or use budget.fraction",
        )
    return int(np.searchsorted(np.cumsum(tokens_N[ranked], dtype=np.int64), budget.tokens, side="right"))


def _duplicates(ids_N: NDArray[np.void], usable_N: Bools) -> Bools:
    usable = np.flatnonzero(usable_N)
    duplicate_N = np.zeros(len(ids_N), np.bool_)
    # np.unique sorts stably, so `first` is each content's first row in plan order.
    _, first = np.unique(hex_array(ids_N[usable]), return_index=True)
    duplicate_N[usable] = True
    duplicate_N[usable[first]] = False
    return duplicate_N
