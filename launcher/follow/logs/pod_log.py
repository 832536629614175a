"""The log of one pod: resumed after a broken connection, each line once. Does not know the other pods."""

import contextlib
import datetime
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.kube.cluster import Cluster
from launcher.kube.errors import NotFound, Refused, Unavailable
from launcher.resource.names import WORKER_CONTAINER
from launcher.resource.object import Object
from launcher.resource.status import parse_time, time_text

MAX_SILENCE_SECONDS = 60.0
"""A stream that is silent this long is reopened: a connection that a proxy dropped may never end by itself."""

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
MAX_TRIES = 5
"""Of reading the log of an ended pod, or without following: its node may never answer again."""

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+$")


@dataclass(eq=False)
class PodLog:
    """The log of one pod from its start. Each line comes once, however often the connection breaks.

    Args:
        stopping: once set, `lines` ends at the next line.
        is_over: whether the pod has ended; its log is then read once to its end and not followed.
    """

    cluster: Cluster
    pod: Object
    tail: int | None
    timestamps: bool
    stopping: threading.Event
    is_over: Callable[[], bool]

    def __post_init__(self) -> None:
        self.namespace, self.name = self.pod["metadata"]["namespace"], self.pod["metadata"]["name"]
        self.last_time: datetime.datetime | None = None
        self.at_last_time: Counter[str] = Counter()
        """Lines with the last timestamp: several may share it, and a broken stream may have delivered only some."""
        self._close_stream: Callable[[], None] = lambda: None

    def lines(self) -> Iterator[str]:
        """Raises Refused if the log may not be read."""
        num_failures, pause_seconds = 0, PAUSE_SECONDS
        while not self.stopping.is_set():
            was_over = self.is_over()
            try:
                for line in self._read(follow=not was_over):
                    num_failures, pause_seconds = 0, PAUSE_SECONDS
                    yield line
            except NotFound as error:
                if f'pods "{self.name}"' not in error.what:  # the pod exists, its node does not
                    yield f"(the rest of this log cannot be read: {error.what})"
                return
            except Refused as error:
                if error.code != 400:
                    raise
                if was_over:  # it ended before it started
                    return
            except Unavailable as error:
                num_failures += was_over  # failures while it ran, such as an outage, do not count against its end
                if num_failures >= MAX_TRIES:
                    yield f"(the rest of this log cannot be read: {error.what})"
                    return
            else:
                if was_over:
                    return
            self.stopping.wait(pause_seconds)
            pause_seconds = min(LONGEST_PAUSE_SECONDS, pause_seconds * 2)

    def stop(self) -> None:
        """From any thread: end a blocked read."""
        self.stopping.set()
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # it may be ending by itself
            self._close_stream()

    def _read(self, *, follow: bool) -> Iterator[str]:
        """The lines of one connection, without those of earlier ones."""
        before, known = self.last_time, Counter(self.at_last_time)
        lines = self.cluster.log_lines(
            self.namespace,
            self.name,
            WORKER_CONTAINER,
            follow=follow,
            timestamps=True,
            tail=self.tail if before is None else None,
            since=time_text(before) if before else "",
            silence_seconds=MAX_SILENCE_SECONDS,
            opened=self._opened,
        )
        for text in lines:
            if self.stopping.is_set():
                return
            timestamp, _, line = text.partition(" ")
            if not TIMESTAMP.match(timestamp):  # a message of the node instead of a log
                yield text
                continue
            when = parse_time(timestamp)
            if before is not None and when < before:
                continue
            if when == before and known[line] > 0:
                known[line] -= 1
                continue
            if before is not None and when > before:
                before = None
            if when != self.last_time:
                self.last_time, self.at_last_time = when, Counter()
            self.at_last_time[line] += 1
            yield text if self.timestamps else line

    def _opened(self, close: Callable[[], None]) -> None:
        self._close_stream = close
        if self.stopping.is_set():
            close()


def has_started(pod: Object) -> bool:
    """Whether its worker runs or ran; only then it has a log."""
    states = [container.get("state", {}) for container in _workers(pod)]
    return any("running" in state or "terminated" in state for state in states)


def has_ended(pod: Object) -> bool:
    phase = pod.get("status", {}).get("phase")
    return phase in ("Succeeded", "Failed") or any(
        "terminated" in container.get("state", {}) for container in _workers(pod)
    )


def _workers(pod: Object) -> list[Object]:
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    return [status for status in statuses if status["name"] == WORKER_CONTAINER]
