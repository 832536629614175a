"""The objects of a kind as they are, then each change to them, through outages. Does not know what follows from a change."""

import random
import threading
import time
from collections.abc import Callable, Iterator

from launcher.kube.cluster import Cluster, Listing
from launcher.kube.errors import ClusterError, NotFound, Refused, Unavailable
from launcher.kube.recent_outage import growing_pause, report_outage
from launcher.resource.object import Object

Change = tuple[str, Object]
"""(ADDED | MODIFIED | DELETED | BOOKMARK, object)."""

SHORT_WATCH_SECONDS = 1.0
"""A watch that ends before so long has failed: a server that is shutting down, or a proxy, would be asked without a pause."""

NOT_SERVED_SECONDS = 5.0
"""A kind that is not installed is asked for at least this often: an operator may start before its custom resource is."""


def list_and_watch(
    cluster: Cluster,
    kind: str,
    namespace: str | None,
    *,
    labels: str = "",
    fields: str = "",
    keep: Callable[[Object], Object] = lambda found: found,
    final: tuple[type[ClusterError], ...] = (NotFound, Refused),
    deadline: float | None = None,
    stopping: threading.Event | None = None,
    watch_seconds: int | None = None,
    longest_pause_seconds: float = 10.0,
    on_failure: Callable[[ClusterError, float], None] = lambda *_: None,
    on_outage: Callable[[str], None] = lambda _: None,
) -> Iterator[Listing | Change]:
    """A listing, then the changes since; after a failure, and a pause that grows, a listing again. Ends at `deadline`,
    after one listing at least, or where `stopping` is set.

    Args:
        cluster: one that does not retry by itself.
        keep: what is kept of each listed object.
        final: errors that are raised; all others are retried.
        deadline: by time.monotonic.
        watch_seconds: how long one watch lasts; None: 200 to 280 seconds, so that many do not end together.
        on_failure: called with each error that is retried and the pause that follows, in seconds.
        on_outage: called once an outage, with a line for the person who waits.
    """
    failures, stopping = 0, stopping or threading.Event()

    def seconds_left() -> float:
        return float("inf") if deadline is None else deadline - time.monotonic()

    while not stopping.is_set():
        watched_from = None
        try:
            listing = cluster.list(kind, namespace, labels=labels, fields=fields, keep=keep)
            yield listing
            version = listing.version
            while not stopping.is_set() and seconds_left() > 0:
                seconds = int(min(watch_seconds or random.randint(200, 280), max(1.0, seconds_left() + 1)))
                watched_from = time.monotonic()
                for change, found in cluster.watch(
                    kind, namespace, version, labels=labels, fields=fields, seconds=seconds
                ):
                    version, failures = found["metadata"].get("resourceVersion", version), 0
                    yield change, found
                if time.monotonic() < watched_from + min(SHORT_WATCH_SECONDS, seconds / 2) and not stopping.is_set():
                    raise Unavailable("a watch ended as it began", where=kind, fix="watch again")
                failures = 0
        except final:
            raise
        except ClusterError as error:
            has_watched = watched_from is not None and time.monotonic() > watched_from + SHORT_WATCH_SECONDS
            failures = 1 if has_watched else failures + 1
            longest_seconds = NOT_SERVED_SECONDS if isinstance(error, NotFound) else longest_pause_seconds
            pause_seconds = growing_pause(failures, longest_seconds=longest_seconds)
            on_failure(error, pause_seconds)
            report_outage(error, failures, on_outage)
            stopping.wait(max(0.0, min(pause_seconds, seconds_left())))
        if seconds_left() <= 0:
            return
