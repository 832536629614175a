"""How far a ranking can be trusted: the job's scores beside those of a second extraction with projections of its own.

**From two noisy rankings to the exact one.** A score is the exact, unprojected one plus noise of projection, folding and
signs. The audit draws all of them anew, with twice the dims a side and twice the stored dims, so that its noise is independent
of the job's and has half the variance (the part of both sides together, which goes with 1/dim², has a quarter; it is small).
With x = noise over signal variance of the job's scores, correlations with the exact scores are r_job = 1/√(1+x) and
r_audit = 1/√(1+x/2), and what they have in common is the exact score alone: r_between = r_job · r_audit (Spearman's
correction for attenuation, 1904, with a known ratio of the two). So x²/2 + 3x/2 + 1 = 1/r_between², which is solved for x.
Rank correlations obey this too: within .003 down to r_job = .8, for normal, t(3) and lognormal scores, and for noise that grows
with the score; .02 too high at .5 (two million simulated rows).

Errors that both rankings share are not measured: the model, the targets, the formula.

With K-FAC the exact scores are those of the full space at the same λ. A projection before the inverse biases scores as well,
which falls faster than 1/dim: with a half the estimate of the agreement is too high, a quarter fits (docs/method.md compares
both with exact scores of a real model).

All rows of a run share one draw of the projections; the interval does not cover other draws.

Shapes: N rows of the sample.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.evaluate.metrics import WIDTH, wilson

Float64 = NDArray[np.float64]
Figures = dict[str, Any]

VARIANCE_RATIOS = {"none": 0.5, "kfac": 0.25}
"""Of the audit's noise to the job's, by curvature: the first follows from `audit_spec`, the second was measured."""

MIN_ROWS = 10
"""Fewer rows give an interval from 0 to 1, or nearly."""

MIN_TAKEN = 5
"""With fewer rows of the sample within the budget the overlap is an extrapolation from the ends of two small rankings."""

LOW_AGREEMENT = 0.9
"""Where Spearman with exact scores may lie under this, more dims are advised: at .9, a third of the top 5 % of normal scores
differ."""

NUM_DRAWS, NUM_RESAMPLINGS, DRAWS_A_RESAMPLING = 400, 200, 20
"""Of the simulated overlap: 0.2 s for 128 rows, and its own noise is a tenth of the interval."""


def agreement(
    scores_N: Float64, audit_scores_N: Float64, fraction: float, from_end: str, curvature: str = "none"
) -> Figures:
    """How well the job's ranking of these rows agrees with the audit's, and so with the exact one.

    Args:
        fraction: share of the ranking that the budget takes, 0 to 1; of the rows here at least one.
        from_end: "highest" or "lowest", whichever end it takes.
        curvature: of the scores, "none" or "kfac".

    Returns plain values, each with `_low` and `_high` of its 95 % interval:
        spearman: with exact scores. overlap: share of what the budget takes that exact scores would take too (`_overlap`);
            None where it takes fewer than MIN_TAKEN of these rows.
        spearman_between, overlap_between: the same between the two rankings as they are, so lower.
        taken: rows that the overlap rests on. noise: x of the module. reason: why some are None, or None.

    Spearman's interval is taken in Fisher's z, with the larger of two standard errors: that of the rank correlation
    linearised in its rows, which also holds where noise grows with the score, and Bonett and Wright's √((1+r²/2)/(n−3)) (2000).
    The overlap between is a share of `taken` rows (Wilson 1927).
    """
    num_rows = len(scores_N)
    if num_rows < MIN_ROWS:
        return too_few(num_rows)
    taken = min(num_rows, max(1, round(fraction * num_rows)))
    figures = _unknown(None) | {"taken": taken}
    if scores_N.min() == scores_N.max() or audit_scores_N.min() == audit_scores_N.max():
        return _unknown("all scores are equal: there is no ranking")
    if from_end == "lowest":
        scores_N, audit_scores_N = -scores_N, -audit_scores_N
    both = int((_highest(scores_N, taken) & _highest(audit_scores_N, taken)).sum())
    figures |= _with_interval("overlap_between", both / taken, *wilson(both, taken))
    between = spearman(scores_N, audit_scores_N)
    low, high = _interval(scores_N, audit_scores_N, between)
    figures |= _with_interval("spearman_between", between, low, high)
    if between <= 0:
        return figures | {"reason": "the two rankings have nothing in common: the scores are noise"}
    ratio = VARIANCE_RATIOS[curvature]
    noise = noise_ratio(between, ratio)
    figures |= _with_interval("spearman", *(with_exact(value, ratio) for value in (between, low, high)))
    figures["noise"] = noise
    if round(fraction * num_rows) < MIN_TAKEN:
        return figures | {"reason": _too_few_taken(fraction)}
    return figures | _with_interval("overlap", *_overlap(scores_N, audit_scores_N, noise, ratio, taken))


def too_few(num_rows: int) -> Figures:
    """The figures of fewer than MIN_ROWS rows: all None."""
    return _unknown(f"{num_rows} usable rows in the sample, at least {MIN_ROWS} are needed")


def _too_few_taken(fraction: float) -> str:
    if not fraction:
        return "the budget takes nothing"
    wanted = math.ceil(MIN_TAKEN / fraction)
    return (
        f"fewer than {MIN_TAKEN} of the sample's rows lie within the budget: raise audit.examples to at least {wanted}, "
        "in a pool of as many"
    )


def _unknown(reason: str | None) -> Figures:
    names = ("spearman", "overlap", "spearman_between", "overlap_between")
    figures: Figures = {f"{name}{end}": None for name in names for end in ("", "_low", "_high")}
    return figures | {"taken": None, "noise": None, "reason": reason}


def noise_ratio(between: float, ratio: float) -> float:
    """x, the noise over the signal variance of the job's scores, from the correlation of job and audit (above 0).

    1/r_between² = (1 + x)(1 + x·ratio), solved for x.
    """
    return (math.sqrt((1 - ratio) ** 2 + 4 * ratio / between**2) - 1 - ratio) / (2 * ratio)


def with_exact(between: float, ratio: float) -> float:
    """r_job = 1/√(1+x) from r_between; 0 where that is not above 0."""
    return 1 / math.sqrt(1 + max(0.0, noise_ratio(between, ratio))) if between > 0 else 0.0


def _overlap(
    scores_N: Float64, audit_scores_N: Float64, noise: float, ratio: float, taken: int
) -> tuple[float, float, float]:
    """Share of the highest `taken` that the exact scores would take too, and its 95 % interval.

    Both scores of a row are the exact one plus noise, whose variance in the audit's is `ratio` of the job's. So
    (ratio·s + a) / (1 + ratio) is the best guess at the exact score, and (s − a) / √(1 + ratio) has the variance of the job's
    noise in that row, be it large or small there. The
    guesses stand for the exact scores, and noise of this size with a random sign is added to them NUM_DRAWS times. No
    distribution is assumed. The interval is that of resampled rows. Signs and resamplings are drawn from a fixed seed.
    """
    # Curvature and norms of another space may scale all scores alike: scale the signal to that of the job.
    scale = scores_N.std() / audit_scores_N.std() * math.sqrt((1 + ratio * noise) / (1 + noise))
    audit_N = (audit_scores_N - audit_scores_N.mean()) * scale + scores_N.mean()
    exact_N, noise_N = (ratio * scores_N + audit_N) / (1 + ratio), (scores_N - audit_N) / math.sqrt(1 + ratio)
    random = np.random.default_rng(0)

    def share(rows_N: NDArray[np.int64], num_draws: int) -> float:
        exact, size = exact_N[rows_N], noise_N[rows_N]
        first = _highest(exact, taken)
        hits = 0
        for _ in range(num_draws):
            signs = np.where(random.random(len(rows_N)) < 0.5, -1.0, 1.0)
            hits += int((first & _highest(exact + signs * size, taken)).sum())
        return hits / (num_draws * taken)

    num_rows = len(scores_N)
    value = share(np.arange(num_rows), NUM_DRAWS)
    resampled = [share(random.integers(0, num_rows, num_rows), DRAWS_A_RESAMPLING) for _ in range(NUM_RESAMPLINGS)]
    low, high = (float(bound) for bound in np.quantile(resampled, [0.025, 0.975]))
    return value, min(low, value), max(high, value)


def _highest(scores_N: Float64, taken: int) -> NDArray[np.bool_]:
    first_N = np.zeros(len(scores_N), np.bool_)
    first_N[np.argpartition(-scores_N, taken - 1)[:taken]] = True
    return first_N


def spearman(left_N: Float64, right_N: Float64) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. Neither may be constant."""
    left, right = (_middle_ranks(values) - 0.5 for values in (left_N, right_N))
    return float(np.clip(left @ right / math.sqrt(float(left @ left) * float(right @ right)), -1, 1))


def _middle_ranks(values_N: Float64) -> Float64:
    """Share of the values that lie below, equal ones counted half: in 0 to 1, mean 1/2."""
    _, value_index_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts / 2)[value_index_N] / len(values_N)


def _interval(left_N: Float64, right_N: Float64, rho: float) -> tuple[float, float]:
    num_rows = len(left_N)
    # Half a step under 1, the nearest a rank correlation can be to it: tanh(∞) would claim certainty.
    inside = math.copysign(min(abs(rho), 1 - 6 / (num_rows * (num_rows**2 - 1))), rho)
    linear = _standard_error(left_N, right_N) / (1 - inside**2)
    error = WIDTH * max(linear, math.sqrt((1 + inside**2 / 2) / (num_rows - 3)))
    low, high = (math.tanh(math.atanh(inside) + side * error) for side in (-1, 1))
    return min(low, rho), 1.0 if rho == 1 else max(high, rho)


def _standard_error(left_N: Float64, right_N: Float64) -> float:
    """Of Spearman's ρ = 12 E[(u − ½)(v − ½)], from each row's part in it: by its own ranks, and by moving those of others."""
    u_N, v_N = _middle_ranks(left_N) - 0.5, _middle_ranks(right_N) - 0.5
    parts_N = u_N * v_N + _mean_above(left_N, v_N) + _mean_above(right_N, u_N)
    scale = math.sqrt(float(u_N @ u_N) * float(v_N @ v_N)) / len(u_N)  # 1/12, less where values are equal
    return float(np.sqrt(np.square(parts_N - parts_N.mean()).sum() / len(u_N) / (len(u_N) - 3))) / scale


def _mean_above(values_N: Float64, of_N: Float64) -> Float64:
    """For each row the mean over all rows of `of` where their value is larger, and of half of it where it is equal."""
    _, value_index_N = np.unique(values_N, return_inverse=True)
    sums = np.bincount(value_index_N, weights=of_N)
    return (np.cumsum(sums[::-1])[::-1] - sums / 2)[value_index_N] / len(values_N)


def _with_interval(name: str, value: float, low: float, high: float) -> Figures:
    return {name: value, f"{name}_low": low, f"{name}_high": high}
