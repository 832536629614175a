"""Scores of the stored candidates, shard by shard, and of the audit's sample.

Shapes: K directions, one a target set; N rows; D dims.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import DataError
from prism_job.plan.plan import Audit, Block, Plan, Quarantined
from prism_job.progress import Meter
from prism_job.score.column import Column, parts
from prism_job.score.scorers import CosineScorer, finish, scorer
from prism_job.score.walk import sign_bytes
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards

Float64 = NDArray[np.float64]
Directions = Float64 | Sequence[Float64]
"""[K, D]; or with `score: representation` what each set compares candidates with, K times [Q, D]."""


@dataclass(frozen=True)
class ScoredUnit:
    """What is kept of one shard. `scores`: of its rows, along each direction."""

    scores: list[Float64]
    ids: NDArray[Any]
    tokens: NDArray[np.int32]
    nll: Float64
    norm: NDArray[np.float32]
    quarantined: dict[str, str]
    num_cut: int
    signs: NDArray[np.void] | None = None


@dataclass
class Scored:
    """What is kept of all candidates. Everything except `usable_N` is in scratch files."""

    scores: list[Column]  # one for each direction
    usable_N: NDArray[np.bool_]  # False for rows without a response token; extraction quarantined them
    ids: Column = field(default_factory=lambda: Column("V16"))
    tokens: Column = field(default_factory=lambda: Column("i4"))
    nll: Column = field(default_factory=lambda: Column("f8"))
    norm: Column = field(default_factory=lambda: Column("f4"))
    quarantined: list[Quarantined] = field(default_factory=list)
    num_cut: int = 0  # rows that go on beyond maxLength
    signs: Column | None = None  # what near-duplicates are found by (`sign_bytes`), where dedupe is near


def score_candidates(
    spec: RunSpec, plan: Plan, store: Store, layers: Sequence[str], directions_KD: Directions
) -> Scored:
    """Equation 4 for every row of the plan and each direction. Each shard is read once.

    Args:
        layers: those of the directions, which must be those of the rows.
    """
    scored = Scored([Column("f8") for _ in directions_KD], np.zeros(plan.num_examples, np.bool_))
    meter = Meter("reduce", plan.num_examples)
    start = 0
    scored_units = score_units(spec, store, plan.extractor, plan.candidates, layers, directions_KD)
    for unit, of_unit in zip(plan.candidates, scored_units, strict=True):
        for column, scores_N in zip(scored.scores, of_unit.scores, strict=True):
            column.append(scores_N)
        scored.usable_N[start : start + unit.num_rows] = of_unit.tokens > 0
        for name in ("ids", "tokens", "nll", "norm"):
            getattr(scored, name).append(getattr(of_unit, name))
        if of_unit.signs is not None:
            if scored.signs is None:
                scored.signs = Column(of_unit.signs.dtype)
            scored.signs.append(of_unit.signs)
        scored.num_cut += of_unit.num_cut
        lines = list(unit.line_numbers()) if of_unit.quarantined else []
        scored.quarantined += [
            Quarantined(source=plan.sources[unit.source], line=lines[int(row)], reason=reason)
            for row, reason in of_unit.quarantined.items()
        ]
        start += unit.num_rows
        meter.add(unit.num_rows)
    return scored


def score_sample(
    spec: RunSpec, audit: Audit, store: Store, layers: Sequence[str], directions_KD: Float64
) -> tuple[Float64, NDArray[np.int32]]:
    """Scores of the audit's sample, combined over the target sets, and its response tokens, 0 where a row is unusable.

    Args:
        spec: in the form of `audit_spec`, as the directions are.
    """
    signed_weights = [target_set.signed_weight for target_set in spec.targets.as_sets()]
    units = list(score_units(spec, store, audit.extractor, audit.units, layers, directions_KD))
    scores_N = np.concatenate([weighted_sum(unit.scores, signed_weights) for unit in units])
    return scores_N, np.concatenate([unit.tokens for unit in units])


def score_units(
    spec: RunSpec,
    store: Store,
    extractor: str,
    units: Sequence[Block],
    layers: Sequence[str],
    directions_KD: Directions,
) -> Iterator[ScoredUnit]:
    """Equation 4 for the rows of these units, in their order; shards are read ahead.

    Raises DataError: a shard is missing or damaged, its arrays do not fit together, or its rows are of other layers.
    """
    codec = spec.codec_kind
    scorers: list[Callable[[dict[str, NDArray[Any]]], Float64]] = [
        CosineScorer(each) if spec.scoring.is_forward_only else scorer(codec, each) for each in directions_KD
    ]

    def score(shard: shards.Shard) -> ScoredUnit:
        arrays = shard.arrays
        where = store.uri(shards.shard_key(extractor, "candidates", shard.unit_id))
        shards.refuse_other_layers(shard, layers, where)
        score, loss = spec.scoring.score, spec.scoring.loss
        try:
            scores = [finish(each(arrays), arrays["tokens"], arrays["norm"], score, loss) for each in scorers]
        except (KeyError, ValueError) as error:
            what = f"damaged shard: its arrays do not fit together: {error}"
            raise DataError(what, where=where, fix=shards.REDO) from error
        # Copies, so that the shard's memory is freed.
        ids = arrays["ids"].reshape(-1).view("V16").copy()
        tokens, nll, norm = (arrays[name].copy() for name in ("tokens", "nll", "norm"))
        signs = sign_bytes(arrays) if spec.selection.dedupe == "near" else None
        notes = shard.notes
        return ScoredUnit(scores, ids, tokens, nll, norm, notes["quarantined"], notes.get("cut", 0), signs)

    num_dims = directions_KD[0].shape[-1]
    row_bytes = num_dims // 8 if codec == "sign" else 2 * num_dims
    depth = shards.read_depth(max(unit.num_rows for unit in units) * row_bytes)
    return shards.read_ahead(store, extractor, [unit.id for unit in units], score, depth)


def combine(scores: list[Column], signed_weights: Sequence[float]) -> Column:
    """Σ_k sign_k weight_k s_k of every row: its score along Σ_k sign_k weight_k g_k. One set of weight 1 stays as it is."""
    if len(scores) == 1 and signed_weights[0] == 1:
        return scores[0]
    combined = Column("f8")
    for part in parts(len(scores[0])):
        combined.append(weighted_sum([column.part(part) for column in scores], signed_weights))
    return combined


def weighted_sum(scores: Sequence[Float64], signed_weights: Sequence[float]) -> Float64:
    """Σ_k sign_k weight_k s_k of each row."""
    # One after the other: np.sum's order depends on the number of rows.
    return reduce(np.add, (weight * scores_N for weight, scores_N in zip(signed_weights, scores, strict=True)))
