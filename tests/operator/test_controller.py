"""The reconcile loop against the fake API server, through faults, refusals, bugs and several hosts at once."""

from __future__ import annotations

import copy
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.kube.cluster import Cluster
from launcher.kube.errors import Conflict
from launcher.operator import controller as hosts
from launcher.operator import informer
from launcher.operator.cache import Cache
from launcher.operator.executor import write_status
from launcher.reconcile.actions import Observed
from launcher.reconcile.child_status import is_owned_by
from launcher.resource.crd import crd
from launcher.resource.document import parse_for_cluster
from launcher.resource.record import Record, config_map_record
from launcher.resource.status import Status
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.refusals import ApiError
from tests.operator.host import ALL_JOBS, a_run, complete_run, end, hosted, job_names, status_of, unfinished

Object = dict[str, Any]


def test_a_run_completes_and_an_idle_one_costs_no_request(server: ApiServer) -> None:
    server.create(a_run())
    with hosted() as host:
        assert complete_run(server).phase == "Complete"
        assert job_names(server) == ALL_JOBS
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

    kinds = [("create", it) for it in ("jobs", "configmaps", "networkpolicies", "events")]
    kinds += [("list", it) for it in ("jobs", "pods", "selectionruns")]
    kinds += [("get", "configmaps"), ("patch", "configmaps"), ("patch", "selectionruns/status")]
    if fault == "409":
        kinds = [("patch", "selectionruns/status"), ("patch", "configmaps"), ("patch", "networkpolicies")]
    server.faults.script([(ours(*kind), fault) for kind in kinds for _ in range(2)])
    server.create(a_run())
    with hosted():
        status = complete_run(server)
    assert (status.phase, status.restarts) == ("Complete", 0)
    assert job_names(server) == ALL_JOBS
    assert server.faults.counts[fault] >= len(kinds)


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_watches_that_break_cost_nothing(server: ApiServer, is_forgotten: bool) -> None:
    server.create(a_run())
    server.faults.script([({"verb": "watch"}, "gone_watch")] * (6 if is_forgotten else 0))

    def break_watches() -> None:
        if is_forgotten:
            server.compact()
        server.drop_watches()

    with hosted():
        status = complete_run(server, also=break_watches)
    assert (status.phase, status.restarts, job_names(server)) == ("Complete", 0, ALL_JOBS)


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


def test_an_operator_may_start_before_the_custom_resource_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.kube.list_and_watch.NOT_SERVED_SECONDS", 0.5)
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        with hosted() as host:
            eventually(lambda: len(host.events("watch")) > 2)
            assert "does not serve this kind" in host.events("watch")[0]["error"]
            server.create(crd())
            server.create(a_run())
            assert complete_run(server).phase == "Complete"


def test_a_transition_that_repeats_has_an_event_each_time(server: ApiServer) -> None:
    server.create(a_run())

    def suspend(wanted: bool) -> None:
        Cluster(tries=3).patch("SelectionRun", "default", "demo", {"spec": {"suspend": wanted}})
        eventually(lambda: (status_of(server).phase == "Suspended") == wanted)

    with hosted():
        eventually(lambda: unfinished(server))
        for wanted in (True, False, True):
            suspend(wanted)
        suspended = [it for it in server.objects("events") if it["reason"] == "Suspended"]
        eventually(lambda: len([it for it in server.objects("events") if it["reason"] == "Suspended"]) == 2)
    assert len({it["message"] for it in suspended}) == 1


def test_an_outage_is_retried_and_what_ended_in_it_is_seen(server: ApiServer) -> None:
    server.create(a_run())
    with hosted():
        (job,) = eventually(lambda: unfinished(server))
        with server.outage():
            end(server, job)
            time.sleep(0.3)
        status = complete_run(server)
    assert (status.phase, status.restarts, job_names(server)) == ("Complete", 0, ALL_JOBS)


def test_a_startup_timeout_reports_the_warning_events(server: ApiServer) -> None:
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


TEMPLATE = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}
THEIRS = {
    "jobs": {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": TEMPLATE}},
    "networkpolicies": {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"podSelector": {}}},
    "configmaps": {"apiVersion": "v1", "kind": "ConfigMap", "data": {"their": "own"}},
}


@pytest.mark.parametrize("plural", THEIRS)
def test_an_object_of_another_owner_is_neither_changed_nor_deleted_and_is_named(server: ApiServer, plural: str) -> None:
    first = server.create(a_run("first"))["metadata"]["uid"]
    with hosted():
        eventually(lambda: unfinished(server))
    (name,) = [it["metadata"]["name"] for it in server.objects(plural) if is_owned_by(it, first)]
    named = name.replace("first", "demo")
    before = server.create({**THEIRS[plural], "metadata": {"name": named, "namespace": "default"}})
    server.create(a_run())
    with hosted():
        eventually(lambda: "is owned by another run or user" in status_of(server).message)
        assert named in status_of(server).message
        server.delete("selectionruns", "demo")
        eventually(lambda: not server.object("selectionruns", "demo"))
        time.sleep(0.3)
    assert server.object(plural, named) == before


def test_a_decision_sees_the_last_refusal_of_a_job_and_the_time_of_the_first(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    observations: list[Observed] = []
    decide = hosts.decide
    monkeypatch.setattr(
        hosts,
        "decide",
        lambda record, observed, *rest: observations.append(copy.deepcopy(observed)) or decide(record, observed, *rest),
    )
    logged = iter([403, 403, 503])

    def answer(_: Any) -> None:
        code = next(logged)
        raise ApiError(code, f"no, {code}")

    server.faults.script([(lambda it: (it.verb, it.plural) == ("create", "jobs"), answer)] * 3)
    server.create(a_run())
    with hosted():
        eventually(lambda: unfinished(server))
    refusals = [it.create_errors["demo-plan-0-0"] for it in observations if it.create_errors]
    assert [(it.code, it.since == refusals[0].since) for it in refusals] == [(403, True)] * len(refusals)
    assert len(refusals) >= 2
    assert not observations[0].create_errors
    with hosted():
        assert complete_run(server).phase == "Complete"
    assert not observations[-1].create_errors


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


def test_a_group_whose_job_is_refused_does_not_hold_up_the_status_of_the_others(server: ApiServer) -> None:
    hard = {"count/jobs.batch": "3"}  # the plan and two of three groups
    metadata = {"name": "small", "namespace": "default"}
    server.create({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}})
    server.create(a_run(groups=3))
    with hosted():
        end(server, eventually(lambda: unfinished(server))[0])
        eventually(
            lambda: [one.started for one in status_of(server).stages if one.stage == "extract"] == [True, True, False]
        )
        status, shown = status_of(server), server.object("selectionruns", "demo")
        assert status.phase == "Extracting"
        assert "exceeded quota: small" in status.stage("extract", 2).message
        time.sleep(1)
        assert server.object("selectionruns", "demo") == shown  # a try without a change writes nothing
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
        assert complete_run(server, "other").phase == "Complete"


def test_a_bug_that_one_run_meets_stops_no_other(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = hosts.decide

    def buggy(record: Record, *rest: Any) -> Any:
        if record.name == "bad":
            raise KeyError("a bug of ours")
        return decide(record, *rest)

    monkeypatch.setattr(hosts, "decide", buggy)
    server.create(a_run("bad"))
    server.create(a_run())
    with hosted() as host:
        assert complete_run(server).phase == "Complete"
        assert any("a bug of ours" in it["error"] and it["run"] == "default/bad" for it in host.events("retry"))


def test_a_bug_in_a_watch_does_not_end_it(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    put, left = Cache.put, [3]

    def buggy(self: Cache, found: Object) -> Any:
        if found["kind"] == "Job" and left[0]:
            left[0] -= 1
            raise KeyError("a bug of ours")
        return put(self, found)

    monkeypatch.setattr(Cache, "put", buggy)
    server.create(a_run())
    with hosted():
        assert complete_run(server).phase == "Complete"


def test_an_invalid_document_is_reported_and_stops_no_other_run(server: ApiServer) -> None:
    server.create(a_run("bad", podOverlay={"spec": {"containers": [{"name": {"no": "name"}}]}}))
    server.create(a_run())
    with hosted():
        assert complete_run(server).phase == "Complete"
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
        assert complete_run(server).phase == "Complete"
        assert not host.events("watch")
        eventually(lambda: status_of(server, "bad").message and status_of(server, "worse").message, 5)


def test_a_crash_is_counted_once_by_two_operators(server: ApiServer) -> None:
    server.create(a_run())
    with hosted(), hosted():
        (job,) = eventually(lambda: unfinished(server))
        end(server, job, 1, "no luck")
        status = complete_run(server)
    assert (status.phase, status.restarts) == ("Complete", 1)
    assert job_names(server) == sorted([*ALL_JOBS, "demo-plan-0-1"])


def test_an_operator_that_dies_is_continued_by_the_next(server: ApiServer) -> None:
    server.create(a_run())
    for _ in range(2):
        with hosted():
            (job,) = eventually(lambda: unfinished(server))
        end(server, job)  # while nobody looks
    with hosted():
        assert complete_run(server).phase == "Complete"
    assert job_names(server) == ALL_JOBS


def test_a_client_reconciles_without_an_operator_and_yields_to_one_that_starts(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "OPERATOR_SECONDS", 0.2)
    server.create(a_run())
    with hosted(host="client", only="demo") as client:
        eventually(lambda: status_of(server).driver == "client")
        with hosted() as operator:
            eventually(lambda: status_of(server).driver == "operator")
            assert operator.controller.counters.reconciles > 0
            time.sleep(0.3)
            passes = client.controller.counters.reconciles
            assert complete_run(server).phase == "Complete"
            assert client.controller.counters.reconciles == passes


def test_a_status_is_written_onto_the_version_that_was_read(server: ApiServer) -> None:
    old = Record({"kind": "SelectionRun", **server.create(a_run())})
    write_status(Cluster(), old, Status(phase="Planning"))
    with pytest.raises(Conflict):
        write_status(Cluster(), old, Status(phase="Reducing"))
    assert status_of(server).phase == "Planning"


def test_a_field_without_a_value_is_removed_from_the_status(server: ApiServer) -> None:
    record = Record({"kind": "SelectionRun", **server.create(a_run())})
    ended = Status(phase="Complete", completion_time="2026-05-01T12:00:00Z", selected=3)
    written = Record({"kind": "SelectionRun", **write_status(Cluster(), record, ended)})
    write_status(Cluster(), written, Status(phase="Planning"))
    assert status_of(server) == Status(phase="Planning")
