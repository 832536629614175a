"""Warning events of Jobs, and what is asked before the first pass."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launcher.kube.cluster import Cluster
from launcher.operator import controller as hosts
from launcher.operator import events, informer
from launcher.operator.controller import Controller
from launcher.operator.work_queue import WorkQueue
from launcher.resource.names import MANAGER, RUN_LABEL
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer
from tests.operator.host import a_run, hosted, status_of, unfinished

Object = dict[str, Any]


def test_events_of_many_jobs_are_read_once_and_the_newest_counts(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SETTLE_SECONDS", 0.0)
    record = server.create(a_run())
    owner = {name: record[name] for name in ("apiVersion", "kind")} | {"name": "demo", "uid": record["metadata"]["uid"]}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}
    for number in range(9):
        labels = {RUN_LABEL: "demo", "app.kubernetes.io/managed-by": MANAGER}
        metadata = {"name": f"j{number}", "namespace": "default", "labels": labels, "ownerReferences": [owner]}
        job = server.create(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}
        )
        about = {"kind": "Job", "namespace": "default", "name": f"j{number}", "uid": job["metadata"]["uid"]}
        for minute, when in ((9, "lastTimestamp"), (5, "lastTimestamp"), (7, "eventTime")):
            at = f"2026-01-01T00:0{minute}:00{'.000000' * (when == 'eventTime')}Z"
            metadata = {"name": f"e{number}-{minute}", "namespace": "default"}
            event = {"apiVersion": "v1", "kind": "Event", "metadata": metadata}
            if when == "eventTime":
                event |= {"reportingComponent": "prism.dev/test", "reportingInstance": "test", "action": "Test"}
            content = {"involvedObject": about, "type": "Warning", "reason": "R", "message": str(minute), when: at}
            server.create({**event, **content})
    controller = Controller(Cluster(), None)
    for kind in ("SelectionRun", "Job"):
        controller.cache.replace(kind, controller.cluster.list(kind, None).items, "0")
    found = controller.cache.record("SelectionRun", ("default", "demo"))
    assert found
    server.requests.reset()
    memory, observed = controller.memories.of(found), controller.cache.observed(found)

    def read(**options: bool) -> dict[str, str]:
        now = controller.clock()
        return events.read_pod_warnings(
            controller.cluster, found, observed, memory, now, controller.queue.add, **options
        )

    notes = [read() for _ in range(5)][-1]
    assert notes == {f"j{number}": "R: 9" for number in range(9)}
    assert server.requests["LIST", "events"] == 1
    read(refresh=True)
    assert server.requests["LIST", "events"] == 2


def test_no_pass_runs_before_every_kind_is_listed(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(informer, "LONGEST_PAUSE_SECONDS", 0.1)
    server.faults.script([(lambda it: (it.verb, it.plural) == ("list", "pods"), "503")] * 12)
    server.create(a_run())
    takes: list[Any] = []
    take = WorkQueue.take
    monkeypatch.setattr(WorkQueue, "take", lambda self: takes.append(0) or take(self))
    with hosted() as host:
        eventually(lambda: len(host.events("watch")) >= 3)
        assert not takes
        eventually(lambda: unfinished(server))
    assert status_of(server).phase == "Planning"


def test_a_controller_that_never_listed_can_be_stopped(server: ApiServer) -> None:
    with server.outage(), hosted():
        time.sleep(0.3)
