"""Scores -> which rows are selected. Deterministic: ties break by example id, duplicates by plan order.

Shapes: N rows in plan order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.plan.checks import refuse_short_budget
from prism_job.score.column import Column, parts
from prism_job.score.groups import Groups, least, limits, moved, sizes
from prism_job.score.walk import walk
from prism_job.spec.ranking import SelectionSpec

Bools = NDArray[np.bool_]
Rows = NDArray[np.uint32]
"""Indices of rows in plan order, 4 bytes each."""

NUM_ENDS = 10
"""Rows named at each end of the ranking, for people."""


@dataclass(frozen=True)
class Selected:
    """The outcome."""

    selected_N: Bools  # rows in the subset
    duplicate_N: (
        Bools  # rows that repeat, or nearly repeat, another one, never selected; all False where dedupe is none
    )
    order: Rows  # indices of the selected rows, highest score first
    threshold: float | None  # score of the last row that the budget took; None where it took none
    num_taken: int  # rows the budget took, kept or dropped
    highest: list[int]  # indices of the first rows from this end of the ranking
    lowest: list[int]
    near: tuple[Rows, Rows] | None = None  # near-duplicates in plan order, and of each the row that it nearly repeats
    rules: dict[str, Any] | None = None  # what shares and `dedupe: near` moved, for the manifest; None without either


def select(
    scores_N: NDArray[np.float64],
    ids: Column,
    tokens: Column,
    usable_N: Bools,
    spec: SelectionSpec,
    groups: Groups | None = None,
    signs: Column | None = None,
) -> Selected:
    """Rank usable rows and let the budget take from one end. Holds about 9 bytes a row beside what it is given (at 10 million);
    with groups 9 more, and with `dedupe: near` about 1,700 for each row that is kept.

    Args:
        ids: 16 raw bytes a row (dtype V16), compared as bytes. tokens: int32, of the response.
        usable_N: False for rows quarantined in extraction; they are neither ranked nor selected.
        groups: where the document limits shares of the budget.
        signs: what `walk.sign_bytes` gives, where dedupe is near.

    Raises RequestError: the budget asks for more than there is, or the groups cannot fill it.
    """
    duplicate_N = _duplicates(ids, usable_N) if spec.dedupe != "none" else np.zeros(len(scores_N), np.bool_)
    pool_N = usable_N & ~duplicate_N
    highest_first = _rising(scores_N, pool_N)
    highest_first[:] = highest_first[::-1]
    _order_ties(highest_first, scores_N, ids)
    ranked = highest_first
    if "highest" not in (spec.keep, spec.drop):
        ranked = highest_first[::-1].copy()
        _order_ties(ranked, scores_N, ids)
    num_taken = _within_budget(ranked, tokens, spec)
    taken, rules, near = ranked[:num_taken], None, _no_rows()
    if groups or signs is not None:
        taken, near, rules = _by_rules(ranked, num_taken, tokens, pool_N, spec, groups, signs)
    if signs is not None and rules:
        if spec.drop:
            near = _repeats_of_the_rest(highest_first, taken, signs, scores_N, ids, spec)
        in_plan_order = np.argsort(near[0])
        near = near[0][in_plan_order], near[1][in_plan_order]
        rules["near_duplicates"] = {
            "agreement": spec.near_agreement,
            "signs": 8 * signs.dtype.itemsize,
            "left_out": len(near[0]),
        }
        duplicate_N[near[0]] = True
        pool_N[near[0]] = False
    selected_N = pool_N  # reuses its memory
    if spec.keep:
        selected_N[:] = False
    selected_N[taken] = bool(spec.keep)
    threshold = float(scores_N[taken[-1]]) if len(taken) else None
    del ranked
    lowest = highest_first[::-1][: _num_in_ties(highest_first[::-1], scores_N)].copy()
    _order_ties(lowest, scores_N, ids)
    return Selected(
        selected_N=selected_N,
        duplicate_N=duplicate_N,
        order=highest_first[selected_N[highest_first]],
        threshold=threshold,
        num_taken=len(taken),
        highest=highest_first[:NUM_ENDS].tolist(),
        lowest=lowest[:NUM_ENDS].tolist(),
        near=near if signs is not None else None,
        rules=rules,
    )


def _by_rules(
    ranked: Rows,
    num_plain: int,
    tokens: Column,
    pool_N: Bools,
    spec: SelectionSpec,
    groups: Groups | None,
    signs: Column | None,
) -> tuple[Rows, tuple[Rows, Rows], dict[str, Any]]:
    """The rows that the budget takes under the document's rules, best first; near-duplicates; and what the rules moved.

    Rows that a budget drops are not compared: a copy of a dropped row may be dropped too.

    Args:
        num_plain: rows that the budget takes without the rules: the first of `ranked`.
    """
    in_tokens = spec.budget.tokens is not None
    budget = spec.budget.tokens or num_plain
    index_N, weight_N = None, tokens.part(slice(0, len(tokens))) if groups and in_tokens else None
    reserve_G, cap_G = np.zeros(1, np.int64), np.full(1, budget, np.int64)
    if groups:
        index_N = groups.index_N()
        reserve_G, cap_G = limits(groups, sizes(index_N, weight_N, pool_N, len(groups.names)), budget, in_tokens)
    compared = signs if spec.keep else None
    agreement, weights = spec.near_agreement or 1.0, tokens if in_tokens else None
    while True:
        walked = walk(ranked, budget, weights, index_N, reserve_G, cap_G, compared, agreement, num_plain)
        if not walked.short_G.any():
            break
        # Near-duplicates left a group with less than its min: the rest of its reserve is for all.
        reserve_G = np.where(walked.short_G, walked.used_G, reserve_G)
    if not walked.filled and spec.budget.fraction is None and walked.used_G.sum() < budget:
        unit = "response tokens" if in_tokens else "examples"
        what = f"the budget is {budget} {unit}, and {walked.used_G.sum()} are left without near-duplicates"
        fix = "lower it, raise nearAgreement, or use budget.fraction"
        raise RequestError(what, where="spec.selection.budget", fix=fix)
    taken, plain_N, taken_N = ranked[walked.taken_R], np.zeros(len(pool_N), np.bool_), np.zeros(len(pool_N), np.bool_)
    plain_N[ranked[:num_plain]], taken_N[taken] = True, True
    rules: dict[str, Any] = {
        "unit": "response tokens" if in_tokens else "examples",
        "entered": int((taken_N & ~plain_N).sum()),
        "left": int((plain_N & ~taken_N).sum()),
    }
    if groups and index_N is not None:
        rules["groups"] = moved(groups, index_N, weight_N, pool_N, plain_N, taken_N, least(groups, budget))
    return taken, (walked.repeats, walked.repeated), rules


def _no_rows() -> tuple[Rows, Rows]:
    return np.empty(0, np.uint32), np.empty(0, np.uint32)


def _repeats_of_the_rest(
    highest_first: Rows, dropped: Rows, signs: Column, scores_N: NDArray[np.float64], ids: Column, spec: SelectionSpec
) -> tuple[Rows, Rows]:
    """Near-duplicates among the rows that a budget does not drop, and what they repeat; of each, the better one stays."""
    dropped_N = np.zeros(len(scores_N), np.bool_)
    dropped_N[dropped] = True
    best_first = highest_first[~dropped_N[highest_first]]
    if spec.drop == "highest":
        best_first = best_first[::-1].copy()
        _order_ties(best_first, scores_N, ids)
    num = len(best_first)
    no_limit = np.full(1, num, np.int64)
    walked = walk(best_first, num, None, None, np.zeros(1, np.int64), no_limit, signs, spec.near_agreement or 1.0, num)
    return walked.repeats, walked.repeated


def _num_in_ties(rising: Rows, scores_N: NDArray[np.float64]) -> int:
    # The first NUM_ENDS, and those of the last one's score.
    return next(
        (rank for rank in range(NUM_ENDS, len(rising)) if scores_N[rising[rank]] != scores_N[rising[NUM_ENDS - 1]]),
        len(rising),
    )


def _rising(scores_N: NDArray[np.float64], pool_N: Bools) -> Rows:
    # numpy's index type is twice as wide as needed: halved and filtered within the memory it has, part by part. No sort is
    # asked to be stable: ids break the ties afterwards.
    order = np.argsort(scores_N)
    filtered, kept = order.view(np.uint32), 0
    for part in parts(len(order)):
        rows = order[part].astype(np.uint32)
        rows = rows[pool_N[rows]]
        filtered[kept : kept + len(rows)] = rows
        kept += len(rows)
    del filtered
    order.resize((kept + 1) // 2, refcheck=False)
    return order.view(np.uint32)[:kept]


def _order_ties(ranked: Rows, scores_N: NDArray[np.float64], ids: Column) -> None:
    """In place: rows of equal scores by id, and those of equal ids by plan order."""
    as_before = np.zeros(len(ranked) + 1, np.bool_)  # has the score of the row ranked before it
    for part in parts(len(ranked) - 1):
        values = scores_N[ranked[part.start : part.stop + 1]]
        as_before[part.start + 1 : part.stop + 1] = values[1:] == values[:-1]
    tied = np.flatnonzero(as_before[:-1] | as_before[1:])
    if len(tied):
        run_of = np.cumsum(~as_before[tied])
        rows = ranked[tied]
        high, low = _as_numbers(ids.at(rows))
        ranked[tied] = rows[np.lexsort((rows, low, high, run_of))]


def _within_budget(ranked: Rows, tokens: Column, spec: SelectionSpec) -> int:
    budget = spec.budget
    if budget.tokens is None:
        refuse_short_budget(budget, len(ranked), None)
        return budget.num_taken(len(ranked))
    tokens_N = tokens.part(slice(0, len(tokens)))
    spent, num_taken = 0, 0
    for part in parts(len(ranked)):
        spent_R = spent + np.cumsum(tokens_N[ranked[part]], dtype=np.int64)
        num_taken += int(np.searchsorted(spent_R, budget.tokens, side="right"))
        spent = int(spent_R[-1])
    refuse_short_budget(budget, len(ranked), spent)
    return num_taken


def _duplicates(ids: Column, usable_N: Bools) -> Bools:
    """Usable rows whose id an earlier usable row has."""
    # First the ids' first halves alone, sorted in place: only rows that share one are looked at whole.
    high_N = np.empty(int(usable_N.sum()), np.uint64)
    filled = 0
    for part in parts(len(usable_N)):
        high, _ = _as_numbers(ids.part(part)[usable_N[part]])
        high_N[filled : filled + len(high)] = high
        filled += len(high)
    high_N.sort()
    shared = np.unique(high_N[1:][high_N[1:] == high_N[:-1]])
    duplicate_N = np.zeros(len(usable_N), np.bool_)
    if not len(shared):
        return duplicate_N
    del high_N
    suspects = np.concatenate(
        [
            part.start + np.flatnonzero(usable_N[part] & _among(_as_numbers(ids.part(part))[0], shared))
            for part in parts(len(usable_N))
        ]
    )
    high, low = _as_numbers(ids.at(suspects))
    order = np.lexsort((low, high))  # stable: rows of one id stay in plan order
    again = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    duplicate_N[suspects[order[1:][again]]] = True
    return duplicate_N


def _among(values: NDArray[np.uint64], known_sorted: NDArray[np.uint64]) -> Bools:
    near = np.minimum(np.searchsorted(known_sorted, values), len(known_sorted) - 1)
    return known_sorted[near] == values


def _as_numbers(ids_N: NDArray[np.generic]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """First and second half of each id as numbers that sort as the bytes do."""
    halves = np.ascontiguousarray(ids_N).view(">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]
