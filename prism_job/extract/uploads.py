"""Puts finished units into the store on a thread of its own, while the next unit is computed. Not: what is in them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from prism_job.extract.work_unit import Arrays
from prism_job.plan.plan import Block
from prism_job.progress import event
from prism_job.storage.objects import Store
from prism_job.store import shards

Shard = tuple[str, shards.Kind, Arrays, dict[str, Any]]
"""Its extractor, its kind, its arrays and notes."""


class Uploads:
    """Puts shards on another thread while the next unit is computed. One unit waits at most: memory stays bounded."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.thread = ThreadPoolExecutor(1, "upload")
        self.waiting: Future[None] | None = None
        self.num_written = 0

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self.thread.shutdown(wait=True)

    def put(self, unit: Block, shards_of_unit: list[Shard]) -> None:
        self._wait()
        self.waiting = self.thread.submit(self._write, unit, shards_of_unit)

    def _wait(self) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.result()

    def _write(self, unit: Block, shards_of_unit: list[Shard]) -> None:
        for extractor, kind, arrays, notes in shards_of_unit:
            num_bytes = shards.write_shard(self.store, extractor, kind, unit.id, arrays, notes)
            event("shard", kind=kind, extractor=extractor, unit=unit.id, rows=unit.num_rows, bytes=num_bytes)
        # As the plan counts: a unit of each extractor.
        self.num_written += len({extractor for extractor, *_ in shards_of_unit})
