"""One loop in three hosts: watch, decide, act, write the status last. Not: what is decided, how requests are made.

The operator runs it over all runs that it sees; `prism submit --wait` over its own one. A host that dies at any point is
continued by the next from what the cluster shows. Two at once do no harm: names are functions of the run, and a status is
written onto the version that was read.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.kube.cluster import Cluster, Listing
from launcher.kube.errors import ClusterError, Conflict, NotFound, Refused, Unavailable
from launcher.kube.list_and_watch import Change, list_and_watch
from launcher.kube.retry import growing_pause
from launcher.operator.informer import Cache, Key, is_owned, kept
from launcher.reconcile.actions import Action, Apply, Create, CreateError, Delete, Observed, Timeouts
from launcher.reconcile.conditions import Transition, sentence, transitions
from launcher.reconcile.decide import decide
from launcher.resource.names import API_GROUP, KIND, MANAGER, RECORD_LABEL, RUN_LABEL
from launcher.resource.record import Record, is_record
from launcher.resource.status import Status
from launcher.resource.timestamps import time_text
from prism_job.spec.digest import digest

Object = dict[str, Any]

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 60.0
"""A pass that failed is made again after this long, doubled each time."""

RESYNC_SECONDS = 600.0
"""Every run is looked at this often even if nothing happens: at what the watches have told. What they miss is seen where a
decision asks the server anew, and when they list again, as after each break."""

SETTLE_SECONDS = 3.0
"""A Job without pods for so long: its events are asked why."""

NOTES_SECONDS = 30.0
"""How long what events said is believed: a run of many groups would ask for them at every change."""

OPERATOR_SECONDS = 30.0
"""A client that finds a new run waits so long for an operator to take it up: longer than one takes over from another."""

OBSERVED = {"Job": f"app.kubernetes.io/managed-by={MANAGER}", "Pod": f"app.kubernetes.io/managed-by={MANAGER}"}
"""Kinds of children -> the labels by which they are watched."""


class Queue:
    """Runs that are due, each once, and none at two workers at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._busy: set[Key] = set()
        self._closed = False

    def add(self, key: Key, after_seconds: float = 0.0) -> None:
        """Due so long from now; an earlier time stands."""
        due = time.monotonic() + max(0.0, after_seconds)
        with self._changed:
            if self._due.get(key, float("inf")) > due:
                self._due[key] = due
                heapq.heappush(self._heap, (due, key))
                self._changed.notify()

    def take(self) -> Key | None:
        """Wait for a run that is due. None once closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
                    heapq.heappop(self._heap)  # an earlier time has taken its place
                ready = next((key for due, key in self._heap[:1] if due <= now and key not in self._busy), None)
                if ready is not None:
                    heapq.heappop(self._heap)
                    del self._due[ready]
                    self._busy.add(ready)
                    return ready
                if self._heap and self._heap[0][0] <= now:
                    # Due, but in another worker's hands: whoever is next must not wait behind it.
                    _, busy = heapq.heappop(self._heap)
                    self._due[busy] = now + 0.05
                    heapq.heappush(self._heap, (self._due[busy], busy))
                    continue
                self._changed.wait(timeout=self._heap[0][0] - now if self._heap else None)
            return None

    def done(self, key: Key) -> None:
        with self._changed:
            self._busy.discard(key)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return len(self._due)


@dataclass
class Counters:
    """What the operator's metrics show."""

    reconciles: int = 0
    failures: int = 0
    status_writes: int = 0
    seconds: Callable[[float], object] = lambda _: None
    """Told how long each pass took."""

    busy_since: dict[int, float] = field(default_factory=dict)
    """Worker -> when its pass in hand began: one that hangs is seen."""


@dataclass
class _Memory:
    """What is known of one record beside what the watches tell. It may be lost."""

    uid: str
    notes: dict[str, str] = field(default_factory=dict)
    noted: float = float("-inf")
    refused: dict[str, CreateError] = field(default_factory=dict)


class Controller:
    """The loop over the runs of one namespace, or of all, or over one run.

    Args:
        cluster: makes the requests; its own errors are waited out here.
        namespace: None for all.
        kind: SelectionRun or ConfigMap: what records are.
        only: the one run to look after.
        clock: the time; tests move it.
        say: told what happens, a plain dict a line.
        host: a client lets the operator go first, and leaves a run alone that an operator has taken up.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str | None,
        *,
        kind: str = KIND,
        only: str | None = None,
        patience: Timeouts | None = None,
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
        say: Callable[..., None] | None = None,
        workers: int = 1,
        host: Literal["operator", "client"] = "operator",
    ) -> None:
        self.host: Literal["operator", "client"] = host
        self.first_seen: dict[Key, float] = {}
        self.memories: dict[Key, _Memory] = {}
        self.cluster, self.namespace, self.kind, self.only = cluster, namespace, kind, only
        self.patience, self.clock, self.num_workers = patience or Timeouts(), clock, workers
        self.say = say or (lambda **_: None)
        self.cache, self.queue, self.counters = Cache(), Queue(), Counters()
        self.stopping = threading.Event()
        self.synced: set[str] = set()
        self.all_synced = threading.Event()
        self.failed: dict[Key, int] = {}
        self.on_status: Callable[[Record, Status], None] = lambda *_: None

    @property
    def is_synced(self) -> bool:
        """Whether every kind was listed once: before that nothing may be decided."""
        return not self.unlisted

    @property
    def unlisted(self) -> set[str]:
        """Kinds that were not listed yet."""
        return {self.kind, *OBSERVED} - self.synced

    def run(self) -> None:
        """Until `stop`. Watches in threads of their own; passes in this one and, where wanted, in more."""
        watchers = [threading.Thread(target=self._follow, args=(kind,), daemon=True) for kind in (self.kind, *OBSERVED)]
        workers = [
            threading.Thread(target=self._work, args=(place,), daemon=True) for place in range(1, self.num_workers)
        ]
        for thread in (*watchers, *workers):
            thread.start()
        self._work(0)
        for thread in workers:
            thread.join()

    def stop(self) -> None:
        """End after the pass in hand."""
        self.stopping.set()
        self.queue.close()
        self.all_synced.set()  # nobody waits for it any more: the queue is closed

    def _work(self, place: int) -> None:
        self.all_synced.wait()
        while (key := self.queue.take()) is not None:
            started = self.counters.busy_since[place] = time.monotonic()
            try:
                self._pass(key)
            finally:
                del self.counters.busy_since[place]
                self.counters.seconds(time.monotonic() - started)
                self.queue.done(key)

    def _pass(self, key: Key) -> None:
        try:
            self.reconcile(key)
        except ClusterError as error:
            self._again(key, str(error), transient=isinstance(error, Unavailable))
        except Exception:  # a flaw of ours, met by one run, must not stop all others
            self._again(key, traceback.format_exc(), transient=False)
        else:
            self.failed.pop(key, None)

    def _again(self, key: Key, error: str, *, transient: bool) -> None:
        self.counters.failures += 1
        self.failed[key] = self.failed.get(key, 0) + 1
        wait_seconds = min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(10, self.failed[key] - 1))
        self.say(
            event="retry",
            run=f"{key[0]}/{key[1]}",
            error=error,
            transient=transient,
            seconds=round(wait_seconds, 1),
        )
        self.queue.add(key, wait_seconds * random.uniform(0.5, 1.0))

    def reconcile(self, key: Key) -> None:
        """One pass over one run.

        Raises:
            ClusterError: an action failed; what was done stands, and the next pass goes on from there.
        """
        record = self.cache.record(self.kind, key)
        if record is None:
            self._forget(key)
            return  # Its children go with it: they name it as their owner.
        before = record.status
        if self._leaves_to_operator(record, before):
            return
        self.counters.reconciles += 1
        notes, refused = self._notes(record), self._memory(record).refused
        decision = decide(record, self.cache.seen(record, notes, refused), self.clock(), self.patience)
        if _gives_up(before, decision.status) or any(isinstance(action, Delete) for action in decision.actions):
            # What the watches told may be old, each by its own time: nothing is given up, or removed, on their word alone.
            record = self._ask(record)
            if record is None:
                return
            before = record.status
            notes, refused = self._notes(record, anew=True), self._memory(record).refused
            decision = decide(record, self.cache.seen(record, notes, refused), self.clock(), self.patience)
        refusal: Refused | None = None
        for action in decision.actions:
            try:
                self._act(action, record)
            except Refused as error:
                refusal = error
                if not self._is_remembered(action, record):
                    # A right that is missing, a name that is taken: it may pass, and who asks for the status should read it.
                    self._write_status(record, before.model_copy(update={"message": sentence(error.what)}))
                    raise
        if refusal is not None:
            # How the refused Jobs stand, and all others with those just made. Nothing of it is done in this pass.
            seen = self.cache.seen(record, notes, self._memory(record).refused)
            decision = decide(record, seen, self.clock(), self.patience)
        self._write_status(record, decision.status)
        for transition in transitions(before, decision.status):
            self._tell(record, transition)
        if refusal is not None and not decision.status.is_terminal:
            raise refusal  # to be tried again, with growing pauses
        wait_seconds = RESYNC_SECONDS
        if decision.look_again is not None:
            wait_seconds = min(wait_seconds, (decision.look_again - self.clock()).total_seconds() + 0.05)
        self.queue.add(key, wait_seconds)

    def _is_remembered(self, action: Action, record: Record) -> bool:
        """Whether it is a Job whose refusal decisions are told of."""
        name = action.object["metadata"]["name"] if isinstance(action, Create) else ""
        return name in self._memory(record).refused

    def _memory(self, record: Record) -> _Memory:
        """Of this very record: one of the same name that was there before is forgotten."""
        key = (record.namespace, record.name)
        memory = self.memories.get(key)
        if memory is None or memory.uid != record.uid:
            memory = self.memories[key] = _Memory(record.uid)
        return memory

    def _forget(self, key: Key) -> None:
        self.memories.pop(key, None)
        self.first_seen.pop(key, None)

    def _ask(self, record: Record) -> Record | None:
        """Read a run's record, then its children, anew. None where it is gone."""
        try:
            there = self.cluster.get(self.kind, record.namespace, record.metadata["name"])
        except NotFound:
            self.cache.drop(record.object)
            return None
        self.cache.put({"kind": self.kind, **there})
        key = (record.namespace, record.name)
        for kind, labels in OBSERVED.items():
            listing = self.cluster.list(kind, record.namespace, labels=f"{labels},{RUN_LABEL}={record.name}", keep=kept)
            self.cache.replace(kind, listing.items, listing.version, of=key)
        return self.cache.record(self.kind, key)

    def _act(self, action: Action, record: Record) -> None:
        match action:
            case Apply(wanted):
                self._apply(wanted, record)
            case Create(wanted):
                self._create_job(wanted, record)
                self.say(event="created", run=f"{record.namespace}/{record.name}", job=wanted["metadata"]["name"])
            case Delete(kind, namespace, name, uid):
                self.cluster.delete(kind, namespace, name, uid=uid)
                self.say(event="deleted", run=f"{record.namespace}/{record.name}", kind=kind, name=name)

    def _apply(self, wanted: Object, record: Record) -> None:
        """Make it so, whatever it was; but an object of that name that another owner has is not touched."""
        metadata = wanted["metadata"]
        there = self.cluster.find(wanted["kind"], metadata["namespace"], metadata["name"])
        if there is None:
            self._create(wanted, record)
            return
        _check_ours(wanted, there, record)
        # That very one: if another takes its place meanwhile, it is Conflict.
        self.cluster.apply({**wanted, "metadata": {**metadata, "uid": there["metadata"]["uid"]}})

    def _create_job(self, wanted: Object, record: Record) -> None:
        """Make a Job; that it was refused, and since when, is remembered for the decisions that follow."""
        name, refused = wanted["metadata"]["name"], self._memory(record).refused
        try:
            made = self._create(wanted, record)
        except Refused as error:
            if error.code not in (0, 401):  # these say nothing of the Job
                since = refused[name].since if name in refused else self.clock()
                refused[name] = CreateError(error.code, error.what, since)
            raise
        refused.pop(name, None)
        self.cache.put(made)

    def _create(self, wanted: Object, record: Record) -> Object:
        """The object as it is there, made now or by us before."""
        metadata = wanted["metadata"]
        try:
            return {"kind": wanted["kind"], **self.cluster.create(wanted)}
        except Conflict:
            # Made by us with the answer lost, or by another host; or left by an earlier run of this name.
            there = self.cluster.get(wanted["kind"], metadata["namespace"], metadata["name"])
            _check_ours(wanted, there, record)
            return {"kind": wanted["kind"], **there}

    def _write_status(self, record: Record, status: Status) -> None:
        """The one write of a pass, onto the version that was read."""
        status = status.model_copy(update={"driver": self.host})
        if status == record.status:
            return
        try:
            written = write_status(self.cluster, record, status)
        except Conflict:
            self.cache.put(
                {"kind": self.kind, **self.cluster.get(self.kind, record.namespace, record.metadata["name"])}
            )
            raise
        except NotFound:
            return  # removed meanwhile
        self.counters.status_writes += 1
        self.cache.put({"kind": self.kind, **written})
        self.on_status(record, status)
        if status.phase != record.status.phase:
            self.say(event="phase", run=f"{record.namespace}/{record.name}", phase=status.phase, message=status.message)

    def _leaves_to_operator(self, record: Record, status: Status) -> bool:
        if self.host == "operator" or record.is_config_map:
            return False
        if status.driver == "operator" and status.round >= record.round:
            return True
        key = (record.namespace, record.name)
        since = self.first_seen.setdefault(key, time.monotonic())
        wait_seconds = since + OPERATOR_SECONDS - time.monotonic()
        if status.driver == "client" or wait_seconds <= 0:
            return False
        self.queue.add(key, wait_seconds)
        return True

    def _notes(self, record: Record, *, anew: bool = False) -> dict[str, str]:
        """What events say of Jobs that have had no pod for a while: a quota, a policy. By one list, now and then.

        Args:
            anew: ask, however lately that was done.
        """
        key, memory = (record.namespace, record.name), self._memory(record)
        jobs = {job["metadata"]["uid"]: name for name, job in self._without_pods(self.cache.seen(record, {})).items()}
        if not jobs:
            return {}
        age_seconds = time.monotonic() - memory.noted
        if anew or age_seconds >= NOTES_SECONDS:
            about = f"involvedObject.uid={next(iter(jobs))}" if len(jobs) == 1 else "involvedObject.kind=Job"
            with contextlib.suppress(ClusterError):
                events = self.cluster.list("Event", record.namespace, fields=f"{about},type=Warning").items
                said = [one for one in sorted(events, key=_when) if one["involvedObject"].get("uid") in jobs]
                memory.notes = {
                    jobs[one["involvedObject"]["uid"]]: f"{one.get('reason')}: {one.get('message')}" for one in said
                }
            memory.noted, age_seconds = time.monotonic(), 0.0
        self.queue.add(key, NOTES_SECONDS - age_seconds)
        return memory.notes

    def _without_pods(self, seen: Observed) -> dict[str, Object]:
        """Jobs by name that should have a pod by now, and have none."""
        found = {}
        for name, job in seen.jobs.items():
            status = job.get("status", {})
            ended = any(one["type"] in ("Complete", "Failed") for one in status.get("conditions") or ())
            if ended or job["spec"].get("suspend") or seen.pods_of(job) or status.get("active"):
                continue
            age = self.clock() - datetime.datetime.fromisoformat(job["metadata"]["creationTimestamp"])
            if age.total_seconds() < SETTLE_SECONDS:
                self.queue.add((job["metadata"]["namespace"], job["metadata"]["labels"][RUN_LABEL]), SETTLE_SECONDS)
                continue
            found[name] = job
        return found

    def _tell(self, record: Record, transition: Transition) -> None:
        """An Event of a transition, named by the version of the record whose status it changed: a transition that repeats
        has another name. Losing one costs nothing.
        """
        now = time_text(self.clock())
        about = record.object
        named = digest([record.uid, record.metadata["resourceVersion"], transition.reason, transition.message])[:16]
        wanted = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{record.metadata['name']}.{named}", "namespace": record.namespace},
            "involvedObject": {
                "apiVersion": about.get("apiVersion", record.owner_reference["apiVersion"]),
                "kind": about["kind"],
                "name": record.metadata["name"],
                "namespace": record.namespace,
                "uid": record.uid,
            },
            "type": "Warning" if transition.is_warning else "Normal",
            "reason": transition.reason,
            "message": transition.message,
            "source": {"component": MANAGER},
            "reportingComponent": f"{API_GROUP}/{MANAGER}",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        with contextlib.suppress(ClusterError):
            self.cluster.create(wanted)

    def _follow(self, kind: str) -> None:
        """Keep what is known of a kind up to date, until `stop`."""
        labels, fields = self._selectors(kind)
        num_defects = 0
        while not self.stopping.is_set():
            try:
                for seen in list_and_watch(
                    self.cluster,
                    kind,
                    self.namespace,
                    labels=labels,
                    fields=fields,
                    keep=kept,
                    final=(),
                    stopping=self.stopping,
                    longest_pause_seconds=LONGEST_RETRY_SECONDS / 2,
                    on_failure=lambda error, pause_seconds: self._report_failed_watch(
                        kind, str(error), pause_seconds, transient=isinstance(error, Unavailable)
                    ),
                ):
                    self._take_in(kind, seen)
            except Exception:  # a defect of ours must not end what all runs depend on
                num_defects += 1
                pause_seconds = growing_pause(num_defects, longest_seconds=LONGEST_RETRY_SECONDS / 2)
                self._report_failed_watch(kind, traceback.format_exc(), pause_seconds, transient=False)
                self.stopping.wait(pause_seconds)

    def _report_failed_watch(self, kind: str, error: str, pause_seconds: float, *, transient: bool) -> None:
        self.say(event="watch", kind=kind, error=error, transient=transient, seconds=round(pause_seconds, 1))

    def _take_in(self, kind: str, seen: Listing | Change) -> None:
        match seen:
            case Listing(items, version):
                for key in self.cache.replace(kind, items, version):
                    self.queue.add(key)
                self.synced.add(kind)
                if self.is_synced:
                    self.all_synced.set()
            case ("BOOKMARK", _):
                pass
            case (change, found):
                touched = self.cache.drop(found) if change == "DELETED" else self.cache.put(found)
                if touched is not None:
                    self.queue.add(touched)
                if change == "DELETED" and kind == self.kind and is_record(found):
                    self.on_status(Record(found), Record(found).status)

    def _selectors(self, kind: str) -> tuple[str, str]:
        """(labels, fields) by which a kind is listed and watched."""
        if kind == KIND:
            return "", f"metadata.name={self.only}" if self.only else ""
        labels = OBSERVED.get(kind, f"{RECORD_LABEL}=true")
        return f"{labels},{RUN_LABEL}={self.only}" if self.only else labels, ""


def _check_ours(wanted: Object, there: Object, record: Record) -> None:
    """Raises Refused where an object is somebody else's, Conflict where it is being removed."""
    named = f"{wanted['kind']} {wanted['metadata']['name']}"
    if not is_owned(there, record.uid):
        what = f"{named} is there already and belongs to somebody else"
        raise Refused(what, where=record.name, fix="remove it, or name the run otherwise")
    if "deletionTimestamp" in there["metadata"]:
        raise Conflict(f"{named} is being removed", where=record.name, fix="wait until it is gone", code=409)


def _when(event: Object) -> str:
    """When it happened last, as text that sorts; the API has two ways to say it."""
    times = (event.get("lastTimestamp"), event.get("eventTime"), event["metadata"].get("creationTimestamp"))
    return str(next(filter(None, times), "")).rstrip("Z")


def _gives_up(before: Status, after: Status) -> bool:
    """Whether an attempt that was begun is given up, for another one or for good."""
    changes = [(before.stage(now.stage, now.group), now) for now in after.stages] if before.round == after.round else []
    return any(now.attempt > old.attempt or (now.state == "Failed" != old.state) for old, now in changes)


def write_status(cluster: Cluster, record: Record, status: Status) -> Object:
    """Onto the version of the record that was read. Raises Conflict where it is not the newest."""
    version = {"resourceVersion": record.metadata["resourceVersion"]}
    name = record.metadata["name"]
    if record.is_config_map:
        change = {"metadata": version, "data": {"status": json.dumps(status.to_document(), ensure_ascii=False)}}
        return cluster.patch("ConfigMap", record.namespace, name, change)
    # A merge patch keeps what it does not name: what has no value now is named with null.
    nothing = {str(field.alias): None for field in Status.model_fields.values()}
    change = {"metadata": version, "status": {**nothing, **status.to_document()}}
    return cluster.patch(KIND, record.namespace, name, change, subresource="status")


def say_lines(**fields: Any) -> None:
    """One JSON line on stderr."""
    line = json.dumps({"time": time_text(datetime.datetime.now(datetime.UTC)), **fields}, default=str)
    sys.stderr.write(line + "\n")
