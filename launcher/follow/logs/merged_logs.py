"""The logs of all pods of a run, merged; each line has a prefix that names its pod. Knows nothing of what a line means.

With `follow`, one thread finds new pods and one thread per pod reads its log, up to MAX_STREAMS at a time. They fill one
bounded queue, so a slow reader slows them down.
"""

import contextlib
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.follow.logs.pod_log import PodLog, has_ended, has_started
from launcher.kube.cluster import Cluster, Listing
from launcher.kube.errors import ClusterError
from launcher.kube.list_and_watch import list_and_watch
from launcher.resource.names import (
    ATTEMPT_LABEL,
    GROUP_LABEL,
    INDEX_ANNOTATION,
    ROUND_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
    pod_prefix,
)
from launcher.resource.object import Object
from launcher.resource.status import STAGES

Line = tuple[str, str]
"""(prefix, line)."""

POLL_INTERVAL_SECONDS = 2.0
"""How often to check whether the run is over. New pods are found by a watch, without polling."""

WATCH_SECONDS = 5
"""A watch of the pods is renewed this often, so that it can be stopped."""

DRAIN_SECONDS = 60.0
"""Once the run is over: give up on the remaining logs if none has ended for this long."""

MAX_QUEUED = 1000
MAX_STREAMS = 64
"""Logs read at a time: each holds a connection here and at the API server. The others wait for one to end."""


def log_lines(
    cluster: Cluster,
    namespace: str,
    run: str,
    *,
    stage: str | None = None,
    group: int | None = None,
    follow: bool,
    tail: int | None = None,
    timestamps: bool = False,
    is_over: Callable[[], bool] | None = None,
    on_outage: Callable[[str], None] = lambda _: None,
    gone: Iterable[Line] = (),
) -> Generator[Line, None, None]:
    """(prefix, line) over all pods of a run: pod after pod, or with `follow` as lines arrive.

    Args:
        follow: wait for new lines and new pods until the run is over and every log has ended. Closing the iterator
            ends its threads.
        tail: start with the last so many lines of each pod.
        timestamps: start each line with the time at which the node received it.
        is_over: whether the run has ended; called every POLL_INTERVAL_SECONDS. None: follow until closed.
        on_outage: called once per outage of the API server, with a line for the person who waits.
        gone: lines of pods that are gone. They come last; with `follow` as they arrive, from a thread. Nothing waits for them.

    Raises:
        Refused: reading pods or their logs is not allowed.
        Unavailable: without `follow`, the pods cannot be listed. With `follow`, transient errors are retried.
    """
    labels = _selector(run, stage, group)
    if follow:
        is_over = is_over or (lambda: False)
        return _Follower(
            cluster.without_retries(), namespace, labels, tail, timestamps, is_over, on_outage, gone
        ).lines()
    return _all_lines(cluster, namespace, labels, tail, timestamps, gone)


def prefix_of(pod: Object) -> str:
    """As `pod_prefix`, from the labels that a pod has."""
    labels = pod["metadata"].get("labels") or {}
    stage, group, attempt = labels.get(STAGE_LABEL, "?"), labels.get(GROUP_LABEL, "0"), labels.get(ATTEMPT_LABEL, "0")
    # Only the pods of a group of several nodes have a subdomain, where they meet.
    return pod_prefix(stage, group, attempt, _node(pod) if "subdomain" in pod["spec"] else None)


def _all_lines(
    cluster: Cluster, namespace: str, labels: str, tail: int | None, timestamps: bool, gone: Iterable[Line]
) -> Generator[Line, None, None]:
    for pod in sorted(cluster.list("Pod", namespace, labels=labels).items, key=_order):
        if has_started(pod):
            yield from _lines_of(PodLog(cluster, pod, tail, timestamps, threading.Event(), is_over=lambda: True))
    yield from gone


def _lines_of(log: PodLog) -> Iterator[Line]:
    prefix = prefix_of(log.pod)
    for line in log.lines():
        yield prefix, line


def list_pods(
    cluster: Cluster, namespace: str, run: str, *, stage: str | None = None, group: int | None = None
) -> list[Object]:
    """The pods of a run that exist."""
    return cluster.list("Pod", namespace, labels=_selector(run, stage, group)).items


def _selector(run: str, stage: str | None, group: int | None) -> str:
    wanted = {RUN_LABEL: run, STAGE_LABEL: stage, GROUP_LABEL: group}
    return ",".join(f"{name}={value}" for name, value in wanted.items() if value is not None)


@dataclass(eq=False)
class _Follower:
    """Reads all pods at once, including pods that start later."""

    cluster: Cluster
    namespace: str
    labels: str
    tail: int | None
    timestamps: bool
    is_over: Callable[[], bool]
    on_outage: Callable[[str], None]
    gone: Iterable[Line]

    def __post_init__(self) -> None:
        self.queue: queue.Queue[Line | Exception] = queue.Queue(MAX_QUEUED)
        self.stopping = threading.Event()
        self.ended_pods: set[str] = set()
        self.logs: dict[str, PodLog] = {}
        self.waiting: deque[Iterable[Line]] = deque([self.gone])
        """Logs that wait for a free stream."""
        self.num_streams = 0
        self.last_end_time = time.monotonic()
        self.lock = threading.Lock()

    def lines(self) -> Generator[Line, None, None]:
        with self.lock:
            self._read_next()
        threading.Thread(target=self._enqueue_error_of, args=(self._find_pods,), daemon=True).start()
        over_since, last_check = None, 0.0
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    while True:
                        item = self.queue.get(timeout=0.2)
                        if isinstance(item, Exception):
                            raise item
                        yield item
                if over_since is None and time.monotonic() - last_check >= POLL_INTERVAL_SECONDS:
                    last_check = time.monotonic()
                    with contextlib.suppress(ClusterError):
                        if self.is_over():
                            self._take_all()
                            over_since = last_check
                if over_since is not None and self._is_drained(over_since):
                    return
        finally:
            self.stopping.set()
            for log in list(self.logs.values()):
                log.stop()

    def _is_drained(self, over_since: float) -> bool:
        """All logs have ended, or the rest is given up."""
        is_late = time.monotonic() > max(over_since, self.last_end_time) + DRAIN_SECONDS
        with self.lock:
            is_reading = self.num_streams or self.waiting
        return self.queue.empty() and (is_late or not is_reading)

    def _find_pods(self) -> None:
        read: set[str] = set()
        for seen in list_and_watch(
            self.cluster,
            "Pod",
            self.namespace,
            labels=self.labels,
            stopping=self.stopping,
            watch_seconds=WATCH_SECONDS,
            on_outage=self.on_outage,
        ):
            match seen:
                case Listing():
                    self._take_listing(seen, read)
                case (change, pod) if change != "BOOKMARK":
                    self._take(pod, gone=change == "DELETED")
            read = set(self.logs)

    def _take_all(self) -> None:
        read = set(self.logs)
        self._take_listing(self.cluster.list("Pod", self.namespace, labels=self.labels), read)

    def _take_listing(self, listing: Listing, read: set[str]) -> None:
        """Every current pod. A pod in `read`, so known before the list was made, and not listed has ended."""
        for pod in sorted(listing.items, key=_order):
            self._take(pod, gone=False)
        self.ended_pods |= read - {pod["metadata"]["uid"] for pod in listing.items}

    def _take(self, pod: Object, *, gone: bool) -> None:
        """The current state of a pod. Its log is read once it has started."""
        uid = pod["metadata"]["uid"]
        if gone or has_ended(pod):
            self.ended_pods.add(uid)
        with self.lock:
            if uid in self.logs or gone or not has_started(pod) or self.stopping.is_set():
                return
            log = PodLog(self.cluster, pod, self.tail, self.timestamps, self.stopping, lambda: uid in self.ended_pods)
            self.logs[uid] = log
            self.waiting.append(_lines_of(log))
            self._read_next()

    def _read_next(self) -> None:
        """Start reading while there are free streams. Holds `lock`."""
        while self.waiting and self.num_streams < MAX_STREAMS and not self.stopping.is_set():
            self.num_streams += 1
            arguments = (self._enqueue_lines, self.waiting.popleft())
            threading.Thread(target=self._enqueue_error_of, args=arguments, daemon=True).start()

    def _enqueue_lines(self, lines: Iterable[Line]) -> None:
        try:
            for line in lines:
                self._put(line)
                if self.stopping.is_set():
                    return
        except Exception as error:  # enqueued before this log counts as ended
            self._put(error)
        finally:
            with self.lock:
                self.num_streams -= 1
                self.last_end_time = time.monotonic()
                self._read_next()

    def _enqueue_error_of(self, do: Callable[..., None], *arguments: Any) -> None:
        try:
            do(*arguments)
        except Exception as error:  # raised in the reader, which would otherwise wait forever
            self._put(error)

    def _put(self, item: Line | Exception) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(queue.Full):
                self.queue.put(item, timeout=0.5)
                return


def _node(pod: Object) -> int:
    annotations = pod["metadata"].get("annotations") or {}
    labels = pod["metadata"].get("labels") or {}
    return _integer(annotations.get(INDEX_ANNOTATION) or labels.get(INDEX_ANNOTATION))


def _integer(text: Any) -> int:
    """0 if it is not a number: anyone may label pods."""
    return int(text) if isinstance(text, str) and re.fullmatch("[0-9]{1,9}", text) else 0


def _order(pod: Object) -> tuple[Any, ...]:
    """Round, stage, attempt, group, node; then start."""
    labels = pod["metadata"].get("labels") or {}
    stage = labels.get(STAGE_LABEL, "")
    stage_number = STAGES.index(stage) if stage in STAGES else len(STAGES)
    round_number, attempt, group = (_integer(labels.get(name)) for name in (ROUND_LABEL, ATTEMPT_LABEL, GROUP_LABEL))
    started = pod.get("status", {}).get("startTime") or pod["metadata"].get("creationTimestamp", "")
    return round_number, stage_number, attempt, group, _node(pod), started
