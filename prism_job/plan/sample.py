"""The audit's sample: the candidates with the smallest example ids.

Ids are digests of the content, so the sample is drawn uniformly from the distinct candidates, and few of its rows change when
data are added.
"""

import heapq

from prism_job.data.readers import Row
from prism_job.plan.plan import Block
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows


class Sample:
    """The rows with the `size` smallest ids of all that are added; of equal rows the first. Holds no others."""

    def __init__(self, size: int) -> None:
        self.size, self.num_added = size, 0
        self.largest_first: list[int] = []
        self.kept: dict[int, tuple[int, str, Row]] = {}

    def add(self, example_id: str, row: Row) -> None:
        position, number = self.num_added, int(example_id, 16)
        self.num_added += 1
        if number in self.kept or not self.size:
            return
        if len(self.kept) < self.size:
            heapq.heappush(self.largest_first, -number)
        elif number < -self.largest_first[0]:
            del self.kept[-heapq.heapreplace(self.largest_first, -number)]
        else:
            return
        self.kept[number] = (position, example_id, row)

    @property
    def positions(self) -> list[int]:
        """For each row, smallest id first: how many rows were added before it."""
        return [self.kept[number][0] for number in sorted(self.kept)]

    def stage(self, size: int, store: Store, staged: set[str]) -> list[Block]:
        """Units of `size` rows, smallest id first. Stages those that are not in `staged`."""
        by_id = [self.kept[number] for number in sorted(self.kept)]
        units = []
        for start in range(0, len(by_id), size):
            part = by_id[start : start + size]
            rows = staged_rows.stage_rows(store, [row for _, _, row in part], staged)
            unit_id = shards.unit_id_of([example_id for _, example_id, _ in part])
            units.append(Block(id=unit_id, rows=rows, num_rows=len(part)))
        return units
