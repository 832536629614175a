"""Events and conditions."""

from __future__ import annotations

from launcher.reconcile.conditions import transitions
from launcher.resource.status import Status
from tests.reconcile.world import complete, failed, planning


def test_each_phase_and_each_failed_attempt_has_an_event() -> None:
    world = planning()
    world.fail("demo-plan-0-0", 1)
    before = world.status
    (event,) = transitions(before, world.settle().status)
    assert (event.is_warning, event.reason) == (True, "Restarted")
    assert event.message.startswith("plan: attempt 1: exit code 1")
    world.later(10)
    world.evict("demo-plan-0-1")
    before = world.status
    (event,) = transitions(before, world.settle().status)
    assert (event.is_warning, event.reason) == (False, "Preempted")
    assert list(transitions(world.status, world.status)) == []
    fail = failed()
    assert [one.reason for one in transitions(Status(), fail.status)] == ["Failed"]


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
