"""The contents of the report: all that the page shows, as plain data.

Shapes: N candidates in plan order, Q target pairs, S sources.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.plan.plan import Quarantined
from prism_job.publish.manifest import TargetSetFacts
from prism_job.score.column import Column

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class ShownExample:
    """One example as the report shows it."""

    score: float
    source: str
    line: int
    selected: bool
    text: str


@dataclass(frozen=True)
class ShownPair:
    """One target pair as the report shows it. `number`: its row in targets.parquet, from 1. `share` of the direction."""

    number: int
    share: float
    text: str


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        counts: candidates, quarantined, duplicates, taken_by_budget, selected, selected_tokens, tokens, target_pairs.
        threshold: score of the last row that the budget took; None where it took none.
        action: the verb and the end, such as "drop lowest".
        scores: finite, float64 [N], of which the `usable` bool [N] count, and the `selected` bool [N] are chosen.
        summary: `manifest.summary` of the usable scores.
        usable_by_source, selected_by_source: how many of the usable, and of those selected, each source holds, int [S].
        preference: π of the pairs that have one, float64 [at most Q].
        contribution: each pair's share of the direction, float64 [Q]; sums to 1, or all zero where there is no direction.
        pairs: the pairs of the largest shares, largest first.
        evaluation, audit: as in the manifest.
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
    sets: list[TargetSetFacts]
    pairs: list[ShownPair]
    sources: list[str]
    usable_by_source: NDArray[np.int64]
    selected_by_source: NDArray[np.int64]
    highest: list[ShownExample]
    lowest: list[ShownExample]
    quarantine: list[Quarantined]
    ignored: list[str]
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    @property
    def num_usable(self) -> int:
        return int(self.usable.sum())
