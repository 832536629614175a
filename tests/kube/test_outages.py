"""Law: an outage of the API server changes neither the exit code nor the output of a verb that waits, save a line that says so.

Outages are as a real server's were seen to be: refused connections, 500, dropped watches, and 403 to everybody for a second
or two after a start.
"""

from __future__ import annotations

import contextlib
import copy
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.kube import recent_outage
from launcher.kube.cluster import Cluster
from launcher.kube.errors import NotFound, Refused, Unavailable
from launcher.resource.crd import crd
from launcher.resource.names import GROUP_LABEL, RUN_LABEL, STAGE_LABEL, WORKER_CONTAINER
from launcher.submit import find_record, has_ended, wait_until
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.refusals import ApiError

ROOT = Path(__file__).parents[2]
DOCUMENT = yaml.safe_load((ROOT / "examples/facts/cluster.yaml").read_text())
POD = "facts-extract-0"
OUTAGE_SECONDS = 3.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as made:
        made.create(crd())
        created = made.create({**DOCUMENT, "metadata": {"name": "facts", "namespace": "default"}})
        become(made, "Extracting", uid=created["metadata"]["uid"])
        made.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-0"}})
        pod = made.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": POD, "labels": {RUN_LABEL: "facts", STAGE_LABEL: "extract", GROUP_LABEL: "0"}},
                "spec": {
                    "containers": [{"name": WORKER_CONTAINER, "image": "prism"}],
                    "restartPolicy": "Never",
                    "nodeName": "node-0",
                },
            }
        )
        log = tmp_path / "logs" / "default" / f"{POD}.{pod['metadata']['uid']}" / f"{WORKER_CONTAINER}.log"
        log.parent.mkdir(parents=True)
        log.write_text("line 1\n")
        made.log = log  # type: ignore[attr-defined]
        turn(made, {"running": {}}, "Running")
        yield made


def become(server: ApiServer, phase: str, **_: Any) -> None:
    """As an operator writes it."""
    found = server.object("selectionruns", "facts")
    assert found is not None
    since = {"startTime": "2026-01-01T00:00:00Z", "driver": "operator"}
    server.update({**found, "status": {"phase": phase, **since}}, subresource="status")


def turn(server: ApiServer, state: dict[str, Any], phase: str) -> None:
    pod = copy.deepcopy(server.object("pods", POD))
    assert pod is not None
    container = {
        "name": WORKER_CONTAINER,
        "image": "prism",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": state,
    }
    pod["status"] = {"phase": phase, "containerStatuses": [container]}
    server.update(pod, subresource="status")


def say(server: ApiServer, line: str) -> None:
    with server.log.open("a") as log:  # type: ignore[attr-defined]
        log.write(f"{line}\n")


@contextlib.contextmanager
def refused_connections(server: ApiServer) -> Iterator[None]:
    server.start_seconds = 0.0
    with server.outage():
        time.sleep(OUTAGE_SECONDS)
        yield


@contextlib.contextmanager
def a_restart(server: ApiServer) -> Iterator[None]:
    """Gone for a moment; then it refuses everybody."""
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


VERBS = {
    "wait": ["wait", "facts"],
    "watch": ["watch", "facts"],
    "logs": ["logs", "-f", "facts"],
    "submit": ["submit", "--wait", "selection.yaml"],
}


@contextlib.contextmanager
def open_verbs(server: ApiServer, folder: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Every verb that waits, each once it watches."""
    (folder / "selection.yaml").write_text(yaml.safe_dump(DOCUMENT))
    env = {**os.environ, "KUBECONFIG": str(server.kubeconfig(folder / "kubeconfig")), "PYTHONPATH": str(ROOT)}
    processes: dict[str, subprocess.Popen[str]] = {}
    with contextlib.ExitStack() as stack:
        for name, words in VERBS.items():
            command = [sys.executable, "-m", "launcher.cli.main", *words]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = processes[name] = subprocess.Popen(command, cwd=folder, env=env, **pipes)
            stack.callback(process.communicate)
            stack.callback(process.kill)
        # wait, watch and submit watch the record; watch and logs the pods, and submit, which is ready to drive the run.
        eventually(lambda: server.requests["WATCH", "selectionruns"] >= 4 and server.requests["WATCH", "pods"] >= 3, 60)
        yield processes


@pytest.mark.parametrize("outage", [refused_connections, a_restart, errors, dropped_watches])
def test_an_outage_changes_neither_exit_code_nor_output_of_a_verb_that_waits(
    server: ApiServer, tmp_path: Path, outage: Callable[[ApiServer], Any]
) -> None:
    with open_verbs(server, tmp_path) as processes:
        with outage(server):
            say(server, "line 2")
        say(server, "line 3")
        turn(server, {"terminated": {"exitCode": 0}}, "Succeeded")
        become(server, "Complete")
        said = {name: process.communicate(timeout=90) for name, process in processes.items()}
    for name, (stdout, stderr) in said.items():
        assert processes[name].returncode == 0, f"{name}: {stderr}"
        waited = [line for line in stderr.splitlines() if "waiting for the API server: " in line]
        others = [line for line in stderr.splitlines() if line not in waited]
        assert len(waited) == (outage is not dropped_watches), f"{name}: {stderr}"
        assert not [line for line in others if "error" in line.lower() or "forbidden" in line], f"{name}: {stderr}"
        printed = "".join(f"extract-0 line {number}\n" for number in (1, 2, 3))
        assert stdout == {"logs": printed, "watch": ""}.get(name, "facts: Complete\n"), name


def test_a_verb_that_begins_while_the_server_starts_waits_for_it(server: ApiServer, tmp_path: Path) -> None:
    """It has seen no failure yet; but a server that does not even say what it serves has just started."""
    server.start_seconds = 8.0  # longer than the command takes to begin
    with server.outage():
        become(server, "Complete")
    env = {**os.environ, "KUBECONFIG": str(server.kubeconfig(tmp_path / "kubeconfig")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher.cli.main", "wait", "facts"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


def test_a_refusal_at_rest_is_a_refusal(server: ApiServer, tmp_path: Path) -> None:
    def refuse(_: Any) -> None:
        raise ApiError(403, NOT_ALLOWED)

    with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
        cluster = Cluster()
        record = find_record(cluster, "default", "facts")
        assert record is not None
        server.faults.script([({"plural": "selectionruns"}, refuse)] * 2)
        with pytest.raises(Refused):
            cluster.list("SelectionRun", "default")
        with pytest.raises(Refused):
            wait_until(cluster, record, has_ended, timeout_seconds=5)


def client(server: ApiServer, folder: Path, **options: Any) -> Cluster:
    with variables(KUBECONFIG=str(server.kubeconfig(folder / "kubeconfig"))):
        return Cluster(**options)


def answer(code: int, message: str, *, times: int = 1) -> list[tuple[Any, Any]]:
    """The next requests for the run are answered so."""

    def refuse(_: Any) -> None:
        raise ApiError(code, message)

    return [({"plural": "selectionruns"}, refuse)] * times


NOT_ALLOWED = (
    'selectionruns.prism.dev is forbidden: User "me" cannot list resource "selectionruns" in API group "prism.dev"'
)
QUOTA = 'selectionruns.prism.dev "facts" is forbidden: exceeded quota: small'


@pytest.mark.parametrize("fault", ["500", "reset_before", "drop_watch"])
def test_a_refusal_shortly_after_a_failure_is_transient(server: ApiServer, tmp_path: Path, fault: str) -> None:
    cluster = client(server, tmp_path)
    version = cluster.list("SelectionRun", "default").version
    server.faults.script([({"plural": "selectionruns"}, fault), *answer(403, NOT_ALLOWED)])
    with pytest.raises(Unavailable):
        list(cluster.watch("SelectionRun", "default", version, seconds=5))
    with pytest.raises(Unavailable, match="just started"):
        cluster.within(5).list("SelectionRun", "default")


def test_a_quota_is_a_refusal_whatever_failed_before_it(server: ApiServer, tmp_path: Path) -> None:
    """It is asked after the roles are: no server that has not read them says so."""
    cluster = client(server, tmp_path)
    server.faults.script([({"plural": "selectionruns"}, "500"), *answer(403, QUOTA)])
    with pytest.raises(Unavailable):
        cluster.list("SelectionRun", "default")
    with pytest.raises(Refused):
        cluster.list("SelectionRun", "default")


def test_a_server_that_has_answered_for_a_while_refuses_for_good(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_outage, "ANSWERED_SECONDS", 0.2)
    cluster = client(server, tmp_path)
    server.faults.script([({"plural": "selectionruns"}, "500")])
    with pytest.raises(Unavailable):
        cluster.list("SelectionRun", "default")
    cluster.list("SelectionRun", "default")
    time.sleep(0.3)
    server.faults.script(answer(403, NOT_ALLOWED))
    with pytest.raises(Refused):
        cluster.list("SelectionRun", "default")


def test_a_kubelet_that_does_not_answer_is_no_outage_of_the_server(server: ApiServer, tmp_path: Path) -> None:
    cluster = client(server, tmp_path)
    server.faults.script([({"plural": "pods/log"}, "500"), *answer(403, NOT_ALLOWED)])
    with pytest.raises(Unavailable):
        list(cluster.log_lines("default", POD, WORKER_CONTAINER, follow=True))
    with pytest.raises(Refused):
        cluster.list("SelectionRun", "default")


def test_who_has_not_logged_in_is_refused_at_once(server: ApiServer, tmp_path: Path) -> None:
    def refuse(_: Any) -> None:
        raise ApiError(403, 'forbidden: User "system:anonymous" cannot get path "/apis/prism.dev/v1alpha1"')

    cluster = client(server, tmp_path, tries=20)
    server.faults.script([({"path": "/apis/prism.dev/v1alpha1"}, refuse)])
    with pytest.raises(Refused):
        cluster.serves_selection_runs()


def test_a_proxy_that_answers_404_says_nothing_of_our_kinds(tmp_path: Path) -> None:
    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>default backend</html>")

        def log_message(self, *_: Any) -> None:
            pass

    with ApiServer() as server, http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        document = yaml.safe_load(server.kubeconfig(tmp_path / "kubeconfig").read_text())
        document["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{proxy.server_port}"
        (tmp_path / "wrong").write_text(yaml.safe_dump(document))
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        with (
            variables(KUBECONFIG=str(tmp_path / "wrong")),
            pytest.raises(Unavailable, match="no answer of a Kubernetes"),
        ):
            Cluster().serves_selection_runs()
        proxy.shutdown()


def test_a_no_to_what_we_may_do_is_asked_again_after_an_outage(server: ApiServer, tmp_path: Path) -> None:
    """A server that has not read its roles allows nothing."""
    cluster = client(server, tmp_path, tries=5)

    server.faults.script([({"plural": "selectionruns"}, "500")])
    with pytest.raises(Unavailable):
        cluster.without_retries().list("SelectionRun", "default")
    with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "person", token="sa:default:person"))):
        person = Cluster(tries=5)
    assert not person.may("create", "batch", "jobs", "default")
    person.recent_outage = cluster.recent_outage
    began = time.monotonic()
    threading.Timer(1.0, grant_jobs, [server]).start()
    assert person.may("create", "batch", "jobs", "default")
    assert time.monotonic() > began + 0.9


def grant_jobs(server: ApiServer) -> None:
    api = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    place = {"metadata": {"name": "person", "namespace": "default"}}
    rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create"]}]
    server.create({**api, "kind": "Role", **place, "rules": rules})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "person"}
    subject = {"kind": "ServiceAccount", "name": "person", "namespace": "default"}
    server.create({**api, "kind": "RoleBinding", **place, "roleRef": reference, "subjects": [subject]})


def test_a_kind_that_is_removed_takes_its_runs_with_it(server: ApiServer, tmp_path: Path) -> None:
    with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
        cluster = Cluster()
        record = find_record(cluster, "default", "facts")
        assert record is not None
        server.delete("customresourcedefinitions", "selectionruns.prism.dev", "")
        eventually(lambda: not server.objects("customresourcedefinitions"))
        with pytest.raises(NotFound, match="does not serve this kind"):
            cluster.list("SelectionRun", "default")
        assert wait_until(cluster, record, has_ended, timeout_seconds=20) is None


def test_a_watch_that_is_always_too_old_is_listed_again_with_growing_pauses(server: ApiServer, tmp_path: Path) -> None:
    with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
        cluster = Cluster()
        record = find_record(cluster, "default", "facts")
        assert record is not None
        server.faults.script([({"verb": "watch"}, lambda _: (_ for _ in ()).throw(ApiError(410, "too old")))] * 100)
        server.requests.reset()
        with pytest.raises(TimeoutError):
            wait_until(cluster, record, has_ended, timeout_seconds=3)
        assert server.requests["LIST", "selectionruns"] <= 7  # pauses of 0.2 to 0.4 s, doubled each time
