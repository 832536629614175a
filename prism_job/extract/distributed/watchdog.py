"""Ends a rank that hangs, or whose spawner is gone. Does not know what a step does, or how long one should take."""

import os
import threading
import time
from typing import Self

from prism_job.progress import write_termination_message

POLL_INTERVAL_SECONDS = 0.5
SPAWNER = "PRISM_SPAWNER_PID"
"""Environment variable of a rank: the process that started it."""

MESSAGE_TIMEOUT_SECONDS = 5
"""Longest time for writing the termination message."""


class Watchdog:
    """A thread that checks when the last step began. Use as a context manager around all of a rank's work.

    A rank that waits for a peer which is gone cannot be interrupted by an exception: the thread reports which rank and
    step it is and ends the process with exit code 75. Finished units are kept.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.rank, self.limit_seconds = int(os.environ.get("RANK", 0)), limit_seconds
        self.doing = "loading"
        self.since: float | None = None  # loading a large model has no limit
        self.over = threading.Event()
        # Set by the spawner, not asked of the system here: it may be gone before this process has imported torch.
        self.spawner = int(os.environ.get(SPAWNER, 0))

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def loading(self) -> None:
        """What is done now has no limit."""
        self.doing, self.since = "loading", None

    def step(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()

    def _watch(self) -> None:
        while not self.over.wait(POLL_INTERVAL_SECONDS):
            if self.spawner and os.getppid() != self.spawner:
                self._end("its spawner is gone")
            if self.since is not None and time.monotonic() - self.since > self.limit_seconds:
                self._end(f"no progress for {self.limit_seconds:g} s")

    def _end(self, what: str) -> None:
        # Whoever reads our output may hang as well: a full pipe must not keep this process alive.
        end = threading.Timer(MESSAGE_TIMEOUT_SECONDS, os._exit, (75,))
        end.daemon = True
        end.start()
        write_termination_message(
            {
                "verb": "extract",
                "error": f"rank {self.rank}: {what}, in {self.doing}",
                "where": f"rank {self.rank}, {self.doing}",
                "fix": "run again: finished units are kept; if a step needs longer, raise extraction.stepTimeoutSeconds",
                "exitCode": 75,
            }
        )
        os._exit(75)
