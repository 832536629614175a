"""Laws of what the tests' kubelet does for pods beside running them: restarts, tokens of service accounts, logs over HTTPS."""

from __future__ import annotations

import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.certificates import Authority, Pair
from tests.cluster.kubelet.kubelet import Kubelet
from tests.cluster.kubelet.logserver import Log, LogServer, NoLog
from tests.cluster.kubelet.mirror import Api
from tests.cluster.kubelet.tokens import MOUNT_PATH, Tokens, mounted, why_no_mounts
from tests.cluster.podlogs import PodLogs
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as server:
        yield server


def pod_of(script: str, policy: str) -> dict[str, Any]:
    container = {"name": "main", "image": "x", "command": ["python", "-c", script]}
    spec = {"restartPolicy": policy, "terminationGracePeriodSeconds": 1, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": "default"}, "spec": spec}


def container_status(server: ApiServer) -> dict[str, Any]:
    pod = server.object("pods", "pod") or {}
    return dict((pod.get("status", {}).get("containerStatuses") or [{}])[0])


def run_pod(server: ApiServer, folder: Path) -> Kubelet:
    return Kubelet(server.kubeconfig(folder / "kubeconfig"), folder / "pods", log_folder=folder / "logs")


def test_a_container_under_always_is_started_again_with_a_back_off_and_ends_with_its_pod(
    server: ApiServer, tmp_path: Path
) -> None:
    server.create(pod_of("print('once', flush=True); exit(3)", "Always"))
    with run_pod(server, tmp_path):
        eventually(lambda: container_status(server).get("restartCount") == 2, 20)
        assert container_status(server)["lastState"]["terminated"]["exitCode"] == 3
        waiting = eventually(lambda: container_status(server)["state"].get("waiting"), 20)
        assert waiting["reason"] == "CrashLoopBackOff"
        assert server.object("pods", "pod")["status"]["phase"] == "Running"
        server.delete("pods", "pod")
        eventually(lambda: server.object("pods", "pod") is None, 20)


def test_a_token_is_that_of_the_pods_account_and_renewed_when_its_share_of_life_is_over(
    server: ApiServer, tmp_path: Path
) -> None:
    server.create(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "worker", "namespace": "default"}}
    )
    pod = pod_of("", "Never")
    pod["metadata"]["uid"], pod["spec"]["serviceAccountName"] = "uid", "worker"
    api = Api(server.kubeconfig(tmp_path / "kubeconfig"), "test")
    path = tmp_path / "volume" / "token"
    tokens = Tokens(api, life_share=0.0)
    tokens.write(path, pod, {"path": "token", "expirationSeconds": 600})
    assert path.read_text() == "sa:default:worker"
    path.write_text("old")
    assert tokens.renew(pod) is not None
    assert path.read_text() == "sa:default:worker"
    tokens.forget("uid")
    assert tokens.renew(pod) is None


def test_a_tokens_folder_is_seen_at_the_constant_path_by_one_process_alone(tmp_path: Path) -> None:
    if reason := why_no_mounts():
        pytest.skip(reason)
    (tmp_path / "token").write_text("mine")
    before = Path(MOUNT_PATH).exists()
    done = subprocess.run(mounted(["cat", f"{MOUNT_PATH}/token"], tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout == "mine"
    assert Path(MOUNT_PATH).exists() == before


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[LogServer, Authority, Path]]:
    """A log server that knows the log of one container, which goes on until a file `ended` is there."""
    authority, logs = Authority(tmp_path / "certificates"), PodLogs(tmp_path / "logs")
    path = logs.path("default", "pod", "uid", "main")
    path.parent.mkdir(parents=True)

    def find(namespace: str, pod: str, container: str, query: Any) -> Log:
        if (namespace, pod, container) != ("default", "pod", "main"):
            raise NoLog(404, "pod does not exist")
        return Log(path, (tmp_path / "ended").exists)

    server = LogServer(logs, find, authority.sign("kubelet", hosts=("127.0.0.1",)), authority.pair.certificate)
    server.start()
    yield server, authority, path
    server.stop()


def fetch(server: LogServer, authority: Authority, path: str, client: Pair | None) -> Any:
    context = ssl.create_default_context(cafile=str(authority.pair.certificate))
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return urllib.request.urlopen(f"https://127.0.0.1:{server.port}{path}", timeout=10, context=context)


def test_logs_are_shown_to_who_has_a_certificate_of_the_ca_alone(served: tuple[LogServer, Authority, Path]) -> None:
    server, authority, path = served
    path.write_text("a\nb\nc\n")
    client = authority.sign("api-server")
    log = "/containerLogs/default/pod/main"
    with fetch(server, authority, f"{log}?tailLines=2", client) as answer:
        assert answer.read() == b"b\nc\n"
    with pytest.raises(OSError, match=r"(?i)certificate|closed|reset|EOF|broken pipe"):
        fetch(server, authority, log, None).read()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server, authority, "/containerLogs/default/other/main", client)
