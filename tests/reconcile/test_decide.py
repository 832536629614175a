"""A run goes from stage to stage, with several groups, and people suspend, cancel and retry it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest

from launcher.reconcile.actions import Decision
from launcher.resource.status import time_text
from tests.reconcile.world import (
    EXTRACTED,
    PHASES,
    PLANNED,
    REDUCED,
    START,
    World,
    cancelled,
    complete,
    creates,
    extracting,
    failed,
    is_finished,
    places,
    planning,
    reducing,
    seconds,
)

# From nothing to the end


def test_a_new_record_gets_a_config_map_a_network_policy_and_a_plan_job() -> None:
    world = World()
    decision = world.reconcile()
    assert places(decision.actions) == [("apply", "ConfigMap"), ("apply", "NetworkPolicy"), ("create", "demo-plan-0-0")]
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
        (status.phase for status in world.statuses), key=["Planning", "Extracting", "Reducing", "Complete"].index
    )


def test_a_store_with_every_unit_needs_no_extraction() -> None:
    world = planning(groups=3)
    world.complete("demo-plan-0-0", PLANNED | {"missing": 0})
    world.settle()
    assert world.unfinished() == ["demo-reduce-0-0"]
    assert world.status.condition("Extracted").reason == "NothingMissing"


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
def test_a_pass_without_a_change_does_nothing_and_writes_nothing(begin: Callable[..., World]) -> None:
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
    assert world.decide() == Decision((), world.status)


# Groups


def test_a_failed_group_does_not_fail_a_run_that_another_group_completes() -> None:
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


def test_a_run_fails_when_its_last_group_fails() -> None:
    world = extracting(groups=2, maxRestarts=0)
    world.fail("demo-extract-1-0-0", 1)
    world.settle()
    world.fail("demo-extract-0-0-0", 137, reason="OOMKilled")
    world.settle()
    assert (world.status.phase, world.failure_reason) == ("Failed", "TooManyRestarts")
    assert world.status.message.startswith("extract, group 0: exit code 137")
    last = world.status.stage("extract", 0)
    assert (last.state, last.reason) == ("Failed", "TooManyRestarts")
    assert "exit code 137" in last.message


@pytest.mark.parametrize("reason", ["NotReady", "Terminating"])
def test_a_pod_on_a_lost_node_is_reported_with_the_time(reason: str) -> None:
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


def test_a_wrong_request_in_one_group_fails_the_run_and_stops_the_others() -> None:
    world = extracting(groups=3)
    world.fail("demo-extract-1-0-0", 64)
    world.fail("demo-extract-2-0-0", 1)
    world.settle()
    assert world.status.phase == "Failed"
    assert world.status.message.startswith("extract, group 1: exit code 64")
    assert world.unfinished() == []
    assert world.status.restarts == 0
    assert not [name for name in world.created if name.endswith("-1")]


def test_no_group_restarts_once_another_has_succeeded() -> None:
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


def test_a_unit_that_two_groups_extracted_is_counted_once() -> None:
    world = extracting(groups=2)
    for group in range(2):
        world.complete(f"demo-extract-{group}-0-0", {"units": 5})
    world.settle()
    assert world.status.shards == "6/6"


def test_a_group_that_is_given_up_loses_its_job_and_the_others_continue() -> None:
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
def test_a_suspended_run_has_no_job_and_continues_where_it_was(begin: Callable[..., World]) -> None:
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
def test_cancelling_an_ended_run_changes_nothing(begin: Callable[..., World]) -> None:
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
def test_nothing_of_an_ended_run_is_created_again(begin: Callable[..., World]) -> None:
    world = begin()
    phase, made = world.status.phase, len(world.created)
    world.jobs, world.pods = {}, []
    world.later(100_000)
    assert (world.status.phase, len(world.created), world.jobs) == (phase, made, {})


@pytest.mark.parametrize("begin", [complete, failed, cancelled])
def test_a_record_is_deleted_when_its_time_to_live_is_over(begin: Callable[..., World]) -> None:
    world = begin()
    assert world.later(1_000_000).record is not None
    world.now = START
    world.change(ttlSecondsAfterFinished=60)
    world.settle()
    assert world.decide().requeue_at == START.replace(microsecond=0) + seconds(60)
    assert world.later(59).record is not None
    assert world.later(1).record is None


def test_jobs_of_earlier_attempts_are_deleted() -> None:
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
