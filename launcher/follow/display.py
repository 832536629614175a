"""What a person sees on stderr while stages run: bars on a terminal, plain lines in CI. Not: where events come from."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_SECONDS = 5.0
"""At most one plain progress line in this time: a CI log of an hour stays under a thousand lines."""

LONGEST_WORDS = 66
"""Columns that the stage's name and the words beside a bar need; the bar takes what is left."""


class Display(Protocol):
    """Shows stages one after the other. Entered once around all of them."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def start(self, stage: str) -> None: ...
    def show(self, event: dict[str, Any]) -> None: ...
    def finish(self, stage: str, words: dict[str, Any]) -> None: ...
    def say(self, line: str) -> None: ...


def open_display(*, plain: bool = False) -> Display:
    """Bars where stderr is a terminal that can draw them, else lines."""
    can_draw = sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
    return Bars() if can_draw and not plain else Lines()


class Lines:
    """Plain lines: a stage's start, its end, and in between one every QUIET_SECONDS."""

    def __init__(self) -> None:
        self.started = self.said = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, stage: str) -> None:
        self.started = self.said = time.monotonic()
        self.say(f"{stage}: started")

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress" and time.monotonic() - self.said >= QUIET_SECONDS:
            self.said = time.monotonic()
            self.say(f"{event['stage']}: {progress_words(event)}")
        elif note := note_of(event):
            self.say(note)

    def finish(self, stage: str, words: dict[str, Any]) -> None:
        self.say(f"{stage}: done in {time.monotonic() - self.started:.1f} s; {outcome_words(words)}")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # The terminal may be gone; the stage is what matters.
            print(printable(line), file=sys.stderr, flush=True)


class Silent(Lines):
    """For verbs of a second or two, whose end is all there is to show."""

    def start(self, stage: str) -> None:
        pass

    def show(self, event: dict[str, Any]) -> None:
        pass

    def finish(self, stage: str, words: dict[str, Any]) -> None:
        pass


class Bars:
    """One bar a stage, drawn by rich, which is imported here and nowhere else."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        bar = BarColumn(bar_width=max(8, min(40, console.width - LONGEST_WORDS)))
        self.progress: Progress = Progress(
            TextColumn("{task.description:<7}", markup=False),
            bar,
            TextColumn("{task.fields[words]}", markup=False),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task: TaskID | None = None
        self.started = 0.0
        self.write_termination_message = ""

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, stage: str) -> None:
        self.started = time.monotonic()
        self.write_termination_message = ""
        self.task = self.progress.add_task(stage, total=None, words="starting")

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._update(completed=event["done"], total=event["total"], words=progress_words(event))
        elif event["event"] == "loading":
            self._update(words=f"loading on {event['device']}")
        elif note := note_of(event):
            self.say(note)

    def finish(self, stage: str, words: dict[str, Any]) -> None:
        seconds = time.monotonic() - self.started
        # A stage that had nothing to count (an unchanged selection) is full all the same.
        self._update(completed=1, total=1, words=f"{outcome_words(words)}; {seconds:.1f} s")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _update(self, **fields: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, **fields)


def progress_words(event: dict[str, Any]) -> str:
    """'24/48 examples, 3.1/s, 812 tokens/s, 0:07 left' from a progress event; rates once there are any."""
    noun = "files" if event["stage"] == "plan" else "examples"
    done, total, seconds = event["done"], event["total"], event["seconds"]
    parts = [f"{done:,}/{total:,} {noun}"]
    if seconds > 0 and done:
        parts.append(f"{_rate(done / seconds)}/s")
        if event.get("tokens"):
            parts.append(f"{_rate(event['tokens'] / seconds)} tokens/s")
        if done < total:
            parts.append(f"{_clock(seconds * (total - done) / done)} left")
    return ", ".join(parts)


def outcome_words(words: dict[str, Any]) -> str:
    """The last words of a stage, in a few words."""
    match words.get("verb"):
        case "plan":
            bad = f"; {words['badRows']:,} unusable rows" if words["badRows"] else ""
            return (
                f"{words['examples']:,} examples, {words['pairs']:,} pairs; "
                f"{words['missing']:,} of {words['units']:,} units to extract{bad}"
            )
        case "extract":
            share = share_of_audit(words)
            audit = f"; {share:.0%} of the time for the audit's sample" if share else ""
            return f"{words['units']:,} units, {words['examples']:,} examples, {words['tokens']:,} tokens{audit}"
        case "reduce" if words.get("unchanged"):
            return "this selection was published before"
        case "reduce":
            return f"{words['selected']:,} of {words['candidates']:,} examples selected"
    return "done"


def share_of_audit(words: dict[str, Any]) -> float:
    """Of the time of extraction's passes, that of the audit's, 0 to 1."""
    seconds = words.get("seconds", 0.0)
    return round(words.get("auditSeconds", 0.0) / seconds, 4) if seconds else 0.0


def printable(text: str) -> str:
    """Text from data as a terminal may show it: control characters, which could move its cursor, written out."""
    return _CONTROL.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", text
    )


# Beside what moves a cursor: what breaks a line, or turns the order of what is read.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def open_in_browser(address: str) -> None:
    """Open a report on this disk; one in a bucket is only named."""
    if "://" in address:
        print("not opened: it is not on this disk", file=sys.stderr)
        return
    import webbrowser

    webbrowser.open(Path(address).resolve().as_uri())


def note_of(event: dict[str, Any]) -> str | None:
    """Events worth a line of their own."""
    match event["event"]:
        case "ignored":
            return f"ignored {event['uri']}: {event['reason']}"
        case "loading":
            return f"loading {event['model']} on {event['device']}"
    return None


def _rate(a_second: float) -> str:
    return f"{a_second:,.0f}" if a_second >= 10 else f"{a_second:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
