"""How much the reference model prefers each target's wanted response, and the directions that follow (DESIGN, section 2).

Shapes: K target sets, Q target pairs, L layers, P projected dims a side, M = L·P² numbers of a pair's row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.plan.plan import Plan
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards

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
        weighted_dots_Q: c_q π_q ⟨ḡ(q,y⁺) − ḡ(q,y⁻), g⟩ with g = Σ_q c_q π_q (ḡ(q,y⁺) − ḡ(q,y⁻)) up to a factor; their
            sum is ‖g‖² times that factor.
    """
    total = float(weighted_dots_Q.sum())
    return weighted_dots_Q / total if total > 0 else np.zeros_like(weighted_dots_Q)


@dataclass
class Targets:
    """What is known of the pairs: the plain direction g_k of each set [K, L, P, P], and a few numbers for each pair.

    Attributes:
        set_Q: place of each pair's set in `spec.targets.as_sets()`.
        contribution_Q: share in the combined direction g = Σ_k sign_k weight_k g_k.
    """

    ids: list[str]
    layers: list[str]
    directions_KLPP: Float64
    set_Q: NDArray[np.int64]
    preference_Q: Float64
    weight_Q: Float64
    contribution_Q: Float64
    chosen_nll_Q: Float64
    rejected_nll_Q: Float64


def weigh_targets(spec: RunSpec, plan: Plan, store: Store) -> Targets:
    """Equations 1 to 3, set by set: π_q of every pair, and g_k = 1/|Q_k| Σ_q w_q (ḡ(q,y⁺) − ḡ(q,y⁻)) over those of set k.

    Two passes over the stored pairs: one to sum the directions, one for each pair's part in the combined one.
    """
    sets = spec.targets.as_sets()
    names = [one.name for one in sets]
    set_of_unit = [names.index(plan.target_sets[unit.source]) for unit in plan.targets]
    ids: list[str] = []
    layers: list[str] = []
    dim = spec.extraction.projection.dim
    totals_KM: Float64 | None = None
    columns: dict[str, list[Float64]] = {"chosen_nll": [], "rejected_nll": [], "preference": [], "weight": []}
    for place, unit in zip(set_of_unit, plan.targets, strict=True):
        shard = shards.read_shard(store, plan.extractor, "targets", unit.id)
        layers = shard.notes["layers"]
        arrays = shard.arrays
        chosen, rejected = _mean_nll(arrays, "chosen"), _mean_nll(arrays, "rejected")
        # A pair without a rejected response (weighting: uniform) has no preference.
        preferred = np.where(np.isnan(rejected), np.nan, preference(chosen, np.nan_to_num(rejected)))
        weight = target_weights(spec.scoring.weighting, preferred)
        part_M = weight @ arrays["rows"].astype(np.float64)
        if totals_KM is None:
            totals_KM = np.zeros((len(sets), len(part_M)))
        totals_KM[place] += part_M
        ids += shards.hex_ids(arrays["ids"])
        for name, values in zip(columns, (chosen, rejected, preferred, weight), strict=True):
            columns[name].append(values)
    assert totals_KM is not None
    set_Q = np.repeat(set_of_unit, [unit.num_rows for unit in plan.targets])
    num_pairs_K = np.bincount(set_Q, minlength=len(sets))
    # A pair's factor in the combined direction, times |Q|: 1 for all where there is one set.
    factor_K = np.array([one.signed_weight for one in sets]) * (len(ids) / num_pairs_K)
    combined_M = factor_K @ totals_KM
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    dots = [
        shards.read_shard(store, plan.extractor, "targets", unit.id).arrays["rows"].astype(np.float64) @ combined_M
        for unit in plan.targets
    ]
    return Targets(
        ids=ids,
        layers=layers,
        directions_KLPP=(totals_KM / num_pairs_K[:, None]).reshape(len(sets), len(layers), dim, dim),
        set_Q=set_Q,
        preference_Q=joined["preference"],
        weight_Q=joined["weight"],
        contribution_Q=contributions(factor_K[set_Q] * joined["weight"] * np.concatenate(dots)),
        chosen_nll_Q=joined["chosen_nll"],
        rejected_nll_Q=joined["rejected_nll"],
    )


def _mean_nll(arrays: dict[str, NDArray[Any]], side: str) -> Float64:
    tokens = arrays[f"{side}_tokens"].astype(np.float64)
    return np.divide(arrays[f"{side}_nll"], tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
