"""How well a published ranking agrees with a label that the candidates carry, beside the candidate-loss baseline.

Shapes: N labelled candidates (usable, duplicates left out), R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.plan import Plan
from prism_job.reduce import manifest
from prism_job.storage import staged
from prism_job.storage.objects import Store, open_store

Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

NUM_RESAMPLES = 1000
_YES = {"1", "1.0", "true", "yes"}
_NO = {"0", "0.0", "false", "no"}


def evaluate(manifest_uri: str, label: str, positive: str | None) -> dict[str, Any]:
    """AUROC and precision at the budget, each with a 95 % bootstrap interval, for the score and for the loss.

    The score is oriented by the selection: under `keep: highest` and `drop: lowest` a good candidate should score high.
    Precision is the share of good ones among those kept, or of bad ones among those dropped. The baseline calls a
    candidate bad by its own loss: `loss` is the token mean, `loss_sum` the sum.

    Args:
        label: column of the candidate rows.
        positive: the value that means good; without it the column must hold 1/0, true/false or yes/no.

    Raises:
        RequestError: no such column, values that are not two-sided, or only one side present.
        DataError: the selection is damaged.
    """
    published = manifest.load(manifest_uri)
    spec = published.manifest.spec.spec
    scores = published.table("scores.parquet")
    ranked = scores["score"].is_valid().to_numpy() & ~scores["duplicate"].to_numpy()
    good_N = _labels(published.plan(), open_store(spec.store), ranked, label, positive, manifest_uri)
    if good_N.all() or not good_N.any():
        what = f"column '{label}' calls all {len(good_N)} candidates {'good' if good_N.all() else 'bad'}"
        raise RequestError(
            what, where=manifest_uri, fix="name a column with both kinds, or the good value (--positive)"
        )

    selection = spec.selection
    sign = 1.0 if (selection.keep == "highest" or selection.drop == "lowest") else -1.0
    nll_N = scores["nll"].to_numpy()[ranked]
    tokens_N = scores["num_tokens"].to_numpy()[ranked]
    rankings = {
        "": sign * scores["score"].to_numpy()[ranked],
        "loss_": -nll_N / tokens_N,
        "loss_sum_": -nll_N,
    }
    num_taken = published.manifest.counts.taken_by_budget
    facts: dict[str, Any] = {
        "label": label,
        "num_examples": len(good_N),
        "num_positive": int(good_N.sum()),
        "action": f"keep {selection.keep}" if selection.keep else f"drop {selection.drop}",
        "taken_by_budget": num_taken,
        "selection_id": published.manifest.selection_id,
    }
    for prefix, ranking_N in rankings.items():
        precision = f"{prefix}precision_at_budget"
        measures = {f"{prefix}auroc": auroc(ranking_N, good_N)}
        if num_taken:
            measures[precision] = _precision(ranking_N, good_N, num_taken, selection.keep is not None)
        else:  # a budget that rounds to nothing has no precision
            facts |= {precision: None, f"{precision}_low": None, f"{precision}_high": None}
        facts |= _with_intervals(measures, len(good_N))
    return facts


Measure = Callable[[Float64], float]
"""A figure of the labelled candidates, as a function of how often each is counted: float64 [N]."""


def auroc(ranking_N: Float64, good_N: Bools) -> Measure:
    """Probability that a good candidate ranks above a bad one, ties counting half."""
    values, place_N = np.unique(ranking_N, return_inverse=True)

    def measure(weights_N: Float64) -> float:
        good_V = np.bincount(place_N, weights_N * good_N, len(values))
        bad_V = np.bincount(place_N, weights_N * ~good_N, len(values))
        below_V = np.cumsum(bad_V) - bad_V
        pairs = good_V.sum() * bad_V.sum()
        return float((good_V * (below_V + bad_V / 2)).sum() / pairs) if pairs else float("nan")

    return measure


def _precision(ranking_N: Float64, good_N: Bools, num_taken: int, keeps: bool) -> Measure:
    # The first rows whose multiplicities fill the budget; of the row at the edge, as much as fits.
    order = np.argsort(-ranking_N if keeps else ranking_N, kind="stable")
    right_N = good_N[order] if keeps else ~good_N[order]

    def measure(weights_N: Float64) -> float:
        before = np.cumsum(weights_N[order]) - weights_N[order]
        taken = np.clip(num_taken - before, 0, weights_N[order])
        return float((taken * right_N).sum() / taken.sum())

    return measure


def _with_intervals(measures: dict[str, Measure], size: int) -> dict[str, float]:
    """Each measure with the middle 95 % of its bootstrap. Every call draws the same resamples, one at a time."""
    generator = np.random.default_rng(0)
    resampled = np.empty((NUM_RESAMPLES, len(measures)))
    for row in resampled:
        weights_N = np.bincount(generator.integers(size, size=size), minlength=size).astype(np.float64)
        row[:] = [measure(weights_N) for measure in measures.values()]
    low, high = np.nanquantile(resampled, [0.025, 0.975], axis=0)
    facts: dict[str, float] = {}
    for column, (name, measure) in enumerate(measures.items()):
        facts |= {name: measure(np.ones(size)), f"{name}_low": float(low[column]), f"{name}_high": float(high[column])}
    return facts


def _labels(plan: Plan, store: Store, ranked: Bools, label: str, positive: str | None, where: str) -> Bools:
    good: list[bool] = []
    is_ranked = iter(ranked.tolist())
    for unit in plan.candidates:
        for line, row in zip(unit.line_numbers(), staged.read_rows(store, unit.rows), strict=True):
            if not next(is_ranked):
                continue
            if row.get(label) is None:
                fix = f"name a column with --label; this row has {', '.join(row)}"
                raise RequestError(
                    f"no '{label}' in this row", where=f"{plan.sources[unit.source]} line {line}", fix=fix
                )
            value = str(row[label]).lower()
            if positive is not None:
                good.append(value == positive.lower())
            elif value in _YES | _NO:
                good.append(value in _YES)
            else:
                fix = "say which value means good with --positive"
                raise RequestError(f"'{label}' holds {row[label]!r}, neither yes nor no", where=where, fix=fix)
    return np.array(good)
