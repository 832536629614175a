"""The audit's sample: the candidates with the smallest example ids."""

from __future__ import annotations

import heapq

from prism_job.data.data_files import Row
from prism_job.plan.plan import Block
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows


class Sample:
    """The rows with the smallest example ids of all that are shown to it, equal ones once; holds no others.

    Ids are digests of the content, so these rows are drawn uniformly from the distinct ones, and few of them change when
    data are added.
    """

    def __init__(self, size: int) -> None:
        self.size, self.num_seen = size, 0
        self.largest_first: list[int] = []
        self.kept: dict[int, tuple[int, str, Row]] = {}

    def add(self, example_id: str, row: Row) -> None:
        place, number = self.num_seen, int(example_id, 16)
        self.num_seen += 1
        if number in self.kept or not self.size:
            return
        if len(self.kept) < self.size:
            heapq.heappush(self.largest_first, -number)
        elif number < -self.largest_first[0]:
            del self.kept[-heapq.heapreplace(self.largest_first, -number)]
        else:
            return
        self.kept[number] = (place, example_id, row)

    @property
    def places(self) -> list[int]:
        """Of the rows in the order of their ids: the place at which each was first shown."""
        return [self.kept[number][0] for number in sorted(self.kept)]

    def stage(self, size: int, store: Store, known: set[str]) -> tuple[list[Block], list[int]]:
        """Units of `size` of the sample's rows in the order of their ids, staged; and the places of these rows."""
        rows_kept = [self.kept[number] for number in sorted(self.kept)]
        units = []
        for start in range(0, len(rows_kept), size):
            part = rows_kept[start : start + size]
            name = staged_rows.stage_rows(store, [row for _, _, row in part], known)
            unit_id = shards.unit_id_of([example_id for _, example_id, _ in part])
            units.append(Block(id=unit_id, rows=name, num_rows=len(part)))
        return units, self.places
