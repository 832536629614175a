"""`prism watch`: follows a run until it ends. One thread waits for the record to change, one reads the pods' logs, one asks
Kueue why it holds the run's Jobs, and the main thread draws what they know.
"""

import contextlib
import threading
from collections.abc import Iterator

from launcher.follow.kueue_reasons import kueue_reasons, with_kueue_reasons
from launcher.follow.logs.merged_logs import log_lines
from launcher.follow.run_view import RunView
from launcher.follow.terminal_text import printable
from launcher.follow.watch_screen import LiveTable, PlainLines, open_screen
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError
from launcher.resource.record import Record
from launcher.submit import has_ended, wait_until

REDRAW_SECONDS = 0.5
KUEUE_SECONDS = 10.0
"""Kueue changes its own objects, not the record: it is asked so often, while a stage is queued."""

LAST_LINES_SECONDS = 3.0
"""How long to wait for the pods' last lines once the run has ended."""


def watch_run(cluster: Cluster, record: Record) -> Record | None:
    """Show a run until it ends. Returns its final record; None if it was deleted.

    Raises:
        Refused: its record may not be read. If only its logs may not be read, a note replaces the bars.
    """
    watch = _Watch(cluster, record)
    with watch.running(), open_screen() as screen:
        while not watch.ended.wait(REDRAW_SECONDS):
            watch.draw(screen)
        watch.log_thread.join(LAST_LINES_SECONDS)
        watch.draw(screen, last=True)
    if watch.error is not None:
        raise watch.error
    return watch.record


class _Watch:
    """What the threads know, under one lock."""

    def __init__(self, cluster: Cluster, record: Record) -> None:
        self.cluster, self.first = cluster, record
        self.record: Record | None = record
        self.newest, self.reasons = record, dict[str, str]()
        self.view = RunView(record.status)
        self.title_note = ""
        self.error: Exception | None = None
        self.ended, self.stopping = threading.Event(), threading.Event()
        self.log_thread = threading.Thread(target=self._read_logs, daemon=True)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        threading.Thread(target=self._follow_record, daemon=True).start()
        threading.Thread(target=self._ask_kueue, daemon=True).start()
        self.log_thread.start()
        try:
            yield
        finally:
            self.stopping.set()

    def draw(self, screen: LiveTable | PlainLines, *, last: bool = False) -> None:
        title = printable(f"{self.first.namespace}/{self.first.name}{self.title_note}")
        with self._lock:
            screen.draw(title, self.view, last=last)

    def _follow_record(self) -> None:
        try:
            self.record = wait_until(
                self.cluster, self.first, self._is_done, on_change=self._take_record, on_outage=self._add_note
            )
        except Exception as error:  # raised by watch_run; without this the view would never end
            self.error = error
        self.ended.set()

    def _is_done(self, record: Record) -> bool:
        return self.stopping.is_set() or has_ended(record)

    def _take_record(self, record: Record) -> None:
        with self._lock:
            self.newest = record
            self._show_newest()

    def _ask_kueue(self) -> None:
        while not self.ended.is_set() and not self.stopping.is_set():
            try:
                reasons = kueue_reasons(self.cluster, self.newest, self.reasons)
            except Exception as error:  # the record is followed without them
                self._add_note(f"no reasons of Kueue: {error!r}")
                return
            with self._lock:
                self.reasons = reasons
                self._show_newest()
            self.ended.wait(KUEUE_SECONDS)

    def _show_newest(self) -> None:
        self.view.take_status(with_kueue_reasons(self.newest.status, self.first.name, self.reasons))

    def _add_note(self, line: str) -> None:
        with self._lock:
            self.view.add_note(line)

    def _read_logs(self) -> None:
        lines = log_lines(self.cluster, self.first.namespace, self.first.name, follow=True, is_over=self.ended.is_set)
        try:
            for prefix, line in lines:
                if self.stopping.is_set():
                    return
                with self._lock:
                    self.view.take_line(prefix, line)
        except Exception as error:  # the record is followed without logs
            self.title_note = f" (no bars: {error.what if isinstance(error, ClusterError) else repr(error)})"
        finally:
            lines.close()
