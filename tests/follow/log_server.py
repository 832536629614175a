"""The fake API server with logs as a kubelet keeps them, and pods of a run to write them."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL, RUN_LABEL, STAGE_LABEL, WORKER_CONTAINER
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.faults import Request

Pod = dict[str, Any]
FIRST = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)


class LogServer(ApiServer):
    """Its logs carry the times at which lines were written, as a kubelet's do: the same ones whenever they are asked for.

    `cuts`: each entry breaks one connection after so many lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, list[tuple[datetime.datetime, str]]] = {}
        self.cuts: list[int] = []
        self.asked: list[dict[str, str]] = []

    def say(self, pod: str, *lines: str, at_once: bool = False) -> None:
        """Lines of a pod's log, a millisecond apart; or all of one time."""
        so_far = self.written.setdefault(pod, [])
        for line in lines:
            step = datetime.timedelta(milliseconds=0 if at_once and so_far else 1)
            so_far.append(((so_far[-1][0] if so_far else FIRST) + step, line))

    def read_log(self, request: Request, alive: Callable[[], bool]) -> Iterator[bytes]:
        super().read_log(request, alive)  # refuses what a kubelet refuses
        self.asked.append(request.query)
        return self._lines(request, self.reading.get(request)["metadata"]["uid"], alive)

    def _lines(self, request: Request, uid: str, alive: Callable[[], bool]) -> Iterator[bytes]:
        query = request.query
        sent, limit = 0, self.cuts.pop(0) if self.cuts else 10**9
        place, written = 0, self.written.setdefault(request.name, [])
        if "tailLines" in query:
            place = max(0, len(written) - int(query["tailLines"]))
        since = datetime.datetime.fromisoformat(query["sinceTime"]) if "sinceTime" in query else FIRST
        while True:
            while place < len(written):
                when, line = written[place]
                place += 1
                if when < since:
                    continue
                if sent == limit:
                    yield b"2026-03-01T00:0"  # half a line
                    raise ConnectionResetError
                sent += 1
                yield f"{when:%Y-%m-%dT%H:%M:%S.%f}000Z {line}\n".encode()
            if sent == limit:
                raise ConnectionResetError
            if query.get("follow") != "true" or not alive():
                return
            if self.subresources.ended_pod(request.namespace, request.name, uid) and place == len(written):
                return
            time.sleep(0.01)
            yield b""


def pod_of(
    stage: str,
    *,
    group: int = 0,
    attempt: int = 0,
    node: int | None = None,
    run: str = "demo",
    created: str = "2026-03-01T00:00:00Z",
) -> Pod:
    labels = {
        RUN_LABEL: run,
        STAGE_LABEL: stage,
        GROUP_LABEL: str(group),
        ROUND_LABEL: "0",
        ATTEMPT_LABEL: str(attempt),
    }
    spec: dict[str, Any] = {"containers": [{"name": WORKER_CONTAINER, "image": "prism"}], "restartPolicy": "Never"}
    if node is not None:
        spec["subdomain"] = "prism-demo-0"
        labels["batch.kubernetes.io/job-completion-index"] = str(node)
    name = f"{run}-{stage}-{group}-{attempt}-{node or 0}"
    metadata = {"name": name, "namespace": "default", "labels": labels, "creationTimestamp": created}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def put(server: LogServer, pod: Pod, state: str = "running", *lines: str) -> str:
    """Create the pod in a state, with a log. Returns its name."""
    name = str(pod["metadata"]["name"])
    server.create(pod)
    server.say(name, *lines)
    turn(server, name, state)
    return name


def turn(server: LogServer, name: str, state: str) -> None:
    """A pod's status, as a kubelet writes it: waiting, running or terminated."""
    phase = {"waiting": "Pending", "running": "Running", "terminated": "Succeeded"}[state]
    what: dict[str, Any] = {"terminated": {"exitCode": 0}}.get(state, {})
    container = {"name": WORKER_CONTAINER, "image": "prism", "imageID": "", "ready": False, "restartCount": 0}
    found = server.object("pods", name)
    assert found
    status = {"phase": phase, "containerStatuses": [{**container, "state": {state: what}}]}
    server.update({**found, "status": status}, subresource="status")
