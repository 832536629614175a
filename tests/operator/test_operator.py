"""Laws of what stands around the loop: the lease that is kept whatever happens, probes, credentials, and connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from launcher.kube import cluster as clusters
from launcher.kube import credentials, transport
from launcher.kube.cluster import Cluster
from launcher.kube.errors import Gone, NotFound, Refused, Unavailable
from launcher.kube.lines import CUT
from launcher.operator import controller as hosts
from launcher.operator import events, informer
from launcher.operator import health as healths
from launcher.operator.controller import Controller
from launcher.operator.health import Health
from launcher.operator.leader_election import Lease
from launcher.operator.work_queue import WorkQueue
from launcher.resource.crd import crd
from launcher.resource.names import MANAGER, RUN_LABEL
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.operator.test_controller import a_run, hosted, status_of, unfinished

Object = dict[str, Any]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as server:
        server.create(crd())
        with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
            yield server


# The lease


def a_lease(duration_seconds: float = 1.0, **options: Any) -> Lease:
    return Lease(Cluster(), "default", "prism", "a", duration_seconds=duration_seconds, renew_seconds=0.1, **options)


@contextlib.contextmanager
def kept(lease: Lease) -> Iterator[threading.Event]:
    """Yields what is set where the lease is lost."""
    stopping, lost = threading.Event(), threading.Event()
    assert lease.acquire(threading.Event())
    keeping = threading.Thread(target=lease.keep, args=(stopping, lost.set))
    keeping.start()
    try:
        yield lost
    finally:
        stopping.set()
        keeping.join(5)
        assert not keeping.is_alive()


def test_a_flaw_of_ours_in_a_renewal_is_one_try_that_failed(server: ApiServer) -> None:
    said: list[Object] = []
    lease = a_lease(5, log=lambda **it: said.append(it))
    get = lease.cluster.get

    def flawed(*place: str) -> Object:
        if not said:
            raise KeyError("a flaw of ours")
        return get(*place)

    with kept(lease) as lost:
        lease.cluster.get = flawed  # type: ignore[method-assign]
        eventually(lambda: said, 5)
        before = lease.answered
        eventually(lambda: lease.answered > before, 5)
        assert not lost.is_set()
    assert "a flaw of ours" in said[0]["error"]


def test_a_lease_of_flawed_renewals_is_lost_in_time(server: ApiServer) -> None:
    lease = a_lease()

    def flawed(*_: str) -> Object:
        raise KeyError("a flaw of ours")

    with kept(lease) as lost:
        lease.cluster.get = flawed  # type: ignore[method-assign]
        assert lost.wait(1.5)


def test_a_renewal_that_hangs_is_not_waited_for(server: ApiServer) -> None:
    lease, goes_on = a_lease(), threading.Event()
    with kept(lease) as lost:
        lease.cluster.get = lambda *_: goes_on.wait(20) and {}  # type: ignore[method-assign,return-value,assignment]
        started = time.monotonic()
        assert lost.wait(5)
        assert time.monotonic() - started < 1.2  # before another may take it
        assert lease.held_since is None
        goes_on.set()


def test_requests_of_a_lease_are_given_up_before_it_ends(server: ApiServer) -> None:
    lease = a_lease(10)
    server.faults.script([({"plural": "leases"}, "delay:3")])
    started = time.monotonic()
    assert not lease._try()
    assert time.monotonic() - started < 2


def test_a_lease_that_was_let_go_is_not_taken_by_a_renewal_that_was_under_way(server: ApiServer) -> None:
    lease, finished = a_lease(5), threading.Event()
    assert lease.acquire(threading.Event())
    keeping = threading.Thread(target=lease.keep, args=(finished, lambda: None))
    keeping.start()
    for _ in range(20):
        time.sleep(0.02)
    finished.set()
    lease.release()
    time.sleep(0.3)
    found = server.object("leases", "prism")
    assert found
    assert found["spec"]["holderIdentity"] == ""
    keeping.join(5)


# Probes and figures


@contextlib.contextmanager
def probed(lease: Lease | None = None) -> Iterator[Health]:
    with Health(Controller(Cluster(), None), 0, lease or a_lease()) as health:
        yield health


def ask(health: Health, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, health.port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_probes_are_answered_by_both_families(server: ApiServer) -> None:
    with probed() as health:
        assert ask(health, "/healthz") == (200, "ok\n")
        if has_ipv6():
            assert ask(health, "/healthz", "::1") == (200, "ok\n")


def test_probes_are_answered_where_there_is_no_ipv6(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Address family not supported by protocol")

    monkeypatch.setattr(healths._DualStackServer, "server_bind", refuse)
    with probed() as health:
        assert ask(health, "/readyz") == (200, "ok\n")


def test_silent_connections_hold_up_no_probe_and_few_threads(server: ApiServer) -> None:
    with probed() as health:
        before = threading.active_count()
        silent = [socket.create_connection(("127.0.0.1", health.port)) for _ in range(200)]
        assert ask(health, "/healthz") == (200, "ok\n")
        eventually(lambda: threading.active_count() - before <= healths.MAX_CONNECTIONS + 4, 10)
        for one in silent:
            one.close()


def test_a_connection_that_sends_nothing_is_left(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healths, "HANDLER_SECONDS", 0.2)
    with probed() as health, socket.create_connection(("127.0.0.1", health.port)) as silent:
        silent.settimeout(5)
        assert silent.recv(1) == b""


def test_not_ready_says_why(server: ApiServer) -> None:
    lease = a_lease(60)
    with probed(lease) as health:
        assert ask(health, "/readyz") == (200, "ok\n")
        assert lease.acquire(threading.Event())
        assert ask(health, "/readyz") == (200, "ok\n")  # just begun
        lease.held_since = time.monotonic() - 100
        status, words = ask(health, "/readyz")
        assert (status, words) == (503, "leads for 100 s, and could not list yet: Job, Pod, SelectionRun\n")
        health.controller.informer.listed |= {"Job", "Pod", "SelectionRun"}
        assert ask(health, "/readyz") == (200, "ok\n")
        lease.answered = time.monotonic() - 100
        assert ask(health, "/readyz") == (503, "no answer from the API server for 100 s\n")
        assert ask(health, "/healthz") == (200, "ok\n")


def test_figures_say_who_leads_and_sees_all(server: ApiServer) -> None:
    lease = a_lease(60)
    with probed(lease) as health:
        assert {"prism_leading 0.0", "prism_synced 0.0"} <= set(ask(health, "/metrics")[1].splitlines())
        assert lease.acquire(threading.Event())
        health.controller.informer.listed |= {"Job", "Pod", "SelectionRun"}
        assert {"prism_leading 1.0", "prism_synced 1.0"} <= set(ask(health, "/metrics")[1].splitlines())


# Credentials


def reader(server: ApiServer, name: str) -> str:
    """A token that may read Jobs."""
    rbac = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list", "watch"]}]
    reference = {"apiGroup": rbac, "kind": "Role", "name": name}
    subjects = [{"kind": "ServiceAccount", "name": name}]
    for kind, more in (("Role", {"rules": rules}), ("RoleBinding", {"roleRef": reference, "subjects": subjects})):
        metadata = {"name": name, "namespace": "default"}
        server.create({"apiVersion": f"{rbac}/v1", "kind": kind, "metadata": metadata, **more})
    return f"sa:default:{name}"


def test_a_token_that_was_renewed_on_disk_is_read_again(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0.0)
    token, file = reader(server, "reader"), tmp_path / "own"
    server.kubeconfig(file, token="expired")
    with variables(KUBECONFIG=str(file)):
        cluster = Cluster()
    with pytest.raises(Refused, match="nauthori") as refused:
        cluster.list("Job", "default")
    assert (refused.value.code, refused.value.fix) == (401, "log in again")
    server.kubeconfig(file, token=token)
    assert cluster.list("Job", "default").items == []
    assert list(cluster.watch("Job", "default", "", seconds=1)) is not None


def test_the_kubeconfigs_own_command_is_asked_again(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0.0)
    token, file, answer = reader(server, "reader"), tmp_path / "own", tmp_path / "answer"
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


def test_credentials_that_stay_refused_are_not_read_again_and_again(server: ApiServer, tmp_path: Path) -> None:
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
    """A server of raw answers, for what ours never does. Counts connections."""

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
                one, _ = self.socket.accept()
                self.num += 1
                self.received.append(one.recv(2**16))
                for piece in self.answer:
                    one.sendall(piece)
                if self.hold:
                    self.held.append(one)
                else:
                    one.close()

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
        for one in self.held:
            one.close()


EMPTY = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\nConnection: close\r\n\r\n{"gitVersion":"v1"}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_watch_that_ends_as_it_begins_is_asked_for_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Object] = []
    with Stub(HEAD, chunk(b""), hold=False) as stub:
        cluster = stub.cluster(tmp_path)
        listing = clusters.Listing([], "5")
        monkeypatch.setattr(cluster, "list", lambda *_, **__: listing)
        controller = Controller(cluster, None, log=lambda **it: said.append(it))
        following = threading.Thread(target=controller.informer.follow, args=("Job",), daemon=True)
        following.start()
        time.sleep(1.5)
        controller.stop()
        following.join(5)
        assert 1 <= stub.num <= 6
    assert {it["error"] for it in said} == {"Job: a watch ended as it began"}


def test_a_watch_with_nobody_at_its_other_end_ends_and_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "SILENT_WATCH_SECONDS", 0.3)
    event = json.dumps({"type": "ADDED", "object": {"metadata": {"name": "a"}}}).encode() + b"\n"
    with Stub(HEAD, chunk(event), hold=True) as stub:
        started = time.monotonic()
        found = list(stub.cluster(tmp_path).watch("Job", "default", "5", seconds=240))
        assert [kind for kind, _ in found] == ["ADDED"]
        assert time.monotonic() - started < 5


def test_a_server_that_does_not_even_begin_to_answer_a_watch_is_bad_weather(
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


def test_warnings_are_few_and_each_is_there_once(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_WARNINGS", 3)
    cluster = Cluster()
    for number in (0, 1, 1, 2, 3, 4, 4):
        cluster._note_warnings({"Warning": f"299 - {number}"})
    assert cluster.warnings == ["299 - 2", "299 - 3", "299 - 4"]


@pytest.mark.parametrize("name", ["../jobs", "a/b", "..", "a?watch=true", "a#b"])
def test_a_name_is_one_step_of_an_address_whatever_is_in_it(server: ApiServer, name: str) -> None:
    with pytest.raises((NotFound, Refused, Gone)):
        Cluster().get("Pod", "default", name)
    with pytest.raises((NotFound, Refused, Gone)):
        Cluster().get("Pod", name, "pod")


# What a pass asks for


def test_events_of_many_jobs_are_asked_for_once_and_the_newest_is_told(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SETTLE_SECONDS", 0.0)
    record = server.create(a_run())
    owner = {
        "apiVersion": record["apiVersion"],
        "kind": record["kind"],
        "name": "demo",
        "uid": record["metadata"]["uid"],
    }
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
            event = {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"e{number}-{minute}", "namespace": "default"},
            }
            if when == "eventTime":
                event |= {"reportingComponent": "prism.dev/test", "reportingInstance": "test", "action": "Test"}
            told = {"involvedObject": about, "type": "Warning", "reason": "R", "message": str(minute), when: at}
            server.create({**event, **told})
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


def test_before_all_is_listed_no_worker_turns(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
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
