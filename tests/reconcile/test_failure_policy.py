"""The failure policy, row by row: what befalls an attempt -> what follows; and the traps of classifying it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from launcher.reconcile.actions import CreateError
from launcher.reconcile.failure_policy import FAILURE_POLICY, Cause, FailureAction
from launcher.resource.status import parse_time, time_text
from tests.reconcile.world import World, ended_pod, extracting, planning, reducing, seconds

PLAN = "demo-plan-0-0"
GROUP = "demo-extract-0-0-0"


def lose_pod(world: World, name: str) -> None:
    world.mark_evicted(name)
    world.settle().later(330)


def refuse(world: World, code: int, message: str) -> None:
    world.remove_job(PLAN)
    world.record["status"] = {}
    world.create_errors[PLAN] = CreateError(code, message, world.now)


def hold_in_queue(world: World, name: str) -> None:
    world.jobs[name]["spec"]["suspend"], world.jobs[name]["status"], world.pods = True, {}, []


def never_start(world: World, name: str) -> None:
    world.pods_of(name)[0]["status"] = {"phase": "Pending"}


def lose_result(world: World, name: str) -> None:
    world.complete(name, "")
    world.later(10)


FAIL, NOW, BACKOFF, WAIT = (
    FailureAction.FAIL_RUN,
    FailureAction.RESTART_NOW,
    FailureAction.RESTART_WITH_BACKOFF,
    FailureAction.WAIT,
)
ROWS: list[tuple[Cause, Callable[[World, str], object], FailureAction, str]] = [
    (Cause.WRONG_REQUEST, lambda w, n: w.fail(n, 64), FAIL, "WrongRequest"),
    (Cause.DAMAGED_DATA, lambda w, n: w.fail(n, 65), FAIL, "DamagedData"),
    (Cause.INVALID_JOB, lambda w, n: refuse(w, 422, "Job is invalid: x"), FAIL, "InvalidPod"),
    (Cause.EVICTED, lambda w, n: w.evict(n), NOW, "TooManyPreemptions"),
    (Cause.POD_LOST, lose_pod, NOW, "TooManyPreemptions"),
    (Cause.OUT_OF_MEMORY, lambda w, n: w.fail(n, 137, reason="OOMKilled"), BACKOFF, "TooManyRestarts"),
    (Cause.CRASHED, lambda w, n: w.fail(n, 1), BACKOFF, "TooManyRestarts"),
    (Cause.CRASHED, lambda w, n: w.fail(n, 75), BACKOFF, "TooManyRestarts"),
    (Cause.CRASHED, lambda w, n: w.fail(n, 143), BACKOFF, "TooManyRestarts"),
    (Cause.JOB_DELETED, lambda w, n: w.remove_job(n), BACKOFF, "TooManyRestarts"),
    (Cause.NO_RESULT, lose_result, BACKOFF, "TooManyRestarts"),
    (Cause.NOT_CREATED, lambda w, n: refuse(w, 403, "exceeded quota: jobs"), WAIT, "StartupTimeout"),
    (Cause.NOT_RUNNING, never_start, WAIT, "StartupTimeout"),
    (Cause.QUEUED, hold_in_queue, WAIT, ""),
]


def test_every_cause_has_a_row() -> None:
    assert set(FAILURE_POLICY) == set(Cause) == {cause for cause, *_ in ROWS}


@pytest.mark.parametrize(("cause", "befall", "action", "reason"), ROWS, ids=[row[0].name for row in ROWS])
def test_each_cause_leads_to_its_action_and_its_limit_ends_it(
    cause: Cause, befall: Callable[[World, str], object], action: FailureAction, reason: str
) -> None:
    assert (FAILURE_POLICY[cause].action, FAILURE_POLICY[cause].reason) == (action, reason)
    is_created = cause not in (Cause.INVALID_JOB, Cause.NOT_CREATED)
    for limit in (1, 0):
        world = planning(maxRestarts=limit, maxPreemptions=limit, startupTimeoutSeconds=600)
        befall(world, PLAN)
        world.settle() if is_created else world.reconcile()
        if action is FAIL or (limit == 0 and action in (NOW, BACKOFF)):
            assert (world.status.phase, world.failure_reason, world.unfinished()) == ("Failed", reason, [])
            assert world.status.restarts == 0
        elif action is WAIT:
            assert (world.status.phase, world.status.stage("plan").attempt) == ("Planning", 0)
            world.now += seconds(601)
            world.settle() if is_created or reason else None
            assert world.status.phase == ("Failed" if reason else "Planning")
        else:
            entry = world.status.stage("plan")
            counts = (1, 0) if action is BACKOFF else (0, 1)
            assert (entry.attempt, entry.restarts, entry.preemptions) == (1, *counts)
            if action is BACKOFF and cause is not Cause.NO_RESULT:  # for a result as long was waited already
                assert (world.unfinished(), entry.not_before) == ([], "2026-05-01T12:00:10Z")
                world.later(10)
            assert world.unfinished() == ["demo-plan-0-1"]


LAST_LINES = [
    (1, "Traceback\nValueError: x\n", "", "exit code 1: ValueError: x"),
    (1, "\n", "", "exit code 1: Job has reached the specified backoff limit"),
    (1, "", "", "exit code 1: Job has reached the specified backoff limit"),
    (75, json.dumps({"error": "no bucket", "where": "s3", "fix": "wait"}), "",
     "exit code 75 (a transient error): no bucket (s3); wait"),
    (137, "", "OOMKilled", "exit code 137 (killed, often out of memory): out of memory (OOMKilled);"),
    (143, "stopped", "", "exit code 143 (stopped by SIGTERM): stopped"),
    (1, json.dumps({"error": "bad \ud800 row", "where": "a", "fix": "b"}), "", "exit code 1: bad ? row (a); b"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "text", "reason", "message"), LAST_LINES)
def test_a_crash_is_reported_with_exit_code_meaning_and_error(code: int, text: str, reason: str, message: str) -> None:
    world = planning()
    world.fail(PLAN, code, text, reason=reason)
    world.settle()
    assert world.status.message == f"plan: attempt 1: {message}"
    assert (world.status.phase, world.status.restarts) == ("Planning", 1)
    json.dumps(world.status.to_document(), ensure_ascii=False).encode()


@pytest.mark.parametrize(("code", "reason"), [(64, "WrongRequest"), (65, "DamagedData")])
@pytest.mark.parametrize("begin", [planning, extracting, reducing])
def test_a_wrong_request_or_damaged_data_ends_the_run_with_the_error_of_the_worker(
    code: int, reason: str, begin: Callable[..., World]
) -> None:
    world = begin()
    (name,) = world.unfinished()
    world.fail(name, code, json.dumps({"error": "row 7 is bad", "where": "a.jsonl", "fix": "correct it"}))
    world.settle()
    assert (world.status.phase, world.failure_reason) == ("Failed", reason)
    assert f"exit code {code}: row 7 is bad (a.jsonl); correct it" in world.status.message


@pytest.mark.parametrize("code", [64, 65])
def test_the_message_of_the_job_is_enough_where_its_pod_is_gone(code: int) -> None:
    world = planning()
    world.fail(PLAN, code)
    world.pods = []
    assert world.settle().status.phase == "Failed"


def test_restarts_and_preemptions_are_counted_apart() -> None:
    world = extracting(maxPreemptions=2, maxRestarts=0)
    for attempt in range(2):
        world.evict(f"demo-extract-0-0-{attempt}")
        world.settle()
        assert world.unfinished() == [f"demo-extract-0-0-{attempt + 1}"]
        assert (world.status.stage("extract").preemptions, world.status.stage("extract").restarts) == (attempt + 1, 0)
    world.evict("demo-extract-0-0-2")
    world.settle()
    assert (world.failure_reason, world.status.restarts) == ("TooManyPreemptions", 2)


def test_backoff_grows_up_to_its_maximum() -> None:
    world = planning(maxRestarts=7)
    waits = []
    for attempt in range(8):
        world.fail(f"demo-plan-0-{attempt}", 1)
        world.settle()
        if world.status.is_terminal:
            break
        due = parse_time(world.status.stage("plan").not_before or "")
        waits.append((due - world.now.replace(microsecond=0)).total_seconds())
        world.later(waits[-1] - 1)
        assert world.unfinished() == []
        world.now = due
        world.settle()
    assert waits == [10, 20, 40, 80, 160, 300, 300]
    assert (world.failure_reason, world.status.restarts) == ("TooManyRestarts", 7)
    assert "attempt 8; no more than 7 restarts" in world.status.message
    assert world.created == [f"demo-plan-0-{attempt}" for attempt in range(8)]


def test_evictions_do_not_lengthen_the_backoff_after_a_crash() -> None:
    world = planning()
    world.evict(PLAN)
    world.settle()
    world.fail("demo-plan-0-1", 1)
    assert world.settle().status.stage("plan").not_before == "2026-05-01T12:00:10Z"


@pytest.mark.parametrize("is_seen_before", [True, False])
def test_trap_a_an_eviction_that_the_job_does_not_name_is_no_crash(is_seen_before: bool) -> None:
    world = extracting(nodesPerGroup=2)
    world.mark_evicted(GROUP, 1)
    evicted = world.pods_of(GROUP)[1]
    if is_seen_before:
        assert world.settle().status.stage("extract").disrupted
    world.fail(GROUP, 1 if is_seen_before else 64)  # its peer ends first
    if not is_seen_before:
        world.pods.append(evicted | {"status": evicted["status"] | {"phase": "Failed"}})
    entry = world.settle().status.stage("extract")
    assert (entry.preemptions, entry.restarts, entry.disrupted) == (1, 0, False)
    assert world.unfinished() == ["demo-extract-0-0-1"]


def test_trap_b_the_exit_code_of_a_pod_that_was_being_deleted_does_not_count() -> None:
    world = extracting(nodesPerGroup=2)
    survivor = world.pods_of(GROUP)[1]
    world.fail(GROUP, 75)
    survivor["metadata"]["deletionTimestamp"] = time_text(world.now)
    world.pods.insert(0, survivor | {"status": ended_pod(64, "stopped")})
    entry = world.settle().status.stage("extract")
    assert (world.status.phase, entry.restarts) == ("Extracting", 1)
    assert "exit code 75" in entry.message


def test_trap_c_a_pod_that_never_ends_is_given_up_after_its_grace_and_the_timeout() -> None:
    world = extracting(nodesPerGroup=2)
    world.mark_evicted(GROUP)  # its deletion is due 30 s later; nobody reports from the node
    world.settle()
    assert world.decide().requeue_at == world.now.replace(microsecond=0) + seconds(330)
    world.later(329)
    assert world.unfinished() == [GROUP]
    world.later(1)
    assert world.unfinished() == ["demo-extract-0-0-1"]
    assert world.status.stage("extract").preemptions == 1
    assert world.has_reported("never ended")


def test_trap_c_a_job_that_counts_pods_which_are_gone_is_given_up() -> None:
    world = extracting().later(400)
    world.jobs[GROUP]["status"] |= {"active": 1, "terminating": 1}
    world.settle()
    assert world.status.stage("extract").missing_since == time_text(world.now)
    world.later(299)
    assert world.unfinished() == [GROUP]
    world.later(1)
    assert world.unfinished() == ["demo-extract-0-0-1"]
    assert (world.status.stage("extract").preemptions, world.status.stage("extract").missing_since) == (1, None)


def test_a_job_that_counts_a_pod_too_many_for_a_moment_is_not_given_up() -> None:
    world = extracting().later(400)
    for num_terminating in (1, 0):
        world.jobs[GROUP]["status"]["terminating"] = num_terminating
        world.later(1)
    assert world.status.stage("extract").missing_since is None
    assert world.later(10_000).unfinished() == [GROUP]


def test_failure_target_is_not_a_failure_yet() -> None:
    world = planning()
    for kind in ("FailureTarget", "SuccessCriteriaMet"):
        world.end(PLAN, kind, "BackoffLimitExceeded", "soon")
        assert world.reconcile().actions == ()
        assert world.status.stage("plan").attempt == 0


def test_a_job_that_is_being_deleted_counts_as_gone_and_is_not_deleted_again() -> None:
    world = planning()
    world.jobs[PLAN]["metadata"]["deletionTimestamp"] = time_text(world.now)
    world.settle().later(10)
    assert world.created == [PLAN, "demo-plan-0-1"]
    assert (world.status.restarts, world.has_reported("deleted by somebody else")) == (1, True)


def test_an_eviction_whose_pod_is_seen_late_is_still_one() -> None:
    world = extracting(nodesPerGroup=2)
    before = copy.deepcopy(world.pods)
    world.fail(GROUP, 1)
    after, world.pods = world.pods, before
    assert world.settle().status.stage("extract").attempt == 0
    evicted: dict[str, Any] = copy.deepcopy(before[-1])
    evicted["status"] = {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    world.pods = [*after, evicted]
    assert world.settle().status.stage("extract").preemptions == 1
