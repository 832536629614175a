"""One number a row and direction: the inner product of a stored row with it, read straight from the stored bytes.

Shapes: K directions, N rows, D dims, S = D / 256 blocks, B = 256 dims of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import DataError
from prism_job.plan.plan import Plan, Quarantined
from prism_job.progress import Meter
from prism_job.score.column import Column, parts
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards
from prism_job.store.codec import BLOCK

Float64 = NDArray[np.float64]


class SignScorer:
    """Inner products with sign rows: those of the direction in integers of 24 bits, a step for each block of 256 dims.

    A step is 1 / (2^23 - 1) of the block's largest absolute value, so that a dim is off by half of that at most, and a score,
    with m_s that largest value, by Σ_s 256 scale_s m_s 2^-24 <= 2^-20 |row| |direction|. The result of a row does not depend
    on its neighbours.
    """

    def __init__(self, direction_D: Float64) -> None:
        from prism_job.score.sign_kernel import LIMIT, sign_sums  # brings llvmlite, which no other codec needs

        self.sums = sign_sums()
        blocks_SB = direction_D.reshape(-1, BLOCK)
        # Scaled to 1, so that no direction, however damped, leaves the range of float64 in what follows.
        self.scale = float(np.abs(direction_D).max(initial=0.0)) or 1.0
        relative_SB = blocks_SB / self.scale
        self.steps_S = np.abs(relative_SB).max(axis=1) / LIMIT
        steps_S1 = np.where(self.steps_S > 0, self.steps_S, 1.0)[:, None]
        self.quantised_D = np.rint(relative_SB / steps_S1).clip(-LIMIT, LIMIT).astype(np.int32).reshape(-1)

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> Float64:
        scores_N = self.sums(arrays["signs"], arrays["scales"], self.quantised_D, self.steps_S)
        if arrays["unit"].shape != scores_N.shape:
            raise ValueError(f"units of shape {arrays['unit'].shape} beside {len(scores_N)} rows")
        return scores_N * (arrays["unit"].astype(np.float64) * self.scale)


class Float16Scorer:
    """Inner products with float16 rows, in float64."""

    def __init__(self, direction_D: Float64) -> None:
        self.direction_D = direction_D

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> Float64:
        scores = np.array([np.dot(row.astype(np.float64), self.direction_D) for row in arrays["values"]])
        return scores.reshape(-1) * arrays["unit"].astype(np.float64)


def scorer(codec: str, direction_D: Float64) -> SignScorer | Float16Scorer:
    return SignScorer(direction_D) if codec == "sign" else Float16Scorer(direction_D)


def finish(raw_N: Float64, tokens_N: NDArray[np.int32], norm_N: NDArray[np.float32], score: str, loss: str) -> Float64:
    """The score asked for: cosine divides by the row's norm (LESS), loss `mean` by its response tokens."""
    if score == "cosine":
        divisor = norm_N.astype(np.float64)
    else:
        divisor = tokens_N.astype(np.float64) if loss == "mean" else np.ones(len(raw_N))
    return np.divide(raw_N, divisor, out=np.zeros_like(raw_N), where=divisor > 0)


@dataclass
class Scored:
    """What is kept of the candidates: in columns, all but one byte a row.

    `scores`: a column a direction. `usable_N`: False for rows without a response token; extraction quarantined them.
    """

    scores: list[Column]
    usable_N: NDArray[np.bool_]
    ids: Column
    tokens: Column
    nll: Column
    norm: Column
    quarantined: list[Quarantined]


@dataclass(frozen=True)
class _Unit:
    """What is kept of one shard: the scores of its rows along each direction, and the rest."""

    scores: list[Float64]
    small: dict[str, NDArray[Any]]
    quarantined: dict[str, str]


def score_candidates(spec: RunSpec, plan: Plan, store: Store, directions_KD: Float64) -> Scored:
    """Equation 4 for every row of the plan and each direction, shard by shard, some of them read ahead; each is read once."""
    kind = spec.extraction.codec.kind
    scorers = [scorer(kind, direction_D) for direction_D in directions_KD]

    def score(shard: shards.Shard) -> _Unit:
        arrays = shard.arrays
        score, loss = spec.scoring.score, spec.scoring.loss
        try:
            scores = [finish(each(arrays), arrays["tokens"], arrays["norm"], score, loss) for each in scorers]
        except (KeyError, ValueError) as error:
            where = store.uri(shards.shard_key(plan.extractor, "candidates", shard.unit_id))
            what = f"damaged shard, its arrays do not fit together: {error}"
            raise DataError(what, where=where, fix=shards.REDO) from error
        small = {name: arrays[name].copy() for name in ("tokens", "nll", "norm")}
        small["ids"] = arrays["ids"].reshape(-1).view("V16").copy()
        return _Unit(scores, small, shard.notes["quarantined"])

    total = plan.num_examples
    scored = Scored(
        [Column("f8") for _ in scorers],
        np.zeros(total, np.bool_),
        Column("V16"),
        Column("i4"),
        Column("f8"),
        Column("f4"),
        [],
    )
    meter = Meter("reduce", total)
    num_dims = directions_KD.shape[1]
    row_bytes = num_dims // 8 if kind == "sign" else 2 * num_dims
    depth = shards.read_depth(max(unit.num_rows for unit in plan.candidates) * row_bytes)
    found = shards.read_ahead(store, plan.extractor, [unit.id for unit in plan.candidates], score, depth)
    start = 0
    for unit, part in zip(plan.candidates, found, strict=True):
        rows = slice(start, start + unit.num_rows)
        for column, scores_N in zip(scored.scores, part.scores, strict=True):
            column.append(scores_N)
        scored.usable_N[rows] = part.small["tokens"] > 0
        columns = {"ids": scored.ids, "tokens": scored.tokens, "nll": scored.nll, "norm": scored.norm}
        for name, column in columns.items():
            column.append(part.small[name])
        lines = list(unit.line_numbers()) if part.quarantined else []
        scored.quarantined += [
            Quarantined(source=plan.sources[unit.source], line=lines[int(place)], reason=reason)
            for place, reason in part.quarantined.items()
        ]
        start += unit.num_rows
        meter.add(unit.num_rows)
    return scored


def combine(scores: list[Column], signed_weights: Sequence[float]) -> Column:
    """Σ_k sign_k weight_k s_k of every row: its score along Σ_k sign_k weight_k g_k. One set of weight 1 stays as it is."""
    if len(scores) == 1 and signed_weights[0] == 1:
        return scores[0]
    combined = Column("f8")
    for part in parts(len(scores[0])):
        terms = (weight * column.part(part) for weight, column in zip(signed_weights, scores, strict=True))
        combined.append(reduce(np.add, terms))  # one after the other: np.sum's order depends on the part's size
    return combined
