"""report.html: one self-contained page. Placeholder contract; rendering follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ShownExample:
    """One example as the report prints it."""

    score: float
    source: str
    line: int
    selected: bool
    text: str


@dataclass(frozen=True)
class Report:
    """All that the page shows. N usable candidates in plan order, Q target pairs."""

    run: str
    selection_id: str
    model: str
    settings: dict[str, str]
    counts: dict[str, int]
    threshold: float | None
    action: str
    scores: NDArray[np.float64]
    selected: NDArray[np.bool_]
    preference: NDArray[np.float64]
    contribution: NDArray[np.float64]
    sources: list[str]
    source_of: NDArray[np.int32]
    highest: list[ShownExample]
    lowest: list[ShownExample]
    quarantine: list[tuple[str, int, str]]
    ignored: list[str]


def render(report: Report) -> str:
    return "<html></html>"
