"""Which target pairs a score comes from: the score is linear in the direction, and the direction is a sum over pairs.

c_q(z) = sign_k weight_k w_q / |Q_k| · ⟨row_z, folded (H + λI)⁻¹ (ḡ(q,y⁺) − ḡ(q,y⁻))⟩ for a pair q of set k. Σ_q c_q(z) is the
score of z, up to the rounding of its directions to 24 bits (`SignScorer`). Rows are those that the score was computed from.

Shapes: E examples, Q target pairs, L layers, P projected dims a side, D stored dims.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prism_job.plan.plan import Plan
from prism_job.score.direction import Folding
from prism_job.score.scorers import finish, scorer
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards
from prism_job.store.codec import Arrays

Float64 = NDArray[np.float64]

BLOCK_BYTES = 2**26
"""Of pairs that are folded at a time: 9 of a model with 210 layers. The eigenbases are computed once, whatever it is."""


MAX_PAIRS_IN_REPORT = 512
"""A report shows the pairs behind its examples up to here: a pair takes about 0.03 CPU seconds with 210 layers, and its row
is read once more. `prism explain` has no limit."""


def pair_factors(spec: RunSpec, weight_Q: Float64, set_Q: NDArray[np.int64]) -> Float64:
    """sign_k weight_k w_q / |Q_k| of each pair."""
    signed_weight_K = np.array([target_set.signed_weight for target_set in spec.targets.as_sets()])
    num_pairs_K = np.bincount(set_Q, minlength=len(signed_weight_K))
    return signed_weight_K[set_Q] * weight_Q / num_pairs_K[set_Q]


def target_layers(plan: Plan, store: Store) -> list[str]:
    """The layers of the stored pairs."""
    layers: list[str] = shards.read_shard(store, plan.extractor, "targets", plan.targets[0].id).notes["layers"]
    return layers


def folded_pairs(plan: Plan, store: Store, folding: Folding, only: int | None = None) -> Iterator[Float64]:
    """The direction [D] of each pair alone, in plan order, or of one pair. Holds a block of them in memory.

    Raises DataError: a shard is missing or damaged.
    """
    dim, start = folding.spec.extraction.projection.dim, 0
    block = max(1, BLOCK_BYTES // (8 * len(folding.layers) * dim**2))
    for unit in plan.targets:
        if only is not None and not start <= only < start + unit.num_rows:
            start += unit.num_rows
            continue
        shard = shards.read_shard(store, plan.extractor, "targets", unit.id)
        shards.refuse_other_layers(
            shard, folding.layers, store.uri(shards.shard_key(plan.extractor, "targets", unit.id))
        )
        rows_QM = shard.arrays["rows"] if only is None else shard.arrays["rows"][only - start : only - start + 1]
        for first in range(0, len(rows_QM), block):
            sketches = rows_QM[first : first + block].astype(np.float64)
            yield from folding(sketches.reshape(len(sketches), len(folding.layers), dim, dim))
        start += unit.num_rows


def read_stored_rows(spec: RunSpec, plan: Plan, store: Store, rows: Sequence[int], layers: list[str]) -> Arrays:
    """The stored arrays of rows, which are given by their index in plan order. Reads their units alone."""
    starts_U = np.cumsum([0, *(unit.num_rows for unit in plan.candidates)])
    places: list[tuple[str, int]] = []  # unit, and row in it
    for row in rows:
        unit = int(np.searchsorted(starts_U, row, side="right")) - 1
        places.append((plan.candidates[unit].id, int(row - starts_U[unit])))
    wanted: dict[str, list[int]] = {}
    for unit_id, row in dict.fromkeys(places):
        wanted.setdefault(unit_id, []).append(row)

    def pick(shard: shards.Shard) -> Arrays:
        where = store.uri(shards.shard_key(plan.extractor, "candidates", shard.unit_id))
        shards.refuse_other_layers(shard, layers, where)
        return {name: array[wanted[shard.unit_id]] for name, array in shard.arrays.items()}

    codec, num_dims = spec.extraction.codec, len(layers) * spec.extraction.projection.dim**2
    row_bytes = codec.dims // 8 if codec.kind == "sign" else 2 * num_dims
    depth = shards.read_depth(max(unit.num_rows for unit in plan.candidates) * row_bytes)
    parts = list(shards.read_ahead(store, plan.extractor, list(wanted), pick, depth))
    index = {place: number for number, place in enumerate((unit, row) for unit in wanted for row in wanted[unit])}
    order = [index[place] for place in places]
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def contributions(
    plan: Plan, store: Store, folding: Folding, factor_Q: Float64, arrays: Arrays, progress: Callable[[], None]
) -> Float64:
    """c_q(z) of every pair and each of these rows: float64 [E, Q].

    Args:
        factor_Q: from `pair_factors`.
        arrays: from `read_stored_rows`.
        progress: called after each pair.
    """
    scoring, codec = folding.spec.scoring, folding.spec.extraction.codec.kind
    found_EQ = np.empty((len(arrays["ids"]), len(factor_Q)))
    for pair, direction_D in enumerate(folded_pairs(plan, store, folding)):
        raw_E = scorer(codec, direction_D)(arrays)
        finished_E = finish(raw_E, arrays["tokens"], arrays["norm"], scoring.score, scoring.loss)
        found_EQ[:, pair] = factor_Q[pair] * finished_E
        progress()
    return found_EQ


def explain_ends(
    plan: Plan, store: Store, folding: Folding, weight_Q: Float64, set_Q: NDArray[np.int64], rows: Sequence[int]
) -> Float64 | None:
    """c_q(z) of the few examples that a report shows: float64 [E, Q]. None: beyond MAX_PAIRS_IN_REPORT."""
    if len(weight_Q) > MAX_PAIRS_IN_REPORT or not rows:
        return None
    arrays = read_stored_rows(folding.spec, plan, store, rows, folding.layers)
    return contributions(plan, store, folding, pair_factors(folding.spec, weight_Q, set_Q), arrays, lambda: None)
