"""Progress of `prism run` on stderr: bars on a terminal, plain lines in CI. `prism watch` draws in watch_screen.py."""

import contextlib
import os
import sys
import time
from typing import Any, Self

from launcher.follow.event_text import note_text, outcome_text, progress_text
from launcher.follow.terminal_text import printable

LINE_INTERVAL_SECONDS = 5.0
"""Between two plain progress lines: the CI log of an hour stays under a thousand lines."""

MAX_TEXT_COLUMNS = 66
"""Columns for the stage's name and the text beside a bar; the bar takes what is left."""


class Display:
    """Shows stages one after the other; entered once around all of them. This one shows nothing but notes of the launcher."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
    def start(self, stage: str) -> None: ...
    def show(self, event: dict[str, Any]) -> None: ...
    def finish(self, stage: str, outcome: dict[str, Any]) -> None: ...

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # The terminal may be gone; the stage is what matters.
            print(printable(line), file=sys.stderr, flush=True)


def can_draw_bars() -> bool:
    """Whether stderr is a terminal that can draw over itself."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def open_display(*, plain: bool = False) -> Display:
    """Bars if the terminal can draw them, else lines."""
    return Bars() if can_draw_bars() and not plain else Lines()


class Steps(Display):
    """Of a verb whose progress is not shown: a line where a slow step begins."""

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "step" and (note := note_text(event)):
            self.say(note)


class Lines(Display):
    """Plain lines: a stage's start, its end, and one every LINE_INTERVAL_SECONDS in between."""

    def __init__(self) -> None:
        self.started = self.last_line = 0.0

    def start(self, stage: str) -> None:
        self.started = self.last_line = time.monotonic()
        self.say(f"{stage}: started")

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress" and time.monotonic() - self.last_line >= LINE_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            self.say(f"{event['stage']}: {progress_text(event)}")
        elif note := note_text(event):
            self.say(note)

    def finish(self, stage: str, outcome: dict[str, Any]) -> None:
        self.say(f"{stage}: done in {time.monotonic() - self.started:.1f} s; {outcome_text(outcome)}")


class Bars(Display):
    """One bar per stage, drawn by rich, which is imported only here and in watch_screen.py."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn

        console = Console(stderr=True)
        bar = BarColumn(bar_width=max(8, min(40, console.width - MAX_TEXT_COLUMNS)))
        self.progress = Progress(
            TextColumn("{task.description:<7}", markup=False),
            bar,
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task: TaskID | None = None
        self.started = 0.0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, stage: str) -> None:
        self.started = time.monotonic()
        self.task = self.progress.add_task(stage, total=None, text="starting")

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._update(completed=event["done"], total=event["total"], text=progress_text(event))
        elif event["event"] == "loading":
            self._update(text=f"loading on {event['device']}")
        elif note := note_text(event):
            self.say(note)

    def finish(self, stage: str, outcome: dict[str, Any]) -> None:
        seconds = time.monotonic() - self.started
        # A stage that had nothing to count (an unchanged selection) still ends with a full bar.
        self._update(completed=1, total=1, text=f"{outcome_text(outcome)}; {seconds:.1f} s")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _update(self, **fields: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, **fields)
