"""Laws of what Kueue's Workloads add to a status: its own words beside a stage that is queued, and never an error.

The conditions are those of a real Kueue (commit ff69552e79 of kubernetes-sigs/kueue, beside Kubernetes 1.36, 2026-11-29): of
a Job larger than its ClusterQueue, of one that waits for another's quota, of a running one whose Workload was deactivated and
activated again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.follow.kueue_reasons import kueue_reasons, why_not_admitted, with_kueue_reasons
from launcher.kube.cluster import Cluster
from launcher.resource.crd import crd
from launcher.resource.record import Record
from launcher.resource.status import StageStatus, Status
from tests.cluster.grants import grant
from tests.cluster.kueue import RELEASES, kueue, suspended_job, workload
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.refusals import ApiError
from tests.run_document import run_document

TOO_LARGE = (
    "couldn't assign flavors to pod set main: insufficient quota for cpu in flavor plain, previously considered podsets "
    "requests (0) + current podset request (500m) > maximum capacity (150m)"
)
NO_ROOM = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor plain, 50m more needed"
DEACTIVATED = "The workload is deactivated"
WAITS = "waits for Kueue's queue team-a"


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


NOT_RESERVED = condition("Admitted", "False", "NoReservation", "The workload has no reservation")
NOT_READY = condition("PodsReady", "False", "WaitForStart", "Not all pods are ready or succeeded")
SEEN = {
    "larger than the queue": (
        (condition("QuotaReserved", "False", "ExceedsMaxQuota", TOO_LARGE), NOT_RESERVED, NOT_READY),
        TOO_LARGE,
    ),
    "no room at present": (
        (NOT_READY, condition("QuotaReserved", "False", "WaitingForQuota", NO_ROOM), NOT_RESERVED),
        NO_ROOM,
    ),
    "deactivated while it ran": (
        (
            condition("QuotaReserved", "False", "Deactivated", DEACTIVATED),
            condition("Evicted", "True", "Deactivated", DEACTIVATED),
            NOT_RESERVED,
            condition("Requeued", "False", "Deactivated", DEACTIVATED),
            NOT_READY,
        ),
        f"evicted: {DEACTIVATED}",
    ),
    "activated again, while its queue is on hold": (
        (
            condition("QuotaReserved", "False", "Suspended", "ClusterQueue all is inactive"),
            condition("Evicted", "True", "Deactivated", DEACTIVATED),
            NOT_RESERVED,
            condition("Requeued", "True", "Reactivated", "The workload was reactivated"),
            NOT_READY,
        ),
        "ClusterQueue all is inactive",
    ),
    "evicted, its quota not given back yet": (  # for two seconds, by the times of the conditions of the deactivated one
        (
            condition("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue all"),
            condition("Evicted", "True", "Deactivated", DEACTIVATED),
            condition("Admitted", "True", "Admitted", "The workload is admitted"),
        ),
        f"evicted: {DEACTIVATED}",
    ),
    "admitted": (
        (
            condition("PodsReady", "True", "Started", "All pods reached readiness and the workload is running"),
            condition("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue all"),
            condition("Admitted", "True", "Admitted", "The workload is admitted"),
        ),
        "",
    ),
    "not looked at yet": ((), ""),
}
"""What a Workload was seen to have -> what is said of it."""

HELD = SEEN["larger than the queue"][0]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.create(crd())
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def queued(stage: str = "plan", group: int = 0, attempt: int = 0) -> StageStatus:
    return StageStatus(stage=stage, group=group, attempt=attempt, state="Queued", message=WAITS)


def record_of(server: ApiServer, *stages: StageStatus, **status: Any) -> Record:
    document = run_document(queueName="team-a")
    made = server.create({**document, "metadata": {"name": "demo", "namespace": "default"}})
    return Record({**made, "status": Status(phase="Planning", stages=stages, **status).to_document()})


def messages(record: Record) -> list[str]:
    """Of the stages, as they are shown."""
    shown = with_kueue_reasons(record.status, record.name, kueue_reasons(Cluster(tries=1), record))
    return [entry.message for entry in shown.stages]


@pytest.mark.parametrize(("conditions", "reason"), SEEN.values(), ids=SEEN.keys())
def test_a_workload_says_why_it_is_not_admitted(conditions: tuple[dict[str, str], ...], reason: str) -> None:
    assert why_not_admitted({"status": {"conditions": list(conditions)}}) == reason
    assert why_not_admitted({}) == ""


@pytest.mark.parametrize("served", RELEASES.values(), ids=RELEASES.keys())
def test_kueues_reason_is_shown_beside_its_queue_in_every_version(server: ApiServer, served: tuple[str, ...]) -> None:
    kueue(server, *served, kind="Workload")
    workload(server, suspended_job(server, "demo-plan-0-0"), *HELD, version=served[0])
    assert messages(record_of(server, queued())) == [f"{WAITS}: {TOO_LARGE}"]


def test_each_stage_that_is_queued_has_the_reason_of_its_own_job(server: ApiServer) -> None:
    kueue(server, "v1beta2", kind="Workload")
    for name, run, seen in (
        ("demo-extract-0-0-1", "demo", "deactivated while it ran"),
        ("demo-extract-1-0-0", "demo", "no room at present"),
        ("demo-extract-2-0-0", "demo", "no room at present"),
        ("demo-extract-0-0-0", "demo", "larger than the queue"),  # of an earlier attempt
        ("other-plan-0-0", "other", "larger than the queue"),
    ):
        workload(server, suspended_job(server, name, run), *SEEN[seen][0])
    running = StageStatus(stage="extract", group=2, state="Running", message="a note")
    shown = messages(record_of(server, queued("extract", 0, 1), queued("extract", 1), running))
    assert shown == [f"{WAITS}: evicted: {DEACTIVATED}", f"{WAITS}: {NO_ROOM}", "a note"]


def test_more_groups_than_fit_into_one_request_all_have_their_reasons(server: ApiServer) -> None:
    kueue(server, "v1beta2", kind="Workload")
    for group in range(101):
        workload(server, suspended_job(server, f"demo-extract-{group}-0-0"), *HELD)
    shown = messages(record_of(server, *(queued("extract", group) for group in range(101))))
    assert shown == [f"{WAITS}: {TOO_LARGE}"] * 101


def test_without_a_queued_stage_nothing_is_asked(server: ApiServer) -> None:
    record = record_of(server, StageStatus(stage="plan", state="Running"))
    server.requests.reset()
    assert messages(record) == [""]
    assert not server.requests


def test_where_nothing_is_known_of_a_workload_the_line_stays_and_there_is_no_error(server: ApiServer) -> None:
    record = record_of(server, queued())
    assert messages(record) == [WAITS]  # no Job yet
    held = suspended_job(server, "demo-plan-0-0")
    assert messages(record) == [WAITS]  # no Kueue
    kueue(server, "v1", "v2alpha1", kind="Workload")
    workload(server, held, *HELD, version="v1")
    assert messages(record) == [WAITS]  # a later Kueue


@pytest.mark.parametrize("right", ["list jobs", "list workloads", "both"])
def test_who_may_not_read_workloads_or_jobs_sees_the_line_as_it_is(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str
) -> None:
    kueue(server, "v1beta1", "v1beta2", kind="Workload")
    workload(server, suspended_job(server, "demo-plan-0-0"), *HELD)
    record = record_of(server, queued())
    rules = {"list jobs": ("batch", ["jobs"], ["list"]), "list workloads": ("kueue.x-k8s.io", ["workloads"], ["list"])}
    token = grant(server, *(rules.values() if right == "both" else [rules[right]]))
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "account", token=token)))
    assert messages(record) == [f"{WAITS}: {TOO_LARGE}" if right == "both" else WAITS]


def test_a_kueue_that_does_not_answer_is_not_waited_for(server: ApiServer) -> None:
    """Reading a Workload in a version that is not the stored one needs Kueue's own webhook."""
    kueue(server, "v1beta1", "v1beta2", kind="Workload")
    workload(server, suspended_job(server, "demo-plan-0-0"), *HELD)
    record = record_of(server, queued())

    def refuse(_: Any) -> None:
        raise ApiError(500, "conversion webhook failed")

    server.faults.script([({"plural": "workloads", "verb": "list"}, refuse)] * 2)
    assert kueue_reasons(Cluster(tries=6), record) == {}
    assert server.faults.pending == 1
