"""The labels that candidates and target pairs carry in a column of their data, read from the staged rows."""

import numpy as np
from numpy.typing import NDArray

from prism_job.data.labels import label_of
from prism_job.plan.plan import Unit
from prism_job.storage.objects import Store
from prism_job.store import staged_rows

Bools = NDArray[np.bool_]


def read_labels(
    units: list[Unit], sources: list[str], store: Store, wanted_A: Bools, column: str, positive: str | None
) -> Bools:
    """Whether the column calls them good: of the wanted ones among the A rows of the units.

    Raises:
        RequestError: a wanted row without a readable label (names source and line).
        DataError: staged rows are missing or damaged.
    """
    good: list[bool] = []
    is_wanted = iter(wanted_A.tolist())
    for unit in units:
        for line, row in zip(unit.line_numbers(), staged_rows.read_rows(store, unit.rows), strict=True):
            if next(is_wanted):
                good.append(label_of(row, column, positive, f"{sources[unit.source]} line {line}"))
    return np.array(good, np.bool_)
