"""Removes what has lost its owner, and what lies in a namespace that ends, a moment later and in a thread of its own."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.cluster.server.refusals import ApiError
from tests.cluster.server.store import Object, Place, is_ending, owned_by

if TYPE_CHECKING:
    from tests.cluster.server.apiserver import ApiServer

COLLECT_AFTER_SECONDS = 0.1


class Collector:
    """Deletes what has lost its owner, what lies in a namespace that ends, and instances of a definition that goes."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.store = server, server.store
        self._due: list[tuple[float, int, str, Any]] = []
        self._count = itertools.count()
        self._wake = threading.Condition(self.store.lock)
        self._ended = False
        self.store.listeners.append(self._see)
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()

    def _later(self, kind: str, what: Any) -> None:
        heapq.heappush(self._due, (time.monotonic() + COLLECT_AFTER_SECONDS, next(self._count), kind, what))
        self._wake.notify()

    def _see(self, place: Place, old: Object | None, new: Object | None) -> None:
        before, after = (old or {}).get("metadata", {}), (new or {}).get("metadata", {})
        if after.get("ownerReferences") and after.get("ownerReferences") != before.get("ownerReferences"):
            self._later("child", place)
        if new is None:
            for child in self.store.children.get(before["uid"], ()):
                self._later("child", child)
            if place[2] and (space := self.store.get(("", "namespaces"), "", place[2])) and is_ending(space):
                self._later("namespace", place[2])
        elif place[1] == "namespaces" and "deletionTimestamp" in after and "deletionTimestamp" not in before:
            self._later("namespace", place[3])

    def _run(self) -> None:
        with self._wake:
            while not self._ended:
                if not self._due:
                    self._wake.wait()
                elif (wait := self._due[0][0] - time.monotonic()) > 0:
                    self._wake.wait(wait)
                else:
                    _, _, kind, what = heapq.heappop(self._due)
                    with contextlib.suppress(ApiError):
                        getattr(self, f"_{kind}")(what)

    def _get(self, place: Place) -> Object | None:
        return self.store.get(place[:2], place[2], place[3])

    def _delete(self, place: Place) -> None:
        item = self._get(place)
        resource = self.server.resource_at(place[:2])
        if item and resource and not is_ending(item):
            self.server.remove(resource, item, policy="Background")

    def _child(self, place: Place) -> None:
        item = self._get(place)
        references = item["metadata"].get("ownerReferences", []) if item else []
        if not item or not references:
            return
        present = []
        for reference in references:
            owner = self.store.places.get(reference["uid"])
            if owner and owner[2] in ("", place[2]):
                present.append(reference)
        if not present:
            self._delete(place)
        elif len(present) < len(references):
            self.store.commit(place[:2], item, owned_by(item, present))

    def _namespace(self, name: str) -> None:
        space = self.store.get(("", "namespaces"), "", name)
        if not space or not is_ending(space):
            return
        inside = [(*key, *place) for key, found in self.store.objects.items() for place in found if place[0] == name]
        for place in inside:
            self._delete(place)
        if not any(self._get(place) for place in inside):
            self.store.commit(("", "namespaces"), space, None)
