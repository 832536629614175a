"""Why an attempt waits, and what its termination message must have."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from launcher.reconcile.actions import CreateError
from launcher.resource.status import parse_time, time_text
from tests.reconcile.world import (
    PLANNED,
    REDUCED,
    START,
    Object,
    World,
    creates,
    extracting,
    planning,
    reducing,
    seconds,
)

# Why it waits


def test_the_startup_timeout_starts_anew_after_a_suspension() -> None:
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
    assert world.failure_reason == "StartupTimeout"


def test_a_job_that_kueue_holds_is_queued_without_a_timeout() -> None:
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
def test_a_pending_run_reports_why_and_fails_at_its_startup_timeout(status: Object, message: str) -> None:
    world = World().settle()
    world.pods[0]["status"] = {"phase": "Pending", **status}
    world.settle()
    assert (world.status.phase, world.status.message) == ("Planning", message)
    assert world.decide().requeue_at == parse_time("2026-05-01T12:10:00Z")
    world.later(599)
    assert world.status.phase == "Planning"
    world.later(1)
    assert (world.status.phase, world.failure_reason) == ("Failed", "StartupTimeout")
    assert message.removeprefix("plan: ") in world.status.message
    assert "no pod ran within 600 s" in world.status.message
    assert world.jobs == {}


def test_a_quota_that_allows_no_pod_is_reported() -> None:
    world = World().settle()
    world.pods, world.pod_warnings = [], {"demo-plan-0-0": "FailedCreate: exceeded quota: gpus"}
    world.jobs["demo-plan-0-0"]["status"].pop("active")
    world.settle()
    assert world.status.message == "plan: FailedCreate: exceeded quota: gpus"
    world.later(600)
    assert "exceeded quota" in world.status.message
    assert world.status.phase == "Failed"


def test_a_pod_that_runs_just_in_time_is_no_timeout() -> None:
    world = World().settle().later(599)
    world.run("demo-plan-0-0")
    world.later(10_000)
    assert (world.status.phase, world.status.message) == ("Planning", "")


def test_a_pod_that_runs_between_the_two_passes_of_a_timeout_is_kept() -> None:
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


# Jobs that the API server refuses


def refuse(world: World, name: str, code: int, message: str = "exceeded quota: jobs") -> None:
    world.create_errors[name] = CreateError(code, message, world.now)


@pytest.mark.parametrize("code", [400, 422])
@pytest.mark.parametrize("groups", [1, 3])
def test_an_invalid_job_fails_the_run_with_the_message_of_the_server(code: int, groups: int) -> None:
    world = planning(groups=groups)
    refuse(world, f"demo-extract-{groups - 1}-0-0", code, "Job is invalid: spec.template: hostPath")
    world.complete("demo-plan-0-0")
    world.settle()
    assert (world.status.phase, world.failure_reason) == ("Failed", "InvalidPod")
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
def test_a_job_that_an_admission_policy_denies_is_retried(code: int, message: str) -> None:
    """It answers with the code of a broken object; but who changes it lets the same Job pass."""
    world = World()
    refuse(world, "demo-plan-0-0", code, message)
    world.reconcile()
    assert world.status.phase == "Planning"
    assert message in world.status.message
    world.create_errors.clear()
    world.settle()
    assert world.created == ["demo-plan-0-0"]


@pytest.mark.parametrize("message", ['Job.batch "x" is invalid: spec.template: Forbidden: x', "Job is forbidden: y"])
def test_an_invalid_job_is_not_taken_for_a_denied_one(message: str) -> None:
    world = World()
    refuse(world, "demo-plan-0-0", 422, message)
    world.settle()
    assert world.status.phase == "Failed"


@pytest.mark.parametrize("code", [403, 409, 429, 500])
def test_a_job_that_a_quota_refuses_is_retried_and_reported(code: int) -> None:
    world = World()
    refuse(world, "demo-plan-0-0", code)
    for _ in range(3):
        decision = world.reconcile()
        assert creates(decision) == ["demo-plan-0-0"]
        assert decision.requeue_at == START + seconds(600)
        assert (world.status.phase, world.status.message) == (
            "Planning",
            "plan: its Job is refused: exceeded quota: jobs",
        )
        world.now += seconds(100)
    world.create_errors.clear()
    world.settle()
    world.run("demo-plan-0-0")
    world.settle()
    assert (world.status.phase, world.status.message, world.status.restarts) == ("Planning", "", 0)
    assert world.created == ["demo-plan-0-0"]


def test_a_refused_group_does_not_hold_up_the_others() -> None:
    world = planning(groups=2)
    refuse(world, "demo-extract-0-0-0", 403)
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


def test_a_running_group_reports_why_its_other_pods_wait() -> None:
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


# Termination messages


@pytest.mark.parametrize(
    "words",
    [
        *("", "no json", "[1]", "[" * 100_000, {"units": 1}),
        *(PLANNED | wrong for wrong in ({"missing": "six"}, {"units": True}, {"units": -1}, {"pairs": 2**53})),
    ],
)
def test_a_plan_without_a_valid_result_is_repeated(words: Any) -> None:
    world = planning()
    world.complete("demo-plan-0-0", words)
    world.settle()
    assert world.unfinished() == []
    assert world.status.stage("plan").restarts == 0  # the status of its pods may be on its way
    world.later(10)
    entry = world.status.stage("plan")
    assert (entry.restarts, entry.attempt) == (1, 1)
    assert world.has_reported("termination message is missing")
    assert world.unfinished() == ["demo-plan-0-1"]


@pytest.mark.parametrize("words", [{"units": "three"}, {"units": None}, {}])
def test_a_group_without_a_count_has_succeeded(words: Object) -> None:
    world = extracting()
    world.complete("demo-extract-0-0-0", words)
    world.settle()
    assert world.status.phase == "Reducing"
    assert world.status.shards == "0/6"


def test_counts_of_another_version_that_are_no_numbers_are_ignored() -> None:
    world = reducing()
    world.complete("demo-reduce-0-0", {"manifest": "s3://b/m.json", "selected": "all", "badRows": {}})
    world.settle()
    assert (world.status.phase, world.status.selected, world.status.bad_rows) == ("Complete", None, 1)


def test_a_warning_of_the_reduce_stage_is_in_the_status_and_in_the_condition_complete() -> None:
    world = reducing()
    world.complete("demo-reduce-0-0", REDUCED | {"warnings": ["mean π is 0.45."]})
    world.settle()
    assert world.status.message == "90 examples selected; warning: mean π is 0.45."
    assert world.status.condition("Complete").message == world.status.message
    assert world.status.stage("reduce").message == "warning: mean π is 0.45."


@pytest.mark.parametrize("warnings", ["text", [], [1], {}, None])
def test_warnings_of_another_version_that_are_no_texts_are_ignored(warnings: Any) -> None:
    world = reducing()
    world.complete("demo-reduce-0-0", REDUCED | {"warnings": warnings})
    world.settle()
    assert world.status.message == "90 examples selected"


NO_URIS = [
    "",
    "m.json",
    "gs://b/m.json",
    "s3://",
    "s3://b/\x1b]0;x\x07",
    "/a\nb",
    "s3://b/\ud800",
    "s3://b/" + "m" * 2048,
    7,
]


@pytest.mark.parametrize("manifest", NO_URIS)
def test_a_manifest_that_is_no_uri_is_no_result(manifest: Any) -> None:
    world = reducing(maxRestarts=0)
    world.complete("demo-reduce-0-0", {"manifest": manifest, "selected": 1})
    world.later(10)
    assert (world.status.phase, world.status.manifest) == ("Failed", None)
    assert "termination message is missing" in world.status.message


@pytest.mark.parametrize("manifest", ["/out/my run/größe/manifest.json", "s3://b/" + "m" * 2000])
def test_any_path_or_s3_uri_of_a_manifest_is_shown(manifest: str) -> None:
    world = reducing()
    world.complete("demo-reduce-0-0", {"manifest": manifest, "selected": 1})
    world.settle()
    assert (world.status.phase, world.status.manifest) == ("Complete", manifest)


@pytest.mark.parametrize("delay_seconds", [0, 3, 9])
def test_the_end_of_a_job_waits_for_the_status_of_its_pods(delay_seconds: int) -> None:
    world = planning()
    pods = copy.deepcopy(world.pods)
    world.complete("demo-plan-0-0")
    after, world.pods = world.pods, pods
    world.later(delay_seconds)
    assert world.status.stage("plan").state == "Running"
    assert world.decide().requeue_at == START.replace(microsecond=0) + seconds(10)
    world.pods = after
    world.settle()
    assert (world.status.phase, world.status.restarts) == ("Extracting", 0)
