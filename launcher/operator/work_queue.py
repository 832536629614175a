"""The queue of runs that are due for a reconcile pass: each run once, and never at two workers at a time."""

import heapq
import threading
import time

from launcher.operator.cache import RunKey

BUSY_RETRY_SECONDS = 0.05
"""A run that is due while a worker has it is looked at again after this long, so that the next run need not wait."""


class WorkQueue:
    """Runs by the time at which they are due."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[RunKey, float] = {}
        self._heap: list[tuple[float, RunKey]] = []
        self._busy: set[RunKey] = set()
        self._closed = False

    def add(self, key: RunKey, after_seconds: float = 0.0) -> None:
        """Make a run due after this long. If it is due earlier already, nothing changes."""
        due = time.monotonic() + max(0.0, after_seconds)
        with self._changed:
            if self._due.get(key, float("inf")) > due:
                self._due[key] = due
                heapq.heappush(self._heap, (due, key))
                self._changed.notify()

    def take(self) -> RunKey | None:
        """Wait for a run that is due. None once closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
                    heapq.heappop(self._heap)  # the run was added again with an earlier time
                if not self._heap or self._heap[0][0] > now:
                    self._changed.wait(timeout=self._heap[0][0] - now if self._heap else None)
                    continue
                _, key = heapq.heappop(self._heap)
                if key in self._busy:
                    self._due[key] = now + BUSY_RETRY_SECONDS
                    heapq.heappush(self._heap, (self._due[key], key))
                    continue
                del self._due[key]
                self._busy.add(key)
                return key
            return None

    def done(self, key: RunKey) -> None:
        """The worker that took the run has finished its pass."""
        with self._changed:
            self._busy.discard(key)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def num_due(self) -> int:
        """Runs whose time has come and that no worker has taken. Every other run waits for its next regular pass."""
        with self._changed:
            now = time.monotonic()
            return sum(due <= now for due in self._due.values())

    def __len__(self) -> int:
        with self._changed:
            return len(self._due)
