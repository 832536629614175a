"""Changing objects: server-side apply, merge patches, replacements."""

from __future__ import annotations

from tests.cluster.recording.session import APPLY, FORCE, KINDS, MERGE, NO_FORCE, Session, recorded


@recorded("kube.cluster.Cluster.apply", "operator.executor.Executor._apply", "cli.setup_verbs.schedule")
def apply(session: Session) -> None:
    """Server-side apply makes, keeps the version where nothing changes, and takes away what is not applied any more."""
    for plural, kind in {**KINDS, "cronjobs": "cron_job"}.items():
        session.ask("PATCH", session.at(plural, "first", query=FORCE), session.body(kind, "first"), APPLY)
        session.ask("PATCH", session.at(plural, "first", query=FORCE), session.body(kind, "first"), APPLY)
    changed = session.body("service", "first", labels={"prism.dev/run": "other"})
    session.ask("PATCH", session.at("services", "first", query=FORCE), changed, APPLY)
    session.do("PATCH", session.at("configmaps", "first", query="fieldManager=other"), {"data": {"theirs": "1"}}, MERGE)
    less = session.body("config_map", "first")
    less["data"] = {"document": "{}"}
    session.ask("PATCH", session.at("configmaps", "first", query=FORCE), less, APPLY)


@recorded("kube.cluster.Cluster.apply", "kube.errors.error_of_answer")
def apply_conflict(session: Session) -> None:
    """A field of another manager is a conflict unless it is forced."""
    path = session.at("configmaps", "first")
    session.do("PATCH", f"{path}?fieldManager=somebody", session.body("config_map", "first"), APPLY)
    other = session.body("config_map", "first")
    other["data"] = {"status": "{1}"}
    session.ask("PATCH", f"{path}?{NO_FORCE}", other, APPLY)
    session.ask("PATCH", f"{path}?{FORCE}", other, APPLY)
    service = session.at("services", "first")
    session.do("PATCH", f"{service}?fieldManager=somebody", session.body("service", "first"), APPLY)
    spec = {"publishNotReadyAddresses": False, "selector": {"prism.dev/run": "other"}}
    session.ask("PATCH", f"{service}?{NO_FORCE}", session.body("service", "first", spec), APPLY)
    session.do("PATCH", f"{path}?fieldManager=third", {"data": {"status": "{2}"}}, MERGE)
    session.ask("PATCH", f"{path}?{NO_FORCE}", other, APPLY)


@recorded("kube.errors.error_of_answer", "operator.executor.Executor._apply")
def apply_refused(session: Session) -> None:
    """An apply with an unknown field (a 500 that is permanent), without a manager, without a type."""
    for plural, kind in (("jobs", "job"), ("selectionruns", "run")):
        body = session.body(kind, "first", {"colour": "red"})
        session.ask("PATCH", session.at(plural, "first", query=FORCE), body, APPLY)
    path = session.at("configmaps", "first")
    session.ask("PATCH", path, session.body("config_map", "first"), APPLY)
    session.ask("PATCH", f"{path}?{FORCE}", {"metadata": {"name": "first"}, "data": {}}, APPLY)


@recorded("operator.executor.Executor._apply")
def apply_another_uid(session: Session) -> None:
    """The uid in an applied body keeps what is gone from rising again, and another's object from being taken."""
    body = session.body("config_map", "first", uid="11111111-2222-3333-4444-555555555555")
    path = session.at("configmaps", "first", query=FORCE)
    session.ask("PATCH", path, body, APPLY)
    made = session.do("PATCH", path, session.body("config_map", "first"), APPLY)
    session.ask("PATCH", path, body, APPLY)
    body["metadata"]["uid"] = made["metadata"]["uid"]
    session.ask("PATCH", path, body, APPLY)


@recorded("reconcile.failures.classify_create_error", "kube.errors.error_of_answer")
def fixed_template(session: Session) -> None:
    """A Job's pod template cannot change: the answer dumps all of it, and is cut in the record."""
    path = session.at("jobs", "first", query=FORCE)
    session.do("PATCH", path, session.body("job", "first"), APPLY)
    changed = session.body("job", "first")
    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "registry/prism:2"
    session.ask("PATCH", path, changed, APPLY)
    session.ask("PATCH", path, session.body("job", "first", {"suspend": True}), APPLY)


@recorded("operator.executor.write_status", "submit.run_again")
def stale_patch(session: Session) -> None:
    """A merge patch onto an older version conflicts, on the object and on its status; without a version it goes through."""
    first = session.do("POST", session.at("selectionruns"), session.body("run", "first"))
    label = {"metadata": {"labels": {"a": "b"}}}
    path = session.at("selectionruns", "first")
    session.do("PATCH", f"{path}?fieldManager=other", label, MERGE)
    stale = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}}
    session.ask("PATCH", f"{path}/status?fieldManager=prism", {**stale, "status": {"phase": "Running"}}, MERGE)
    session.ask("PATCH", f"{path}?fieldManager=prism", {**stale, "spec": {"retry": 1}}, MERGE)
    session.ask("PATCH", f"{path}/status?fieldManager=prism", {"status": {"phase": "Running", "message": None}}, MERGE)
    now = session.do("GET", path)
    fresh = {"metadata": {"resourceVersion": now["metadata"]["resourceVersion"]}}
    session.ask("PATCH", f"{path}?fieldManager=prism", {**fresh, "spec": {"retry": 1}}, MERGE)
    record = session.do("POST", session.at("configmaps"), session.body("config_map", "first"))
    path = session.at("configmaps", "first", query="fieldManager=prism")
    session.do("PATCH", path, {"data": {"a": "b"}}, MERGE)
    old = {"resourceVersion": record["metadata"]["resourceVersion"]}
    session.ask("PATCH", path, {"metadata": old, "data": {"status": "{1}"}}, MERGE)


@recorded("operator.executor.write_status", "submit.cancel")
def two_halves(session: Session) -> None:
    """Status sent to the object is ignored, and all but status sent to its status; a change of nothing keeps the version."""
    body = {**session.body("run", "first"), "status": {"phase": "Done"}}
    session.ask("POST", session.at("selectionruns"), body)
    path = session.at("selectionruns", "first")
    both = {"spec": {"retry": 1}, "status": {"phase": "Running"}}
    session.ask("PATCH", f"{path}?fieldManager=prism", both, MERGE)
    both["spec"]["retry"] = 2
    session.ask("PATCH", f"{path}/status?fieldManager=prism", both, MERGE)
    session.ask("PATCH", f"{path}/status?fieldManager=prism", both, MERGE)
    note = {"metadata": {"annotations": {"prism.dev/cancel": "0"}}}
    session.ask("PATCH", f"{path}?fieldManager=prism", note, MERGE)


@recorded(
    "operator.leader_election.Lease._take", "operator.leader_election.Lease.release", "kube.cluster.Cluster.replace"
)
def lease(session: Session) -> None:
    """A lease is renewed onto the version that was read; onto an older one it conflicts."""
    made = session.do("POST", session.at("leases"), session.body("lease", "leader"))
    path, spec = session.at("leases", "leader"), made["spec"]
    taken = {**made, "spec": {**spec, "holderIdentity": "second", "renewTime": "2026-01-01T00:00:05.000002Z"}}
    session.ask("PUT", path, taken)
    session.ask("PUT", path, taken)
    now = session.ask("GET", path)
    session.ask("PUT", path, {**now, "spec": {**spec, "holderIdentity": "", "leaseDurationSeconds": 1}})
    session.ask("PUT", path, session.body("lease", "leader"))
    session.ask("PUT", path, {**now, "metadata": {**now["metadata"], "uid": "11111111-2222-3333-4444-555555555555"}})
    session.do("POST", session.at("selectionruns"), session.body("run", "first"))
    session.ask("PUT", session.at("selectionruns", "first"), session.body("run", "first"))
    everywhere = session.at("leases", everywhere=True, query="limit=500&fieldSelector=metadata.name%3Dleader")
    session.ask("GET", everywhere)
    session.do("DELETE", path)
    session.ask("PUT", path, now)
