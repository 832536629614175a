"""Puts finished shards into the store on a thread of its own, while the next unit is computed. Does not make their content."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray

from prism_job.extract.tasks import Output
from prism_job.plan.plan import Block
from prism_job.progress import event
from prism_job.storage.objects import Store
from prism_job.store import shards

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class NewShard:
    """A shard that is to be written."""

    output: Output
    arrays: Arrays
    notes: dict[str, Any]


class Uploads:
    """Writes one unit at a time while the next is computed; at most one unit waits, so that memory stays bounded.

    Use as a context manager: leaving it waits for the last unit.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.thread = ThreadPoolExecutor(1, "upload")
        self.pending: Future[None] | None = None
        self.num_written = 0  # units, as the plan counts them: one for each extractor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            if error_type is None:
                self._wait()
        finally:
            self.thread.shutdown(wait=True)

    def put(self, unit: Block, new_shards: list[NewShard]) -> None:
        """Write these shards of a unit, in this order. Raises what the unit before raised."""
        self._wait()
        self.pending = self.thread.submit(self._write, unit, new_shards)

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _write(self, unit: Block, new_shards: list[NewShard]) -> None:
        for shard in new_shards:
            kind, extractor = shard.output.kind, shard.output.extractor
            num_bytes = shards.write_shard(self.store, extractor, kind, unit.id, shard.arrays, shard.notes)
            event("shard", kind=kind, extractor=extractor, unit=unit.id, rows=unit.num_rows, bytes=num_bytes)
        self.num_written += len({shard.output.extractor for shard in new_shards})
