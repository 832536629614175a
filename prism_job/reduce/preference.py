"""How much the reference model prefers each target's wanted response, and the direction that follows (DESIGN, section 2).

Shapes: Q target pairs, L layers, M = P² numbers of one layer's sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.plan import Plan
from prism_job.spec import RunSpec
from prism_job.storage import shards
from prism_job.storage.objects import Store

Float64 = NDArray[np.float64]


def preference(chosen_mean_nll_Q: Float64, rejected_mean_nll_Q: Float64) -> Float64:
    """π_q = p̄(y⁺) / (p̄(y⁺) + p̄(y⁻)), equations 1 and 2, with log p̄ = −(token-mean NLL).

    A sigmoid of the difference of log p̄: no probability is formed, so long responses cannot underflow.
    """
    difference = np.asarray(rejected_mean_nll_Q, np.float64) - np.asarray(chosen_mean_nll_Q, np.float64)
    positive = difference >= 0
    small = np.exp(-np.abs(difference))
    return np.where(positive, 1 / (1 + small), small / (1 + small))


def target_weights(weighting: str, preference_Q: Float64) -> Float64:
    """Weight of each pair in the direction: π_q (PRISM) or 1 (the baseline it must beat)."""
    return preference_Q if weighting == "preference" else np.ones_like(preference_Q)


def contributions(weighted_dots_Q: Float64) -> Float64:
    """Share of each pair in the direction: its weighted inner product with it, over the sum; they add up to 1.

    Args:
        weighted_dots_Q: π_q ⟨ḡ(q,y⁺) − ḡ(q,y⁻), g⟩; their sum is |Q| ‖g‖².
    """
    total = float(weighted_dots_Q.sum())
    return weighted_dots_Q / total if total > 0 else np.zeros_like(weighted_dots_Q)


@dataclass
class Targets:
    """What is known of the pairs: the plain direction g [L, P, P] and a few numbers for each."""

    ids: list[str]
    layers: list[str]
    direction_LPP: Float64
    preference_Q: Float64
    weight_Q: Float64
    contribution_Q: Float64
    chosen_nll_Q: Float64
    rejected_nll_Q: Float64


def weigh_targets(spec: RunSpec, plan: Plan, store: Store) -> Targets:
    """Equations 1 to 3: π_q of every pair, and g = 1/|Q| Σ_q w_q (ḡ(q,y⁺) − ḡ(q,y⁻)).

    Two passes over the stored pairs: one to sum the direction, one for each pair's part in it.
    """
    ids: list[str] = []
    layers: list[str] = []
    dim = spec.extraction.projection.dim
    total: Float64 | None = None
    columns: dict[str, list[Float64]] = {"chosen_nll": [], "rejected_nll": [], "preference": [], "weight": []}
    for unit in plan.targets:
        shard = shards.read_shard(store, plan.extractor, "targets", unit.id)
        layers = shard.notes["layers"]
        arrays = shard.arrays
        chosen, rejected = _mean_nll(arrays, "chosen"), _mean_nll(arrays, "rejected")
        # A pair without a rejected response (weighting: uniform) has no preference.
        preferred = np.where(np.isnan(rejected), np.nan, preference(chosen, np.nan_to_num(rejected)))
        weight = target_weights(spec.scoring.weighting, preferred)
        part = weight @ arrays["rows"].astype(np.float64)
        total = part if total is None else total + part
        ids += shards.hex_ids(arrays["ids"])
        for name, values in zip(columns, (chosen, rejected, preferred, weight), strict=True):
            columns[name].append(values)
    assert total is not None
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    dots = [
        shards.read_shard(store, plan.extractor, "targets", unit.id).arrays["rows"].astype(np.float64) @ total
        for unit in plan.targets
    ]
    return Targets(
        ids=ids,
        layers=layers,
        direction_LPP=(total / len(ids)).reshape(len(layers), dim, dim),
        preference_Q=joined["preference"],
        weight_Q=joined["weight"],
        contribution_Q=contributions(joined["weight"] * np.concatenate(dots)),
        chosen_nll_Q=joined["chosen_nll"],
        rejected_nll_Q=joined["rejected_nll"],
    )


def _mean_nll(arrays: dict[str, NDArray[Any]], side: str) -> Float64:
    tokens = arrays[f"{side}_tokens"].astype(np.float64)
    return np.divide(arrays[f"{side}_nll"], tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
