"""Reading: one object, a list by pages, and a watch. Changes nothing."""

from __future__ import annotations

import base64
import bisect
import json
import random
import time
from collections.abc import Callable, Iterator

from tests.cluster.server.faults import Request
from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.kinds.selectors import field_test, label_test
from tests.cluster.server.refusals import TOO_OLD, ApiError, not_found
from tests.cluster.server.store import Change, Object, Store
from tests.cluster.server.writes import as_asked


class Reading:
    def __init__(self, store: Store) -> None:
        self.store = store
        self._watch_age = 0
        self.bookmark_seconds = 10.0

    def drop_watches(self) -> None:
        """Ends all watches that run now, by closing their connections."""
        with self.store.lock:
            self._watch_age += 1
            for condition in self.store.changed.values():
                condition.notify_all()

    def get(self, request: Request) -> Object:
        """One object."""
        resource = request.kind
        item = self.store.get(resource.key, request.namespace, request.name)
        if item is None:
            raise not_found(resource, request.name)
        return as_asked(resource, item)

    def selected(self, request: Request) -> Callable[[Object], bool]:
        """Whether an object is among those that the request selects."""
        resource = request.kind
        by_label = label_test(request.query.get("labelSelector", ""))
        by_field = field_test(resource, request.query.get("fieldSelector", ""))
        space, name = request.namespace, request.name

        def test(item: Object) -> bool:
            metadata = item["metadata"]
            if (space and metadata.get("namespace", "") != space) or (name and metadata["name"] != name):
                return False
            return by_label(item) and by_field(item)

        return test

    def list(self, request: Request) -> tuple[list[Object], Object]:
        """The objects selected, and the list's metadata."""
        resource = request.kind
        with self.store.lock:
            test = self.selected(request)
            items = [item for item in self.store.list(resource.key, request.namespace or None) if test(item)]
            metadata: Object = {"resourceVersion": str(self.store.version)}
            if token := request.query.get("continue"):
                start = json.loads(base64.urlsafe_b64decode(token + "=="))
                if 0 < start["rv"] < self.store.oldest:
                    refusal = ApiError(410, TOO_OLD)
                    refusal.status["metadata"] = {"continue": page_token(-1, start["start"])}
                    raise refusal
                if start["rv"] > 0:
                    metadata["resourceVersion"] = str(start["rv"])
                after = start["start"].rstrip("\0").split("/")
                items = [item for item in items if page_key(item)[-len(after) :] > after]
            limit = int(request.query.get("limit") or 0)
            if limit and len(items) > limit:
                last = page_key(items[limit - 1])
                after = "/".join(last[1:] if request.namespace or not resource.namespaced else last)
                metadata["continue"] = page_token(int(metadata["resourceVersion"]), f"{after}\0")
                if not (request.query.get("labelSelector") or request.query.get("fieldSelector")):
                    metadata["remainingItemCount"] = len(items) - limit
                items = items[:limit]
            elif resource.custom:
                metadata["continue"] = ""
        return [as_asked(resource, item) for item in items], metadata

    def watch(self, request: Request, alive: Callable[[], bool]) -> Iterator[tuple[str, Object] | None]:
        """Changes as (ADDED | MODIFIED | DELETED | BOOKMARK | ERROR, object), until the time asked for is over.

        Raises ConnectionResetError where watches are dropped. Yields None now and then, so that the caller can look about.
        """
        resource, query = request.kind, request.query
        test, key = self.selected(request), resource.key
        ends = time.monotonic() + float(query.get("timeoutSeconds") or random.uniform(1800, 3600))
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        initial = query.get("sendInitialEvents") in ("true", "1")
        with self.store.lock:
            age, condition = self._watch_age, self.store.condition(key)
            text = query.get("resourceVersion", "")
            ready: list[tuple[str, Object]] = []
            if text in ("", "0") or initial:
                ready = [("ADDED", item) for item in self.store.list(key) if test(item)]
                seen = self.store.version
            else:
                seen = int(text)
                if seen < max(self.store.oldest, self.store.forgotten.get(key, 0)):
                    yield "ERROR", ApiError(410, f"too old resource version: {seen} ({self.store.oldest})").status
                    return
        yield from ready
        if initial:
            yield "BOOKMARK", bookmark(resource, seen, {"k8s.io/initial-events-end": "true"})
        marked = time.monotonic()
        while alive():
            ready = []
            with self.store.lock:
                changes = self.store.history.get(key, [])
                fresh = bisect.bisect_right(changes, seen, key=lambda change: change.version)
                now = time.monotonic()
                if fresh == len(changes) and now < ends and age == self._watch_age:
                    condition.wait(min(ends - now, 1.0))
                    changes = self.store.history.get(key, [])
                    fresh = bisect.bisect_right(changes, seen, key=lambda change: change.version)
                if age != self._watch_age:
                    raise ConnectionResetError("watches are dropped")
                if seen < self.store.forgotten.get(key, 0):
                    ready = [("ERROR", ApiError(410, f"too old resource version: {seen} ({self.store.oldest})").status)]
                for change in changes[fresh:]:
                    if event := seen_through(test, change):
                        left = event == "DELETED" and change.kind != "DELETED"
                        ready.append((event, at_version(change) if left else change.new))
                seen = changes[-1].version if changes else seen
                latest = self.store.version
            for event in ready:
                yield event
                if event[0] == "ERROR":
                    return
            if bookmarks and time.monotonic() > marked + self.bookmark_seconds:
                marked = time.monotonic()
                yield "BOOKMARK", bookmark(resource, max(seen, latest), {})
            if time.monotonic() >= ends:
                return
            yield None


def page_token(version: int, start: str) -> str:
    """Where the next page begins, and at which version; -1: at the newest, whatever changed since."""
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": start})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def page_key(item: Object) -> list[str]:
    return [item["metadata"].get("namespace", ""), item["metadata"]["name"]]


def bookmark(resource: Resource, version: int, annotations: dict[str, str]) -> Object:
    """An object of that kind, empty but for its version."""
    metadata: Object = {"resourceVersion": str(version), **({"annotations": annotations} if annotations else {})}
    empty: dict[str, Object] = {
        "jobs": {"spec": {"template": {"metadata": {}, "spec": {"containers": None}}}, "status": {}},
        "pods": {"spec": {"containers": None}, "status": {}},
    }
    parts = empty.get(resource.plural, {})
    return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata, **parts}


def at_version(change: Change) -> Object:
    """An object as it was before a change, at the change's version."""
    assert change.old is not None
    return {**change.old, "metadata": {**change.old["metadata"], "resourceVersion": str(change.version)}}


def seen_through(test: Callable[[Object], bool], change: Change) -> str:
    """What a watcher with this selector sees of a change."""
    after = change.kind != "DELETED" and test(change.new)
    before = change.old is not None and test(change.old)
    return {(True, True): "MODIFIED", (True, False): "ADDED", (False, True): "DELETED"}.get((after, before), "")
