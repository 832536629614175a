"""Keeps the cache up to date: lists each kind, then watches it from there. Does not decide what follows from a change."""

import threading
import traceback
from collections.abc import Callable

from launcher.kube.cluster import Cluster, Listing
from launcher.kube.errors import NotFound, Unavailable
from launcher.kube.list_and_watch import Change, list_and_watch
from launcher.kube.recent_outage import growing_pause
from launcher.operator.cache import Cache, RunKey, trim
from launcher.resource.names import KIND, MANAGER, RECORD_LABEL, RUN_LABEL
from launcher.resource.record import Record

LONGEST_PAUSE_SECONDS = 30.0
"""After many failures in a row a kind is listed this often."""

CHILD_KINDS = {"Job": f"app.kubernetes.io/managed-by={MANAGER}", "Pod": f"app.kubernetes.io/managed-by={MANAGER}"}
"""Kinds of children -> the labels by which they are watched."""


class Informer:
    """Follows the records, Jobs and pods of one namespace, of all, or of one run.

    Args:
        namespace: None for all.
        record_kind: SelectionRun or ConfigMap.
        only: the name of the one run to follow; None for all.
        on_change: called with each run of which something changed.
        log: called with the fields of a log line.
    """

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        namespace: str | None,
        record_kind: str,
        only: str | None,
        *,
        on_change: Callable[[RunKey], None],
        log: Callable[..., None],
    ) -> None:
        self.cluster, self.cache, self.namespace = cluster, cache, namespace
        self.record_kind, self.only, self.on_change, self.log = record_kind, only, on_change, log
        self.kinds = (record_kind, *CHILD_KINDS)
        self.listed: set[str] = set()
        self.ready = threading.Event()
        """Set once every kind was listed, before which nothing may be decided; or by `stop`."""
        self._stopping = threading.Event()

    @property
    def is_synced(self) -> bool:
        """Whether every kind was listed once."""
        return not self.unlisted

    @property
    def unlisted(self) -> set[str]:
        """Kinds that were not listed yet."""
        return set(self.kinds) - self.listed

    def start(self) -> None:
        for kind in self.kinds:
            threading.Thread(target=self.follow, args=(kind,), daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self.ready.set()

    def follow(self, kind: str) -> None:
        """Keep the cache of one kind up to date until `stop`."""
        labels, fields = self._selectors(kind)
        num_bugs = 0
        while not self._stopping.is_set():
            try:
                for seen in list_and_watch(
                    self.cluster,
                    kind,
                    self.namespace,
                    labels=labels,
                    fields=fields,
                    keep=trim,
                    final=(),
                    stopping=self._stopping,
                    longest_pause_seconds=LONGEST_PAUSE_SECONDS,
                    on_failure=lambda error, pause_seconds: self._log_failure(
                        kind, str(error), pause_seconds, transient=isinstance(error, Unavailable)
                    ),
                ):
                    self._update_cache(kind, seen)
                    if not isinstance(seen, Listing):  # a listing comes again after each failure
                        num_bugs = 0
            except Exception:  # a bug of ours must not end what all runs depend on
                num_bugs += 1
                pause_seconds = growing_pause(num_bugs, longest_seconds=LONGEST_PAUSE_SECONDS)
                self._log_failure(kind, traceback.format_exc(), pause_seconds, transient=False)
                self._stopping.wait(pause_seconds)

    def _log_failure(self, kind: str, error: str, pause_seconds: float, *, transient: bool) -> None:
        self.log(event="watch", kind=kind, error=error, transient=transient, seconds=round(pause_seconds, 1))

    def _update_cache(self, kind: str, seen: Listing | Change) -> None:
        match seen:
            case Listing(items, version):
                for run in self.cache.replace(kind, items, version):
                    self.on_change(run)
                self.listed.add(kind)
                if self.is_synced:
                    self.ready.set()
            case ("BOOKMARK", _):
                pass
            case (change, found):
                changed = self.cache.drop(found) if change == "DELETED" else self.cache.put(found)
                if changed is not None:
                    self.on_change(changed)

    def refresh(self, record: Record) -> Record | None:
        """Read a run's record, then its children, from the server. None where the record is gone."""
        try:
            found = self.cluster.get(self.record_kind, record.namespace, record.metadata["name"])
        except NotFound:
            self.cache.drop(record.object)
            return None
        self.cache.put({"kind": self.record_kind, **found})
        key = (record.namespace, record.name)
        for kind, labels in CHILD_KINDS.items():
            listing = self.cluster.list(kind, record.namespace, labels=f"{labels},{RUN_LABEL}={record.name}", keep=trim)
            self.cache.replace(kind, listing.items, listing.version, of=key)
        return self.cache.record(self.record_kind, key)

    def _selectors(self, kind: str) -> tuple[str, str]:
        """(labels, fields) by which a kind is listed and watched."""
        if kind == KIND:
            return "", f"metadata.name={self.only}" if self.only else ""
        labels = CHILD_KINDS.get(kind, f"{RECORD_LABEL}=true")
        return f"{labels},{RUN_LABEL}={self.only}" if self.only else labels, ""
