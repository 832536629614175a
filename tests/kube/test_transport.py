"""Credentials that are read again, connections that break, and answers that are cut off."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes.config import incluster_config

from launcher.kube import cluster as clusters
from launcher.kube import credentials, transport
from launcher.kube.cluster import Cluster
from launcher.kube.deep_json import loads
from launcher.kube.errors import ClusterError, Gone, NotFound, Refused, Unavailable
from launcher.kube.list_and_watch import list_and_watch
from launcher.kube.transport import CUT
from launcher.resource.crd import crd
from tests.cluster.grants import grant
from tests.cluster.rig import variables
from tests.cluster.server.apiserver import ApiServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer() as server, variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
        server.create(crd())
        yield server


# Credentials


READ_JOBS = ("batch", ["jobs"], ["list", "watch"])


def test_a_token_that_was_renewed_on_disk_is_read_again(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0.0)
    token, file = grant(server, READ_JOBS), tmp_path / "own"
    server.kubeconfig(file, token="expired")
    with variables(KUBECONFIG=str(file)):
        cluster = Cluster()
    with pytest.raises(Refused, match="nauthori") as refused:
        cluster.list("Job", "default")
    assert (refused.value.code, refused.value.fix) == (401, "log in again")
    server.kubeconfig(file, token=token)
    assert cluster.list("Job", "default").items == []
    assert list(cluster.watch("Job", "default", "", seconds=1)) is not None


def test_the_command_of_a_kubeconfig_runs_again(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0.0)
    token, file, answer = grant(server, READ_JOBS), tmp_path / "own", tmp_path / "answer"
    document = yaml.safe_load(server.kubeconfig(file, token="").read_text())
    command = {"apiVersion": "client.authentication.k8s.io/v1", "command": "cat", "args": [str(answer)]}
    document["users"][0]["user"] = {"exec": {**command, "interactiveMode": "Never"}}
    file.write_text(yaml.safe_dump(document))

    def give(token: str) -> None:
        kind = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
        answer.write_text(json.dumps({**kind, "status": {"token": token}}))

    give("expired")
    with variables(KUBECONFIG=str(file)):
        cluster = Cluster()
    give(token)
    assert cluster.list("Job", "default").items == []


def test_credentials_that_stay_refused_are_not_read_at_every_request(server: ApiServer, tmp_path: Path) -> None:
    with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "own", token="expired"))):
        cluster = Cluster()
    for _ in range(3):
        with pytest.raises(Refused):
            cluster.list("Job", "default")
    assert cluster.num_requests <= 4


def test_a_pods_own_token_is_read_again_as_it_is_renewed(tmp_path: Path) -> None:
    file, authority = tmp_path / "token", tmp_path / "ca.crt"
    file.write_text("first")
    authority.write_text("not asked for")
    with Stub(EMPTY) as stub:
        cluster = stub.cluster(tmp_path)
        configuration = cluster.credentials.access.configuration
        where = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
        loader = incluster_config.InClusterConfigLoader(str(file), str(authority), environ=where)
        loader.load_and_set(configuration)
        loader.host = configuration.host = stub.url  # without TLS
        cluster.version()
        file.write_text("second")
        cluster.version()
        loader.token_expires_at = loader.token_expires_at.replace(year=2000)  # a minute later
        cluster.version()
    sent = [line for text in stub.received for line in text.split(b"\r\n") if line.lower().startswith(b"authorization")]
    assert [line.partition(b": ")[2] for line in sent] == [b"bearer first", b"bearer first", b"bearer second"]


# Connections


class Stub:
    """A server of raw answers, which ours never gives. Counts connections."""

    def __init__(self, *answer: bytes, hold: bool = False) -> None:
        self.answer, self.hold, self.num = answer, hold, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.held: list[socket.socket] = []
        self.received: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.num += 1
                self.received.append(connection.recv(2**16))
                for piece in self.answer:
                    connection.sendall(piece)
                if self.hold:
                    self.held.append(connection)
                else:
                    connection.close()

    def cluster(self, folder: Path) -> Cluster:
        host = {"name": "c", "cluster": {"server": self.url}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        document = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "clusters": [host]}
        document |= {"contexts": [context], "users": [{"name": "u", "user": {}}]}
        (folder / "stub").write_text(yaml.safe_dump(document))
        with variables(KUBECONFIG=str(folder / "stub")):
            return Cluster()

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        for connection in self.held:
            connection.close()


EMPTY = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\nConnection: close\r\n\r\n{"gitVersion":"v1"}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_watch_that_ends_as_it_begins_is_opened_again_with_growing_pauses(tmp_path: Path) -> None:
    failures: list[ClusterError] = []
    with Stub(HEAD, chunk(b"")) as stub:
        cluster = stub.cluster(tmp_path)
        cluster.list = lambda *_, **__: clusters.Listing([], "5")  # type: ignore[method-assign]
        deadline = time.monotonic() + 1.5
        on_failure = lambda error, _: failures.append(error)  # noqa: E731
        assert list(list_and_watch(cluster, "Job", None, deadline=deadline, on_failure=on_failure))
        assert 1 <= stub.num <= 6
    assert {str(error) for error in failures} == {"Job: a watch ended as it began"}


def test_a_watch_with_nobody_at_its_other_end_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "SILENT_WATCH_SECONDS", 0.3)
    event = json.dumps({"type": "ADDED", "object": {"metadata": {"name": "a"}}}).encode() + b"\n"
    with Stub(HEAD, chunk(event), hold=True) as stub:
        started = time.monotonic()
        found = list(stub.cluster(tmp_path).watch("Job", "default", "5", seconds=240))
        assert [kind for kind, _ in found] == ["ADDED"]
        assert time.monotonic() - started < 5


def test_a_server_that_does_not_begin_to_answer_a_watch_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "SILENT_WATCH_SECONDS", 0.3)
    with Stub(hold=True) as stub, pytest.raises(Unavailable):
        list(stub.cluster(tmp_path).watch("Job", "default", "5"))


def test_connections_are_kept_alive(server: ApiServer) -> None:
    cluster = Cluster()
    cluster.version()
    connection = cluster.credentials.access.pool.connection_from_url(server.url).pool.get()
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_a_line_without_an_end_is_cut_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "LONGEST_LINE", 2**16)
    pieces = [chunk(b"x" * 2**14) for _ in range(64)]
    with Stub(HEAD, *pieces, chunk(b"end\nnext\n"), b"0\r\n\r\n") as stub:
        lines = list(stub.cluster(tmp_path).log_lines("default", "p", "worker", follow=False))
    assert lines == ["x" * 2**16 + CUT, "next"]


def test_warnings_are_few_and_each_is_kept_once(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_WARNINGS", 3)
    cluster = Cluster()
    for number in (0, 1, 1, 2, 3, 4, 4):
        cluster._note_warnings({"Warning": f"299 - {number}"})
    assert cluster.warnings == ["299 - 2", "299 - 3", "299 - 4"]


@pytest.mark.parametrize("name", ["../jobs", "a/b", "..", "a?watch=true", "a#b"])
def test_a_name_is_one_step_of_a_path_whatever_is_in_it(server: ApiServer, name: str) -> None:
    with pytest.raises((NotFound, Refused, Gone)):
        Cluster().get("Pod", "default", name)
    with pytest.raises((NotFound, Refused, Gone)):
        Cluster().get("Pod", name, "pod")


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


def test_only_what_lies_too_deep_is_left_out() -> None:
    found = loads(f'{{"x": [{nested(1500)}, "]}}"], "y": 2}}')
    assert (list(found), found["x"][1], found["y"]) == (["x", "y"], "]}", 2)
    found = loads('{"s": "\\\\\\"{[{[", "d": ' + nested(3000) + ', "e": [[]]}')
    assert (list(found), found["s"], found["e"]) == (["s", "d", "e"], '\\"{[{[', [[]])
    assert isinstance(loads("[" * 5000 + "]" * 5000), list)
