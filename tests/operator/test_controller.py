"""Laws of the loop around the decision, against the rig's API server: cache, queue, lease, and weather of every kind.

There is no Job controller here: tests say how Jobs and pods end, by writing their statuses.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.kube.cluster import Cluster
from launcher.kube.errors import Conflict
from launcher.operator import controller as hosts
from launcher.operator import events, informer
from launcher.operator.cache import Cache, is_owned_by
from launcher.operator.controller import Controller
from launcher.operator.executor import write_status
from launcher.operator.leader_election import Lease
from launcher.operator.work_queue import WorkQueue
from launcher.reconcile.actions import Observed, Timeouts
from launcher.resource.crd import crd
from launcher.resource.document import parse_for_cluster
from launcher.resource.names import RECORD_LABEL, RUN_LABEL
from launcher.resource.record import Record, config_map_record
from launcher.resource.status import Status
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.refusals import ApiError

Object = dict[str, Any]

QUICK = Timeouts(backoff_seconds=0.2, max_backoff_seconds=1, lost_pod_seconds=60, pod_status_seconds=1)
LAST_WORDS = {
    "plan": '{"units": 2, "missing": 2, "examples": 8, "pairs": 3, "badRows": 0}',
    "extract": '{"units": 2}',
    "reduce": '{"manifest": "s3://b/m.json", "selected": 3, "badRows": 0}',
}


# The cache


def thing(
    kind: str, name: str, version: int, *, uid: str = "", run: str = "demo", owner: str = "r", **labels: str
) -> Object:
    metadata = {"name": name, "namespace": "team", "uid": uid or name, "resourceVersion": str(version)}
    metadata |= {"labels": {**({RUN_LABEL: run} if run else {}), **labels}, "ownerReferences": [{"uid": owner}]}
    return {"kind": kind, "metadata": metadata}


def a_record_in(cache: Cache, version: int = 1) -> Record:
    cache.put(thing("SelectionRun", "demo", version, uid="r"))
    record = cache.record("SelectionRun", ("team", "demo"))
    assert record is not None
    return record


def test_what_we_wrote_is_not_overtaken_by_an_older_event_or_listing() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 7))
    cache.put(thing("Job", "a", 5))
    assert cache.observed(record).jobs["a"]["metadata"]["resourceVersion"] == "7"
    assert cache.replace("Job", [], "6") == set()
    assert list(cache.observed(record).jobs) == ["a"]
    assert cache.replace("Job", [], "7") == {("team", "demo")}
    assert cache.observed(record).jobs == {}


def test_a_removal_takes_only_the_object_that_it_names() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5, uid="new"))
    assert cache.drop(thing("Job", "a", 4, uid="old")) == ("team", "demo")
    assert list(cache.observed(record).jobs) == ["a"]
    cache.drop(thing("Job", "a", 6, uid="new"))
    assert cache.observed(record).jobs == {}


def test_an_answer_that_is_late_does_not_bring_back_what_was_removed() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.drop(thing("Job", "a", 6, uid="old"))
    cache.put(thing("Job", "a", 5, uid="old"))
    assert cache.observed(record).jobs == {}
    cache.put(thing("Job", "a", 8, uid="new"))
    assert list(cache.observed(record).jobs) == ["a"]
    cache.drop(thing("SelectionRun", "demo", 9, uid="r"))
    cache.put(thing("SelectionRun", "demo", 8, uid="r"))
    assert cache.record("SelectionRun", ("team", "demo")) is None


def test_a_removed_record_is_forgotten_after_a_new_listing_too() -> None:
    cache = Cache()
    a_record_in(cache, 3)
    cache.replace("SelectionRun", [], "5")
    cache.put(thing("SelectionRun", "demo", 4, uid="r"))
    assert cache.records("SelectionRun") == []


@pytest.mark.parametrize("run", ["", "other"])
def test_a_child_whose_label_is_changed_leaves_its_run(run: str) -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5))
    changed = thing("Job", "a", 6, run=run)
    assert cache.put(changed) is not None
    assert cache.observed(record).jobs == {}
    cache.drop({**changed, "metadata": {**changed["metadata"], "resourceVersion": "7"}})
    assert cache.observed(record).jobs == {}


def test_a_child_that_leaves_a_watch_by_its_label_is_dropped() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5))
    assert cache.drop(thing("Job", "a", 6, run="")) == ("team", "demo")
    assert cache.observed(record).jobs == {}


def test_children_of_another_owner_do_not_count() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5, owner="an earlier record"))
    assert cache.observed(record).jobs == {}


def test_records_are_of_both_kinds_and_a_document_is_none() -> None:
    cache = Cache()
    a_record_in(cache)
    cache.put(thing("ConfigMap", "demo-document", 2))
    assert cache.record("ConfigMap", ("team", "demo")) is None
    cache.put(thing("ConfigMap", "demo-prism-record", 3, **{RECORD_LABEL: "true"}))
    found = cache.record("ConfigMap", ("team", "demo"))
    assert found is not None
    assert found.metadata["name"] == "demo-prism-record"
    assert len(cache.records("SelectionRun")) == len(cache.records("ConfigMap")) == 1


def test_what_belongs_to_no_run_is_not_kept() -> None:
    cache = Cache()
    assert cache.put(thing("Job", "a", 1, run="")) is None
    assert cache.drop(thing("Job", "a", 1, run="")) is None


# The queue


def test_a_run_is_taken_once_however_often_it_was_added() -> None:
    queue = WorkQueue()
    for _ in range(5):
        queue.add(("team", "a"))
    assert queue.take() == ("team", "a")
    queue.done(("team", "a"))
    assert len(queue) == 0


def test_the_earlier_time_stands() -> None:
    queue = WorkQueue()
    queue.add(("team", "a"), 60)
    queue.add(("team", "a"), 0.05)
    queue.add(("team", "a"), 30)
    started = time.monotonic()
    assert queue.take() == ("team", "a")
    assert 0.04 < time.monotonic() - started < 5
    assert len(queue) == 0


def test_no_run_is_at_two_workers_and_each_change_is_seen_after() -> None:
    queue, lock = WorkQueue(), threading.Lock()
    keys = [("team", str(number)) for number in range(5)]
    at_work: list[Any] = []
    clashes: list[Any] = []
    passes: dict[Any, int] = dict.fromkeys(keys, 0)

    def work() -> None:
        while (key := queue.take()) is not None:
            with lock:
                if key in at_work:
                    clashes.append(key)
                at_work.append(key)
            time.sleep(0.002)
            with lock:
                at_work.remove(key)
                passes[key] += 1
            queue.done(key)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(100):
        for key in keys:
            queue.add(key)
        time.sleep(0.001)
    eventually(lambda: len(queue) == 0 and not at_work, 10)
    queue.close()
    for worker in workers:
        worker.join(5)
    assert not clashes
    assert all(passes.values())


def test_a_run_that_is_due_while_at_work_comes_again_and_holds_up_no_other() -> None:
    queue = WorkQueue()
    queue.add(("team", "a"))
    assert queue.take() == ("team", "a")
    queue.add(("team", "a"))
    queue.add(("team", "b"))
    assert queue.take() == ("team", "b")
    queue.done(("team", "a"))
    assert queue.take() == ("team", "a")


def test_close_wakes_all_who_wait() -> None:
    queue, taken = WorkQueue(), []
    waiting = [threading.Thread(target=lambda: taken.append(queue.take())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    queue.close()
    for thread in waiting:
        thread.join(5)
    assert taken == [None, None, None]


# The server, and how Jobs end there


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as server:
        server.create(crd())
        with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
            yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "LONGEST_PAUSE_SECONDS", 0.4)
    monkeypatch.setattr(informer, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(events, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(hosts, "OPERATOR_SECONDS", 2.0)


def a_run(name: str = "demo", **cluster: Any) -> Object:
    return {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "org/model"},
            "candidates": {"uris": ["s3://b/pool/"]},
            "targets": {"uris": ["s3://b/t.jsonl"]},
            "store": "s3://b/store",
            "output": "s3://b/out",
            "selection": {"keep": "highest", "budget": {"count": 1}},
            "cluster": {"image": "registry/prism:1", "gpusPerNode": 0, **cluster},
        },
    }


class Hosted:
    """A controller in threads, and what it said."""

    def __init__(self, **options: Any) -> None:
        self.said: list[Object] = []
        self.controller = Controller(Cluster(), None, timeouts=QUICK, log=lambda **it: self.said.append(it), **options)
        self.thread = threading.Thread(target=self.controller.run, daemon=True)

    def events(self, name: str) -> list[Object]:
        return [it for it in self.said if it["event"] == name]


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
    words = LAST_WORDS[labels["prism.dev/stage"]] if words is None else words
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


def see_through(
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


ALL_WELL = ["demo-extract-0-0-0", "demo-plan-0-0", "demo-reduce-0-0"]


# The loop


def test_a_run_goes_through_and_an_idle_one_costs_no_write(server: ApiServer) -> None:
    server.create(a_run())
    with hosted() as host:
        assert see_through(server).phase == "Complete"
        assert job_names(server) == ALL_WELL
        time.sleep(0.3)
        server.requests.reset()
        passes = host.controller.counters.reconciles
        for _ in range(5):
            host.controller.queue.add(("default", "demo"))
            time.sleep(0.05)
        assert host.controller.counters.reconciles > passes
        assert server.requests.writes() == 0
        assert sum(server.requests.values()) == 0


def test_a_config_map_is_a_record_too(server: ApiServer) -> None:
    text = json.dumps(a_run())
    server.create(config_map_record(parse_for_cluster(text, "test"), text, "default"))

    def status() -> Status:
        found = server.object("configmaps", "demo-prism-record")
        return Record({"kind": "ConfigMap", **(found or {})}).status

    def is_over() -> bool:
        for job in unfinished(server):
            end(server, job)
        return status().is_terminal

    with hosted(kind="ConfigMap", host="client", only="demo"):
        eventually(is_over)
    assert (status().phase, status().driver) == ("Complete", "client")
    assert {job["metadata"]["ownerReferences"][0]["kind"] for job in server.objects("jobs")} == {"ConfigMap"}


FAULTS = ["409", "429", "500", "503", "reset_before", "reset_after"]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_request_of_a_run_may_fail_once(server: ApiServer, fault: str) -> None:
    # Every request that a run needs, in turn: a fault befalls the n-th of each verb and kind, for n up to 3.
    def ours(verb: str, plural: str) -> Callable[[Any], bool]:
        return lambda request: (
            request.user_agent.startswith("prism") and (request.verb, request.plural) == (verb, plural)
        )

    kinds = [
        ("create", "jobs"),
        ("create", "configmaps"),
        ("get", "configmaps"),
        ("patch", "configmaps"),
        ("create", "networkpolicies"),
        ("patch", "selectionruns/status"),
        ("list", "jobs"),
        ("list", "pods"),
        ("list", "selectionruns"),
        ("create", "events"),
    ]
    if fault == "409":
        kinds = [("patch", "selectionruns/status"), ("patch", "configmaps"), ("patch", "networkpolicies")]
    server.faults.script([(ours(*kind), fault) for kind in kinds for _ in range(2)])
    server.create(a_run())
    with hosted():
        status = see_through(server)
    assert (status.phase, status.restarts) == ("Complete", 0)
    assert job_names(server) == ALL_WELL
    assert server.faults.counts[fault] >= len(kinds)


def test_watches_that_break_cost_nothing(server: ApiServer) -> None:
    server.create(a_run())
    with hosted():
        status = see_through(server, also=server.drop_watches)
    assert (status.phase, status.restarts, job_names(server)) == ("Complete", 0, ALL_WELL)


def test_a_history_that_is_forgotten_is_listed_again(server: ApiServer) -> None:
    server.create(a_run())
    server.faults.script([({"verb": "watch"}, "gone_watch")] * 6)

    def forget() -> None:
        server.compact()
        server.drop_watches()

    with hosted():
        status = see_through(server, also=forget)
    assert (status.phase, status.restarts, job_names(server)) == ("Complete", 0, ALL_WELL)


def test_a_history_that_is_always_forgotten_is_listed_with_growing_pauses(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(informer, "LONGEST_PAUSE_SECONDS", 30.0)

    def too_old(_: Any) -> None:
        raise ApiError(410, "too old resource version")

    server.faults.script([({"verb": "watch", "plural": "jobs"}, too_old)] * 100)
    with hosted():
        time.sleep(3)
    assert server.requests["LIST", "jobs"] <= 5  # pauses of 0.25 to 0.5 s, doubled each time


def test_an_operator_may_be_there_before_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.kube.list_and_watch.NOT_SERVED_SECONDS", 0.5)
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        with hosted() as host:
            eventually(lambda: len(host.events("watch")) > 2)
            assert "does not serve this kind" in host.events("watch")[0]["error"]
            server.create(crd())
            server.create(a_run())
            assert see_through(server).phase == "Complete"


def test_a_transition_that_repeats_has_an_event_each_time(server: ApiServer) -> None:
    server.create(a_run())

    def suspend(wanted: bool) -> None:
        Cluster(tries=3).patch("SelectionRun", "default", "demo", {"spec": {"suspend": wanted}})
        eventually(lambda: (status_of(server).phase == "Suspended") == wanted)

    with hosted():
        eventually(lambda: unfinished(server))
        for wanted in (True, False, True):
            suspend(wanted)
        told = [it for it in server.objects("events") if it["reason"] == "Suspended"]
        eventually(lambda: len([it for it in server.objects("events") if it["reason"] == "Suspended"]) == 2)
    assert len({it["message"] for it in told}) == 1


def test_an_outage_is_waited_out_and_what_ended_in_it_is_seen(server: ApiServer) -> None:
    server.create(a_run())
    with hosted():
        (job,) = eventually(lambda: unfinished(server))
        with server.outage():
            end(server, job)
            time.sleep(0.3)
        status = see_through(server)
    assert (status.phase, status.restarts, job_names(server)) == ("Complete", 0, ALL_WELL)


def test_a_quota_that_refuses_a_job_is_shown_and_waited_out(server: ApiServer) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small", "namespace": "default"},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    server.create(quota)
    server.create(a_run())
    with hosted():
        eventually(lambda: "exceeded quota: small" in status_of(server).message)
        assert not status_of(server).is_terminal
        shown = server.object("selectionruns", "demo")
        time.sleep(1)
        assert server.object("selectionruns", "demo") == shown
        server.delete("resourcequotas", "small")
        assert see_through(server).phase == "Complete"


def test_a_startup_timeout_says_what_the_events_said(server: ApiServer) -> None:
    late = [datetime.timedelta(0)]
    server.create(a_run())
    with hosted(clock=lambda: datetime.datetime.now(datetime.UTC) + late[0]):
        (job,) = eventually(lambda: unfinished(server))
        about = {"kind": "Job", "namespace": "default", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}, "involvedObject": about}
        server.create({**event, "type": "Warning", "reason": "FailedCreate", "message": "exceeded quota: gpus"})
        started = copy.deepcopy(job)
        started["status"] = {"startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        late[0] = datetime.timedelta(seconds=2000)
        server.update(started, subresource="status")
        eventually(lambda: status_of(server).is_terminal)
    status = status_of(server)
    assert status.phase == "Failed"
    assert "no pod ran within 1800 s: FailedCreate: exceeded quota: gpus" in status.message
    assert server.objects("jobs") == []


def test_a_job_of_somebody_else_is_not_taken_over_and_is_named(server: ApiServer) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}
    theirs = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "demo-plan-0-0"},
        "spec": {"template": template},
    }
    uid = server.create(theirs)["metadata"]["uid"]
    server.create(a_run())
    with hosted():
        eventually(lambda: "belongs to somebody else" in status_of(server).message)
        found = server.object("jobs", "demo-plan-0-0")
        assert found is not None
        assert found["metadata"]["uid"] == uid
        server.delete("jobs", "demo-plan-0-0")
        assert see_through(server).phase == "Complete"


@pytest.mark.parametrize("plural", ["networkpolicies", "configmaps"])
def test_what_stands_around_a_job_is_taken_over_from_nobody_and_removed_with_no_run(
    server: ApiServer, plural: str
) -> None:
    server.create(a_run("first"))
    with hosted():
        eventually(lambda: unfinished(server))
    (name,) = [it["metadata"]["name"] for it in server.objects(plural) if is_owned_by(it, uid_of(server, "first"))]
    theirs = {
        "networkpolicies": {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"podSelector": {}}},
        "configmaps": {"apiVersion": "v1", "kind": "ConfigMap", "data": {"their": "own"}},
    }[plural]
    named = name.replace("first", "demo")
    before = server.create({**theirs, "metadata": {"name": named, "namespace": "default"}})
    server.create(a_run())
    with hosted():
        eventually(lambda: f"{named} exists already and belongs to somebody else" in status_of(server).message)
        server.delete("selectionruns", "demo")
        eventually(lambda: not server.object("selectionruns", "demo"))
        time.sleep(0.3)
    assert server.object(plural, named) == before


def uid_of(server: ApiServer, name: str) -> str:
    found = server.object("selectionruns", name)
    assert found
    return str(found["metadata"]["uid"])


def test_what_a_decision_is_told_of_refused_jobs_is_the_last_answer_and_the_first_time(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Observed] = []
    decide = hosts.decide
    monkeypatch.setattr(
        hosts, "decide", lambda record, seen, *rest: told.append(copy.deepcopy(seen)) or decide(record, seen, *rest)
    )
    said = iter([403, 403, 503])

    def answer(_: Any) -> None:
        code = next(said)
        raise ApiError(code, f"no, {code}")

    server.faults.script([(lambda it: (it.verb, it.plural) == ("create", "jobs"), answer)] * 3)
    server.create(a_run())
    with hosted():
        eventually(lambda: unfinished(server))
    refusals = [it.create_errors["demo-plan-0-0"] for it in told if it.create_errors]
    assert [(it.code, it.since == refusals[0].since) for it in refusals] == [(403, True)] * len(refusals)
    assert len(refusals) >= 2
    assert not told[0].create_errors
    with hosted():
        assert see_through(server).phase == "Complete"
    assert not told[-1].create_errors


def test_a_job_that_the_server_calls_invalid_ends_the_run(server: ApiServer) -> None:
    def answer(_: Any) -> None:
        raise ApiError(422, "spec.template.spec.restartPolicy: Unsupported value")

    server.faults.script([(lambda it: (it.verb, it.plural) == ("create", "jobs"), answer)] * 50)
    server.create(a_run())
    with hosted():
        eventually(lambda: status_of(server).is_terminal, 10)
    status = status_of(server)
    assert status.phase == "Failed"
    assert "restartPolicy: Unsupported value" in status.message
    assert "InvalidPod" in {one.reason for one in status.conditions}


def test_a_group_whose_job_is_refused_holds_back_no_word_of_the_others(server: ApiServer) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small", "namespace": "default"},
        "spec": {"hard": {"count/jobs.batch": "3"}},  # the plan and two of three groups
    }
    server.create(quota)
    server.create(a_run(groups=3))
    with hosted():
        end(server, eventually(lambda: unfinished(server))[0])
        eventually(
            lambda: [one.started for one in status_of(server).stages if one.stage == "extract"] == [True, True, False]
        )
        status = status_of(server)
        assert status.phase == "Extracting"
        assert "exceeded quota: small" in status.stage("extract", 2).message
        server.delete("resourcequotas", "small")
        eventually(lambda: len(unfinished(server)) == 3)


def test_a_record_that_is_removed_takes_its_children_with_it(server: ApiServer) -> None:
    server.create(a_run())
    with hosted() as host:
        eventually(lambda: unfinished(server))
        server.delete("selectionruns", "demo")
        eventually(lambda: not server.objects("jobs") and not server.objects("networkpolicies"))
        eventually(lambda: host.controller.cache.record("SelectionRun", ("default", "demo")) is None)
        time.sleep(0.3)
        assert not server.objects("jobs")
        assert not [one for one in server.objects("configmaps") if one["metadata"]["name"].startswith("demo")]


def test_a_namespace_that_goes_takes_its_runs_and_no_other(server: ApiServer) -> None:
    server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    server.create(a_run(), namespace="team")
    server.create(a_run("other"))
    with hosted():
        eventually(lambda: len(unfinished(server)) == 2)
        server.delete("namespaces", "team")
        eventually(lambda: server.object("namespaces", "team", "") is None)
        assert not server.objects("selectionruns", "team")
        assert see_through(server, "other").phase == "Complete"


def test_a_flaw_met_by_one_run_stops_no_other(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = hosts.decide

    def flawed(record: Record, *rest: Any) -> Any:
        if record.name == "bad":
            raise KeyError("a flaw of ours")
        return decide(record, *rest)

    monkeypatch.setattr(hosts, "decide", flawed)
    server.create(a_run("bad"))
    server.create(a_run())
    with hosted() as host:
        assert see_through(server).phase == "Complete"
        assert any("a flaw of ours" in it["error"] and it["run"] == "default/bad" for it in host.events("retry"))


def test_a_flaw_in_a_watch_does_not_end_it(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    put, left = Cache.put, [3]

    def flawed(self: Cache, found: Object) -> Any:
        if found["kind"] == "Job" and left[0]:
            left[0] -= 1
            raise KeyError("a flaw of ours")
        return put(self, found)

    monkeypatch.setattr(Cache, "put", flawed)
    server.create(a_run())
    with hosted():
        assert see_through(server).phase == "Complete"


def test_nonsense_by_hand_is_answered_once_and_stops_no_other(server: ApiServer) -> None:
    server.create(a_run("bad", podOverlay={"spec": {"containers": [{"name": {"no": "name"}}]}}))
    server.create(a_run())
    with hosted():
        assert see_through(server).phase == "Complete"
        eventually(lambda: status_of(server, "bad").message)


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [1200, 9900])
def test_a_document_deeper_than_python_reads_stops_no_other(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, levels: int
) -> None:
    # The stored object is what it was; what goes over the wire has the depth, as a Go server would send it.
    dumps = json.dumps

    def deep(answer: Any, **options: Any) -> str:
        return dumps(answer, **options).replace('"@deep@"', nested(levels))

    monkeypatch.setattr("tests.cluster.server.handler.json.dumps", deep)
    server.create(a_run("bad", podOverlay={"spec": {"a": "@deep@"}}))
    with hosted() as host:
        eventually(lambda: host.controller.informer.is_synced)
        server.create(a_run("worse", podOverlay={"spec": {"a": "@deep@"}}))
        server.create(a_run())
        assert see_through(server).phase == "Complete"
        assert not host.events("watch")
        eventually(lambda: status_of(server, "bad").message and status_of(server, "worse").message, 5)


def test_two_operators_at_once_make_each_job_once(server: ApiServer) -> None:
    server.create(a_run())
    with hosted(), hosted():
        status = see_through(server)
    assert (status.phase, status.restarts, job_names(server)) == ("Complete", 0, ALL_WELL)


def test_a_crash_is_counted_once_by_two_operators(server: ApiServer) -> None:
    server.create(a_run())
    with hosted(), hosted():
        (job,) = eventually(lambda: unfinished(server))
        end(server, job, 1, "no luck")
        status = see_through(server)
    assert (status.phase, status.restarts) == ("Complete", 1)
    assert job_names(server) == sorted([*ALL_WELL, "demo-plan-0-1"])


def test_an_operator_that_dies_is_continued_by_the_next(server: ApiServer) -> None:
    server.create(a_run())
    for _ in range(2):
        with hosted():
            (job,) = eventually(lambda: unfinished(server))
        end(server, job)  # while nobody looks
    with hosted():
        assert see_through(server).phase == "Complete"
    assert job_names(server) == ALL_WELL


def test_a_client_leaves_a_run_to_the_operator(server: ApiServer) -> None:
    server.create(a_run())
    with hosted() as operator, hosted(host="client", only="demo") as client:
        assert see_through(server).driver == "operator"
        assert client.controller.counters.reconciles == 0
        assert operator.controller.counters.reconciles > 0


def test_a_client_that_no_operator_answers_does_it_and_yields_to_one_that_comes(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "OPERATOR_SECONDS", 0.2)
    server.create(a_run())
    with hosted(host="client", only="demo") as client:
        eventually(lambda: status_of(server).driver == "client")
        with hosted():
            eventually(lambda: status_of(server).driver == "operator")
            time.sleep(0.3)
            passes = client.controller.counters.reconciles
            assert see_through(server).phase == "Complete"
            assert client.controller.counters.reconciles == passes


def test_a_status_is_written_onto_the_version_that_was_read(server: ApiServer) -> None:
    old = Record({"kind": "SelectionRun", **server.create(a_run())})
    write_status(Cluster(), old, Status(phase="Planning"))
    with pytest.raises(Conflict):
        write_status(Cluster(), old, Status(phase="Reducing"))
    assert status_of(server).phase == "Planning"


def test_a_value_that_is_no_more_is_removed_from_the_status(server: ApiServer) -> None:
    record = Record({"kind": "SelectionRun", **server.create(a_run())})
    ended = Status(phase="Complete", completion_time="2026-05-01T12:00:00Z", selected=3)
    written = Record({"kind": "SelectionRun", **write_status(Cluster(), record, ended)})
    write_status(Cluster(), written, Status(phase="Planning"))
    assert status_of(server) == Status(phase="Planning")


# The lease


def a_lease(identity: str, duration_seconds: float = 1.0) -> Lease:
    return Lease(Cluster(), "default", "prism", identity, duration_seconds=duration_seconds, renew_seconds=0.1)


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


def test_a_lease_that_is_let_go_is_taken_at_once(server: ApiServer) -> None:
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


def test_a_lease_without_a_word_in_it_is_taken(server: ApiServer) -> None:
    server.create({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "prism"}})
    assert a_lease("a").acquire(threading.Event())
    assert holder(server) == "a"


def test_a_holder_that_cannot_renew_is_told_that_it_lost(server: ApiServer) -> None:
    lease, lost = a_lease("a"), threading.Event()
    assert lease.acquire(threading.Event())
    keeping = threading.Thread(target=lease.keep, args=(threading.Event(), lost.set))
    keeping.start()
    time.sleep(0.3)
    assert not lost.is_set()
    with server.outage():
        started = time.monotonic()
        assert lost.wait(5)
        assert time.monotonic() - started < 1.5  # before another may take it
    keeping.join(5)
    assert not keeping.is_alive()


def test_a_short_outage_loses_no_lease(server: ApiServer) -> None:
    lease, lost, stopping = a_lease("a", 5), threading.Event(), threading.Event()
    assert lease.acquire(threading.Event())
    keeping = threading.Thread(target=lease.keep, args=(stopping, lost.set))
    keeping.start()
    with server.outage():
        time.sleep(0.4)
    time.sleep(0.3)
    stopping.set()
    keeping.join(5)
    assert not lost.is_set()
    assert holder(server) == "a"


def test_who_waits_for_a_lease_can_be_stopped_in_an_outage(server: ApiServer) -> None:
    stopping = threading.Event()
    with server.outage():
        threading.Timer(0.2, stopping.set).start()
        assert not a_lease("a").acquire(stopping)
        a_lease("a").release()  # costs nothing
