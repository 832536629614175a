"""What a stage reports while it runs: one JSON line per event on stdout, and its termination message at the end.

The termination message (a small JSON object) goes to the file that PRISM_TERMINATION_LOG names; in a pod that is
/dev/termination-log, so the launcher learns the outcome without bucket credentials (docs/architecture.md, Contracts).
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_TERMINATION_MESSAGE_BYTES = 4096
"""Kubernetes truncates a longer one."""

REPORT_INTERVAL_SECONDS = 0.5


def event(name: str, **fields: Any) -> None:
    """Print one event. `fields` must be plain values. In a world of several ranks the event carries its rank."""
    rank = {"rank": int(os.environ["RANK"])} if "RANK" in os.environ else {}
    line = json.dumps({"event": name, "time": round(time.time(), 3), **rank, **fields}, default=str)
    # One write: ranks share stdout, and lines written in parts would mix.
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_termination_message(message: Mapping[str, Any]) -> None:
    """Report the outcome: as an event, and in the termination file if there is one."""
    event("done" if "error" not in message else "failed", **message)
    path = Path(os.environ.get("PRISM_TERMINATION_LOG", "/dev/termination-log"))
    if path.exists() or "PRISM_TERMINATION_LOG" in os.environ:
        text = json.dumps(message, default=str)
        if len(text.encode()) > MAX_TERMINATION_MESSAGE_BYTES:
            text = _shortened(message)
        try:
            path.write_text(text)
        except OSError as error:
            print(f"cannot write the termination message to {path}: {error}", file=sys.stderr)


def _shortened(message: Mapping[str, Any]) -> str:
    """The message as JSON that fits: every text is cut to the same length, the longest that works."""
    for length in (1200, 800, 400, 200, 100, 50):
        text = json.dumps(
            {key: str(value)[:length] if isinstance(value, str) else value for key, value in message.items()}
        )
        if len(text) <= MAX_TERMINATION_MESSAGE_BYTES:
            return text
    return json.dumps({"error": "the termination message is too long; see the events"})


class Meter:
    """Counts finished work and reports it at most twice a second, and at the end."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self.done = self.tokens = 0
        self.started = time.monotonic()
        self.last_report = 0.0

    def add(self, done: int, tokens: int = 0) -> None:
        self.done += done
        self.tokens += tokens
        if time.monotonic() - self.last_report >= REPORT_INTERVAL_SECONDS or self.done >= self.total:
            self.report()

    def report(self) -> None:
        self.last_report = time.monotonic()
        event(
            "progress",
            stage=self.stage,
            done=self.done,
            total=self.total,
            tokens=self.tokens,
            seconds=round(self.last_report - self.started, 3),
        )
