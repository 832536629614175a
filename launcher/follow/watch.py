"""`prism watch`: a live table of a run on a terminal, plain lines elsewhere, all on stderr. Not: what its rows say.

One thread waits for the record to change, another one reads its pods' logs; this one draws what they know, and ends with
the run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from launcher.follow.display import QUIET_SECONDS, Bars, Lines, open_display, printable
from launcher.follow.logs import log_lines
from launcher.follow.run_view import Row, RunView, changes, line_of
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError
from launcher.resource.record import Record
from launcher.submit import has_ended, wait_until

if TYPE_CHECKING:
    from rich.console import Console, Group

DRAW_SECONDS = 0.5
LAST_WORDS_SECONDS = 3.0
"""Once the run has ended: what its pods said last is waited for so long, and no longer."""

BAR_COLUMNS = 24


class Screen(Protocol):
    """Shows a view again and again. Entered once around all of it."""

    def __enter__(self) -> Screen: ...
    def __exit__(self, *_: object) -> None: ...
    def draw(self, title: str, view: RunView, *, last: bool = False) -> None: ...


def watch_run(cluster: Cluster, record: Record, *, plain: bool = False) -> Record | None:
    """Show a run until it ends. Returns its record then; None where it was deleted meanwhile.

    Args:
        plain: lines even on a terminal.

    Raises:
        Refused: its record may not be read. Where only logs may not be read, there are no bars, and a note says why.
    """
    watch = _Watch(cluster, record)
    with watch.running(), open_screen(plain=plain) as screen:
        while not watch.wait(DRAW_SECONDS):
            watch.draw(screen)
        watch.wait_for_last_words()
        watch.draw(screen, last=True)
    if watch.error is not None:
        raise watch.error
    return watch.record


def open_screen(*, plain: bool = False) -> Screen:
    """A live table where stderr is a terminal that can draw it, else lines."""
    return LiveTable() if isinstance(open_display(plain=plain), Bars) else PlainLines()


class _Watch:
    """What the two threads know, under one lock."""

    def __init__(self, cluster: Cluster, record: Record) -> None:
        self.cluster, self.first = cluster, record
        self.record: Record | None = record
        self.view = RunView(record.status)
        self.note = ""
        self.error: Exception | None = None
        self._lock = threading.Lock()
        self._ended, self._stopping = threading.Event(), threading.Event()
        self._log_thread = threading.Thread(target=self._read_logs, daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        threading.Thread(target=self._follow_record, daemon=True).start()
        self._log_thread.start()
        try:
            yield
        finally:
            self._stopping.set()

    def wait(self, seconds: float) -> bool:
        """Whether the run has ended."""
        return self._ended.wait(seconds)

    def wait_for_last_words(self) -> None:
        self._log_thread.join(LAST_WORDS_SECONDS)

    def draw(self, screen: Screen, *, last: bool = False) -> None:
        title = printable(f"{self.first.namespace}/{self.first.name}{self.note}")
        with self._lock:
            screen.draw(title, self.view, last=last)

    def _follow_record(self) -> None:
        try:
            self.record = wait_until(
                self.cluster, self.first, self._is_enough, on_change=self._take, on_outage=self._note
            )
        except Exception as error:  # or the view would stay for ever
            self.error = error
        self._ended.set()

    def _is_enough(self, record: Record) -> bool:
        return self._stopping.is_set() or has_ended(record)

    def _take(self, record: Record) -> None:
        with self._lock:
            self.view.take_status(record.status)

    def _note(self, line: str) -> None:
        with self._lock:
            self.view.add_note(line)

    def _read_logs(self) -> None:
        lines = log_lines(self.cluster, self.first.namespace, self.first.name, follow=True, is_over=self._ended.is_set)
        try:
            for prefix, line in lines:
                if self._stopping.is_set():
                    return
                with self._lock:
                    self.view.take_line(prefix, line)
        except Exception as error:  # the record is followed all the same
            self.note = f" (no bars: {printable(error.what if isinstance(error, ClusterError) else repr(error))})"
        finally:
            lines.close()


class PlainLines:
    """Each change of a state at once; how far a stage is, every few seconds."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or Lines().say
        self.rows: list[Row] = []
        self.progress: list[str] = []
        self.headline = ""
        self.said = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def draw(self, title: str, view: RunView, *, last: bool = False) -> None:
        rows = view.rows()
        for line in (*view.take_notes(), *changes(self.rows, rows)):
            self.say(line)
        self.rows, now = rows, time.monotonic()
        if now - self.said >= QUIET_SECONDS:
            self.said = now
            # A group's own count stands in the sum over all groups.
            counted = [
                row for row in rows if row.total and row.state in ("", "Running") and not row.place.startswith(" ")
            ]
            lines = [line_of(row) for row in counted]
            for line in lines:
                if line not in self.progress:
                    self.say(line)
            self.progress = lines
        phase = view.status.phase
        if last or phase != self.headline:
            self.headline = phase
            self.say(f"{title}: {view.headline()}")


class LiveTable:
    """A table that is drawn over itself, by rich, which is imported in this class alone."""

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
    """A headline, then a row a stage or group: where it stands, a bar, words. Nothing in it is taken for markup."""
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
        table.add_row(Text(row.place), Text(f"{row.state}{attempt}", STYLES.get(row.state, "")), bar, Text(row.words))
    return Group(headline, table)


STYLES = {"Succeeded": "green", "Failed": "bold red", "Queued": "yellow", "Pending": "yellow", "Running": "cyan"}
