"""GPU time: seconds × GPUs of the pods of all attempts, each counted once."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.reconcile.gpu_time import gpus_of, held_seconds
from launcher.resource.status import Status, time_text
from tests.reconcile.world import START, World, extracting, seconds

Object = dict[str, Any]
EXTRACT = "demo-extract-0-0-"


def crashed_once(world: World | None = None) -> World:
    """Two nodes of four GPUs: an attempt that crashes after 100 s, one that succeeds after 50 s."""
    world = world or extracting(gpusPerNode=4, nodesPerGroup=2)
    world.later(100)
    world.fail(f"{EXTRACT}0", 1)
    world.settle()
    world.later(10)  # its backoff
    world.run(f"{EXTRACT}1")
    world.settle()
    world.later(50)
    world.complete(f"{EXTRACT}1", {"units": 3, "gpu": "NVIDIA H200"})
    return world.settle()


def ended(world: World) -> World:
    world.run("demo-reduce-0-0")
    world.settle()
    world.later(1_000)
    world.complete("demo-reduce-0-0")
    return world.settle()


def variables(world: World, job: str) -> dict[str, str]:
    (worker,) = world.jobs[job]["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in worker["env"] if each["name"].startswith("PRISM_GPU")}


def test_all_attempts_count_from_the_start_to_the_end_of_their_containers() -> None:
    world = crashed_once()
    assert world.status.gpu_seconds == 8 * (100 + 50)
    assert ended(world).status.gpu_seconds == 8 * 150, "reduction holds no GPU"
    assert (world.status.phase, world.status.gpu) == ("Complete", "NVIDIA H200")


def test_time_before_a_container_starts_does_not_count() -> None:
    world = World(gpusPerNode=4).settle()
    world.run("demo-plan-0-0")
    world.settle()
    world.complete("demo-plan-0-0")
    world.settle()
    world.later(500)
    assert world.unfinished() == [f"{EXTRACT}0"]
    world.run(f"{EXTRACT}0")
    world.settle()
    world.later(7)
    world.complete(f"{EXTRACT}0")
    assert world.settle().status.gpu_seconds == 4 * 7


def test_reduction_is_told_what_the_stages_before_it_used() -> None:
    world = crashed_once()
    assert variables(world, "demo-reduce-0-0") == {"PRISM_GPU_SECONDS": "1200", "PRISM_GPU": "NVIDIA H200"}
    assert not any(variables(world, name) for name in world.jobs if "reduce" not in name)


def test_reduction_is_told_of_groups_that_still_run() -> None:
    world = extracting(groups=2, gpusPerNode=1)
    world.later(30)
    world.complete(f"{EXTRACT}0")
    world.settle()
    assert variables(world, "demo-reduce-0-0") == {"PRISM_GPU_SECONDS": "60"}
    assert world.status.gpu_seconds == 30, "the status counts attempts that have ended"
    world.run("demo-reduce-0-0")
    world.settle()
    world.later(5)
    world.complete("demo-reduce-0-0")
    assert world.settle().status.gpu_seconds == 30 + 35


def plan_and_start_extraction(world: World) -> None:
    world.settle()
    world.run("demo-plan-0-0")
    world.settle()
    world.complete("demo-plan-0-0")
    world.settle()
    world.run(f"{EXTRACT}0")
    world.settle()


@pytest.mark.parametrize("number", range(5, 20))
@pytest.mark.parametrize("place", [0, 1])
def test_an_operator_that_dies_anywhere_changes_no_sum(number: int, place: int) -> None:
    """It dies before an action, or after the last one and before the status is written; another one continues."""
    world = World(gpusPerNode=4, nodesPerGroup=2)
    world.crash_at = (number, place)
    plan_and_start_extraction(world)
    crashed_once(world)
    assert variables(world, "demo-reduce-0-0")["PRISM_GPU_SECONDS"] == "1200"
    assert ended(world).status.gpu_seconds == 1200


@pytest.mark.parametrize("number", range(5, 20, 3))
def test_a_second_operator_with_an_old_record_changes_no_sum(number: int) -> None:
    world = World(gpusPerNode=4, nodesPerGroup=2)
    world.stale_at = (number, 1)
    plan_and_start_extraction(world)
    assert ended(crashed_once(world)).status.gpu_seconds == 1200


def test_pods_that_are_gone_count_until_their_attempt_ended() -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    world.later(60)
    world.evict(f"{EXTRACT}0")
    world.pods = [pod for pod in world.pods if EXTRACT not in pod["metadata"]["name"]]
    assert world.later(3).status.gpu_seconds == 8 * 60


def test_a_deleted_job_counts_until_it_was_missed() -> None:
    world = extracting(gpusPerNode=2)
    world.later(60)
    world.remove_job(f"{EXTRACT}0")
    assert world.settle().status.gpu_seconds == 2 * 60


def test_a_cancelled_run_counts_until_it_was_cancelled() -> None:
    world = extracting(gpusPerNode=2)
    world.later(40)
    world.cancel()
    world.settle()
    assert (world.status.phase, world.status.gpu_seconds) == ("Cancelled", 80)
    assert world.later(1_000).status.gpu_seconds == 80


def test_a_suspension_does_not_count() -> None:
    world = extracting(gpusPerNode=2)
    world.later(40)
    world.change(suspend=True)
    world.settle()
    world.later(1_000)
    world.change(suspend=False)
    world.settle()
    world.run(f"{EXTRACT}1")
    world.settle()
    world.later(5)
    world.complete(f"{EXTRACT}1")
    assert world.settle().status.gpu_seconds == 2 * 45


def suspend_job(world: World, name: str = f"{EXTRACT}0") -> None:
    """As Kueue does to preempt it: its pods are taken away, and the number of the attempt stays."""
    job, said = world.jobs[name], {"type": "Suspended", "status": "True", "reason": "JobSuspended"}
    job["spec"]["suspend"] = True
    job["status"] |= {"active": 0, "conditions": [said | {"lastTransitionTime": time_text(world.now)}]}
    for pod in world.pods_of(name):
        pod["metadata"]["deletionTimestamp"] = time_text(world.now + seconds(30))


def resume_job(world: World, name: str = f"{EXTRACT}0") -> None:
    job = world.jobs[name]
    job["spec"]["suspend"] = False
    job["status"] |= {"active": job["spec"]["completions"], "conditions": [], "startTime": time_text(world.now)}
    owner = {"uid": job["metadata"]["uid"]}
    for index in range(job["spec"]["completions"]):
        metadata = {"name": f"{name}-{index}", "ownerReferences": [owner]}
        world.pods.append({"kind": "Pod", "metadata": metadata, "status": {"phase": "Pending"}})


@pytest.mark.parametrize("seconds_until_seen", [0, 500])
@pytest.mark.parametrize("are_pods_gone", [True, False])
def test_time_in_the_queue_after_a_preemption_does_not_count(seconds_until_seen: int, are_pods_gone: bool) -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    world.later(7_200)
    suspend_job(world)
    world.now += seconds(seconds_until_seen)
    world.pods = [] if are_pods_gone else world.pods
    assert world.settle().status.gpu_seconds == 8 * 7_200
    assert world.later(20).status.gpu_seconds == 8 * 7_200
    world.pods = []
    world.later(36_000)
    world.cancel()
    assert world.settle().status.gpu_seconds == 8 * 7_200
    assert world.later(1_000).status.gpu_seconds == 8 * 7_200


def test_an_attempt_that_was_preempted_counts_before_and_after_it() -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    for number in range(2):
        world.later(7_200)
        suspend_job(world)
        world.later(20)
        world.pods = []
        world.later(36_000)
        resume_job(world)
        world.later(60)
        assert world.status.gpu_seconds == 8 * 7_200 * (number + 1)
        world.run(f"{EXTRACT}0")
        world.settle()
    world.later(3_600)
    world.complete(f"{EXTRACT}0")
    assert world.settle().status.gpu_seconds == 8 * (2 * 7_200 + 3_600)
    assert variables(world, "demo-reduce-0-0")["PRISM_GPU_SECONDS"] == str(8 * (2 * 7_200 + 3_600))


def test_an_operator_that_dies_at_a_preemption_changes_no_sum() -> None:
    world = extracting(gpusPerNode=4)
    world.later(100)
    suspend_job(world)
    world.crash_at = (world.passes, 0)
    world.settle()
    assert world.later(50).status.gpu_seconds == 4 * 100


def test_a_later_round_continues_the_sum() -> None:
    world = ended(crashed_once())
    world.change(retry=1)
    world.settle()
    assert world.status.gpu_seconds == 1200
    world.run("demo-plan-1-0")
    world.settle()
    world.complete("demo-plan-1-0")
    world.settle()
    (name,) = world.unfinished()
    world.run(name)
    world.settle()
    world.later(10)
    world.change(retry=2)
    world.settle()
    assert world.status.gpu_seconds == 1200 + 80, "what the second round had begun"


def test_a_run_on_cpus_uses_no_gpu() -> None:
    world = extracting(gpusPerNode=0)
    world.later(100)
    world.complete(f"{EXTRACT}0")
    assert world.settle().status.gpu_seconds == 0
    assert variables(world, "demo-reduce-0-0") == {"PRISM_GPU_SECONDS": "0"}


def test_the_price_follows_from_the_documents_price() -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    world.change(gpuHourPrice=3.5)
    assert crashed_once(world).status.price == round(1200 / 3600 * 3.5, 2)
    assert variables(world, "demo-reduce-0-0")["PRISM_GPU_HOUR_PRICE"] == "3.5"
    assert crashed_once().status.price is None


def test_a_price_that_json_cannot_hold_is_refused() -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    world.change(gpuHourPrice=1e308)
    assert "gpuHourPrice" in world.settle().status.message
    assert world.status.phase == "Failed"


def test_the_price_of_an_hour_may_be_corrected_after_the_end() -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    world.change(gpuHourPrice=35)
    ended(crashed_once(world)).change(gpuHourPrice=3.5)
    assert world.settle().status.price == round(1200 / 3600 * 3.5, 2)
    assert world.status.phase == "Complete"


def test_a_document_that_cannot_be_run_any_more_keeps_the_price_of_what_ended() -> None:
    world = extracting(gpusPerNode=4, nodesPerGroup=2)
    world.change(gpuHourPrice=3.5)
    price = crashed_once(world).status.price
    world.change(model=7)
    world.settle()
    assert (world.status.phase, world.status.gpu_seconds, world.status.price) == ("Failed", 1200, price)


@pytest.mark.parametrize(
    "resources",
    [
        {"limits": {"nvidia.com/gpu": None, "nvidia.com/mig-1g.5gb": 1}},
        {"limits": {"nvidia.com/gpu": None}, "claims": [{"name": "gpu"}]},
    ],
)
def test_parts_of_a_gpu_have_no_price(resources: Object) -> None:
    overlay = {"spec": {"containers": [{"name": "worker", "resources": resources}]}}
    world = extracting(gpusPerNode=1, podOverlay=overlay)
    world.change(gpuHourPrice=3.5)
    world.later(100)
    world.complete(f"{EXTRACT}0")
    assert world.settle().status.price is None
    assert variables(world, "demo-reduce-0-0") == {}


@pytest.mark.parametrize("name", ["$(AWS_SECRET_ACCESS_KEY)", "a" * 65, "", 7, None, "x\ny"])
def test_a_name_that_is_no_name_of_a_gpu_is_ignored(name: object) -> None:
    world = extracting(gpusPerNode=1)
    world.complete(f"{EXTRACT}0", {"units": 3, "gpu": name})
    world.settle()
    assert (world.status.stage("extract").state, world.status.gpu) == ("Succeeded", None)


def test_the_clocks_of_two_nodes_make_no_negative_time() -> None:
    pod = {"status": {"containerStatuses": [{"name": "worker", "state": {"terminated": {
        "exitCode": 0, "startedAt": "2026-05-01T13:00:00Z", "finishedAt": "2026-05-01T12:00:00Z"}}}]}}  # fmt: skip
    assert held_seconds(job_with({"nvidia.com/gpu": "2"}), [pod], None, START) == 0


@pytest.mark.parametrize(
    ("limits", "gpus"),
    [({"nvidia.com/gpu": "8", "memory": "8Gi"}, 9), ({"amd.com/gpu": 4}, 5), ({"memory": "8Gi"}, 1), (None, 1)],
)
def test_gpus_are_those_of_all_containers_of_a_pod(limits: Any, gpus: int) -> None:
    assert gpus_of(job_with(limits)["spec"]["template"]) == gpus


def job_with(limits: Any) -> Object:
    sidecar = {"name": "sidecar", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    worker = {"name": "worker", "resources": {"limits": limits}}
    return {"spec": {"completions": 1, "template": {"spec": {"containers": [sidecar, worker]}}}}


def test_a_status_without_gpu_time_is_one_of_an_earlier_version() -> None:
    assert Status.model_validate({"phase": "Complete", "completionTime": "2026-05-01T12:00:00Z"}).gpu_seconds == 0
