"""An outage of the API server changes neither the exit code nor the output of a verb that waits, save one line on stderr.

The outages are those of a real server: refused connections, 500, dropped watches, and 403 to everybody for a second or two
after a start.
"""

from __future__ import annotations

import contextlib
import copy
import http.server
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.kube import recent_outage
from launcher.kube.cluster import Cluster
from launcher.kube.errors import NotFound, Refused, Starting, Unavailable
from launcher.resource.crd import crd
from launcher.resource.names import GROUP_LABEL, RUN_LABEL, STAGE_LABEL, WORKER_CONTAINER
from launcher.resource.record import Record
from launcher.submit import find_record, has_ended, wait_until
from tests.cluster.grants import ACCOUNT, grant
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.refusals import ApiError

ROOT = Path(__file__).parents[2]
DOCUMENT = yaml.safe_load((ROOT / "examples/sums/cluster.yaml").read_text()) | {"metadata": {"name": "facts"}}
POD = "facts-extract-0"
OUTAGE_SECONDS = 3.0


class RunningServer(ApiServer):
    """A server with a run that extracts, in one pod with a log."""

    def __init__(self, folder: Path) -> None:
        super().__init__(log_folder=folder / "logs")
        self.folder = folder

    def __enter__(self) -> RunningServer:
        super().__enter__()
        self.create(crd())
        self.create({**DOCUMENT, "metadata": {"name": "facts", "namespace": "default"}})
        self.set_phase("Extracting")
        self.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-0"}})
        labels = {RUN_LABEL: "facts", STAGE_LABEL: "extract", GROUP_LABEL: "0"}
        containers = [{"name": WORKER_CONTAINER, "image": "prism"}]
        spec = {"containers": containers, "restartPolicy": "Never", "nodeName": "node-0"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD, "labels": labels}, "spec": spec}
        uid = self.create(pod)["metadata"]["uid"]
        self.log = self.folder / "logs" / "default" / f"{POD}.{uid}" / f"{WORKER_CONTAINER}.log"
        self.log.parent.mkdir(parents=True)
        self.write("line 1")
        self.set_container({"running": {}}, "Running")
        return self

    def set_phase(self, phase: str) -> None:
        """As an operator writes it."""
        found = self.object("selectionruns", "facts")
        assert found is not None
        status = {"phase": phase, "startTime": "2026-01-01T00:00:00Z", "driver": "operator"}
        self.update({**found, "status": status}, subresource="status")

    def set_container(self, state: dict[str, Any], phase: str) -> None:
        pod = copy.deepcopy(self.object("pods", POD))
        assert pod is not None
        container = {"name": WORKER_CONTAINER, "image": "prism", "imageID": "", "ready": False, "restartCount": 0}
        pod["status"] = {"phase": phase, "containerStatuses": [{**container, "state": state}]}
        self.update(pod, subresource="status")

    def write(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{line}\n")

    def command(self, *words: str) -> dict[str, Any]:
        """Arguments of subprocess for a `prism` command on this server."""
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig(self.folder / "kubeconfig")), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "launcher.cli.main", *words]
        return {"args": command, "cwd": self.folder, "env": env, "text": True}

    def client(self, **options: Any) -> Cluster:
        with variables(KUBECONFIG=str(self.kubeconfig(self.folder / "kubeconfig"))):
            return Cluster(**options)

    def record(self) -> Record:
        found = find_record(self.client(), "default", "facts")
        assert found is not None
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(tmp_path) as made:
        yield made


# Verbs that wait


@contextlib.contextmanager
def refused_connections(server: ApiServer) -> Iterator[None]:
    server.start_seconds = 0.0
    with server.outage():
        time.sleep(OUTAGE_SECONDS)
        yield


@contextlib.contextmanager
def a_restart(server: ApiServer) -> Iterator[None]:
    """The server is away for a moment, and then refuses everybody."""
    server.start_seconds = OUTAGE_SECONDS
    with server.outage():
        yield


@contextlib.contextmanager
def errors(server: ApiServer) -> Iterator[None]:
    server.faults.rain({"500": 1.0}, only="prism")
    server.drop_watches()
    time.sleep(OUTAGE_SECONDS)
    yield
    server.faults.clear()


@contextlib.contextmanager
def dropped_watches(server: ApiServer) -> Iterator[None]:
    for _ in range(2):
        server.drop_watches()
        time.sleep(OUTAGE_SECONDS)
    yield


Outage = Callable[[ApiServer], contextlib.AbstractContextManager[None]]
OUTAGES: list[Outage] = [refused_connections, a_restart, errors, dropped_watches]

VERBS = {
    "wait": ["wait", "facts"],
    "watch": ["watch", "facts"],
    "logs": ["logs", "-f", "facts"],
    "submit": ["submit", "--wait", "selection.yaml"],
}


def ends_of_verbs(outage: Outage, folder: Path) -> dict[str, tuple[int, str, str]]:
    """Verb -> its exit code, stdout and stderr. Each verb that waits runs through one outage."""
    (folder / "selection.yaml").write_text(yaml.safe_dump(DOCUMENT))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes: dict[str, subprocess.Popen[str]] = {}
    with RunningServer(folder) as server, contextlib.ExitStack() as stack:
        for name, words in VERBS.items():
            process = processes[name] = subprocess.Popen(**server.command(*words), **pipes)
            stack.callback(process.communicate)
            stack.callback(process.kill)
        # wait, watch and submit watch the record; watch and logs the pods, and submit, which is ready to drive the run.
        eventually(lambda: server.requests["WATCH", "selectionruns"] >= 4 and server.requests["WATCH", "pods"] >= 3)
        with outage(server):
            server.write("line 2")
        server.write("line 3")
        server.set_container({"terminated": {"exitCode": 0}}, "Succeeded")
        server.set_phase("Complete")
        output = {name: process.communicate(timeout=120) for name, process in processes.items()}
        return {name: (process.returncode, *output[name]) for name, process in processes.items()}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Outage, Future[dict[str, tuple[int, str, str]]]]]:
    """The outages side by side, each on a server of its own."""
    with ThreadPoolExecutor(len(OUTAGES)) as pool:
        yield {outage: pool.submit(ends_of_verbs, outage, tmp_path_factory.mktemp("outage")) for outage in OUTAGES}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_changes_neither_exit_code_nor_output_of_a_verb_that_waits(outage: Outage, ends: Any) -> None:
    for name, (code, stdout, stderr) in ends[outage].result().items():
        assert code == 0, f"{name}: {stderr}"
        waited = [line for line in stderr.splitlines() if "waiting for the API server: " in line]
        others = [line for line in stderr.splitlines() if line not in waited]
        assert len(waited) == (outage is not dropped_watches), f"{name}: {stderr}"
        assert not [line for line in others if "error" in line.lower() or "forbidden" in line], f"{name}: {stderr}"
        printed = "".join(f"extract-0 line {number}\n" for number in (1, 2, 3))
        assert stdout == {"logs": printed, "watch": ""}.get(name, "facts: Complete\n"), name


def test_a_verb_that_begins_while_the_server_starts_waits_for_it(server: RunningServer) -> None:
    """It has met no failure yet; but a server that refuses even to list what it serves has just started."""
    server.start_seconds = 8.0  # longer than the command takes to begin
    with server.outage():
        server.set_phase("Complete")
    done = subprocess.run(**server.command("wait", "facts"), capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


# Refusals

NOT_ALLOWED = (
    'selectionruns.prism.dev is forbidden: User "me" cannot list resource "selectionruns" in API group "prism.dev"'
)
QUOTA = 'selectionruns.prism.dev "facts" is forbidden: exceeded quota: small'
NOT_LOGGED_IN = 'forbidden: User "system:anonymous" cannot get path "/apis/prism.dev/v1alpha1"'


def answer(code: int, message: str, *, times: int = 1, **to: str) -> list[tuple[Any, Any]]:
    """So the server answers the next requests for the run, or those named."""

    def refuse(_: Any) -> None:
        raise ApiError(code, message)

    return [(to or {"plural": "selectionruns"}, refuse)] * times


FAILURE = [({"plural": "selectionruns"}, "500")]


@pytest.mark.parametrize(
    ("failure", "refusal", "expected"),
    [
        ("", NOT_ALLOWED, Refused),
        *((failure, NOT_ALLOWED, Starting) for failure in ("500", "reset_before", "drop_watch")),
        # A server checks quotas after roles: one that has not read its roles does not get there.
        ("500", QUOTA, Refused),
        ("500 of a kubelet", NOT_ALLOWED, Refused),
    ],
)
def test_a_refusal_for_lack_of_a_right_is_transient_only_after_an_outage(
    server: RunningServer, failure: str, refusal: str, expected: type[Exception]
) -> None:
    cluster, record = server.client(), server.record()
    watch = cluster.watch("SelectionRun", "default", cluster.list("SelectionRun", "default").version, seconds=5)
    plural = "pods/log" if failure == "500 of a kubelet" else "selectionruns"
    if failure:
        server.faults.script([({"plural": plural}, failure.split()[0])])
        with pytest.raises(Unavailable):
            list(itertools.chain(cluster.log_lines("default", POD, WORKER_CONTAINER, follow=False), watch))
    server.faults.script(answer(403, refusal))
    with pytest.raises(expected):
        cluster.within(5).list("SelectionRun", "default")
    if expected is Refused:
        server.faults.script(answer(403, refusal))
        with pytest.raises(Refused):
            wait_until(cluster, record, has_ended, timeout_seconds=5)


def test_a_server_that_has_answered_for_a_while_refuses_for_good(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_outage, "ANSWERED_SECONDS", 0.2)
    cluster = server.client()
    server.faults.script(FAILURE)
    with pytest.raises(Unavailable):
        cluster.list("SelectionRun", "default")
    cluster.list("SelectionRun", "default")
    time.sleep(0.3)
    server.faults.script(answer(403, NOT_ALLOWED))
    with pytest.raises(Refused):
        cluster.list("SelectionRun", "default")


def test_who_has_not_logged_in_is_refused_at_once(server: RunningServer) -> None:
    cluster = server.client(tries=20)
    server.faults.script(answer(403, NOT_LOGGED_IN, path="/apis/prism.dev/v1alpha1"))
    with pytest.raises(Refused):
        cluster.serves_selection_runs()


class Proxy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>default backend</html>")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_404_of_a_proxy_does_not_mean_that_our_kind_is_not_installed(server: RunningServer) -> None:
    cluster = server.client()
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        cluster.credentials.access.configuration.host = f"http://127.0.0.1:{proxy.server_port}"
        threading.Thread(target=proxy.handle_request, daemon=True).start()
        with pytest.raises(Unavailable, match="no answer of a Kubernetes"):
            cluster.serves_selection_runs()


def test_a_missing_right_is_checked_again_after_an_outage(server: RunningServer) -> None:
    """A server that has not read its roles allows nothing."""
    cluster = server.client(tries=5)
    server.faults.script(FAILURE)
    with pytest.raises(Unavailable):
        cluster.without_retries().list("SelectionRun", "default")
    with variables(KUBECONFIG=str(server.kubeconfig(server.folder / "person", token=f"sa:default:{ACCOUNT}"))):
        person = Cluster(tries=5)
    assert not person.may("create", "batch", "jobs", "default")
    person.recent_outage = cluster.recent_outage
    began = time.monotonic()
    threading.Timer(1.0, grant, [server, ("batch", ["jobs"], ["create"])]).start()
    assert person.may("create", "batch", "jobs", "default")
    assert time.monotonic() > began + 0.9


# Waiting for a record


def test_a_kind_that_is_removed_takes_its_runs_with_it(server: RunningServer) -> None:
    cluster, record = server.client(), server.record()
    server.delete("customresourcedefinitions", "selectionruns.prism.dev", "")
    eventually(lambda: not server.objects("customresourcedefinitions"))
    with pytest.raises(NotFound, match="does not serve this kind"):
        cluster.list("SelectionRun", "default")
    assert wait_until(cluster, record, has_ended, timeout_seconds=20) is None


def test_a_watch_that_is_always_too_old_is_listed_again_with_growing_pauses(server: RunningServer) -> None:
    cluster, record = server.client(), server.record()
    server.faults.script(answer(410, "too old", times=100, verb="watch"))
    server.requests.reset()
    with pytest.raises(TimeoutError):
        wait_until(cluster, record, has_ended, timeout_seconds=3)
    assert server.requests["LIST", "selectionruns"] <= 7  # pauses of 0.2 to 0.4 s, doubled each time


def test_a_wait_without_time_returns_what_is_true_already(server: RunningServer) -> None:
    cluster, record = server.client(), server.record()
    with pytest.raises(TimeoutError):
        wait_until(cluster, record, has_ended, timeout_seconds=0)
    server.set_phase("Complete")
    assert wait_until(cluster, record, has_ended, timeout_seconds=0) is not None
