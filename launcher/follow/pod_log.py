"""The log of one pod: resumed where a connection broke, each line once. Not: which pods there are, where the lines go."""

from __future__ import annotations

import contextlib
import datetime
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from launcher.kube.cluster import Cluster
from launcher.kube.errors import NotFound, Refused, Unavailable
from launcher.resource.names import WORKER_CONTAINER
from launcher.resource.timestamps import parse_time, time_text

Object = dict[str, Any]

QUIET_SECONDS = 60.0
"""A stream that is silent for so long is opened anew: a connection that something in between forgot never ends by itself."""

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
MAX_TRIES = 5
"""Of reading the log of a pod that has ended, or without following: its node may never answer again."""

TIME = re.compile(r"\d{4}-\d\d-\d\dT\S+$")


class PodLog:
    """The log of one pod from its start, each line once, however often the connection breaks.

    Args:
        stopping: set: `lines` ends at the next line.
        is_over: whether the pod has ended: its log is then read to its end, once, and not followed any more.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: Object,
        tail: int | None,
        timestamps: bool,
        stopping: threading.Event,
        is_over: Callable[[], bool],
    ) -> None:
        self.cluster, self.tail, self.timestamps = cluster, tail, timestamps
        self.namespace, self.name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self.stopping, self.is_over = stopping, is_over
        self.last: datetime.datetime | None = None
        self.at_last: Counter[str] = Counter()
        """Lines of the last time seen: several may share it, and a broken stream may have brought some of them."""
        self._shut: Callable[[], None] = lambda: None

    def lines(self) -> Iterator[str]:
        """Raises Refused where the log may not be read."""
        num_failures, pause_seconds = 0, PAUSE_SECONDS
        while not self.stopping.is_set():
            was_over = self.is_over()
            try:
                for line in self._read(follow=not was_over):
                    num_failures, pause_seconds = 0, PAUSE_SECONDS
                    yield line
            except NotFound as error:
                if f'pods "{self.name}"' not in error.what:  # the pod is there, and what it ran on is not
                    yield f"(the rest of this log cannot be read: {error.what})"
                return
            except Refused as error:
                if error.code != 400:
                    raise
                if was_over:  # it ended without having begun
                    return
            except Unavailable as error:
                num_failures += was_over  # what failed while it ran, an outage perhaps, says nothing of its end
                if num_failures >= MAX_TRIES:
                    yield f"(the rest of this log cannot be read: {error.what})"
                    return
            else:
                if was_over:
                    return
            self.stopping.wait(pause_seconds)
            pause_seconds = min(LONGEST_PAUSE_SECONDS, pause_seconds * 2)

    def stop(self) -> None:
        """From any thread: end a read that waits."""
        self.stopping.set()
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # it may be ending by itself just now
            self._shut()

    def _read(self, *, follow: bool) -> Iterator[str]:
        """One connection's lines, without those that an earlier one brought."""
        before, known = self.last, Counter(self.at_last)
        lines = self.cluster.log_lines(
            self.namespace,
            self.name,
            WORKER_CONTAINER,
            follow=follow,
            timestamps=True,
            tail=self.tail if before is None else None,
            since=time_text(before) if before else "",
            silence_seconds=QUIET_SECONDS,
            opened=self._opened,
        )
        for text in lines:
            if self.stopping.is_set():
                return
            time_words, _, line = text.partition(" ")
            if not TIME.match(time_words):  # words of the node's own, in place of a log
                yield text
                continue
            when = parse_time(time_words)
            if before is not None and when < before:
                continue
            if when == before and known[line] > 0:
                known[line] -= 1
                continue
            if before is not None and when > before:
                before = None
            if when != self.last:
                self.last, self.at_last = when, Counter()
            self.at_last[line] += 1
            yield text if self.timestamps else line

    def _opened(self, shut: Callable[[], None]) -> None:
        self._shut = shut
        if self.stopping.is_set():
            shut()


def has_started(pod: Object) -> bool:
    """Whether its worker runs or ran: only then it has a log."""
    states = [one.get("state", {}) for one in _workers(pod)]
    return any("running" in state or "terminated" in state for state in states)


def has_ended(pod: Object) -> bool:
    phase = pod.get("status", {}).get("phase")
    return phase in ("Succeeded", "Failed") or any("terminated" in one.get("state", {}) for one in _workers(pod))


def _workers(pod: Object) -> list[Object]:
    found = pod.get("status", {}).get("containerStatuses") or ()
    return [one for one in found if one["name"] == WORKER_CONTAINER]
