"""What is stored: objects by place, a history of changes a kind, who owns whom. Knows no request and no rule."""

from __future__ import annotations

import marshal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

Object = dict[str, Any]
Place = tuple[str, str, str, str]
"""Where an object lies: group, plural, namespace (empty for those of the cluster), name."""

FIRST_VERSION = 1000
"""Versions start here, so that '1' is one that a server has long forgotten."""
HISTORY = 20_000
"""Changes of one kind that can still be watched."""


def stamp(after_seconds: float = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=after_seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def copied(value: Any) -> Any:
    return marshal.loads(marshal.dumps(value))


@dataclass(frozen=True)
class Change:
    """One change of one object: `new` is its last state where `kind` is DELETED."""

    version: int
    kind: str
    new: Object
    old: Object | None


class Store:
    """Objects by place, a history of changes a kind, and who owns whom. The caller holds `lock`; objects are never changed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.version = FIRST_VERSION
        self.oldest = FIRST_VERSION
        self.forgotten: dict[tuple[str, str], int] = {}
        self.objects: dict[tuple[str, str], dict[tuple[str, str], Object]] = {}
        self.history: dict[tuple[str, str], list[Change]] = {}
        self.changed: dict[tuple[str, str], threading.Condition] = {}
        self.places: dict[str, Place] = {}
        self.children: dict[str, set[Place]] = {}
        self.listeners: list[Callable[[Place, Object | None, Object | None], None]] = []

    def condition(self, key: tuple[str, str]) -> threading.Condition:
        """Told of each change of a kind."""
        return self.changed.setdefault(key, threading.Condition(self.lock))

    def get(self, key: tuple[str, str], namespace: str, name: str) -> Object | None:
        return self.objects.get(key, {}).get((namespace, name))

    def list(self, key: tuple[str, str], namespace: str | None = None) -> list[Object]:
        """A kind's objects by namespace and name; of one namespace, or (None) of all."""
        found = self.objects.get(key, {})
        return [found[place] for place in sorted(found) if namespace in (None, place[0])]

    def commit(self, key: tuple[str, str], old: Object | None, new: Object | None) -> Object:
        """Stores `new` (None: removes `old`) under the next version, and tells watchers. Returns what they saw."""
        self.version += 1
        seen = new if new is not None else old
        assert seen is not None
        seen = {**seen, "metadata": {**seen["metadata"], "resourceVersion": str(self.version)}}
        metadata = seen["metadata"]
        place = (*key, metadata.get("namespace", ""), metadata["name"])
        for reference in (old or {}).get("metadata", {}).get("ownerReferences", ()):
            siblings = self.children.get(reference["uid"], set())
            siblings.discard(place)
            if not siblings:
                self.children.pop(reference["uid"], None)
        stored = self.objects.setdefault(key, {})
        if new is None:
            del stored[place[2:]]
            self.places.pop(metadata["uid"], None)
        else:
            stored[place[2:]] = seen
            self.places[metadata["uid"]] = place
            for reference in metadata.get("ownerReferences", ()):
                self.children.setdefault(reference["uid"], set()).add(place)
        kind = "DELETED" if new is None else "MODIFIED" if old else "ADDED"
        changes = self.history.setdefault(key, [])
        changes.append(Change(self.version, kind, seen, old))
        if len(changes) > 2 * HISTORY:
            self.forgotten[key] = changes[HISTORY - 1].version
            del changes[:HISTORY]
        self.condition(key).notify_all()
        for listener in self.listeners:
            listener(place, old, None if new is None else seen)
        return seen


def owned_by(item: Object, references: list[Object]) -> Object:
    metadata = {name: value for name, value in item["metadata"].items() if name != "ownerReferences"}
    return {**item, "metadata": {**metadata, **({"ownerReferences": references} if references else {})}}


def is_ending(item: Object) -> bool:
    return "deletionTimestamp" in item["metadata"]
