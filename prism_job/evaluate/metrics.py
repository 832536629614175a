"""How well a ranking, or a probability, agrees with a label: figures and their intervals. Does not read labels.

Shapes: N labelled candidates, V distinct values of a ranking, B budgets, Q target pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

NUM_RESAMPLES = 1000
NUM_BINS = 10
"""Of equal width from 0 to 1, in a reliability table."""
WIDTH = NormalDist().inv_cdf(0.975)
"""97.5 % of the normal distribution: the two sides of a 95 % interval."""

Measure = Callable[[Float64], Float64]
"""Figures of the labelled candidates, as a function of how often each is counted: float64 [N]."""


def ranking_figures(ranking_N: Float64, good_N: Bools, keeps: bool, budgets: Sequence[int] = ()) -> Measure:
    """AUROC, then precision at each budget, then recall at each: float64 [1 + 2B]. One sort, two running sums a call.

    Good candidates should rank high. Where the budget keeps, it takes from the high end, and a good one is right to take;
    where it drops, from the low end, and a bad one is. Precision is the share of right ones among those taken, recall the
    share of those taken among the right ones. AUROC is the probability that a good one ranks above a bad one, ties counting
    half; nan where there is one kind alone, as is recall where there is no right one. Where a budget ends within a group of
    equal values, it takes from each of them the same share: the mean over all orders of the group.

    Args:
        budgets: rows taken, each from 1 to N.
    """
    # Held for as long as resampling takes: 5 bytes a row, 9 where values are equal.
    order = np.argsort(-ranking_N if keeps else ranking_N).astype(np.uint32)
    right_N = good_N[order] if keeps else ~good_N[order]
    values_N = ranking_N[order]
    is_last_N = np.append(values_N[1:] != values_N[:-1], True)
    last_V = slice(None) if is_last_N.all() else np.flatnonzero(is_last_N).astype(np.uint32)
    budgets_B = np.array(budgets, np.float64)

    def measure(weights_N: Float64) -> Float64:
        ranked_N = weights_N[order]
        taken_V = np.cumsum(ranked_N)[last_V]
        right_taken_V = np.cumsum(ranked_N * right_N)[last_V]
        right_V = np.diff(right_taken_V, prepend=0.0)
        wrong_taken_V = taken_V - right_taken_V
        wrong_V = np.diff(wrong_taken_V, prepend=0.0)
        edge_B = np.searchsorted(taken_V, budgets_B)  # the group that fills the budget, perhaps in part
        left_B = taken_V[edge_B] - budgets_B
        right_B = right_taken_V[edge_B] - left_B * right_V[edge_B] / (right_V + wrong_V)[edge_B]
        num_right, num_wrong = right_taken_V[-1], wrong_taken_V[-1]
        ahead = (right_V * (num_wrong - wrong_taken_V + wrong_V / 2)).sum()
        pairs = num_right * num_wrong
        auroc = ahead / pairs if pairs else np.nan
        recall_B = right_B / num_right if num_right else np.full(len(budgets_B), np.nan)
        return np.concatenate([[auroc], right_B / budgets_B, recall_B])

    return measure


def auroc(ranking_N: Float64, good_N: Bools) -> float | None:
    """Probability that a good one ranks above a bad one, ties counting half; None where there is one kind alone."""
    (value,) = ranking_figures(ranking_N, good_N, keeps=True)(np.ones(len(good_N)))
    return None if np.isnan(value) else float(value)


def with_intervals(
    measures: Mapping[Sequence[str], Measure],
    size: int,
    trials: Mapping[str, int],
    differences: Mapping[str, tuple[str, str]],
) -> dict[str, float]:
    """Each figure with the middle 95 % of its bootstrap. Every call draws the same resamples, one at a time.

    A figure of 0 or 1 is the same in every resample, as if nothing were uncertain. It has Wilson's interval of so many trials.

    Args:
        measures: by the names of their figures.
        size: N.
        trials: name -> how many independent ones a figure of 0 or 1 is the share of.
        differences: name -> the two figures whose difference it is, first less second, resample by resample.
    """
    names = [name for figures in measures for name in figures]
    generator = np.random.default_rng(0)
    resampled = np.empty((NUM_RESAMPLES, len(names)))
    for row in resampled:
        weights_N = np.bincount(generator.integers(size, size=size), minlength=size).astype(np.float64)
        row[:] = np.concatenate([measure(weights_N) for measure in measures.values()])
    plain = np.concatenate([measure(np.ones(size)) for measure in measures.values()])
    for name, pair in differences.items():
        first, second = (names.index(figure) for figure in pair)
        resampled = np.column_stack([resampled, resampled[:, first] - resampled[:, second]])
        plain = np.append(plain, plain[first] - plain[second])
        names.append(name)
    low, high = np.nanquantile(resampled, [0.025, 0.975], axis=0)
    for number, name in enumerate(names):
        if name in trials and plain[number] in (0.0, 1.0) and low[number] == high[number]:
            low[number], high[number] = wilson(round(plain[number] * trials[name]), trials[name])
    facts: dict[str, float] = {}
    for number, name in enumerate(names):
        facts |= {name: float(plain[number]), f"{name}_low": float(low[number]), f"{name}_high": float(high[number])}
    return facts


def wilson(num_right: int, num_all: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): it holds at 0 and 1, and for few trials."""
    share, spread = num_right / num_all, WIDTH**2 / num_all
    middle = (share + spread / 2) / (1 + spread)
    reach = (share * (1 - share) * spread + spread**2 / 4) ** 0.5 / (1 + spread)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def preference_figures(preference_Q: Float64, right_Q: Bools | None) -> dict[str, Any]:
    """Calibration of π: are 80 of 100 pairs with π near 0.8 right?

    Args:
        preference_Q: π of the pairs that have one.
        right_Q: whether the pair itself is right; None: every pair is taken as right, and what needs both kinds is None.

    Returns:
        num_pairs, num_pairs_right, preference_mean, preference_above_half (share of pairs), preference_brier (mean squared
        distance of π from 1 where the pair is right, from 0 where it is not), preference_auroc (of π against the label),
        preference_ece (mean distance of π and the share right over the bins, by their pairs), and `reliability`, a row a bin
        that holds a pair. Means of no pair are None.
    """
    num_pairs = len(preference_Q)
    outcome_Q = np.ones(num_pairs) if right_Q is None else right_Q.astype(np.float64)
    table = [] if right_Q is None else _reliability(preference_Q, right_Q)

    def mean(values_Q: NDArray[Any]) -> float | None:
        return float(values_Q.mean()) if num_pairs else None

    return {
        "num_pairs": num_pairs,
        "num_pairs_right": None if right_Q is None else int(right_Q.sum()),
        "preference_mean": mean(preference_Q),
        "preference_above_half": mean(preference_Q > 0.5),
        "preference_brier": mean((preference_Q - outcome_Q) ** 2),
        "preference_auroc": None if right_Q is None or not num_pairs else auroc(preference_Q, right_Q),
        "preference_ece": sum(row["pairs"] / num_pairs * abs(row["mean"] - row["right"]) for row in table)
        if table
        else None,
        "reliability": table,
    }


def _reliability(preference_Q: Float64, right_Q: Bools) -> list[dict[str, Any]]:
    bin_Q = np.minimum((preference_Q * NUM_BINS).astype(int), NUM_BINS - 1)
    rows = []
    for number in np.unique(bin_Q).tolist():
        among = bin_Q == number
        num_pairs, num_right = int(among.sum()), int(right_Q[among].sum())
        low, high = wilson(num_right, num_pairs)
        rows.append(
            {
                "from": number / NUM_BINS,
                "to": (number + 1) / NUM_BINS,
                "pairs": num_pairs,
                "mean": float(preference_Q[among].mean()),
                "right": num_right / num_pairs,
                "right_low": low,
                "right_high": high,
            }
        )
    return rows
