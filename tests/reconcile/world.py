"""A small world in which runs are reconciled: one record, its Jobs and pods, a clock, and a host that may die.

Plain Python: its Job controller does what a real one was measured to do (docs/architecture.md, Kubernetes), its clock stands
still until a test moves it, and a host may die after any action, or act on a record that is no longer the newest.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from typing import Any

from launcher.reconcile.actions import Apply, Create, CreateError, Decision, Delete, Observed, Timeouts
from launcher.reconcile.decide import decide
from launcher.resource.names import CANCEL_ANNOTATION, STAGE_LABEL
from launcher.resource.record import Record
from launcher.resource.status import Status, parse_time, time_text
from tests.run_document import run_document

Object = dict[str, Any]

START = datetime.datetime(2026, 5, 1, 12, 0, 0, 250_000, tzinfo=datetime.UTC)
TIMEOUTS = Timeouts(backoff_seconds=10, max_backoff_seconds=300, lost_pod_seconds=300, pod_status_seconds=10)
PLANNED = {"units": 9, "missing": 6, "examples": 900, "pairs": 30, "badRows": 1}
REDUCED = {"manifest": "s3://bucket/selections/demo/x/manifest.json", "selected": 90, "badRows": 1}
EXTRACTED = {"units": 3}


def seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)


def a_record(name: str = "demo", *, spec: Any = None, **cluster: Any) -> Object:
    record = run_document(name, **{"startupTimeoutSeconds": 600, **cluster})
    record["metadata"] |= {"namespace": "team", "uid": "record-1", "generation": 1, "annotations": {}}
    return record if spec is None else record | {"spec": spec}


class World:
    """One record, its Jobs and pods, a clock, and a host that reconciles."""

    def __init__(self, **cluster: Any) -> None:
        self.now = START
        self.record: Object | None = a_record(**cluster)
        self.jobs: dict[str, Object] = {}
        self.pods: list[Object] = []
        self.foreign: dict[str, Object] = {}
        self.objects: dict[tuple[str, str], Object] = {}
        self.pod_warnings: dict[str, str] = {}
        self.create_errors: dict[str, CreateError] = {}
        self.created: list[str] = []
        self.writes = self.passes = self.uids = 0
        self.actions_of_pass: list[int] = []
        self.statuses: list[Status] = []
        self.crash_at: tuple[int, int] | None = None
        self.stale_at: tuple[int, int] | None = None

    # The API server

    def act(self, action: Any) -> None:
        match action:
            case Apply(wanted):
                self.objects[wanted["kind"], wanted["metadata"]["name"]] = wanted
            case Create(wanted):
                self._create(wanted)
            case Delete("Job", _, name, uid):
                if name in self.jobs and self.jobs[name]["metadata"]["uid"] == uid:
                    self.remove_job(name)
            case Delete(kind, _, name, uid):
                assert self.record is not None
                assert (kind, name, uid) == (self.record["kind"], self.record["metadata"]["name"], "record-1")
                self.record, self.jobs, self.pods = None, {}, []

    def _create(self, wanted: Object) -> None:
        name = wanted["metadata"]["name"]
        assert name not in self.foreign, "the API server refuses it; the host waits"
        if name in self.jobs or name in self.create_errors:
            return  # found to be ours; or refused again
        self.uids += 1
        self.created.append(name)
        made = copy.deepcopy(wanted)
        made["metadata"] |= {"uid": f"job-{self.uids}", "creationTimestamp": time_text(self.now)}
        made["status"] = {} if made["spec"].get("suspend") else {"startTime": time_text(self.now)}
        self.jobs[name] = made
        for index in range(made["spec"]["completions"]):
            self.pods.append(
                {
                    "kind": "Pod",
                    "metadata": {"name": f"{name}-{index}", "ownerReferences": [{"uid": made["metadata"]["uid"]}]},
                    "status": {"phase": "Pending"},
                }
            )
        made["status"]["active"] = made["spec"]["completions"]

    def remove_job(self, name: str) -> None:
        uid = self.jobs.pop(name)["metadata"]["uid"]
        self.pods = [pod for pod in self.pods if pod["metadata"]["ownerReferences"][0]["uid"] != uid]

    # The Job controller and the kubelet

    def unfinished(self) -> list[str]:
        return [name for name, job in self.jobs.items() if not is_finished(job)]

    def pods_of(self, name: str) -> list[Object]:
        uid = self.jobs[name]["metadata"]["uid"]
        return [pod for pod in self.pods if pod["metadata"]["ownerReferences"][0]["uid"] == uid]

    def run(self, name: str) -> None:
        started = {"running": {"startedAt": time_text(self.now)}}
        for pod in self.pods_of(name):
            pod["status"] = {"phase": "Running", "containerStatuses": [{"name": "worker", "state": started}]}

    def complete(self, name: str, words: Any = None) -> None:
        """Every pod exits 0; the first one reports the result."""
        stage = self.jobs[name]["metadata"]["labels"][STAGE_LABEL]
        words = {"plan": PLANNED, "extract": EXTRACTED, "reduce": REDUCED}[stage] if words is None else words
        for number, pod in enumerate(self.pods_of(name)):
            text = json.dumps(words) if isinstance(words, dict) else words
            pod["status"] = self._ended(pod, 0, text if number == 0 else "{}")
        self.end(name, "Complete", "CompletionsReached", "Reached expected number of succeeded pods")

    def fail(self, name: str, code: int, message: str = "", *, reason: str = "", index: int = 0) -> None:
        """One pod fails by itself: it is kept. Its peers are deleted, and gone before the Job has the condition Failed."""
        kept = self.pods_of(name)[index]
        kept["status"] = self._ended(kept, code, message, reason)
        self._drop_pods(name, keep=kept)
        if code in (64, 65):
            said = (
                f"Container worker for pod team/{name}-0 failed with exit code {code} matching FailJob rule at index 1"
            )
            self.end(name, "Failed", "PodFailurePolicy", said)
        else:
            self.end(name, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")

    def mark_evicted(self, name: str, index: int = 0) -> None:
        pod = self.pods_of(name)[index]
        pod["metadata"]["deletionTimestamp"] = time_text(self.now + seconds(30))
        pod["status"]["conditions"] = [
            {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        ]

    def evict(self, name: str) -> None:
        """An eviction: the pod is gone before the Job has the condition Failed."""
        self.mark_evicted(name)
        self.end_evicted(name)

    def end_evicted(self, name: str) -> None:
        self._drop_pods(name)
        said = f"Pod team/{name}-0 has condition DisruptionTarget matching FailJob rule at index 0"
        self.end(name, "Failed", "PodFailurePolicy", said)

    def end(self, name: str, kind: str, reason: str, message: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.jobs[name]["status"] |= {"active": 0, "terminating": 0}
        self.jobs[name]["status"]["conditions"] = [condition | {"lastTransitionTime": time_text(self.now)}]

    def _ended(self, pod: Object, code: int, message: str, reason: str = "") -> Object:
        status = ended_pod(code, message, reason)
        state = status["containerStatuses"][0]["state"]["terminated"]
        for container in pod["status"].get("containerStatuses", ()):
            state |= container["state"].get("running", {}) | {"finishedAt": time_text(self.now)}
        return status

    def _drop_pods(self, name: str, keep: Object | None = None) -> None:
        gone = [pod for pod in self.pods_of(name) if pod is not keep]
        self.pods = [pod for pod in self.pods if not any(pod is one for one in gone)]

    # People

    def change(self, **spec: Any) -> None:
        assert self.record is not None
        self.record["spec"] = {**self.record["spec"], **spec}
        self.record["metadata"]["generation"] += 1

    def cancel(self) -> None:
        assert self.record is not None
        self.record["metadata"]["annotations"][CANCEL_ANNOTATION] = str(Record(self.record).round)

    # The host

    @property
    def status(self) -> Status:
        assert self.record is not None
        return Record(self.record).status

    @property
    def failure_reason(self) -> str:
        found = self.status.condition("Failed")
        return found.reason if found else ""

    def observed(self) -> Observed:
        return Observed(
            copy.deepcopy(self.jobs), copy.deepcopy(self.pods), dict(self.pod_warnings), dict(self.create_errors)
        )

    def decide(self) -> Decision:
        assert self.record is not None
        return decide(Record(copy.deepcopy(self.record)), self.observed(), self.now, TIMEOUTS)

    def reconcile(self) -> Decision:
        """One pass, its status written last. Every law of a single pass is checked here."""
        assert self.record is not None
        before, number = self.status, self.passes
        decision = self.decide()
        check_pass(Record(self.record), before, decision)
        self.passes += 1
        self.actions_of_pass.append(len(decision.actions))
        for place, action in enumerate(decision.actions):
            if self.crash_at == (number, place):
                return decision
            self.act(action)
        if self.crash_at == (number, len(decision.actions)) or self.record is None:
            return decision
        self.write(decision.status)
        if self.stale_at and self.stale_at[0] == number:
            self.act_on_an_old_record(self.stale_at[1])
        return decision

    def write(self, status: Status) -> None:
        assert self.record is not None
        if status != self.status:
            self.writes += 1
            self.record["status"] = json.loads(json.dumps(status.to_document()))
            assert self.status == status, "a status survives its way through the API server"
            self.statuses.append(status)

    def act_on_an_old_record(self, age: int) -> None:
        """A second host whose record is so many writes old. It acts; its status is refused, for it is not on the newest."""
        assert self.record is not None
        old = copy.deepcopy(self.record)
        older = self.statuses[-1 - age] if age < len(self.statuses) else None
        old["status"] = older.to_document() if older else {}
        for action in decide(Record(old), self.observed(), self.now, TIMEOUTS).actions:
            if self.record is not None:
                self.act(action)

    def has_reported(self, text: str) -> bool:
        """Whether any status had this in the message of a stage."""
        return any(text in entry.message for status in self.statuses for entry in status.stages)

    def settle(self) -> World:
        """Reconcile until a pass changes nothing."""
        for _ in range(12):
            if self.record is None:
                return self
            before, disturbed = self.status, self.passes in (self.crash_at or self.stale_at or ())[:1]
            decision = self.reconcile()
            if self.record is None or (not decision.actions and self.status == before and not disturbed):
                return self
        raise AssertionError(f"does not come to rest: {decision}")

    def later(self, number: float) -> World:
        self.now += seconds(number)
        return self.settle()


def ended_pod(code: int, message: str, reason: str = "") -> Object:
    ended = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": message}
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "containerStatuses": [{"name": "worker", "state": {"terminated": ended}}]}


def is_finished(job: Object) -> bool:
    return any(one["type"] in ("Complete", "Failed") for one in job["status"].get("conditions", ()))


def places(actions: Any) -> list[tuple[str, ...]]:
    """What the actions are about: ('create', name), ('delete', name), ('apply', kind)."""
    found: list[tuple[str, ...]] = []
    for action in actions:
        match action:
            case Apply(wanted):
                found.append(("apply", wanted["kind"]))
            case Create(wanted):
                found.append(("create", wanted["metadata"]["name"]))
            case Delete(_, _, name, _):
                found.append(("delete", name))
    return found


def creates(decision: Decision) -> list[str]:
    return [name for what, name in places(decision.actions) if what == "create"]


def check_pass(record: Record, before: Status, decision: Decision) -> None:
    """What holds of every single pass, whatever was seen."""
    status = decision.status
    json.dumps(status.to_document())
    if record.is_deleting:
        return
    assert status.observed_generation == record.generation
    assert all(one.observed_generation == record.generation for one in status.conditions)
    for name in ("start_time", "completion_time"):
        check_time(getattr(status, name))
    for entry in status.stages:
        check_time(entry.not_before)
        check_time(entry.missing_since)
    for one in status.conditions:
        check_time(one.last_transition_time)
        old = before.condition(one.type)
        if old and old.status == one.status and status.round == before.round:
            assert one.last_transition_time == old.last_transition_time
    assert (status.completion_time is not None) == status.is_terminal
    assert status.holds("Complete") == (status.phase == "Complete")
    assert status.holds("Failed") == (status.phase in ("Failed", "Cancelled"))
    is_new_round = status.round > before.round
    if before.is_terminal and before.holds("Accepted") and not is_new_round:
        assert status.phase == before.phase
        assert status.completion_time == before.completion_time
        assert creates(decision) == []
    if status.is_terminal:
        assert creates(decision) == []
    assert len(set(creates(decision))) == len(creates(decision))
    assert not any(action in decision.actions[:place] for place, action in enumerate(decision.actions))


def check_time(text: str | None) -> None:
    if text is not None:
        assert text.endswith("Z")
        assert parse_time(text).microsecond == 0
        assert time_text(parse_time(text)) == text


# Ways to where a table begins


def planning(**cluster: Any) -> World:
    world = World(**cluster).settle()
    world.run("demo-plan-0-0")
    return world.settle()


def extracting(groups: int = 1, **cluster: Any) -> World:
    world = planning(groups=groups, **cluster)
    world.complete("demo-plan-0-0")
    world.settle()
    for name in world.unfinished():
        world.run(name)
    return world.settle()


def reducing(**cluster: Any) -> World:
    world = extracting(**cluster)
    world.complete("demo-extract-0-0-0")
    world.settle()
    world.run("demo-reduce-0-0")
    return world.settle()


def complete(**cluster: Any) -> World:
    world = reducing(**cluster)
    world.complete("demo-reduce-0-0")
    return world.settle()


def failed(**cluster: Any) -> World:
    world = planning(**cluster)
    world.fail("demo-plan-0-0", 64)
    return world.settle()


def cancelled(**cluster: Any) -> World:
    world = extracting(**cluster)
    world.cancel()
    return world.settle()


PHASES: dict[str, Callable[..., World]] = {"Pending": World, "Planning": planning, "Extracting": extracting}
PHASES |= {"Reducing": reducing, "Complete": complete, "Failed": failed, "Cancelled": cancelled}
