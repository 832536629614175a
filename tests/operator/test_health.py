"""Probes and metrics of the operator."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.kube.cluster import Cluster
from launcher.operator import health as healths
from launcher.operator.controller import Controller
from launcher.operator.health import Health
from launcher.operator.leader_election import Lease
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer
from tests.operator.test_leader_election import a_lease


@contextlib.contextmanager
def probed(lease: Lease | None = None) -> Iterator[Health]:
    with Health(Controller(Cluster(), None), 0, lease or a_lease("a")) as health:
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


def test_a_connection_that_sends_nothing_is_closed(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healths, "HANDLER_SECONDS", 0.2)
    with probed() as health, socket.create_connection(("127.0.0.1", health.port)) as silent:
        silent.settimeout(5)
        assert silent.recv(1) == b""


def test_readyz_reports_why_it_fails(server: ApiServer) -> None:
    lease = a_lease("a", 60)
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


def test_metrics_show_the_leader_and_whether_all_is_listed(server: ApiServer) -> None:
    lease = a_lease("a", 60)
    with probed(lease) as health:
        assert {"prism_leading 0.0", "prism_synced 0.0"} <= set(ask(health, "/metrics")[1].splitlines())
        assert lease.acquire(threading.Event())
        health.controller.informer.listed |= {"Job", "Pod", "SelectionRun"}
        assert {"prism_leading 1.0", "prism_synced 1.0"} <= set(ask(health, "/metrics")[1].splitlines())
