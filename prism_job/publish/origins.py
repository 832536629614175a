"""Source and line of each candidate, from the runs of lines in the plan.

Shapes: N candidates in plan order, R runs of lines (mostly one a unit), S sources.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_job.plan.plan import Plan
from prism_job.score.column import parts


class Origins:
    """Where each row in plan order stands in the data. Its memory does not grow with the number of rows."""

    def __init__(self, plan: Plan) -> None:
        runs = [(unit.source, first, count) for unit in plan.candidates for first, count in unit.lines]
        sources, first_lines, counts = np.array(runs, np.int64).T
        self.names = pa.array(plan.sources)
        self.source_R, self.line_R = sources.astype(np.int32), first_lines
        self.start_R = np.cumsum(counts) - counts

    def of(self, rows: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Index of the source, and line, of each of these rows."""
        run = np.searchsorted(self.start_R, rows, side="right") - 1
        return self.source_R[run], self.line_R[run] + (rows - self.start_R[run])

    def columns(self, rows: NDArray[Any]) -> dict[str, Any]:
        """Those of a published table."""
        sources, lines = self.of(rows)
        return {"source": pa.DictionaryArray.from_arrays(pa.array(sources), self.names), "line": lines}

    def count_by_source(self, among_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of these rows each source holds: int64 [S]."""
        counts_S = np.zeros(len(self.names), np.int64)
        for part in parts(len(among_N)):
            sources, _ = self.of(part.start + np.flatnonzero(among_N[part]))
            counts_S += np.bincount(sources, minlength=len(counts_S))
        return counts_S
