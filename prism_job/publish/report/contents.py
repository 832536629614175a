"""The contents of the report: all that the page shows, as plain data.

Shapes: N candidates in plan order, Q target pairs, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.score.column import Column

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class ShownExample:
    """One example as the report prints it."""

    score: float
    source: str
    line: int
    selected: bool
    text: str


@dataclass(frozen=True)
class ShownPair:
    """One target pair as the report prints it. `number`: its row in targets.parquet, from 1. `share` of the direction."""

    number: int
    share: float
    text: str


@dataclass(frozen=True)
class ShownSet:
    """One named set of targets as the report prints it. `weight` is signed, `share` of the combined direction.

    `mean_preference`: of its pairs that have a π, None where none has.
    """

    name: str
    num_pairs: int
    weight: float
    mean_preference: float | None
    norm: float
    share: float


@dataclass(frozen=True)
class Report:
    """All that the page shows. N candidates in plan order, Q target pairs.

    Attributes:
        counts: candidates, quarantined, duplicates, taken_by_budget, selected, selected_tokens, tokens, target_pairs.
        threshold: score of the last row that the budget took; None where it took none.
        action: the verb and the end, such as "drop lowest".
        scores: finite, float64 [N], of which the `usable` bool [N] count, and the `selected` bool [N] are chosen.
        summary: what `manifest.summary` makes of the usable scores.
        usable_by_source, selected_by_source: how many of the usable, and of those selected, each source holds, int [S].
        preference: π of the pairs that have one, float64 [at most Q].
        contribution: each pair's share of the direction, float64 [Q]; sums to 1, or all zero where there is no direction.
        sets: named sets of targets, in order; empty where they are not named.
        pairs: the pairs of the largest shares, largest first.
        quarantine: (source, line, reason) of each unusable row.
        evaluation: what `evaluate.compare` says, where the document asks for it.
        audit: the manifest's figures on how far the ranking can be trusted; None where that is switched off.
    """

    run: str
    selection_id: str
    model: str
    settings: dict[str, str]
    counts: dict[str, int]
    threshold: float | None
    action: str
    scores: Column
    usable: NDArray[np.bool_]
    summary: dict[str, float]
    selected: NDArray[np.bool_]
    preference: Float64
    contribution: Float64
    sets: list[ShownSet]
    pairs: list[ShownPair]
    sources: list[str]
    usable_by_source: NDArray[np.int64]
    selected_by_source: NDArray[np.int64]
    highest: list[ShownExample]
    lowest: list[ShownExample]
    quarantine: list[tuple[str, int, str]]
    ignored: list[str]
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    @property
    def num_usable(self) -> int:
        return int(self.usable.sum())
