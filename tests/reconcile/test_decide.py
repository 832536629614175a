"""Laws of the reconcile function: tables of what follows from what is seen, and a small world in which hosts die.

The world is plain Python: its Job controller does what a real one was measured to do
(docs/architecture.md, Kubernetes), its clock stands still
until a test moves it, and a host may die after any action, or act on a record that is no longer the newest.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from launcher.reconcile.actions import Apply, Create, CreateError, Decision, Delete, Observed, Timeouts
from launcher.reconcile.conditions import transitions
from launcher.reconcile.decide import UnknownStatus, decide
from launcher.resource.names import (
    ATTEMPT_LABEL,
    CANCEL_ANNOTATION,
    GROUP_LABEL,
    RECORD_LABEL,
    ROUND_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
)
from launcher.resource.record import Record
from launcher.resource.status import TERMINAL, Status
from launcher.resource.timestamps import parse_time, time_text

Object = dict[str, Any]

START = datetime.datetime(2026, 5, 1, 12, 0, 0, 250_000, tzinfo=datetime.UTC)
PATIENCE = Timeouts(backoff_seconds=10, max_backoff_seconds=300, lost_pod_seconds=300, pod_status_seconds=10)
PLANNED = {"units": 9, "missing": 6, "examples": 900, "pairs": 30, "badRows": 1}
REDUCED = {"manifest": "s3://bucket/selections/demo/x/manifest.json", "selected": 90, "badRows": 1}
EXTRACTED = {"units": 3}


def seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)


def a_record(name: str = "demo", *, spec: Any = None, **cluster: Any) -> Object:
    asked = {
        "model": {"uri": "org/model"},
        "candidates": {"uris": ["s3://bucket/pool/"]},
        "targets": {"uris": ["s3://bucket/targets.jsonl"]},
        "store": "s3://bucket/store",
        "output": "s3://bucket/selections",
        "selection": {"keep": "highest", "budget": {"fraction": 0.1}},
        "cluster": {"image": "registry/prism:1", "startupTimeoutSeconds": 600, **cluster},
    }
    return {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": name, "namespace": "team", "uid": "record-1", "generation": 1, "annotations": {}},
        "spec": asked if spec is None else spec,
    }


class World:
    """One record, its Jobs and pods, a clock, and a host that reconciles."""

    def __init__(self, **cluster: Any) -> None:
        self.now = START
        self.record: Object | None = a_record(**cluster)
        self.jobs: dict[str, Object] = {}
        self.pods: list[Object] = []
        self.foreign: dict[str, Object] = {}
        self.objects: dict[tuple[str, str], Object] = {}
        self.notes: dict[str, str] = {}
        self.refused: dict[str, CreateError] = {}
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
        if name in self.jobs or name in self.refused:
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
        for pod in self.pods_of(name):
            pod["status"] = {"phase": "Running"}

    def complete(self, name: str, words: Any = None) -> None:
        """Every pod ends well; the first says the last words."""
        stage = self.jobs[name]["metadata"]["labels"][STAGE_LABEL]
        words = {"plan": PLANNED, "extract": EXTRACTED, "reduce": REDUCED}[stage] if words is None else words
        for number, pod in enumerate(self.pods_of(name)):
            text = json.dumps(words) if isinstance(words, dict) else words
            pod["status"] = ended_pod(0, text if number == 0 else "{}")
        self.end(name, "Complete", "CompletionsReached", "Reached expected number of succeeded pods")

    def fail(self, name: str, code: int, message: str = "", *, reason: str = "", index: int = 0) -> None:
        """One pod fails by itself: it is kept. Its peers are deleted, and gone before the Job says Failed."""
        kept = self.pods_of(name)[index]
        kept["status"] = ended_pod(code, message, reason)
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

    def evict(self, name: str, *, is_seen: bool = False) -> None:
        """An eviction: the pod is gone before the Job says Failed."""
        self.mark_evicted(name)
        if is_seen:
            self.reconcile()
        self._drop_pods(name)
        said = f"Pod team/{name}-0 has condition DisruptionTarget matching FailJob rule at index 0"
        self.end(name, "Failed", "PodFailurePolicy", said)

    def end(self, name: str, kind: str, reason: str, message: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.jobs[name]["status"] |= {"active": 0, "terminating": 0}
        self.jobs[name]["status"]["conditions"] = [condition | {"lastTransitionTime": time_text(self.now)}]

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

    def seen(self) -> Observed:
        return Observed(copy.deepcopy(self.jobs), copy.deepcopy(self.pods), dict(self.notes), dict(self.refused))

    def look(self) -> Decision:
        assert self.record is not None
        return decide(Record(copy.deepcopy(self.record)), self.seen(), self.now, PATIENCE)

    def reconcile(self) -> Decision:
        """One pass, its status written last. Every law of a single pass is checked here."""
        assert self.record is not None
        before, number = self.status, self.passes
        decision = self.look()
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
        for action in decide(Record(old), self.seen(), self.now, PATIENCE).actions:
            if self.record is not None:
                self.act(action)

    def was_told(self, text: str) -> bool:
        """Whether any status said so of a stage."""
        return any(text in entry.message for status in self.statuses for entry in status.stages)

    def settle(self) -> World:
        """Passes until nothing is left to do now."""
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


PHASES: dict[str, Callable[..., World]] = {
    "Pending": World,
    "Planning": planning,
    "Extracting": extracting,
    "Reducing": reducing,
    "Complete": complete,
    "Failed": failed,
    "Cancelled": cancelled,
}


# From nothing to the end


def test_a_fresh_record_gets_its_document_its_policy_and_a_plan() -> None:
    world = World()
    decision = world.reconcile()
    assert places(decision.actions) == [
        ("apply", "ConfigMap"),
        ("apply", "NetworkPolicy"),
        ("create", "demo-plan-0-0"),
    ]
    assert (world.status.phase, world.status.holds("Accepted"), world.status.round) == ("Planning", True, 0)
    assert world.status.start_time == "2026-05-01T12:00:00Z"
    assert [one.type for one in world.status.conditions if one.status == "True"] == ["Accepted"]


def test_a_run_goes_from_stage_to_stage_and_ends() -> None:
    world = complete()
    status = world.status
    assert (status.phase, status.message) == ("Complete", "90 examples selected")
    assert world.created == ["demo-plan-0-0", "demo-extract-0-0-0", "demo-reduce-0-0"]
    assert (status.units, status.missing_units, status.examples, status.pairs, status.bad_rows) == (9, 6, 900, 30, 1)
    assert (status.groups, status.shards, status.selected, status.restarts) == ("1/1", "3/6", 90, 0)
    assert status.manifest == REDUCED["manifest"]
    true = {one.type for one in status.conditions if one.status == "True"}
    assert true == {"Accepted", "Planned", "Extracted", "Reduced", "Complete"}
    assert [status.phase for status in world.statuses] == sorted(
        (status.phase for status in world.statuses),
        key=["Planning", "Extracting", "Reducing", "Complete"].index,
    )


def test_nothing_missing_is_no_extraction() -> None:
    world = planning(groups=3)
    world.complete("demo-plan-0-0", PLANNED | {"missing": 0})
    world.settle()
    assert world.unfinished() == ["demo-reduce-0-0"]
    assert world.status.condition("Extracted").reason == "NothingMissing"  # type: ignore[union-attr]


def test_each_group_gets_a_job_and_a_service_where_it_has_several_nodes() -> None:
    world = planning(groups=2, nodesPerGroup=2)
    world.complete("demo-plan-0-0")
    decision = world.reconcile()
    assert creates(decision) == ["demo-extract-0-0-0", "demo-extract-1-0-0"]
    assert Counter(places(decision.actions))["apply", "Service"] == 2
    for action in decision.actions:
        world.act(action)
    assert {("Service", "prism-demo-0"), ("Service", "prism-demo-1")} <= world.objects.keys()


@pytest.mark.parametrize("begin", PHASES.values(), ids=PHASES)
def test_a_pass_in_which_nothing_happened_does_nothing_and_writes_nothing(begin: Callable[..., World]) -> None:
    world = begin().settle()
    writes = world.writes
    for wait_seconds in (0, 1, 60):
        world.now += seconds(wait_seconds)
        decision = world.reconcile()
        assert decision.actions == ()
        assert world.writes == writes


@pytest.mark.parametrize("begin", PHASES.values(), ids=PHASES)
def test_a_record_that_is_being_deleted_is_left_alone(begin: Callable[..., World]) -> None:
    world = begin()
    assert world.record is not None
    world.record["metadata"]["deletionTimestamp"] = time_text(world.now)
    assert world.look() == Decision((), world.status)


# Why it waits


def test_the_time_before_a_suspension_counts_for_nothing_once_a_job_is_let_go() -> None:
    """Its controller sets the start anew, a moment after the queue lets it go."""
    world = World()
    world.settle()
    job = world.jobs["demo-plan-0-0"]
    job["spec"]["suspend"] = True
    job["status"]["conditions"] = [{"type": "Suspended", "status": "True", "lastTransitionTime": time_text(world.now)}]
    world.later(10_000)
    assert world.status.stage("plan").state == "Queued"
    job["spec"]["suspend"] = False
    world.settle()
    assert world.status.stage("plan").state == "Pending"
    job["status"]["conditions"][0]["status"] = "False"
    job["status"]["startTime"] = time_text(world.now)
    world.later(599)
    assert world.status.phase == "Planning"
    world.later(2)
    assert world.status.condition("Failed").reason == "StartupTimeout"  # type: ignore[union-attr]


def test_a_job_that_kueue_holds_is_queued_for_as_long_as_it_takes() -> None:
    world = World(queueName="team-a").settle()
    job = world.jobs["demo-plan-0-0"]
    job["spec"]["suspend"], job["status"], world.pods = True, {}, []
    world.later(1_000_000)
    assert (world.status.phase, world.status.message) == ("Planning", "plan: waits for Kueue's queue team-a")
    assert world.status.stage("plan").state == "Queued"
    job["spec"]["suspend"] = False
    world.settle()  # let go, and not taken up yet: no reason to give up
    assert world.status.stage("plan").state == "Pending"
    assert world.unfinished() == ["demo-plan-0-0"]


PENDING = [
    ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]},
     "plan: Unschedulable: 0/3 nodes"),
    ({"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}]},
     "plan: ImagePullBackOff: no"),
    ({"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": "ContainerCreating"}}}]},
     "plan: its container is being created"),
    ({"conditions": [{"type": "PodScheduled", "status": "True"}]}, "plan: its container is being created"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message"), PENDING)
def test_a_run_that_waits_says_why_and_ends_by_its_timeout(status: Object, message: str) -> None:
    world = World().settle()
    world.pods[0]["status"] = {"phase": "Pending", **status}
    world.settle()
    assert (world.status.phase, world.status.message) == ("Planning", message)
    assert world.look().requeue_at == parse_time("2026-05-01T12:10:00Z")
    world.later(599)
    assert world.status.phase == "Planning"
    world.later(1)
    assert (world.status.phase, world.status.condition("Failed").reason) == ("Failed", "StartupTimeout")  # type: ignore[union-attr]
    assert message.removeprefix("plan: ") in world.status.message
    assert "no pod ran within 600 s" in world.status.message
    assert world.jobs == {}


def test_a_quota_that_lets_no_pod_be_made_is_told() -> None:
    world = World().settle()
    world.pods, world.notes = [], {"demo-plan-0-0": "FailedCreate: exceeded quota: gpus"}
    world.jobs["demo-plan-0-0"]["status"].pop("active")
    world.settle()
    assert world.status.message == "plan: FailedCreate: exceeded quota: gpus"
    world.later(600)
    assert "exceeded quota" in world.status.message
    assert world.status.phase == "Failed"


def test_a_pod_that_runs_at_last_is_no_timeout() -> None:
    world = World().settle().later(599)
    world.run("demo-plan-0-0")
    world.later(10_000)
    assert (world.status.phase, world.status.message) == ("Planning", "")


def test_a_pod_that_runs_just_when_its_time_is_over_is_kept() -> None:
    world = World().settle()
    world.now += seconds(600)
    world.reconcile()  # given up, not yet done
    world.run("demo-plan-0-0")
    world.settle()
    assert world.unfinished() == ["demo-plan-0-0"]
    assert world.status.stage("plan").reason == ""
    world.evict("demo-plan-0-0")
    world.settle()
    assert world.status.phase == "Planning"


# What the API server will not make


def refused(world: World, name: str, code: int, message: str = "exceeded quota: jobs") -> None:
    world.refused[name] = CreateError(code, message, world.now)


@pytest.mark.parametrize("code", [400, 422])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_job_that_breaks_a_rule_of_the_api_ends_the_run_with_its_words(code: int, groups: int) -> None:
    world = planning(groups=groups)
    refused(world, f"demo-extract-{groups - 1}-0-0", code, "Job is invalid: spec.template: hostPath")
    world.complete("demo-plan-0-0")
    world.settle()
    assert (world.status.phase, world.status.condition("Failed").reason) == ("Failed", "InvalidPod")  # type: ignore[union-attr]
    assert world.status.message == (
        f"extract, group {groups - 1}: its Job is refused: Job is invalid: spec.template: hostPath"
    )
    assert world.unfinished() == []
    assert world.status.restarts == 0


POLICY = (
    "jobs.batch \"demo-plan-0-0\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'p' denied request: no team"
)
WEBHOOK = 'admission webhook "validate.example" denied the request: no team'


@pytest.mark.parametrize(("code", "message"), [(422, POLICY), (403, POLICY), (400, WEBHOOK), (422, WEBHOOK)])
def test_a_job_that_a_policy_denies_is_tried_again_until_the_startup_timeout(code: int, message: str) -> None:
    """It answers with the code of a broken object; but who changes it lets the same Job pass."""
    world = World()
    refused(world, "demo-plan-0-0", code, message)
    world.reconcile()
    assert world.status.phase == "Planning"
    assert message in world.status.message
    world.refused.clear()
    world.settle()
    assert world.created == ["demo-plan-0-0"]


@pytest.mark.parametrize("message", ['Job.batch "x" is invalid: spec.template: Forbidden: x', "Job is forbidden: y"])
def test_a_broken_job_is_no_denial(message: str) -> None:
    world = World()
    refused(world, "demo-plan-0-0", 422, message)
    world.settle()
    assert world.status.phase == "Failed"


@pytest.mark.parametrize("code", [403, 409, 429, 500])
def test_a_job_that_a_quota_holds_back_is_tried_again_and_says_why(code: int) -> None:
    world = World()
    refused(world, "demo-plan-0-0", code)
    for _ in range(3):
        decision = world.reconcile()
        assert creates(decision) == ["demo-plan-0-0"]
        assert decision.requeue_at == START + seconds(600)
        assert (world.status.phase, world.status.message) == (
            "Planning",
            "plan: its Job is refused: exceeded quota: jobs",
        )
        world.now += seconds(100)
    world.refused.clear()
    world.settle()
    world.run("demo-plan-0-0")
    world.settle()
    assert (world.status.phase, world.status.message, world.status.restarts) == ("Planning", "", 0)
    assert world.created == ["demo-plan-0-0"]


def test_a_job_that_is_refused_for_too_long_is_a_startup_timeout() -> None:
    world = World()
    refused(world, "demo-plan-0-0", 403)
    world.now += seconds(599)
    assert creates(world.reconcile()) == ["demo-plan-0-0"]
    world.later(1)
    assert (world.status.phase, world.status.condition("Failed").reason) == ("Failed", "StartupTimeout")  # type: ignore[union-attr]
    assert world.status.message == "plan: its Job was refused for 600 s: exceeded quota: jobs"


def test_a_group_that_is_refused_holds_no_other_back() -> None:
    world = planning(groups=2)
    refused(world, "demo-extract-0-0-0", 403)
    world.complete("demo-plan-0-0")
    world.reconcile()
    assert world.unfinished() == ["demo-extract-1-0-0"]
    world.run("demo-extract-1-0-0")
    world.reconcile()
    states = [world.status.stage("extract", group).state for group in range(2)]
    assert states == ["Pending", "Running"]
    assert world.status.message == "extract 0: its Job is refused: exceeded quota: jobs"
    world.later(600)
    assert world.status.stage("extract", 0).reason == "StartupTimeout"
    world.complete("demo-extract-1-0-0")
    world.settle()
    assert (world.status.phase, world.status.groups) == ("Reducing", "1/2")


def test_a_world_of_which_one_pod_runs_says_what_the_others_wait_for() -> None:
    world = planning(nodesPerGroup=2)
    world.complete("demo-plan-0-0")
    world.settle()
    first, second = world.pods_of("demo-extract-0-0-0")
    first["status"] = {"phase": "Running"}
    second["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    ]
    world.settle()
    entry = world.status.stage("extract")
    assert (entry.state, entry.message) == ("Running", "Unschedulable: 0/3 nodes")
    assert world.status.message == "extract 0: Unschedulable: 0/3 nodes"
    second["status"] = {"phase": "Running"}
    world.settle()
    assert (world.status.stage("extract").message, world.status.message) == ("", "")


# How attempts end

ENDINGS = [
    (1, "Traceback\nValueError: x\n", "", "restarts", "attempt 1: exit code 1: ValueError: x"),
    (1, "\n", "", "restarts", "attempt 1: exit code 1: Job has reached the specified backoff limit"),
    (1, "", "", "restarts", "attempt 1: exit code 1: Job has reached the specified backoff limit"),
    (75, json.dumps({"error": "no bucket", "where": "s3", "fix": "wait"}), "", "restarts",
     "attempt 1: exit code 75 (a transient error): no bucket (s3); wait"),
    (137, "", "OOMKilled", "restarts", "attempt 1: exit code 137 (killed, often out of memory): out of memory (OOMKilled);"),
    (143, "stopped", "", "restarts", "attempt 1: exit code 143 (stopped by SIGTERM): stopped"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "words", "reason", "counter", "message"), ENDINGS)
def test_a_crash_is_waited_out_counted_and_told(code: int, words: str, reason: str, counter: str, message: str) -> None:
    world = planning()
    world.fail("demo-plan-0-0", code, words, reason=reason)
    world.settle()
    entry = world.status.stage("plan")
    assert (entry.attempt, entry.restarts, entry.preemptions, entry.state) == (1, 1, 0, "Waiting")
    assert entry.message == message.strip()
    assert world.status.message == f"plan: {entry.message}"
    assert (world.status.phase, world.status.restarts) == ("Planning", 1)
    assert entry.not_before == "2026-05-01T12:00:10Z"
    world.later(9)
    assert world.unfinished() == []
    world.later(1)
    assert world.unfinished() == ["demo-plan-0-1"]


@pytest.mark.parametrize(("code", "reason"), [(64, "WrongRequest"), (65, "DamagedData")])
@pytest.mark.parametrize("begin", [planning, extracting, reducing])
def test_a_wrong_request_and_damaged_data_end_the_run_with_the_words_of_the_worker(
    code: int, reason: str, begin: Callable[..., World]
) -> None:
    world = begin()
    (name,) = world.unfinished()
    world.fail(name, code, json.dumps({"error": "row 7 is bad", "where": "a.jsonl", "fix": "mend it"}))
    world.settle()
    assert world.status.phase == "Failed"
    assert world.status.condition("Failed").reason == reason  # type: ignore[union-attr]
    assert f"exit code {code}: row 7 is bad (a.jsonl); mend it" in world.status.message
    assert world.status.restarts == 0
    assert world.unfinished() == []


@pytest.mark.parametrize("code", [64, 65])
def test_the_jobs_message_is_enough_where_its_pod_is_gone(code: int) -> None:
    world = planning()
    world.fail("demo-plan-0-0", code)
    world.pods = []
    world.settle()
    assert world.status.phase == "Failed"


def test_an_eviction_starts_again_at_once_under_a_count_of_its_own() -> None:
    world = extracting(maxPreemptions=2, maxRestarts=0)
    for attempt in range(2):
        world.evict(f"demo-extract-0-0-{attempt}")
        world.settle()
        assert world.unfinished() == [f"demo-extract-0-0-{attempt + 1}"]
        assert world.status.stage("extract").preemptions == attempt + 1
        assert world.status.stage("extract").restarts == 0
    world.evict("demo-extract-0-0-2")
    world.settle()
    assert (world.status.phase, world.status.restarts) == ("Failed", 2)
    assert world.status.condition("Failed").reason == "TooManyPreemptions"  # type: ignore[union-attr]


def test_trap_a_an_eviction_that_the_job_does_not_name_is_no_crash() -> None:
    world = extracting(nodesPerGroup=2)
    name = "demo-extract-0-0-0"
    world.mark_evicted(name, 1)
    world.settle()
    assert world.status.stage("extract").disrupted
    world.fail(name, 1)  # its peer ends first, and the evicted pod is gone by then
    world.settle()
    entry = world.status.stage("extract")
    assert (entry.preemptions, entry.restarts, entry.disrupted) == (1, 0, False)
    assert world.unfinished() == ["demo-extract-0-0-1"]


def test_trap_a_also_where_both_are_seen_at_once() -> None:
    world = extracting(nodesPerGroup=2)
    name = "demo-extract-0-0-0"
    world.mark_evicted(name, 1)
    evicted = world.pods_of(name)[1]
    world.fail(name, 64)
    world.pods.append(evicted | {"status": evicted["status"] | {"phase": "Failed"}})
    world.settle()
    assert world.status.stage("extract").preemptions == 1


def test_trap_b_a_pod_that_is_told_to_go_does_not_speak_for_its_job() -> None:
    world = extracting(nodesPerGroup=2)
    name = "demo-extract-0-0-0"
    survivor = world.pods_of(name)[1]
    world.fail(name, 75)
    survivor["metadata"]["deletionTimestamp"] = time_text(world.now)
    world.pods.insert(0, survivor | {"status": ended_pod(64, "told to go")})
    world.settle()
    entry = world.status.stage("extract")
    assert (world.status.phase, entry.restarts) == ("Extracting", 1)
    assert "exit code 75" in entry.message


def test_trap_c_a_pod_that_never_ends_is_given_up_after_its_grace_and_our_patience() -> None:
    world = extracting(nodesPerGroup=2)
    world.mark_evicted("demo-extract-0-0-0")  # its deletion is due 30 s later; nobody reports from the node
    world.settle()
    assert world.look().requeue_at == world.now.replace(microsecond=0) + seconds(330)
    world.later(329)
    assert world.unfinished() == ["demo-extract-0-0-0"]
    world.later(1)
    assert world.unfinished() == ["demo-extract-0-0-1"]
    assert world.status.stage("extract").preemptions == 1
    assert world.was_told("never ended")


def test_trap_c_a_job_that_counts_pods_which_are_gone_is_given_up() -> None:
    world = extracting()
    world.later(400)
    world.jobs["demo-extract-0-0-0"]["status"] |= {"active": 1, "terminating": 1}
    world.settle()
    assert world.status.stage("extract").missing_since == time_text(world.now)
    world.later(299)
    assert world.unfinished() == ["demo-extract-0-0-0"]
    world.later(1)
    assert world.unfinished() == ["demo-extract-0-0-1"]
    assert (world.status.stage("extract").preemptions, world.status.stage("extract").missing_since) == (1, None)


def test_a_job_that_counts_what_we_are_soon_told_of_is_not_given_up() -> None:
    world = extracting()
    world.later(400)
    world.jobs["demo-extract-0-0-0"]["status"]["terminating"] = 1
    world.later(1)
    world.jobs["demo-extract-0-0-0"]["status"]["terminating"] = 0
    world.later(1)
    assert world.status.stage("extract").missing_since is None
    world.later(10_000)
    assert world.unfinished() == ["demo-extract-0-0-0"]


def test_a_failure_target_is_not_yet_a_failure() -> None:
    world = planning()
    for kind in ("FailureTarget", "SuccessCriteriaMet"):
        world.end("demo-plan-0-0", kind, "BackoffLimitExceeded", "soon")
        decision = world.reconcile()
        assert decision.actions == ()
        assert world.status.stage("plan").attempt == 0


def test_attempts_are_capped_and_their_waits_grow() -> None:
    world = planning(maxRestarts=7)
    waits = []
    for attempt in range(8):
        world.fail(f"demo-plan-0-{attempt}", 1)
        world.settle()
        if world.status.is_terminal:
            break
        due = parse_time(world.status.stage("plan").not_before or "")
        waits.append((due - world.now.replace(microsecond=0)).total_seconds())
        world.now = due
        world.settle()
    assert waits == [10, 20, 40, 80, 160, 300, 300]
    assert (world.status.phase, world.status.restarts) == ("Failed", 7)
    assert world.status.condition("Failed").reason == "TooManyRestarts"  # type: ignore[union-attr]
    assert "attempt 8; no more than 7 restarts" in world.status.message
    assert world.created == [f"demo-plan-0-{attempt}" for attempt in range(8)]


def test_evictions_do_not_lengthen_the_wait_after_a_crash() -> None:
    world = planning()
    world.evict("demo-plan-0-0")
    world.settle()
    world.fail("demo-plan-0-1", 1)
    world.settle()
    assert world.status.stage("plan").not_before == "2026-05-01T12:00:10Z"


@pytest.mark.parametrize("begin", [planning, extracting, reducing])
def test_a_job_deleted_by_hand_is_made_anew_and_counted(begin: Callable[..., World]) -> None:
    world = begin()
    (name,) = world.unfinished()
    world.remove_job(name)
    world.settle()
    assert world.status.restarts == 1
    assert "deleted by somebody else" in world.status.message
    world.later(10)
    assert world.unfinished() == [f"{name[:-1]}1"]


def test_a_job_that_is_being_deleted_counts_as_gone_and_is_not_deleted_again() -> None:
    world = planning()
    world.jobs["demo-plan-0-0"]["metadata"]["deletionTimestamp"] = time_text(world.now)
    world.settle().later(10)
    assert world.created == ["demo-plan-0-0", "demo-plan-0-1"]
    assert world.status.restarts == 1


# Last words


@pytest.mark.parametrize(
    "words",
    [
        *("", "no json", "[1]", "[" * 100_000, {"units": 1}),
        *(PLANNED | wrong for wrong in ({"missing": "six"}, {"units": True}, {"units": -1}, {"pairs": 2**53})),
    ],
)
def test_a_plan_whose_last_words_are_lost_is_made_again(words: Any) -> None:
    world = planning()
    world.complete("demo-plan-0-0", words)
    world.settle()
    assert world.unfinished() == []
    assert world.status.stage("plan").restarts == 0  # its pods may have ended without our being told
    world.later(10)
    entry = world.status.stage("plan")
    assert (entry.restarts, entry.attempt) == (1, 1)
    assert world.was_told("termination message is missing")
    assert world.unfinished() == ["demo-plan-0-1"]


@pytest.mark.parametrize("words", [{"units": "three"}, {"units": None}, {}])
def test_a_group_that_says_no_number_has_done_its_work(words: Object) -> None:
    world = extracting()
    world.complete("demo-extract-0-0-0", words)
    world.settle()
    assert world.status.phase == "Reducing"
    assert world.status.shards == "0/6"


def test_a_reduce_of_another_version_says_no_nonsense() -> None:
    world = reducing()
    world.complete("demo-reduce-0-0", {"manifest": "s3://b/m.json", "selected": "all", "badRows": {}})
    world.settle()
    assert (world.status.phase, world.status.selected, world.status.bad_rows) == ("Complete", None, 1)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "m.json",
        "gs://b/m.json",
        "s3://",
        "s3://b/\x1b]0;x\x07",
        "/a\nb",
        "s3://b/\ud800",
        "s3://b/" + "m" * 2048,
        7,
    ],
)
def test_a_manifest_that_is_no_address_is_none(manifest: Any) -> None:
    world = reducing(maxRestarts=0)
    world.complete("demo-reduce-0-0", {"manifest": manifest, "selected": 1})
    world.later(10)
    assert (world.status.phase, world.status.manifest) == ("Failed", None)
    assert "termination message is missing" in world.status.message


@pytest.mark.parametrize("manifest", ["/out/my run/größe/manifest.json", "s3://b/" + "m" * 2000])
def test_a_manifest_lies_wherever_the_document_says(manifest: str) -> None:
    world = reducing()
    world.complete("demo-reduce-0-0", {"manifest": manifest, "selected": 1})
    world.settle()
    assert (world.status.phase, world.status.manifest) == ("Complete", manifest)


def test_half_a_character_in_last_words_is_shown_and_hurts_nothing() -> None:
    world = planning()
    world.fail("demo-plan-0-0", 1, json.dumps({"error": "bad \ud800 row", "where": "a", "fix": "b"}))
    world.settle()
    assert "bad ? row" in world.status.message
    json.dumps(world.status.to_document(), ensure_ascii=False).encode()


@pytest.mark.parametrize("delay_seconds", [0, 3, 9])
def test_an_end_that_is_told_of_before_that_of_its_pods_is_waited_for(delay_seconds: int) -> None:
    world = planning()
    pods = copy.deepcopy(world.pods)
    world.complete("demo-plan-0-0")
    told, world.pods = world.pods, pods
    world.later(delay_seconds)
    assert world.status.stage("plan").state == "Running"
    assert world.look().requeue_at == START.replace(microsecond=0) + seconds(10)
    world.pods = told
    world.settle()
    assert (world.status.phase, world.status.restarts) == ("Extracting", 0)


def test_an_eviction_whose_pod_we_are_told_of_late_is_still_one() -> None:
    world = extracting(nodesPerGroup=2)
    name = "demo-extract-0-0-0"
    pods = copy.deepcopy(world.pods)
    world.fail(name, 1)
    told, world.pods = world.pods, pods
    world.settle()
    assert world.status.stage("extract").attempt == 0
    evicted = copy.deepcopy(pods[-1])
    evicted["status"] = {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    world.pods = [*told, evicted]
    world.settle()
    assert world.status.stage("extract").preemptions == 1


# Groups


def test_one_group_that_is_dead_for_good_does_not_end_a_run_that_another_completes() -> None:
    world = extracting(groups=2, maxRestarts=0)
    world.fail("demo-extract-1-0-0", 1)
    world.settle()
    assert (world.status.phase, world.status.stage("extract", 1).state) == ("Extracting", "Failed")
    world.complete("demo-extract-0-0-0")
    world.settle()
    assert world.status.groups == "1/2"
    world.complete("demo-reduce-0-0")
    world.settle()
    assert world.status.phase == "Complete"


def test_the_last_group_that_dies_for_good_ends_the_run() -> None:
    world = extracting(groups=2, maxRestarts=0)
    world.fail("demo-extract-1-0-0", 1)
    world.settle()
    world.fail("demo-extract-0-0-0", 137, reason="OOMKilled")
    world.settle()
    assert (world.status.phase, world.status.condition("Failed").reason) == ("Failed", "TooManyRestarts")  # type: ignore[union-attr]
    assert world.status.message.startswith("extract, group 0: exit code 137")
    last = world.status.stage("extract", 0)
    assert (last.state, last.reason) == ("Failed", "TooManyRestarts")
    assert "exit code 137" in last.message


@pytest.mark.parametrize("reason", ["NotReady", "Terminating"])
def test_a_pod_on_a_node_that_is_lost_says_so_and_since_when(reason: str) -> None:
    world = extracting()
    world.run("demo-extract-0-0-0")
    world.settle()
    assert world.status.message == ""
    (pod,) = world.pods_of("demo-extract-0-0-0")
    pod["spec"] = {"nodeName": "node-a"}
    since = time_text(world.now)
    pod["status"]["conditions"] = [{"type": "Ready", "status": "False", "lastTransitionTime": since}]
    if reason == "Terminating":
        pod["metadata"]["deletionTimestamp"] = time_text(world.now + seconds(30))
        pod["metadata"]["deletionGracePeriodSeconds"] = 30
    world.settle()
    entry = world.status.stage("extract")
    assert entry.state == "Running"
    assert entry.message.startswith(f"{reason} since {since}: pod demo-extract-0-0-0-0 on node node-a")
    assert entry.message in world.status.message
    pod["status"]["conditions"] = [{"type": "Ready", "status": "True", "lastTransitionTime": since}]
    if reason == "NotReady":
        world.settle()
        assert world.status.stage("extract").message == ""


def test_a_wrong_request_in_one_group_ends_the_run_and_stops_the_others() -> None:
    world = extracting(groups=3)
    world.fail("demo-extract-1-0-0", 64)
    world.fail("demo-extract-2-0-0", 1)
    world.settle()
    assert world.status.phase == "Failed"
    assert world.status.message.startswith("extract, group 1: exit code 64")
    assert world.unfinished() == []
    assert world.status.restarts == 0
    assert not [name for name in world.created if name.endswith("-1")]


def test_no_group_begins_again_once_another_has_seen_to_every_unit() -> None:
    world = extracting(groups=2)
    world.fail("demo-extract-1-0-0", 1)
    world.complete("demo-extract-0-0-0")
    world.later(60)
    assert world.status.phase == "Reducing"
    assert world.unfinished() == ["demo-reduce-0-0"]
    assert world.status.restarts == 0


def test_a_group_that_ends_late_is_still_counted() -> None:
    world = extracting(groups=2)
    world.complete("demo-extract-0-0-0")
    world.settle()
    assert (world.status.groups, world.status.shards) == ("1/2", "3/6")
    world.complete("demo-extract-1-0-0")
    world.settle()
    assert (world.status.groups, world.status.shards) == ("2/2", "6/6")


def test_groups_that_met_at_a_unit_do_not_count_it_twice() -> None:
    world = extracting(groups=2)
    for group in range(2):
        world.complete(f"demo-extract-{group}-0-0", {"units": 5})
    world.settle()
    assert world.status.shards == "6/6"


def test_a_group_that_is_given_up_loses_its_job_and_the_others_go_on() -> None:
    world = planning(groups=2)
    world.complete("demo-plan-0-0")
    world.settle()
    world.run("demo-extract-0-0-0")
    world.later(600)
    assert world.status.stage("extract", 1).reason == "StartupTimeout"
    assert world.unfinished() == ["demo-extract-0-0-0"]
    assert world.status.phase == "Extracting"


# Suspend, cancel, retry, the end of a record


def test_a_suspension_costs_no_stage_that_had_ended_before_the_status_said_so() -> None:
    world = World()
    world.reconcile()
    world.complete(world.unfinished()[0], PLANNED)  # and before the next pass:
    world.change(suspend=True)
    world.reconcile()
    assert world.status.phase == "Suspended"
    world.change(suspend=False)
    world.reconcile()
    assert [name for name in world.created if "plan" in name] == ["demo-plan-0-0"]
    assert world.status.stage("plan").state == "Succeeded"


@pytest.mark.parametrize("begin", [World, planning, extracting, reducing])
def test_a_suspended_run_has_no_job_and_goes_on_where_it_was(begin: Callable[..., World]) -> None:
    world = begin()
    done = {name for name, job in world.jobs.items() if is_finished(job)}
    world.change(suspend=True)
    world.settle()
    assert (world.status.phase, world.status.holds("Suspended"), world.unfinished()) == ("Suspended", True, [])
    assert set(world.jobs) == done  # what ended keeps its logs
    world.later(100_000)
    assert world.unfinished() == []
    world.change(suspend=False)
    world.settle()
    assert not world.status.holds("Suspended")
    assert len(world.unfinished()) == 1
    assert world.status.restarts == 0
    for stage, words in (("plan", PLANNED), ("extract", EXTRACTED), ("reduce", REDUCED)):
        if any(stage in one for one in world.unfinished()):
            world.complete(world.unfinished()[0], words)
            world.settle()
    assert world.status.phase == "Complete"


@pytest.mark.parametrize("begin", [World, planning, extracting, reducing])
def test_a_cancelled_run_stops_and_stays_so(begin: Callable[..., World]) -> None:
    world = begin()
    world.cancel()
    world.settle()
    assert (world.status.phase, world.unfinished()) == ("Cancelled", [])
    assert world.status.message == "cancelled; finished shards are kept"
    world.change(suspend=True)
    world.later(100)
    assert world.status.phase == "Cancelled"


@pytest.mark.parametrize("begin", [complete, failed])
def test_to_cancel_what_has_ended_changes_nothing(begin: Callable[..., World]) -> None:
    world = begin()
    phase = world.status.phase
    world.cancel()
    world.settle()
    assert world.status.phase == phase


@pytest.mark.parametrize("begin", PHASES.values(), ids=PHASES)
def test_a_retry_begins_a_round_of_its_own(begin: Callable[..., World]) -> None:
    world = begin()
    world.now += seconds(50)
    world.change(retry=2)
    world.settle()
    assert (world.status.phase, world.status.round, world.status.restarts) == ("Planning", 2, 0)
    assert list(world.jobs) == ["demo-plan-2-0"]
    assert world.status.completion_time is None
    assert world.status.start_time == time_text(world.now)
    assert not any(world.status.holds(name) for name in ("Planned", "Complete", "Failed"))
    world.complete("demo-plan-2-0", PLANNED | {"missing": 0})
    world.settle()
    world.complete("demo-reduce-2-0")
    world.settle()
    assert world.status.phase == "Complete"


def test_a_retry_that_is_taken_back_goes_on_with_its_round() -> None:
    world = complete()
    world.change(retry=2)
    world.settle()
    world.change(retry=1)
    world.settle()
    assert (world.status.round, world.unfinished()) == (2, ["demo-plan-2-0"])


def test_a_cancelled_round_does_not_cancel_the_next() -> None:
    world = cancelled()
    world.change(retry=1)
    world.settle()
    assert world.status.phase == "Planning"
    world.cancel()
    world.settle()
    assert (world.status.phase, world.status.round) == ("Cancelled", 1)


@pytest.mark.parametrize("begin", [complete, failed, cancelled])
def test_nothing_of_a_run_that_has_ended_is_made_again(begin: Callable[..., World]) -> None:
    world = begin()
    phase, made = world.status.phase, len(world.created)
    world.jobs, world.pods = {}, []
    world.later(100_000)
    assert (world.status.phase, len(world.created), world.jobs) == (phase, made, {})


@pytest.mark.parametrize("begin", [complete, failed, cancelled])
def test_a_record_goes_when_its_time_is_over(begin: Callable[..., World]) -> None:
    world = begin()
    assert world.later(1_000_000).record is not None
    world.now = START
    world.change(ttlSecondsAfterFinished=60)
    world.settle()
    assert world.look().requeue_at == START.replace(microsecond=0) + seconds(60)
    assert world.later(59).record is not None
    assert world.later(1).record is None


def test_conditions_of_a_run_that_ended_follow_the_generation() -> None:
    # `kubectl wait` takes a condition of an older generation for out of date.
    world = complete()
    before = world.status.condition("Complete")
    world.change(ttlSecondsAfterFinished=1_000_000)
    world.settle()
    after = world.status.condition("Complete")
    assert before is not None
    assert after is not None
    assert after.observed_generation == 2
    assert after.last_transition_time == before.last_transition_time


def test_leftovers_of_earlier_attempts_are_removed() -> None:
    world = extracting()
    world.evict("demo-extract-0-0-0")
    world.settle()
    late = copy.deepcopy(world.jobs["demo-extract-0-0-0"])  # a host that was behind made it again
    late["metadata"]["uid"], late["status"] = "job-late", {}
    world.jobs["demo-extract-0-0-0"] = late
    world.settle()
    assert list(world.jobs) == ["demo-plan-0-0", "demo-extract-0-0-1"]
    assert world.status.stage("extract").preemptions == 1


def test_of_ended_attempts_the_latest_keep_their_jobs() -> None:
    world = extracting(groups=2)
    for attempt in range(6):
        world.evict(f"demo-extract-0-0-{attempt}")
        world.settle()
    assert [name for name in world.jobs if "extract-0" in name] == [
        f"demo-extract-0-0-{attempt}" for attempt in (3, 4, 5, 6)
    ]
    assert {"demo-plan-0-0", "demo-extract-1-0-0"} <= world.jobs.keys()
    assert (world.status.stage("extract", 0).preemptions, world.status.stage("extract", 1).preemptions) == (6, 0)


# Events


def test_an_event_is_worth_each_phase_and_each_attempt_lost() -> None:
    world = planning()
    world.fail("demo-plan-0-0", 1)
    before = world.status
    (told,) = transitions(before, world.settle().status)
    assert (told.is_warning, told.reason) == (True, "Restarted")
    assert told.message.startswith("plan: attempt 1: exit code 1")
    world.later(10)
    world.evict("demo-plan-0-1")
    before = world.status
    (told,) = transitions(before, world.settle().status)
    assert (told.is_warning, told.reason) == (False, "Preempted")
    assert list(transitions(world.status, world.status)) == []
    fail = failed()
    assert [one.reason for one in transitions(Status(), fail.status)] == ["Failed"]


# Bad input

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)
FIELDS = [
    "retry",
    "suspend",
    "ttlSecondsAfterFinished",
    "store",
    "output",
    "model",
    "candidates",
    "selection",
    "cluster",
]


def decided(record: Object, seen: Observed | None = None) -> Decision:
    decision = decide(Record(record), seen or Observed({}), START, PATIENCE)
    check_pass(Record(record), Record(record).status, decision)
    return decision


def is_refused(record: Object) -> bool:
    decision = decided(record)
    if decision.status.holds("Accepted"):
        return False
    again = decided(record | {"status": decision.status.to_document()})
    assert again.status == decision.status, "said once"
    assert (decision.status.phase, decision.actions) == ("Failed", ())
    assert decision.status.condition("Accepted").reason == "InvalidSpec"  # type: ignore[union-attr]
    return True


@given(JSON)
@settings(max_examples=60, deadline=None)
def test_no_document_is_too_wrong_to_be_refused(spec: Any) -> None:
    assert is_refused(a_record(spec=spec) | {"spec": spec})


@given(st.sampled_from(FIELDS), JSON)
@settings(max_examples=100, deadline=None)
def test_a_document_with_one_field_wrong_is_refused_or_run(field: str, value: Any) -> None:
    record = a_record()
    record["spec"][field] = value
    is_refused(record)


@given(st.sampled_from(["podOverlay", "env", "image", "queueName", "groups", "cpu"]), JSON)
@settings(max_examples=100, deadline=None)
def test_a_cluster_section_with_one_field_wrong_is_refused_or_run(field: str, value: Any) -> None:
    is_refused(a_record(**{field: value}))


@pytest.mark.parametrize("character", ["😀", "\ud83d", "\x7f", "\u2028", "\x00"])
def test_any_character_of_a_document_is_taken_as_it_is_or_refused(character: str) -> None:
    record = a_record()
    record["spec"]["store"] = f"s3://bucket/{character}"
    refused = is_refused(record)
    assert refused == (character == "\ud83d")


@pytest.mark.parametrize("length", [41, 63, 253])
def test_a_name_that_is_too_long_is_refused_in_words(length: int) -> None:
    record = a_record("n" * length)
    assert is_refused(record)
    assert "metadata.name" in decided(record).status.message


@pytest.mark.parametrize("begin", [World, planning, complete, cancelled])
def test_a_round_of_a_document_that_is_refused_ends_and_a_mended_one_is_run(begin: Callable[..., World]) -> None:
    world = begin()
    world.change(retry=1, store="ftp://x")
    world.settle()
    # `prism wait` waits for an end of the round that is asked for.
    assert (world.status.phase, world.status.round, world.status.holds("Accepted")) == ("Failed", 1, False)
    assert world.status.completion_time == time_text(world.now)
    world.change(store="s3://bucket/store")
    world.settle()
    assert (world.status.phase, world.status.round) == ("Planning", 1)
    assert world.unfinished() == ["demo-plan-1-0"]


def test_a_literal_secret_is_refused_and_repeated_nowhere() -> None:
    record = a_record(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "wJalrXUtnFEMI"}])
    assert is_refused(record)
    assert "wJalr" not in json.dumps(decided(record).status.to_document())


def test_a_document_that_was_mended_is_taken_up() -> None:
    world = World()
    world.change(store="ftp://x")
    world.settle()
    assert (world.status.phase, world.status.holds("Accepted")) == ("Failed", False)
    world.change(store="s3://bucket/store")
    world.settle()
    assert (world.status.phase, world.status.holds("Accepted")) == ("Planning", True)


@pytest.mark.parametrize("begin", PHASES.values(), ids=PHASES)
def test_a_document_that_becomes_nonsense_stops_the_run_and_changes_no_end(begin: Callable[..., World]) -> None:
    world = begin().settle()
    phase = world.status.phase
    world.change(store=7)
    world.settle()
    assert world.status.phase == (phase if phase in TERMINAL else "Failed")
    assert world.unfinished() == []


def config_map(text: str, status: str | None = None) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "demo-prism-record",
            "namespace": "team",
            "uid": "record-1",
            "labels": {RUN_LABEL: "demo", RECORD_LABEL: "true"},
        },
        "data": {"selection.yaml": text} | ({} if status is None else {"status": status}),
    }


DOCUMENT = json.dumps(
    {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": "demo"},
        "spec": a_record()["spec"],
    }
)


def test_a_config_map_stands_for_a_record() -> None:
    decision = decided(config_map(DOCUMENT))
    assert creates(decision) == ["demo-plan-0-0"]
    owner = decision.actions[-1].object["metadata"]["ownerReferences"][0]  # type: ignore[union-attr]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("ConfigMap", "demo-prism-record", "record-1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\t",
        "a: [",
        "- 1",
        "spec: 2024-99-99",
        "spec: {store: 2024-01-01}",
        "spec: &a {x: *a}",
        "spec: {cluster: &a {podOverlay: *a}}",
        "? [1]\n: 2",
        "[" * 1500,
        "spec: {retry: .inf}",
        "spec: !!python/object:os.system {}",
        DOCUMENT.replace('"demo"', '"other"'),
    ],
)
def test_a_config_map_with_nonsense_is_refused(text: str) -> None:
    decision = decided(config_map(text))
    assert (decision.status.phase, decision.status.holds("Accepted"), decision.actions) == ("Failed", False, ())


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_in_a_config_map_is_refused(text: str) -> None:
    assert not decided(config_map(text)).status.holds("Accepted")


def test_an_overlay_that_holds_itself_is_refused() -> None:
    text = f'{DOCUMENT[:-3]}, "podOverlay": &a {{x: *a}}}}}}}}'
    decision = decided(config_map(text))
    assert not decision.status.holds("Accepted")


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Complete", "completionTime": "yesterday"},
        {"phase": 3},
        {"stages": [{"stage": "plan", "notBefore": "soon"}]},
        {"startTime": "2026-05-01T12:00:00"},
        [],
        "x",
        {"stages": [{"stage": "plan", "attempt": "many"}]},
        {"conditions": [{"type": "Complete"}]},
    ],
)
def test_a_status_that_cannot_be_read_is_left_alone(status: Any) -> None:
    retried, going, refused = a_record(), a_record(), a_record(spec={"store": 7})
    retried["spec"]["retry"] = 3
    going["metadata"]["deletionTimestamp"] = time_text(START)
    stored = [it | {"status": status} for it in (a_record(), retried, going, refused)]
    for found in (*stored, config_map(DOCUMENT, json.dumps(status))):
        with pytest.raises(UnknownStatus, match=r"Unknown \(status.* cannot be read: "):
            decide(Record(found), Observed({}), START, PATIENCE)
        shown = Record(found).status
        assert (shown.phase, shown.is_terminal) == ("Unknown", False)
        assert "cannot be read" in shown.message


@pytest.mark.parametrize("status", [None, {}])
def test_a_status_of_nothing_is_a_fresh_one(status: Any) -> None:
    assert decided(a_record() | {"status": status}).status.phase == "Planning"
    assert decided(config_map(DOCUMENT, json.dumps(status or {}))).status.phase == "Planning"
    assert decided(config_map(DOCUMENT, "")).status.phase == "Planning"


LATER: list[Object] = [
    {"phase": "Sleeping"},
    {"phase": "Extracting", "stages": [{"stage": "plan", "state": "Skipped"}]},
    {"phase": "Extracting", "stages": [{"stage": "index"}]},
]


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("begin", [planning, extracting])
def test_a_run_that_a_later_version_drives_is_left_to_it_until_a_new_round(
    later: Object, begin: Callable[..., World]
) -> None:
    world = begin()
    assert world.record is not None
    world.record["status"] |= later
    for change in ({}, {"suspend": True}, {"store": 7}):
        world.change(**change)
        with pytest.raises(UnknownStatus, match=r"values that this version does not know: (Sleeping|Skipped|index)"):
            world.look()
    world.change(retry=1, suspend=False, store="s3://bucket/store")
    world.settle()
    assert (world.status.phase, world.status.round) == ("Planning", 1)
    assert world.unfinished() == ["demo-plan-1-0"]


def test_an_end_that_a_later_version_wrote_is_one() -> None:
    world = complete()
    assert world.record is not None
    world.record["status"] |= {"driver": "scheduler"}
    world.record["status"]["stages"][1]["state"] = "Skipped"
    world.record["status"]["conditions"].append(
        {
            "type": "Checked",
            "status": "Maybe",
            "reason": "x",
            "lastTransitionTime": time_text(START),
            "observedGeneration": 1,
        }
    )
    assert world.look().actions == ()
    assert world.look().status == world.status
    assert world.status.phase == "Complete"


def test_a_status_of_a_later_version_is_read_as_far_as_we_know_it() -> None:
    world = complete()
    assert world.record is not None
    world.record["status"] |= {"colour": "green"}
    assert world.status.phase == "Complete"
    assert world.look().actions == ()


# Clocks


@pytest.mark.parametrize("jump_seconds", [-3600, 86_400])
@pytest.mark.parametrize("begin", [planning, extracting, reducing, complete, failed, cancelled])
def test_a_clock_that_jumps_ends_no_run_that_works(begin: Callable[..., World], jump_seconds: int) -> None:
    world = begin()
    phase, made = world.status.phase, list(world.created)
    world.later(jump_seconds)
    assert (world.status.phase, world.created, world.status.restarts) == (phase, made, 0)


@pytest.mark.parametrize("jump_seconds", [-3600, 86_400])
def test_a_clock_that_jumps_ends_a_wait_early_at_most(jump_seconds: int) -> None:
    world = planning()
    world.fail("demo-plan-0-0", 1)
    world.settle().later(jump_seconds)
    assert world.unfinished() == ["demo-plan-0-1"]
    assert world.status.restarts == 1


def test_an_end_whose_words_are_lost_is_not_waited_for_by_a_clock_that_is_behind() -> None:
    world = planning()
    world.complete("demo-plan-0-0", "")
    world.later(-3600)
    assert world.status.stage("plan").attempt == 1


# Terminal phases

JOBS_OF_ANY_KIND = st.lists(
    st.tuples(
        st.sampled_from(["plan", "extract", "reduce"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from(["running", "Complete", "Failed", "deleting"]),
    ),
    max_size=5,
    unique_by=lambda it: it[:3],
)


@given(st.sampled_from(["Complete", "Failed", "Cancelled"]), JOBS_OF_ANY_KIND, st.booleans(), st.integers(-5000, 5000))
@settings(max_examples=150, deadline=None)
def test_a_terminal_phase_stays_whatever_is_seen(phase: str, jobs: Any, suspend: bool, at: int) -> None:
    world = {"Complete": complete, "Failed": failed, "Cancelled": cancelled}[phase]()
    for stage, round_number, attempt, how in jobs:
        name = f"demo-{stage}{'-0' if stage == 'extract' else ''}-{round_number}-{attempt}"
        labels = {STAGE_LABEL: stage, GROUP_LABEL: "0", ROUND_LABEL: str(round_number), ATTEMPT_LABEL: str(attempt)}
        job: Object = {
            "metadata": {"name": name, "uid": f"any-{name}", "labels": labels, "creationTimestamp": time_text(START)},
            "spec": {},
            "status": {},
        }
        if how == "deleting":
            job["metadata"]["deletionTimestamp"] = time_text(START)
        elif how != "running":
            condition = {"type": how, "status": "True", "lastTransitionTime": time_text(START)}
            job["status"]["conditions"] = [condition]
        world.jobs[name] = job
    world.change(suspend=suspend)
    world.now += seconds(at)
    world.settle()
    assert world.status.phase == phase
    assert all(is_finished(job) or "deletionTimestamp" in job["metadata"] for job in world.jobs.values())


# Hosts that die, and hosts that are behind: a scenario each, cut at every place

Step = Callable[[World], object]


def finish(stage: str = "") -> Step:
    def step(world: World) -> None:
        for name in world.unfinished():
            if stage in name:
                world.run(name)
                world.complete(name)

    return step


def run_all(world: World) -> None:
    for name in world.unfinished():
        world.run(name)


def on(number: int, what: Callable[[World, str], object]) -> Step:
    """Something befalls the unfinished Job of this number, where there is one."""
    return lambda world: what(world, world.unfinished()[number]) if len(world.unfinished()) > number else None


def wait(number: float) -> Step:
    def step(world: World) -> None:
        world.now += seconds(number)

    return step


def ghost(world: World, name: str) -> None:
    world.jobs[name]["status"] |= {"active": 2}


SCENARIOS: dict[str, tuple[Object, list[Step]]] = {
    "all goes well": ({"groups": 2, "nodesPerGroup": 2}, [run_all, finish(), finish("extract-0"), finish(), finish()]),
    "crash": (
        {},
        [
            *(on(0, lambda w, n: w.fail(n, 1)), wait(10), finish()),
            *(on(0, lambda w, n: w.fail(n, 75)), wait(10), finish(), finish()),
        ],
    ),
    "wrong request in one group": ({"groups": 3}, [finish(), run_all, on(1, lambda w, n: w.fail(n, 64))]),
    "every group dies": (
        {"groups": 2, "maxRestarts": 0},
        [finish(), on(0, lambda w, n: w.fail(n, 1)), on(0, lambda w, n: w.fail(n, 1))],
    ),
    "one group dies": (
        {"groups": 2, "maxRestarts": 0},
        [finish(), on(0, lambda w, n: w.fail(n, 1)), finish(), finish()],
    ),
    "done while another still works": ({"groups": 3}, [finish(), run_all, finish("extract-1"), finish("reduce")]),
    "eviction": ({}, [finish(), run_all, on(0, lambda w, n: w.evict(n)), run_all, finish(), finish()]),
    "node gone": ({}, [finish(), run_all, on(0, World.mark_evicted), wait(330), wait(0), finish(), finish()]),
    "pods of a job gone": ({}, [finish(), run_all, wait(301), on(0, ghost), wait(300), wait(0), finish(), finish()]),
    "startup timeout of a stage": ({}, [wait(600), wait(0)]),
    "startup timeout of a group": ({"groups": 2}, [finish(), on(0, World.run), wait(600), wait(0), finish(), finish()]),
    "job deleted by hand": ({}, [run_all, on(0, World.remove_job), wait(10), finish(), finish(), finish()]),
    "suspended": (
        {"groups": 2},
        [finish(), run_all, lambda w: w.change(suspend=True), wait(5), lambda w: w.change(suspend=False), finish(), finish()],
    ),
    "cancelled": ({"groups": 2}, [finish(), run_all, World.cancel]),
    "retried while it runs": ({}, [finish(), run_all, lambda w: w.change(retry=1), finish(), finish(), finish()]),
    "retried after its end": (
        {},
        [on(0, lambda w, n: w.fail(n, 65)), lambda w: w.change(retry=1), finish(), finish(), finish()],
    ),
    "nonsense": ({}, [finish(), run_all, lambda w: w.change(store=1)]),
    "removed by its time": ({}, [finish(), finish(), finish(), lambda w: w.change(ttlSecondsAfterFinished=5), wait(6)]),
}  # fmt: skip


def play(scenario: str, *, crash_at: tuple[int, int] | None = None, stale_at: tuple[int, int] | None = None) -> World:
    cluster, steps = SCENARIOS[scenario]
    world = World(**cluster)
    world.crash_at, world.stale_at = crash_at, stale_at
    world.settle()
    for step in steps:
        step(world)
        world.settle()
    return world.settle()


def outcome(world: World) -> Any:
    """How it ended, and what it counted on the way."""
    if world.record is None:
        return "removed", world.jobs
    status = world.status
    counters = {
        (one.stage, one.group): (one.restarts, one.preemptions)
        for one in status.stages
        if one.restarts or one.preemptions
    }
    failed = status.condition("Failed")
    return status.phase, status.round, failed and failed.reason, status.restarts, counters, world.unfinished()


EXPECTED = {
    "all goes well": "Complete",
    "crash": "Complete",
    "wrong request in one group": "Failed",
    "every group dies": "Failed",
    "one group dies": "Complete",
    "done while another still works": "Complete",
    "eviction": "Complete",
    "node gone": "Complete",
    "pods of a job gone": "Complete",
    "startup timeout of a stage": "Failed",
    "startup timeout of a group": "Complete",
    "job deleted by hand": "Complete",
    "suspended": "Complete",
    "cancelled": "Cancelled",
    "retried while it runs": "Complete",
    "retried after its end": "Complete",
    "nonsense": "Failed",
    "removed by its time": "removed",
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_host_that_dies_after_any_action_is_continued_to_the_same_end(scenario: str) -> None:
    undisturbed = play(scenario)
    assert outcome(undisturbed)[0] == EXPECTED[scenario]
    assert undisturbed.unfinished() == []
    cuts = [(number, k) for number, count in enumerate(undisturbed.actions_of_pass) for k in range(count + 1)]
    for cut in cuts:
        disturbed = play(scenario, crash_at=cut)
        assert outcome(disturbed) == outcome(undisturbed), cut
        assert disturbed.created == undisturbed.created, cut
        assert disturbed.objects == undisturbed.objects, cut


@pytest.mark.parametrize("age", [0, 1, 2, 9])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_second_host_whose_record_is_behind_changes_no_end_and_leaves_no_job(scenario: str, age: int) -> None:
    undisturbed = play(scenario)
    for number in range(undisturbed.passes):
        disturbed = play(scenario, stale_at=(number, age))
        assert outcome(disturbed) == outcome(undisturbed), number


# Any history


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order: laws of Jobs, counts and phases hold, and when nothing fails any more it ends."""

    @initialize(groups=st.integers(1, 2), restarts=st.integers(0, 2), preemptions=st.integers(0, 2))
    def begin(self, groups: int, restarts: int, preemptions: int) -> None:
        self.caps = (restarts, preemptions)
        self.world = World(groups=groups, maxRestarts=restarts, maxPreemptions=preemptions)
        self.world.settle()
        self.may_fail: set[str] = set()

    def pick(self, number: int) -> Iterator[str]:
        names = self.world.unfinished()
        if names:
            yield names[number % len(names)]

    @rule(number=st.integers(0, 3), code=st.sampled_from([1, 64, 65, 75, 137, 143]))
    def a_pod_fails(self, number: int, code: int) -> None:
        for name in self.pick(number):
            if self.world.pods_of(name):
                self.world.fail(name, code)
                self.may_fail.add({64: "WrongRequest", 65: "DamagedData"}.get(code, "TooManyRestarts"))

    @rule(number=st.integers(0, 3), is_seen=st.booleans())
    def a_pod_is_evicted(self, number: int, is_seen: bool) -> None:
        for name in self.pick(number):
            if self.world.pods_of(name):
                self.world.mark_evicted(name)
                if is_seen:
                    self.world.settle()
                if name in self.world.jobs and not is_finished(self.world.jobs[name]):
                    self.world._drop_pods(name)
                    said = f"Pod team/{name}-0 has condition DisruptionTarget matching FailJob rule at index 0"
                    self.world.end(name, "Failed", "PodFailurePolicy", said)
                self.may_fail.add("TooManyPreemptions")

    @rule(number=st.integers(0, 3))
    def a_job_completes(self, number: int) -> None:
        for name in self.pick(number):
            self.world.complete(name)

    @rule(number=st.integers(0, 3))
    def pods_run(self, number: int) -> None:
        for name in self.pick(number):
            self.world.run(name)

    @rule(number=st.integers(0, 9))
    def a_job_is_deleted_by_hand(self, number: int) -> None:
        names = sorted(self.world.jobs)
        if names:
            self.world.remove_job(names[number % len(names)])
            self.may_fail |= {"TooManyRestarts", "TooManyPreemptions"}

    @rule(step=st.sampled_from([1, 15, 310, 700, -3600, 86_400]))
    def the_clock_moves(self, step: int) -> None:
        self.world.now += seconds(step)
        self.may_fail |= {"StartupTimeout", "TooManyPreemptions", "TooManyRestarts"}

    @rule(after=st.integers(0, 4))
    def the_host_dies(self, after: int) -> None:
        self.world.crash_at = (self.world.passes, after)
        self.world.reconcile()
        self.world.crash_at = None

    @rule()
    def the_host_works(self) -> None:
        self.world.settle()

    @rule(is_on=st.booleans())
    def it_is_suspended_or_resumed(self, is_on: bool) -> None:
        self.world.change(suspend=is_on)

    @rule()
    def it_is_cancelled(self) -> None:
        self.world.cancel()

    @precondition(lambda self: len(self.world.statuses) > 3)
    @rule()
    def it_is_retried(self) -> None:
        self.world.change(retry=self.world.status.round + 1)
        self.may_fail.clear()

    @invariant()
    def one_job_a_place_at_a_time(self) -> None:
        at_work: Counter[tuple[str, ...]] = Counter()
        for name in self.world.unfinished():
            labels = self.world.jobs[name]["metadata"]["labels"]
            at_work[labels[STAGE_LABEL], labels[GROUP_LABEL], labels[ROUND_LABEL]] += 1
        assert not at_work or max(at_work.values()) == 1, at_work

    @invariant()
    def counts_stay_within_their_caps(self) -> None:
        for entry in self.world.status.stages:
            assert entry.restarts <= self.caps[0]
            assert entry.preemptions <= self.caps[1]

    @invariant()
    def no_end_becomes_another(self) -> None:
        ends: dict[int, str] = {}
        for status in self.world.statuses:
            if status.is_terminal:
                assert ends.setdefault(status.round, status.phase) == status.phase

    def teardown(self) -> None:
        world = self.world
        world.change(suspend=False)
        for _ in range(40):
            world.now += seconds(301)
            world.settle()
            if world.status.is_terminal:
                break
            for name in world.unfinished():
                world.run(name)
                world.complete(name)
        status = world.status
        assert status.is_terminal, status
        assert world.unfinished() == []
        if status.phase == "Cancelled":
            assert world.record is not None
            assert world.record["metadata"]["annotations"][CANCEL_ANNOTATION] == str(status.round)
        if status.phase == "Failed":
            assert status.condition("Failed").reason in self.may_fail | {"StartupTimeout"}  # type: ignore[union-attr]


AnyHistory.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestAnyHistory = AnyHistory.TestCase
