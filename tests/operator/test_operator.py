"""Laws of what stands around the loop: the lease that is kept whatever happens, probes, credentials, and connections."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.kube.cluster import Cluster
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
