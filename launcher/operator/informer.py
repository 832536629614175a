"""What the watches have told so far: records, Jobs and pods of all runs. Thread-safe. Not: how it is told, what follows.

What we write ourselves is put in at once, and nothing older takes its place: a Job that was made a moment ago must not look
like one that somebody removed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from launcher.reconcile.actions import CreateError, Observed
from launcher.resource.names import KIND, RUN_LABEL
from launcher.resource.record import Record, is_record

Object = dict[str, Any]
Key = tuple[str, str]
"""(namespace, name of the run)."""

Place = tuple[str, str, str]
"""(kind, namespace, name of the object)."""


NUM_GONE = 10_000
"""Removed objects that are remembered: an answer that is late by more than so many removals does not come."""


class Cache:
    """Objects by place, and by the run that they belong to."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._objects: dict[Place, Object] = {}
        self._of_run: dict[Key, set[Place]] = defaultdict(set)
        self._gone: OrderedDict[Place, int] = OrderedDict()

    def put(self, found: Object) -> Key | None:
        """Take in an object unless a newer one is here, or was removed. Returns the run that it belongs to, or did."""
        place, key = place_of(found), key_of(found)
        with self._lock:
            here = self._objects.get(place)
            before = key_of(here) if here is not None else None
            if (here is None or _version(here) <= _version(found)) and _version(found) > self._gone.get(place, -1):
                if before is not None and before != key:  # somebody changed its label
                    self._remove(place, before)
                if key is not None:
                    self._objects[place] = kept(found)
                    self._of_run[key].add(place)
        return key or before

    def drop(self, gone: Object) -> Key | None:
        """An object was removed; one of the same name that was made since stays."""
        place, key = place_of(gone), key_of(gone)
        with self._lock:
            self._bury(place, _version(gone))
            here = self._objects.get(place)
            if here is not None and here["metadata"]["uid"] == gone["metadata"]["uid"]:
                key = key_of(here)  # as it was when we took it in: its label may be what was removed
                assert key is not None
                self._remove(place, key)
        return key

    def replace(self, kind: str, items: list[Object], version: str, *, of: Key | None = None) -> set[Key]:
        """A new listing: what is not in it is gone, unless it was written after the listing. Returns the runs touched.

        Args:
            of: the one run that was listed; all, if None.
        """
        with self._lock:
            told = {place_of(item) for item in items}
            places = self._objects if of is None else self._of_run.get(of, set())
            here = [(place, self._objects[place]) for place in places if place[0] == kind]
            touched = set()
            for place, found in here:
                key = key_of(found)
                if place not in told and key is not None and _version(found) <= int(version):
                    self._remove(place, key)
                    self._bury(place, int(version))
                    touched.add(key)
            return touched | {key for item in items if (key := self.put(item)) is not None}

    def record(self, kind: str, key: Key) -> Record | None:
        with self._lock:
            for place in self._of_run.get(key, ()):
                found = self._objects[place]
                if place[0] == kind and is_record(found):
                    return Record(found)
        return None

    def records(self, kind: str) -> list[Record]:
        with self._lock:
            return [Record(found) for place, found in self._objects.items() if place[0] == kind and is_record(found)]

    def seen(
        self, record: Record, notes: Mapping[str, str], refused: Mapping[str, CreateError] | None = None
    ) -> Observed:
        """The children of this very record; those of an earlier one of the same name do not count."""
        with self._lock:
            found = [self._objects[place] for place in self._of_run.get((record.namespace, record.name), ())]
        jobs = {one["metadata"]["name"]: one for one in found if one["kind"] == "Job" and is_owned(one, record.uid)}
        return Observed(jobs, [one for one in found if one["kind"] == "Pod"], notes, refused or {})

    def _bury(self, place: Place, version: int) -> None:
        """An answer that was under way when its object went must not bring it back."""
        self._gone[place] = max(version, self._gone.pop(place, 0))
        while len(self._gone) > NUM_GONE:
            self._gone.popitem(last=False)

    def _remove(self, place: Place, key: Key) -> None:
        del self._objects[place]
        self._of_run[key].discard(place)
        if not self._of_run[key]:
            del self._of_run[key]


def kept(found: Object) -> Object:
    """What decisions read. Who manages which field, and what pods are made of, are four fifths of the memory of a run."""
    metadata = {name: value for name, value in found["metadata"].items() if name != "managedFields"}
    left_out = {"Job": ("template",), "Pod": ("containers", "volumes")}.get(found["kind"], ())
    spec = {name: value for name, value in (found.get("spec") or {}).items() if name not in left_out}
    return {**found, "metadata": metadata, **({"spec": spec} if left_out else {})}


def place_of(found: Object) -> Place:
    return found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"]


def key_of(found: Object) -> Key | None:
    """The run that an object belongs to: its own name for a SelectionRun, else its label's."""
    metadata = found["metadata"]
    if found["kind"] == KIND:
        return metadata.get("namespace", ""), metadata["name"]
    run = (metadata.get("labels") or {}).get(RUN_LABEL)
    return (metadata.get("namespace", ""), run) if run else None


def is_owned(found: Object, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in found["metadata"].get("ownerReferences") or ())


def _version(found: Object) -> int:
    return int(found["metadata"].get("resourceVersion", 0))
