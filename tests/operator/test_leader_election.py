"""Leader election: one leads, a lost lease ends its holder in time, a short outage loses nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.kube.cluster import Cluster
from launcher.operator.leader_election import Lease
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer

Object = dict[str, Any]


def a_lease(identity: str, duration_seconds: float = 1.0, **options: Any) -> Lease:
    return Lease(
        Cluster(), "default", "prism", identity, duration_seconds=duration_seconds, renew_seconds=0.1, **options
    )


def holder(server: ApiServer) -> str:
    found = server.object("leases", "prism") or {"spec": {}}
    return str(found["spec"].get("holderIdentity", ""))


def test_one_of_two_leads(server: ApiServer) -> None:
    stopping, leads = threading.Event(), []
    waiting = [
        threading.Thread(target=lambda name=name: a_lease(name, 60).acquire(stopping) and leads.append(name))  # type: ignore[misc]
        for name in ("a", "b", "c")
    ]
    for thread in waiting:
        thread.start()
    eventually(lambda: leads)
    time.sleep(0.3)
    stopping.set()
    for thread in waiting:
        thread.join(5)
    assert leads == [holder(server)]


def test_a_released_lease_is_taken_at_once(server: ApiServer) -> None:
    first, second = a_lease("a", 60), a_lease("b", 60)
    assert first.acquire(threading.Event())
    threading.Timer(0.2, first.release).start()
    started = time.monotonic()
    assert second.acquire(threading.Event())
    assert time.monotonic() - started < 5
    assert holder(server) == "b"
    first.release()  # not ours any more
    assert holder(server) == "b"


@pytest.mark.parametrize("their_time", ["1999-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z"])
def test_a_lease_is_stale_once_we_saw_it_unchanged_whatever_its_clock_says(server: ApiServer, their_time: str) -> None:
    spec = {"holderIdentity": "gone", "leaseDurationSeconds": 1, "renewTime": their_time, "leaseTransitions": 4}
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "prism"}, "spec": spec}
    server.create(lease)
    started = time.monotonic()
    assert a_lease("b").acquire(threading.Event())
    assert 0.9 < time.monotonic() - started < 5
    found = server.object("leases", "prism")
    assert found is not None
    assert found["spec"]["leaseTransitions"] == 5


def test_an_empty_lease_is_taken(server: ApiServer) -> None:
    server.create({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "prism"}})
    assert a_lease("a").acquire(threading.Event())
    assert holder(server) == "a"


def test_a_holder_that_cannot_renew_learns_it_before_another_leads(server: ApiServer) -> None:
    with kept(a_lease("a")) as lost:
        time.sleep(0.3)
        assert not lost.is_set()
        with server.outage():
            started = time.monotonic()
            assert lost.wait(5)
            assert time.monotonic() - started < 1.5  # before another may take it


def test_a_short_outage_loses_no_lease(server: ApiServer) -> None:
    with kept(a_lease("a", 5)) as lost:
        with server.outage():
            time.sleep(0.4)
        time.sleep(0.3)
    assert not lost.is_set()
    assert holder(server) == "a"


def test_who_waits_for_a_lease_can_be_stopped_in_an_outage(server: ApiServer) -> None:
    stopping = threading.Event()
    with server.outage():
        threading.Timer(0.2, stopping.set).start()
        assert not a_lease("a").acquire(stopping)
        a_lease("a").release()  # costs nothing


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


def test_a_bug_in_a_renewal_is_one_failed_try(server: ApiServer) -> None:
    logged: list[Object] = []
    lease = a_lease("a", 5, log=lambda **it: logged.append(it))
    get = lease.cluster.get

    def buggy(*place: str) -> Object:
        if not logged:
            raise KeyError("a bug of ours")
        return get(*place)

    with kept(lease) as lost:
        lease.cluster.get = buggy  # type: ignore[method-assign]
        eventually(lambda: logged, 5)
        before = lease.answered
        eventually(lambda: lease.answered > before, 5)
        assert not lost.is_set()
    assert "a bug of ours" in logged[0]["error"]


def test_a_lease_whose_renewals_fail_is_lost_in_time(server: ApiServer) -> None:
    lease = a_lease("a")

    def buggy(*_: str) -> Object:
        raise KeyError("a bug of ours")

    with kept(lease) as lost:
        lease.cluster.get = buggy  # type: ignore[method-assign]
        assert lost.wait(1.5)


def test_a_renewal_that_hangs_is_not_waited_for(server: ApiServer) -> None:
    lease, goes_on = a_lease("a"), threading.Event()
    with kept(lease) as lost:
        lease.cluster.get = lambda *_: goes_on.wait(20) and {}  # type: ignore[method-assign,return-value,assignment]
        started = time.monotonic()
        assert lost.wait(5)
        assert time.monotonic() - started < 1.2  # before another may take it
        assert lease.held_since is None
        goes_on.set()


def test_requests_of_a_lease_are_given_up_before_it_ends(server: ApiServer) -> None:
    lease = a_lease("a", 10)
    server.faults.script([({"plural": "leases"}, "delay:3")])
    started = time.monotonic()
    assert not lease._try()
    assert time.monotonic() - started < 2


def test_a_lease_that_was_let_go_is_not_taken_by_a_renewal_that_was_under_way(server: ApiServer) -> None:
    lease, finished = a_lease("a", 5), threading.Event()
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
