"""A controller in threads against the fake API server. There is no Job controller: `end` writes how Jobs and pods end."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller
from launcher.reconcile.actions import Timeouts
from launcher.resource.record import Record
from launcher.resource.status import Status
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer
from tests.run_document import run_document

Object = dict[str, Any]

QUICK = Timeouts(backoff_seconds=0.2, max_backoff_seconds=1, lost_pod_seconds=60, pod_status_seconds=1)
RESULTS = {
    "plan": '{"units": 2, "missing": 2, "examples": 8, "pairs": 3, "badRows": 0}',
    "extract": '{"units": 2}',
    "reduce": '{"manifest": "s3://b/m.json", "selected": 3, "badRows": 0}',
}


def a_run(name: str = "demo", **cluster: Any) -> Object:
    return run_document(name, gpusPerNode=0, **cluster)


class Hosted:
    """A controller in threads, and what it logged."""

    def __init__(self, **options: Any) -> None:
        self.logged: list[Object] = []
        self.controller = Controller(
            Cluster(), None, timeouts=QUICK, log=lambda **it: self.logged.append(it), **options
        )
        self.thread = threading.Thread(target=self.controller.run, daemon=True)

    def events(self, name: str) -> list[Object]:
        return [it for it in self.logged if it["event"] == name]


@contextlib.contextmanager
def hosted(**options: Any) -> Iterator[Hosted]:
    host = Hosted(**options)
    host.thread.start()
    try:
        yield host
    finally:
        host.controller.stop()
        host.thread.join(10)
        assert not host.thread.is_alive()


def status_of(server: ApiServer, name: str = "demo") -> Status:
    found = server.object("selectionruns", name)
    return Record({"kind": "SelectionRun", **found}).status if found else Status()


def unfinished(server: ApiServer) -> list[Object]:
    return [job for job in server.objects("jobs") if not job.get("status", {}).get("conditions")]


def end(server: ApiServer, job: Object, code: int = 0, words: str | None = None) -> None:
    """A pod of the Job ends, and then the Job."""
    labels = job["spec"]["template"]["metadata"]["labels"]
    name = job["metadata"]["name"]
    words = RESULTS[labels["prism.dev/stage"]] if words is None else words
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-0", "namespace": "default", "labels": labels, "ownerReferences": [reference]},
        "spec": {"containers": [{"name": "worker", "image": "registry/prism:1"}]},
    }
    made = copy.deepcopy(server.create(pod))
    state = {"terminated": {"exitCode": code, "message": words}}
    shown = {"name": "worker", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    made["status"] = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [shown]}
    server.update(made, subresource="status")
    conclude(server, job, "Failed" if code else "Complete")


def conclude(server: ApiServer, job: Object, kind: str) -> None:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ended = copy.deepcopy(job)
    ended["status"] = {"startTime": at, "conditions": []}
    for one in ("SuccessCriteriaMet", "Complete") if kind == "Complete" else ("FailureTarget", "Failed"):
        condition = {"type": one, "status": "True", "lastProbeTime": at, "lastTransitionTime": at}
        ended["status"]["conditions"].append(condition | {"reason": "Test", "message": "by a test"})
    if kind == "Complete":
        ended["status"] |= {"completionTime": at, "succeeded": 1}
    server.update(ended, subresource="status")


def complete_run(
    server: ApiServer, name: str = "demo", *, seconds: float = 30, also: Callable[[], object] = lambda: None
) -> Status:
    """Every Job ends well, until the run has ended."""

    def is_over() -> bool:
        also()
        for job in unfinished(server):
            with contextlib.suppress(Exception):
                end(server, job)
        return status_of(server, name).is_terminal

    eventually(is_over, seconds)
    return status_of(server, name)


def job_names(server: ApiServer) -> list[str]:
    return [job["metadata"]["name"] for job in server.objects("jobs")]


ALL_JOBS = ["demo-extract-0-0-0", "demo-plan-0-0", "demo-reduce-0-0"]
