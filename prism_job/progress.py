"""What a stage says while it runs: one JSON line an event on stdout, and its last words for whoever started it.

The last words (a small JSON object) go to the file that PRISM_TERMINATION_LOG names; in a pod that is
/dev/termination-log, so a launcher learns the outcome without any bucket credentials (DESIGN, section 6).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_LAST_WORDS_BYTES = 4096
"""Kubernetes cuts a termination message here."""


def event(name: str, **fields: Any) -> None:
    """Print one event. `fields` must be plain values. Where several ranks write, each says which it is."""
    place = {"rank": int(os.environ["RANK"])} if "RANK" in os.environ else {}
    line = json.dumps({"event": name, "time": round(time.time(), 3), **place, **fields}, default=str)
    # One write: ranks share their stdout, and lines written in parts would mix.
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_termination_message(words: Mapping[str, Any]) -> None:
    """Say the outcome: as an event, and in the termination file if there is one."""
    event("done" if "error" not in words else "failed", **words)
    path = Path(os.environ.get("PRISM_TERMINATION_LOG", "/dev/termination-log"))
    if path.exists() or "PRISM_TERMINATION_LOG" in os.environ:
        text = json.dumps(words, default=str)
        if len(text.encode()) > MAX_LAST_WORDS_BYTES:
            text = _shortened(words)
        try:
            path.write_text(text)
        except OSError as error:
            print(f"cannot write the termination message to {path}: {error}", file=sys.stderr)


def _shortened(words: Mapping[str, Any]) -> str:
    """The words as JSON that fits, every text cut to the same length; a script of three bytes a letter is cut shorter."""
    for length in (1200, 800, 400, 200, 100, 50):
        text = json.dumps(
            {key: str(value)[:length] if isinstance(value, str) else value for key, value in words.items()}
        )
        if len(text) <= MAX_LAST_WORDS_BYTES:
            return text
    return json.dumps({"error": "the last words are too long; see the events"})


class Meter:
    """Counts work and says so at most twice a second, and at the end."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self.done = self.tokens = 0
        self.started = time.monotonic()
        self.said = 0.0

    def add(self, done: int, tokens: int = 0) -> None:
        self.done += done
        self.tokens += tokens
        if time.monotonic() - self.said >= 0.5 or self.done >= self.total:
            self.say()

    def say(self) -> None:
        self.said = time.monotonic()
        event(
            "progress",
            stage=self.stage,
            done=self.done,
            total=self.total,
            tokens=self.tokens,
            seconds=round(self.said - self.started, 3),
        )
