"""Leader election by a Lease object: its holder works, the others wait. Does not know what the leader does.

The client's own election raises on a refused connection and releases nothing on SIGTERM (docs/architecture.md, Kubernetes),
so this is ours: take, renew, release, each onto the version that was read. Times of other holders are never compared with our
clock: a lease is stale once we ourselves have seen it unchanged for its duration.
"""

import datetime
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Conflict, NotFound

DURATION_SECONDS, RENEW_SECONDS = 15.0, 5.0
"""How long a renewal holds; and how often the lease is renewed, which is also the timeout of one request for it."""


class Lease:
    """One Lease object, held by this process or by another.

    Args:
        identity: the name of this process in it: that of its pod.
        log: called with the fields of a log line where something unexpected happens.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration_seconds: float = DURATION_SECONDS,
        renew_seconds: float = RENEW_SECONDS,
        log: Callable[..., None] = lambda **_: None,
    ) -> None:
        self.cluster = cluster.within(renew_seconds)  # a later answer is of no use
        self.log, self.namespace, self.name, self.identity = log, namespace, name, identity
        self.duration_seconds, self.renew_seconds = duration_seconds, renew_seconds
        self._seen: tuple[str, float] = ("", 0.0)
        self._renewed = 0.0
        self._requesting = threading.Lock()
        self.held_since: float | None = None
        self.answered = time.monotonic()
        """When the API server last answered a request for the lease."""

    def acquire(self, stopping: threading.Event) -> bool:
        """Wait until the lease is ours. False if stopped before."""
        while not stopping.is_set():
            if self._try():
                return True
            stopping.wait(self.renew_seconds / 2)
        return False

    def keep(self, stopping: threading.Event, lost: Callable[[], None]) -> None:
        """Renew until stopped. If renewals fail, calls `lost` once, before another may take the lease, and returns."""
        threading.Thread(target=self._renew, args=(stopping,), daemon=True).start()
        # In another thread than the request, which may hang for longer than the lease lasts.
        while not stopping.wait(self.renew_seconds / 10):
            if time.monotonic() > self._renewed + self.duration_seconds - self.renew_seconds / 2:
                self.held_since = None
                lost()
                return

    def _renew(self, stopping: threading.Event) -> None:
        pause_seconds = self.renew_seconds
        while not stopping.wait(pause_seconds):
            pause_seconds = self.renew_seconds if self._try(stopping) else self.renew_seconds / 5

    def release(self) -> None:
        """Let the next one lead at once. If the request fails, it has to wait until the lease is stale."""
        with self._requesting:
            self.held_since = None
            try:
                lease = self.cluster.get("Lease", self.namespace, self.name)
                held = lease.get("spec") or {}
                if held.get("holderIdentity") == self.identity:
                    changed = {**held, "holderIdentity": "", "leaseDurationSeconds": 1}
                    self.cluster.replace({**lease, "kind": "Lease", "spec": changed})
            except ClusterError:
                return

    def _try(self, stopping: threading.Event | None = None) -> bool:
        """Take or renew it, if it is free, stale or ours. Any error is a failed try."""
        with self._requesting:
            if stopping is not None and stopping.is_set():
                return False
            started = time.monotonic()
            try:
                taken = self._take()
            except ClusterError:
                return False
            except Exception:  # a bug of ours must not leave an operator at work without a lease
                self.log(event="lease", error=traceback.format_exc())
                return False
            self.answered = time.monotonic()
            if taken:
                self._renewed = started
                self.held_since = started if self.held_since is None else self.held_since
            return taken

    def _take(self) -> bool:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours: dict[str, Any] = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(max(1, self.duration_seconds)),
            "renewTime": now,
        }
        try:
            lease = self.cluster.get("Lease", self.namespace, self.name)
        except NotFound:
            fresh = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
            metadata = {"name": self.name, "namespace": self.namespace}
            try:
                self.cluster.create({**fresh, "metadata": metadata, "spec": {**ours, "acquireTime": now}})
            except Conflict:
                return False
            return True
        held = lease.get("spec") or {}
        holder, version = held.get("holderIdentity"), lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, time.monotonic())
        is_stale = time.monotonic() > self._seen[1] + float(held.get("leaseDurationSeconds") or 0)
        if holder and holder != self.identity and not is_stale:
            return False
        if holder != self.identity:
            ours |= {"acquireTime": now, "leaseTransitions": int(held.get("leaseTransitions") or 0) + 1}
        try:
            self.cluster.replace({**lease, "kind": "Lease", "spec": {**held, **ours}})
        except (Conflict, NotFound):
            return False
        return True
