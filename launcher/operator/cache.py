"""The records, Jobs and pods of all runs as last seen. Thread-safe. Makes no requests and decides nothing.

What we write ourselves is put in at once, and no older answer replaces it: a Job that was created a moment ago must not look
like one that somebody removed.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping

from launcher.reconcile.actions import CreateError, Observed
from launcher.reconcile.child_status import is_owned_by
from launcher.resource.names import KIND, RUN_LABEL
from launcher.resource.object import Object
from launcher.resource.record import Record, is_record

RunKey = tuple[str, str]
"""(namespace, name of the run)."""

ObjectKey = tuple[str, str, str]
"""(kind, namespace, name of the object)."""

NUM_REMOVED = 10_000
"""Removed objects that are remembered. No answer is late by more removals than that."""


class Cache:
    """Objects by key, and by the run that they belong to."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._objects: dict[ObjectKey, Object] = {}
        self._keys_of_run: dict[RunKey, set[ObjectKey]] = defaultdict(set)
        self._removed: OrderedDict[ObjectKey, int] = OrderedDict()

    def put(self, found: Object) -> RunKey | None:
        """Store an object unless it was removed or a newer version is here. Returns the run that it belongs to, or did."""
        key, run = object_key(found), run_key(found)
        with self._lock:
            here = self._objects.get(key)
            before = run_key(here) if here is not None else None
            if (here is None or _version(here) <= _version(found)) and _version(found) > self._removed.get(key, -1):
                if before is not None and before != run:  # somebody changed its label
                    self._discard(key, before)
                if run is not None:
                    self._objects[key] = trim(found)
                    self._keys_of_run[run].add(key)
        return run or before

    def drop(self, removed: Object) -> RunKey | None:
        """An object was removed. A later one of the same name stays."""
        key, run = object_key(removed), run_key(removed)
        with self._lock:
            self._remember_removal(key, _version(removed))
            here = self._objects.get(key)
            if here is not None and here["metadata"]["uid"] == removed["metadata"]["uid"]:
                run = run_key(here)  # not the removed object's: its label may be what was removed
                assert run is not None
                self._discard(key, run)
        return run

    def replace(self, kind: str, items: list[Object], version: str, *, of: RunKey | None = None) -> set[RunKey]:
        """Take over a listing: what is not in it is gone, unless it was written later. Returns the runs touched.

        Args:
            of: the one run that was listed; None: all runs.
        """
        with self._lock:
            listed = {object_key(item) for item in items}
            keys = self._objects if of is None else self._keys_of_run.get(of, set())
            here = [(key, self._objects[key]) for key in keys if key[0] == kind]
            touched = set()
            for key, found in here:
                run = run_key(found)
                if key not in listed and run is not None and _version(found) <= int(version):
                    self._discard(key, run)
                    self._remember_removal(key, int(version))
                    touched.add(run)
            return touched | {run for item in items if (run := self.put(item)) is not None}

    def record(self, kind: str, run: RunKey) -> Record | None:
        with self._lock:
            for key in self._keys_of_run.get(run, ()):
                found = self._objects[key]
                if key[0] == kind and is_record(found):
                    return Record(found)
        return None

    def records(self, kind: str) -> list[Record]:
        with self._lock:
            return [Record(found) for key, found in self._objects.items() if key[0] == kind and is_record(found)]

    def observed(
        self,
        record: Record,
        pod_warnings: Mapping[str, str] | None = None,
        create_errors: Mapping[str, CreateError] | None = None,
    ) -> Observed:
        """The children of this very record; those of an earlier record of the same name do not count."""
        with self._lock:
            found = [self._objects[key] for key in self._keys_of_run.get((record.namespace, record.name), ())]
        jobs = {one["metadata"]["name"]: one for one in found if one["kind"] == "Job" and is_owned_by(one, record.uid)}
        pods = [one for one in found if one["kind"] == "Pod"]
        return Observed(jobs, pods, pod_warnings or {}, create_errors or {})

    def _remember_removal(self, key: ObjectKey, version: int) -> None:
        """An answer that was under way when its object was removed must not restore it."""
        self._removed[key] = max(version, self._removed.pop(key, 0))
        while len(self._removed) > NUM_REMOVED:
            self._removed.popitem(last=False)

    def _discard(self, key: ObjectKey, run: RunKey) -> None:
        del self._objects[key]
        self._keys_of_run[run].discard(key)
        if not self._keys_of_run[run]:
            del self._keys_of_run[run]


def trim(found: Object) -> Object:
    """Only what decisions read: managed fields and pod specs are four fifths of a run's memory."""
    metadata = {name: value for name, value in found["metadata"].items() if name != "managedFields"}
    left_out = {"Job": ("template",), "Pod": ("containers", "volumes")}.get(found["kind"], ())
    spec = {name: value for name, value in (found.get("spec") or {}).items() if name not in left_out}
    return {**found, "metadata": metadata, **({"spec": spec} if left_out else {})}


def object_key(found: Object) -> ObjectKey:
    return found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"]


def run_key(found: Object) -> RunKey | None:
    """The run that an object belongs to: a SelectionRun's own name, else that in the label."""
    metadata = found["metadata"]
    if found["kind"] == KIND:
        return metadata.get("namespace", ""), metadata["name"]
    run = (metadata.get("labels") or {}).get(RUN_LABEL)
    return (metadata.get("namespace", ""), run) if run else None


def _version(found: Object) -> int:
    return int(found["metadata"].get("resourceVersion", 0))
