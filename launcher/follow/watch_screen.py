"""Draws `prism watch` on stderr: a live table with bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launcher.follow.bars import LINE_INTERVAL_SECONDS, Lines, can_draw_bars
from launcher.follow.run_view import Row, RunView, changes, line_of

if TYPE_CHECKING:
    from rich.console import Console, Group

BAR_COLUMNS = 24
STYLES = {"Succeeded": "green", "Failed": "bold red", "Queued": "yellow", "Pending": "yellow", "Running": "cyan"}


def open_screen() -> LiveTable | PlainLines:
    """A live table if the terminal can draw it, else lines. Both draw a view again and again; entered once around all of it."""
    return LiveTable() if can_draw_bars() else PlainLines()


class PlainLines:
    """Every change of state at once; progress every few seconds."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or Lines().say
        self.rows: list[Row] = []
        self.progress: list[str] = []
        self.phase = ""
        self.last_progress = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def draw(self, title: str, view: RunView, *, last: bool = False) -> None:
        rows = view.rows()
        for line in (*view.take_notes(), *changes(self.rows, rows)):
            self.say(line)
        self.rows, now = rows, time.monotonic()
        if now - self.last_progress >= LINE_INTERVAL_SECONDS:
            self.last_progress = now
            # A single group's progress is part of the sum over all groups.
            shown = [row for row in rows if row.total and row.state in ("", "Running") and row.label[0] != " "]
            progress = [line_of(row) for row in shown]
            for line in progress:
                if line not in self.progress:
                    self.say(line)
            self.progress = progress
        if last or view.status.phase != self.phase:
            self.phase = view.status.phase
            self.say(f"{title}: {view.headline()}")


class LiveTable:
    """A table that redraws itself in place, by rich."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(stderr=True, highlight=False)
        self.live = Live(
            console=self.console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="ellipsis",
        )

    def __enter__(self) -> LiveTable:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def draw(self, title: str, view: RunView, *, last: bool = False) -> None:
        with contextlib.suppress(OSError):  # The terminal may be gone.
            for note in view.take_notes():
                self.console.print(note, markup=False, highlight=False, soft_wrap=True)
            self.live.update(table_of(title, view, last=last), refresh=True)


def table_of(title: str, view: RunView, *, last: bool = False) -> Group:
    """A headline, then one row per stage or group: state, bar, text. No text is interpreted as markup."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    headline = Text.assemble((title, "bold"), "  ", view.headline())
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(width=BAR_COLUMNS)
    table.add_column(ratio=1)
    for row in view.rows():
        attempt = f" (attempt {row.attempt + 1})" if row.attempt else ""
        bar: Any = ProgressBar(total=row.total, completed=row.done, width=BAR_COLUMNS) if row.total else ""
        if row.state == "Running" and not row.total and not last:
            bar = ProgressBar(total=None, pulse=True, width=BAR_COLUMNS)
        table.add_row(Text(row.label), Text(f"{row.state}{attempt}", STYLES.get(row.state, "")), bar, Text(row.text))
    return Group(headline, table)
