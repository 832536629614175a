"""The weights of the target pairs, and the plain direction of each target set (docs/architecture.md, Method).

Shapes: K target sets, Q target pairs, H hidden dims, L layers, P projected dims a side, M = L·P² numbers of a pair's row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.plan.plan import Audit, Plan, Unit
from prism_job.score.preference import mean_nll, preference
from prism_job.score.scorers import scaled_to_one
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import codec, shards

Float64 = NDArray[np.float64]


@dataclass
class Targets:
    """The plain direction g_k of each target set [K, L, P, P], and a few numbers for each pair."""

    ids: list[str]
    layers: list[str]
    coverage: dict[str, float]  # shares of the model in the layers, as extraction found them; empty for old shards
    directions_KLPP: Float64
    set_Q: NDArray[np.int64]  # index of each pair's set in `spec.targets.as_sets()`
    preference_Q: Float64  # of the preference model, where the document names one
    reference_preference_Q: Float64  # of the model whose gradients are taken
    weight_Q: Float64
    contribution_Q: Float64  # share in the combined direction g = Σ_k sign_k weight_k g_k
    chosen_nll_Q: Float64  # token means of the reference, as are the next
    rejected_nll_Q: Float64
    num_cut: int = 0  # pairs of which a side goes on beyond maxLength


def weigh_targets(spec: RunSpec, plan: Plan, store: Store) -> Targets:
    """Equations 1 to 3, set by set: π_q of every pair, and g_k = 1/|Q_k| Σ_q w_q (ḡ(q,y⁺) − ḡ(q,y⁻)) over those of set k.

    Two passes over the stored pairs: one to sum the directions, one for each pair's part in the combined one.
    """
    ids: list[str] = []
    layers: list[str] = []
    coverage: dict[str, float] = {}
    num_cut = 0
    names = ("chosen_nll", "rejected_nll", "reference_preference", "preference", "weight")
    columns: dict[str, list[Float64]] = {name: [] for name in names}
    by_set = _SetSums(spec, plan)
    for unit in plan.targets:
        shard = shards.read_shard(store, plan.extractor, "targets", unit.id)
        layers, arrays = layers or shard.notes["layers"], shard.arrays
        num_cut += shard.notes.get("cut", 0)
        shards.refuse_other_layers(shard, layers, store.uri(shards.shard_key(plan.extractor, "targets", unit.id)))
        coverage = {name: shard.notes[name] for name in ("coverage", "share_of_model") if name in shard.notes}
        chosen, rejected = (_mean_nll(arrays, side) for side in ("chosen", "rejected"))
        of_reference = preference(chosen, rejected)
        preferred = _preference_of_unit(plan, store, unit, of_reference)
        weight = preferred if spec.scoring.weighting == "preference" else np.ones_like(preferred)
        by_set.add(unit, weight @ arrays["rows"].astype(np.float64))
        ids += shards.hex_ids(arrays["ids"])
        for name, values in zip(names, (chosen, rejected, of_reference, preferred, weight), strict=True):
            columns[name].append(values)
    set_Q = np.repeat([by_set.set_of(unit) for unit in plan.targets], [unit.num_rows for unit in plan.targets])
    # A pair's factor in the combined direction, times |Q|: 1 for all where there is one set.
    signed_weight_K = np.array([target_set.signed_weight for target_set in spec.targets.as_sets()])
    factor_K = signed_weight_K * (len(ids) / by_set.num_pairs_K)
    combined_M = factor_K @ by_set.totals_KM
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    dots = [
        shards.read_shard(store, plan.extractor, "targets", unit.id).arrays["rows"].astype(np.float64) @ combined_M
        for unit in plan.targets
    ]
    return Targets(
        ids=ids,
        layers=layers,
        coverage=coverage,
        directions_KLPP=by_set.mean_directions(layers),
        set_Q=set_Q,
        preference_Q=joined["preference"],
        reference_preference_Q=joined["reference_preference"],
        weight_Q=joined["weight"],
        contribution_Q=contributions(factor_K[set_Q] * joined["weight"] * np.concatenate(dots)),
        chosen_nll_Q=joined["chosen_nll"],
        rejected_nll_Q=joined["rejected_nll"],
        num_cut=num_cut,
    )


def _mean_nll(arrays: dict[str, NDArray[Any]], side: str) -> Float64:
    return mean_nll(arrays[f"{side}_nll"], arrays[f"{side}_tokens"])


def _preference_of_unit(plan: Plan, store: Store, unit: Unit, of_reference_Q: Float64) -> Float64:
    """π of a unit's pairs: by the preference model, where the plan has one."""
    if plan.preference is None:
        return of_reference_Q
    arrays = shards.read_shard(store, plan.preference.extractor, "nll", unit.id).arrays
    return preference(_mean_nll(arrays, "chosen"), _mean_nll(arrays, "rejected"))


def wanted_responses(spec: RunSpec, plan: Plan, store: Store) -> tuple[Targets, list[Float64]]:
    """The targets as the tables show them, and of each set what candidates are compared with.

    That is, with `similarity: nearest`, the rows of its responses scaled to length 1 [Q, H]; with `mean` their mean [1, H], so
    that the inner product with it is the mean cosine. A candidate's score is the largest of its inner products
    (`scorers.CosineScorer`). `contribution`: as for gradients, the share of a response in Σ_k sign_k weight_k mean_k; of the
    nearest response there is no such share, and it is NaN.
    """
    ids: list[str] = []
    rows: list[Float64] = []
    nll: list[Float64] = []
    num_cut = 0
    for unit in plan.targets:
        shard = shards.read_shard(store, plan.extractor, "targets", unit.id)
        arrays, num_cut = shard.arrays, num_cut + shard.notes["cut"]
        ids += shards.hex_ids(arrays["ids"])
        rows.append(scaled_to_one(arrays["rows"].astype(np.float64)))
        nll.append(arrays["chosen_nll"] / arrays["chosen_tokens"])
    rows_QH = np.concatenate(rows)
    sets = spec.targets.as_sets()
    names = [each.name for each in sets]
    set_of_unit = [names.index(plan.target_sets[unit.source]) for unit in plan.targets]
    set_Q = np.repeat(set_of_unit, [unit.num_rows for unit in plan.targets])
    mean_KH = np.stack([rows_QH[set_Q == number].mean(axis=0) for number in range(len(sets))])
    unknown_Q = np.full(len(ids), np.nan)
    if spec.scoring.similarity == "nearest":
        compared, contribution_Q = [rows_QH[set_Q == number] for number in range(len(sets))], unknown_Q
    else:
        factor_K = np.array([each.signed_weight for each in sets]) / np.bincount(set_Q, minlength=len(sets))
        combined_H = (factor_K[set_Q, None] * rows_QH).sum(axis=0)
        compared = [mean_H[None] for mean_H in mean_KH]
        contribution_Q = contributions(factor_K[set_Q] * (rows_QH @ combined_H))
    targets = Targets(
        ids=ids,
        layers=[],
        coverage={},
        directions_KLPP=mean_KH[:, None, None],
        set_Q=set_Q,
        preference_Q=unknown_Q,
        reference_preference_Q=unknown_Q,
        weight_Q=np.ones(len(ids)),
        contribution_Q=contribution_Q,
        chosen_nll_Q=np.concatenate(nll),
        rejected_nll_Q=unknown_Q,
        num_cut=num_cut,
    )
    return targets, compared


@dataclass(frozen=True)
class SummedTargets:
    """The plain direction of each target set with the audit's projection, its layers, and the tokens of all responses."""

    layers: list[str]
    directions_KLPP: Float64
    num_tokens: int


def sum_targets(spec: RunSpec, plan: Plan, audit: Audit, store: Store) -> SummedTargets:
    """Equation 3, set by set, from the weighted sums that extraction stored of each target unit; or from the rows of its
    pairs, where the weights come from another model.

    Args:
        spec: from `audit_spec`.
    """
    layers: list[str] = []
    by_set, num_tokens = _SetSums(spec, plan), 0
    for unit in plan.targets:
        shard = shards.read_shard(store, audit.extractor, plan.audit_kind, unit.id)
        layers = layers or shard.notes["layers"]
        where = store.uri(shards.shard_key(audit.extractor, plan.audit_kind, unit.id))
        shards.refuse_other_layers(shard, layers, where)
        if plan.preference:
            unused = np.full(unit.num_rows, np.nan)
            weight = _preference_of_unit(plan, store, unit, unused)
            sum_M = weight @ codec.decode_float16(shard.arrays).astype(np.float64)
        else:
            sum_M = shard.arrays[spec.scoring.weighting].astype(np.float64)
        by_set.add(unit, sum_M)
        num_tokens += sum(int(shard.arrays[f"{side}_tokens"].sum()) for side in ("chosen", "rejected"))
    return SummedTargets(layers, by_set.mean_directions(layers), num_tokens)


class _SetSums:
    """The weighted rows of the pairs summed by target set: [K, M], and the number of pairs [K]."""

    def __init__(self, spec: RunSpec, plan: Plan) -> None:
        self._names, self._set_of_source = [each.name for each in spec.targets.as_sets()], plan.target_sets
        self._dim = spec.extraction.projection.dim
        self.num_pairs_K = np.zeros(len(self._names), np.int64)
        self.totals_KM: Float64 = np.zeros((len(self._names), 0))

    def set_of(self, unit: Unit) -> int:
        return self._names.index(self._set_of_source[unit.source])

    def add(self, unit: Unit, sum_M: Float64) -> None:
        if not self.totals_KM.size:
            self.totals_KM = np.zeros((len(self._names), len(sum_M)))
        self.totals_KM[self.set_of(unit)] += sum_M
        self.num_pairs_K[self.set_of(unit)] += unit.num_rows

    def mean_directions(self, layers: list[str]) -> Float64:
        shape = (len(self._names), len(layers), self._dim, self._dim)
        return (self.totals_KM / self.num_pairs_K[:, None]).reshape(shape)


def contributions(weighted_dots_Q: Float64) -> Float64:
    """Share of each pair in the direction: its weighted inner product with it, over the sum; they add up to 1.

    Args:
        weighted_dots_Q: c_q π_q ⟨ḡ(q,y⁺) − ḡ(q,y⁻), g⟩ with g = Σ_q c_q π_q (ḡ(q,y⁺) − ḡ(q,y⁻)) up to a factor; their
            sum is ‖g‖² times that factor.
    """
    total = float(weighted_dots_Q.sum())
    return weighted_dots_Q / total if total > 0 else np.zeros_like(weighted_dots_Q)
