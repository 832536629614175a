"""Hosts that die, hosts that are behind, clocks that jump: the same end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from launcher.resource.names import ATTEMPT_LABEL, CANCEL_ANNOTATION, GROUP_LABEL, ROUND_LABEL, STAGE_LABEL
from launcher.resource.status import time_text
from tests.reconcile.world import (
    START,
    Object,
    World,
    cancelled,
    complete,
    extracting,
    failed,
    is_finished,
    planning,
    reducing,
    seconds,
)

# Clocks


@pytest.mark.parametrize("jump_seconds", [-3600, 86_400])
@pytest.mark.parametrize("begin", [planning, extracting, reducing, complete, failed, cancelled])
def test_a_clock_that_jumps_fails_no_running_run(begin: Callable[..., World], jump_seconds: int) -> None:
    world = begin()
    phase, made = world.status.phase, list(world.created)
    world.later(jump_seconds)
    assert (world.status.phase, world.created, world.status.restarts) == (phase, made, 0)


@pytest.mark.parametrize("jump_seconds", [-3600, 86_400])
def test_a_clock_that_jumps_at_most_shortens_a_backoff(jump_seconds: int) -> None:
    world = planning()
    world.fail("demo-plan-0-0", 1)
    world.settle().later(jump_seconds)
    assert world.unfinished() == ["demo-plan-0-1"]
    assert world.status.restarts == 1


def test_a_missing_result_is_not_waited_for_with_a_clock_that_is_behind() -> None:
    world = planning()
    world.complete("demo-plan-0-0", "")
    world.later(-3600)
    assert world.status.stage("plan").attempt == 1


# Terminal phases


STAGES, HOW = (
    st.sampled_from(["plan", "extract", "reduce"]),
    st.sampled_from(["running", "Complete", "Failed", "deleting"]),
)
ANY_JOB = st.tuples(STAGES, st.integers(0, 2), st.integers(0, 2), HOW)
JOBS_OF_ANY_KIND = st.lists(ANY_JOB, max_size=5, unique_by=lambda it: it[:3])


@given(st.sampled_from(["Complete", "Failed", "Cancelled"]), JOBS_OF_ANY_KIND, st.booleans(), st.integers(-5000, 5000))
@settings(max_examples=60)
def test_a_terminal_phase_stays_whatever_is_observed(phase: str, jobs: Any, suspend: bool, at: int) -> None:
    world = {"Complete": complete, "Failed": failed, "Cancelled": cancelled}[phase]()
    for stage, round_number, attempt, how in jobs:
        name = f"demo-{stage}{'-0' if stage == 'extract' else ''}-{round_number}-{attempt}"
        labels = {STAGE_LABEL: stage, GROUP_LABEL: "0", ROUND_LABEL: str(round_number), ATTEMPT_LABEL: str(attempt)}
        metadata = {"name": name, "uid": f"any-{name}", "labels": labels, "creationTimestamp": time_text(START)}
        job: Object = {"metadata": metadata, "spec": {}, "status": {}}
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


PHASES_OF_SCENARIOS = {"wrong request in one group": "Failed", "every group dies": "Failed", "cancelled": "Cancelled"}
PHASES_OF_SCENARIOS |= {"startup timeout of a stage": "Failed", "nonsense": "Failed", "removed by its time": "removed"}
"""Where it is not Complete."""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_host_that_dies_after_any_action_leads_to_the_same_end(scenario: str) -> None:
    undisturbed = play(scenario)
    assert outcome(undisturbed)[0] == PHASES_OF_SCENARIOS.get(scenario, "Complete")
    assert undisturbed.unfinished() == []
    cuts = [(number, k) for number, count in enumerate(undisturbed.actions_of_pass) for k in range(count + 1)]
    for cut in cuts:
        disturbed = play(scenario, crash_at=cut)
        assert outcome(disturbed) == outcome(undisturbed), cut
        assert disturbed.created == undisturbed.created, cut
        assert disturbed.objects == undisturbed.objects, cut


@pytest.mark.parametrize("age", [0, 1, 2, 9])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_second_host_with_an_old_record_changes_no_end_and_leaves_no_job(scenario: str, age: int) -> None:
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

    @rule(number=st.integers(0, 3), is_observed=st.booleans())
    def a_pod_is_evicted(self, number: int, is_observed: bool) -> None:
        for name in self.pick(number):
            if self.world.pods_of(name):
                self.world.mark_evicted(name)
                if is_observed:
                    self.world.settle()
                if name in self.world.jobs and not is_finished(self.world.jobs[name]):
                    self.world.end_evicted(name)
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
            assert status.condition("Failed").reason in self.may_fail | {"StartupTimeout"}


AnyHistory.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestAnyHistory = AnyHistory.TestCase
