"""The signals that stop a local run: noted when they arrive, handed to the process, and what a second one does."""

import contextlib
import os
import signal
import subprocess
import time
from types import FrameType
from typing import Any, Self

from launcher.follow.bars import Display

GRACE_SECONDS = 20.0
"""From SIGTERM to SIGKILL: extract ends its micro-batch first, a few seconds even on a slow CPU."""

SAME_PRESS_SECONDS = 0.5
"""Wrappers (uv run, make) forward a Ctrl-C that the terminal has already sent: that is not a second one."""


class StopError(Exception):
    """A signal asked us to stop, and the process we ran has ended. `is_stage`: finished units are kept."""

    def __init__(self, signal_number: int, *, is_stage: bool) -> None:
        self.signal_number, self.is_stage = signal_number, is_stage
        super().__init__(f"stopped by signal {signal_number}")


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered. A signal that is ignored (nohup, `&`) stays ignored."""

    def __init__(self) -> None:
        self.received: list[tuple[int, float]] = []
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append((number, time.monotonic()))

    def wants_stop(self) -> bool:
        return bool(self.received)

    def wants_kill(self) -> bool:
        """A second signal arrived, or the grace period after the first is over."""
        first = self.received[0][1]
        return time.monotonic() > first + GRACE_SECONDS or self.received[-1][1] > first + SAME_PRESS_SECONDS


def stop_process(process: subprocess.Popen[str], display: Display, signals: Signals, *, is_stopping: bool) -> None:
    """SIGTERM on the first Ctrl-C or SIGTERM of ours; SIGKILL to the whole group where `signals` wants it."""
    if not is_stopping:
        display.say("stopping: the current work is finished first (Ctrl-C again: stop at once)")
        process.terminate()
    if signals.wants_kill():
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and everything it started, if any of it is alive."""
    # macOS answers PermissionError where only a zombie is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
