"""The requests whose answers are recorded: every kind of answer that the launcher depends on. How they are sent: recording.py.

Each scenario makes what it needs in a namespace of its own, and says which functions of launcher/ rely on the answers.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.cluster.recording.recorder import APPLY, MERGE, Session, recorded

STRICT = "fieldManager=prism&fieldValidation=Strict"
FORCE, NO_FORCE = "fieldManager=prism&force=true", "fieldManager=prism&force=false"
KINDS = {
    "configmaps": "config_map",
    "jobs": "job",
    "leases": "lease",
    "networkpolicies": "network_policy",
    "selectionruns": "run",
    "services": "service",
}
"""What the launcher makes: plural -> the body's name in objects.yaml."""

# What is not there


@recorded("kube.cluster.Cluster.preferred_version", "submit.list_records", "kube.cluster.Cluster.serves_selection_runs")
def unknown_group(session: Session) -> None:
    """A group that no API server serves is a 404 in plain text, whatever is asked of it."""
    many, one = session.at("localqueues"), session.at("localqueues", "team")
    for path in (
        many,
        one,
        f"{many}?watch=true&resourceVersion=1&timeoutSeconds=1",
        "/apis/kueue.x-k8s.io",
        "/apis/kueue.x-k8s.io/v1beta1",
    ):
        session.ask("GET", path)
    session.ask("POST", many, {"metadata": {"name": "team"}})
    session.ask("PATCH", f"{one}?{FORCE}", {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue"}, APPLY)
    session.ask("PUT", one, {"metadata": {"name": "team"}})
    session.ask("DELETE", one)


@recorded("kube.cluster.Cluster.serves_selection_runs", "submit.record_kind")
def unknown_version(session: Session) -> None:
    """A version that a known group does not have: ours, and a built-in one."""
    runs, jobs = f"/namespaces/{session.namespace}/selectionruns", f"/namespaces/{session.namespace}/jobs"
    for path in ("/apis/prism.dev/v9", f"/apis/prism.dev/v9{runs}", f"/apis/prism.dev/v9{runs}?watch=true"):
        session.ask("GET", path)
    for path in ("/apis/batch/v9", f"/apis/batch/v9{jobs}", f"/apis/batch/v9{jobs}/gang"):
        session.ask("GET", path)
    session.ask("POST", f"/apis/prism.dev/v9{runs}", session.body("run", "first"))


@recorded("kube.cluster.Cluster.find", "submit.find_record")
def unknown_resource(session: Session) -> None:
    """A resource that a known group and version does not have."""
    for prefix in ("/apis/batch/v1", "/apis/prism.dev/v1alpha1", "/api/v1"):
        session.ask("GET", f"{prefix}/namespaces/{session.namespace}/unheards")
        session.ask("GET", f"{prefix}/namespaces/{session.namespace}/unheards/first")
    session.ask("GET", f"/apis/batch/v1/namespaces/{session.namespace}/unheards?watch=true&timeoutSeconds=1")
    session.ask("POST", f"/apis/batch/v1/namespaces/{session.namespace}/unheards", {"metadata": {"name": "first"}})


@recorded(
    "kube.cluster.Cluster.find",
    "kube.cluster.Cluster.get",
    "doctor.cluster_checks._namespace",
    "doctor.run_checks._service_account",
)
def missing_object(session: Session) -> None:
    """An object that is not there."""
    for plural in ("configmaps", "jobs", "leases", "selectionruns", "serviceaccounts", "persistentvolumeclaims"):
        session.ask("GET", session.at(plural, "none"))
    session.ask("GET", session.at("namespaces", "none"))
    session.ask("GET", session.at("customresourcedefinitions", "none.prism.dev"))
    session.ask("PATCH", session.at("selectionruns", "none/status", query="fieldManager=prism"), {"status": {}}, MERGE)
    session.ask("PATCH", session.at("configmaps", "none", query="fieldManager=prism"), {"data": {}}, MERGE)
    session.ask("PUT", session.at("leases", "none"), session.body("lease", "none"))


@recorded("submit._create", "operator.controller.Controller._create", "kube.cluster.Cluster.get")
def missing_namespace(session: Session) -> None:
    """A namespace that is not there: making something says so, reading says the object is missing, a list is empty."""
    session.namespace = "nowhere"
    for plural, kind in (("jobs", "job"), ("selectionruns", "run"), ("configmaps", "config_map")):
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first"))
        session.ask("GET", session.at(plural, "first"))
        session.ask("GET", session.at(plural, query="limit=500"))
    session.ask("PATCH", session.at("services", "first", query=FORCE), session.body("service", "first"), APPLY)


# Making


@recorded(
    "kube.cluster.Cluster.create",
    "operator.controller.Controller._create",
    "submit._create",
    "operator.leader_election.Lease._take",
)
def create(session: Session) -> None:
    """Making what the launcher makes: the whole object comes back, its defaults filled in."""
    for plural, kind in KINDS.items():
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first"))
        session.ask("GET", session.at(plural, "first"))
    pod = session.body("pod", "first")
    session.ask("POST", session.at("pods", query=STRICT), pod)


@recorded(
    "submit.submit",
    "operator.controller.Controller._create",
    "operator.leader_election.Lease._take",
    "doctor.bucket_probe._create",
)
def create_existing(session: Session) -> None:
    """A name that is taken."""
    for plural, kind in KINDS.items():
        session.do("POST", session.at(plural), session.body(kind, "first"))
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first"))


@recorded("operator.controller.Controller._tell")
def events(session: Session) -> None:
    """An Event is made once; a second of its name conflicts, and one about another namespace is refused."""
    body = session.body("event", "demo.1234")
    body["involvedObject"]["namespace"] = session.namespace
    session.ask("POST", session.at("events", query=STRICT), body)
    session.ask("POST", session.at("events", query=STRICT), body)
    elsewhere = session.body("event", "demo.5678")
    elsewhere["involvedObject"]["namespace"] = "elsewhere"
    session.ask("POST", session.at("events", query=STRICT), elsewhere)
    fields = "fieldSelector=involvedObject.kind%3DSelectionRun%2Ctype%3DWarning&limit=500"
    session.ask("GET", session.at("events", query=fields))


@recorded("submit._create", "reconcile.attempts.Attempts._judge_refusal", "kube.errors.error_of_answer")
def unknown_field(session: Session) -> None:
    """Strict validation refuses a field that the schema does not know, at the top and far within."""
    for plural, kind in (("jobs", "job"), ("selectionruns", "run")):
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first", {"colour": "red"}))
    deep = session.body("job", "first")
    deep["spec"]["template"]["spec"]["containers"][0]["colour"] = "red"
    session.ask("POST", session.at("jobs", query=STRICT), deep)


@recorded("submit._create", "reconcile.attempts.Attempts._judge_refusal")
def broken_schema(session: Session) -> None:
    """What a custom resource's schema refuses, with its causes."""
    wrong: list[dict[str, Any]] = [
        {"model": 3},
        {"model": "UPPER"},
        {"model": "a" * 101},
        {"model": ""},
        {"keep": "best"},
        {"damping": 0},
        {"nodes": 0},
        {"nodes": 9},
        {"suspend": "yes"},
        {"uris": []},
        {"uris": ["s3://a"] * 4},
        {"uris": "s3://a"},
        {"overlay": 3},
    ]
    for spec in wrong:
        session.ask("POST", session.at("selectionruns", query=STRICT), session.body("run", "first", spec))
    missing = session.body("run", "first")
    del missing["spec"]["model"]
    session.ask("POST", session.at("selectionruns", query=STRICT), missing)
    none = session.body("run", "first")
    del none["spec"]
    session.ask("POST", session.at("selectionruns", query=STRICT), none)
    named = session.body("run", "First_Run")
    session.ask("POST", session.at("selectionruns", query=STRICT), named)


@recorded("submit._create", "submit.run_again", "reconcile.attempts.Attempts._judge_refusal")
def broken_rule(session: Session) -> None:
    """What the CEL rules of a custom resource refuse: at creation, and as changes."""
    for spec in ({"uris": ["/tmp"]}, {"nodes": 8, "gpus": 8}, {"retry": 100}):
        session.ask("POST", session.at("selectionruns", query=STRICT), session.body("run", "first", spec))
    session.ask("POST", session.at("selectionruns", query=STRICT), session.body("run", "n" * 41))
    session.do("POST", session.at("selectionruns"), session.body("run", "first"))
    for spec in ({"model": "large"}, {"overlay": {"any": {"thing": "1"}}}, {"overlay": None}, {"retry": 1}):
        session.ask("PATCH", session.at("selectionruns", "first", query="fieldManager=prism"), {"spec": spec}, MERGE)


@recorded("reconcile.attempts.Attempts._judge_refusal", "operator.controller.Controller._create_job")
def broken_job(session: Session) -> None:
    """Jobs that the server refuses."""
    never: dict[str, Any] = session.body("job", "first")
    never["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"
    other = session.body("job", "first")
    other["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] = "other"
    codes = []
    for values in ([65, 64], [0, 64]):
        codes.append(session.body("job", "first"))
        codes[-1]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] = values
    replaced = session.body("job", "first", {"podReplacementPolicy": "TerminatingOrFailed"})
    gpus = session.body("job", "first")
    amounts = {"requests": {"nvidia.com/gpu": "1"}, "limits": {"nvidia.com/gpu": "2"}}
    gpus["spec"]["template"]["spec"]["containers"][0]["resources"] = amounts
    mounts = session.body("job", "first")
    del mounts["spec"]["template"]["spec"]["volumes"][2]
    for body in (never, other, *codes, replaced, gpus, mounts, session.body("job", "n" * 62)):
        session.ask("POST", session.at("jobs", query=STRICT), body)


@recorded("reconcile.attempts.Attempts._judge_refusal", "operator.controller.Controller._create_job")
def wrong_type(session: Session) -> None:
    """A built-in kind with a field of another type: 400, and no causes."""
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first", {"completions": "two"}))
    session.ask("POST", session.at("configmaps", query=STRICT), {"metadata": {"name": "first"}, "data": {"a": 1}})
    micro = session.body("lease", "first", {"renewTime": "2026-01-01T00:00:00Z"})
    session.ask("POST", session.at("leases", query=STRICT), micro)


@recorded("submit._create", "operator.controller.write_status")
def too_large(session: Session) -> None:
    """A record in a ConfigMap has at most 1 MiB, a request at most 3 MiB."""
    for size in (1_100_000, 4_000_000):
        body = session.body("config_map", "first")
        body["data"] = {"status": "x" * size}
        session.ask("POST", session.at("configmaps", query=STRICT), body)


@recorded("doctor.run_checks._policies", "cli.cluster_verbs.schedule")
def dry_run(session: Session) -> None:
    """A dry run is judged and answered like the write, and nothing is there afterwards."""
    session.ask("POST", session.at("pods", query=f"{STRICT}&dryRun=All"), session.body("pod", "first"))
    session.ask("GET", session.at("pods", "first"))
    session.ask(
        "PATCH", session.at("cronjobs", "first", query=f"{FORCE}&dryRun=All"), session.body("cron_job", "first"), APPLY
    )
    session.ask("GET", session.at("cronjobs", "first"))


# Changing


@recorded("kube.cluster.Cluster.apply", "operator.controller.Controller._apply", "cli.cluster_verbs.schedule")
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


@recorded("kube.errors.error_of_answer", "operator.controller.Controller._apply")
def apply_refused(session: Session) -> None:
    """An apply with an unknown field (a 500 that is permanent), without a manager, without a type."""
    for plural, kind in (("jobs", "job"), ("selectionruns", "run")):
        body = session.body(kind, "first", {"colour": "red"})
        session.ask("PATCH", session.at(plural, "first", query=FORCE), body, APPLY)
    path = session.at("configmaps", "first")
    session.ask("PATCH", path, session.body("config_map", "first"), APPLY)
    session.ask("PATCH", f"{path}?{FORCE}", {"metadata": {"name": "first"}, "data": {}}, APPLY)


@recorded("operator.controller.Controller._apply")
def apply_another_uid(session: Session) -> None:
    """The uid in an applied body keeps what is gone from rising again, and another's object from being taken."""
    body = session.body("config_map", "first", uid="11111111-2222-3333-4444-555555555555")
    path = session.at("configmaps", "first", query=FORCE)
    session.ask("PATCH", path, body, APPLY)
    made = session.do("PATCH", path, session.body("config_map", "first"), APPLY)
    session.ask("PATCH", path, body, APPLY)
    body["metadata"]["uid"] = made["metadata"]["uid"]
    session.ask("PATCH", path, body, APPLY)


@recorded("reconcile.attempts.Attempts._judge_refusal", "kube.errors.error_of_answer")
def fixed_template(session: Session) -> None:
    """A Job's pod template cannot change: the answer dumps all of it, and is cut in the record."""
    path = session.at("jobs", "first", query=FORCE)
    session.do("PATCH", path, session.body("job", "first"), APPLY)
    changed = session.body("job", "first")
    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "registry/prism:2"
    session.ask("PATCH", path, changed, APPLY)
    session.ask("PATCH", path, session.body("job", "first", {"suspend": True}), APPLY)


@recorded("operator.controller.write_status", "submit.run_again")
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


@recorded("operator.controller.write_status", "submit.cancel")
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


# Removing


@recorded("kube.cluster.Cluster.delete", "doctor.bucket_probe.try_buckets", "operator.controller.Controller._act")
def delete(session: Session) -> None:
    """A removal is answered by a Status, or by the object where something holds it."""
    for plural, kind in KINDS.items():
        made = session.do("POST", session.at(plural), session.body(kind, "first"))
        uid = {"preconditions": {"uid": made["metadata"]["uid"]}}
        session.ask("DELETE", session.at(plural, "first"), {"propagationPolicy": "Background", **uid})
    session.ask("DELETE", session.at("jobs", "first"), {"propagationPolicy": "Background"})
    wrong = {"preconditions": {"uid": "11111111-2222-3333-4444-555555555555"}}
    for plural, kind in (("jobs", "job"), ("configmaps", "config_map"), ("selectionruns", "run")):
        session.do("POST", session.at(plural), session.body(kind, "other"))
        session.ask("DELETE", session.at(plural, "other"), {"propagationPolicy": "Background", **wrong})
    session.do("POST", session.at("jobs"), session.body("job", "held", finalizers=["prism.dev/hold"]))
    session.ask("DELETE", session.at("jobs", "held"), {"propagationPolicy": "Background"})
    session.ask("DELETE", session.at("jobs", "held"), {"propagationPolicy": "Background"})
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "held"))
    renamed = session.body("job", "held", labels={"a": "b"}, finalizers=["prism.dev/hold"])
    session.ask("PATCH", session.at("jobs", "held", query=FORCE), renamed, APPLY)
    session.do("PATCH", session.at("jobs", "held"), {"metadata": {"finalizers": None}}, MERGE)
    session.ask("GET", session.at("jobs", "held"))


@recorded("reconcile.attempts.Attempts._judge_refusal", "operator.controller.Controller._create_job", "submit._create")
def ending_namespace(session: Session) -> None:
    """Nothing is made in a namespace that is being removed."""
    session.do("POST", session.at("configmaps"), session.body("config_map", "held", finalizers=["prism.dev/hold"]))
    session.do("DELETE", session.at("namespaces", session.namespace))
    session.until(
        lambda: "deletionTimestamp" in session.do("GET", session.at("namespaces", session.namespace))["metadata"]
    )
    for plural, kind in KINDS.items():
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "late"))
    session.do("PATCH", session.at("configmaps", "held"), {"metadata": {"finalizers": None}}, MERGE)


# Lists and watches


@recorded("kube.cluster.Cluster.list", "kube.list_and_watch.list_and_watch", "submit.list_records")
def pages(session: Session) -> None:
    """A list by pages, without a selector and with one; its items have no kind, but those of a custom resource do."""
    for number in range(3):
        for plural, kind in (("leases", "lease"), ("configmaps", "config_map"), ("selectionruns", "run")):
            session.do("POST", session.at(plural), session.body(kind, f"item-{number}"))
    for plural, query in (
        ("leases", "limit=2"),
        ("selectionruns", "limit=2"),
        ("configmaps", "limit=2&labelSelector=prism.dev%2Frecord%3Dtrue"),
    ):
        first = session.ask("GET", session.at(plural, query=query))
        session.ask("GET", session.at(plural, query=f"{query}&continue={first['metadata']['continue']}"))
    session.ask("GET", session.at("pods", query="limit=500&labelSelector=prism.dev%2Frun%3Dnone"))


@recorded(
    "kube.cluster.Cluster.list",
    "operator.controller.Controller._selectors",
    "submit.wait_until",
    "follow.logs._Following._take_all",
)
def selectors(session: Session) -> None:
    """Selectors by label and by field, and such as the server does not understand."""
    for number, run in enumerate(("one", "two")):
        labels = {"prism.dev/record": "true", "prism.dev/run": run}
        session.do("POST", session.at("configmaps"), session.body("config_map", f"item-{number}", labels=labels))
        session.do("POST", session.at("selectionruns"), session.body("run", run))
    for query in (
        "labelSelector=prism.dev%2Frecord%3Dtrue%2Cprism.dev%2Frun%3Done",
        "labelSelector=prism.dev%2Frun%20in%20%28one%2Ctwo%29%2Cprism.dev%2Frun%21%3Dtwo",
        "labelSelector=prism.dev%2Frun%2C%21other",
        "fieldSelector=metadata.name%3Ditem-1",
        "fieldSelector=data.status%3Dx",
    ):
        session.ask("GET", session.at("configmaps", query=f"limit=500&{query}"))
    for query in ("fieldSelector=metadata.name%3Done", "fieldSelector=spec.model%3Dsmall"):
        session.ask("GET", session.at("selectionruns", query=f"limit=500&{query}"))
    session.ask("GET", session.at("jobs", query="limit=500&fieldSelector=spec.suspend%3Dtrue"))


@recorded(
    "kube.cluster.Cluster.watch",
    "kube.list_and_watch.list_and_watch",
    "submit.wait_until",
    "follow.logs._Following._find_pods",
)
def watch(session: Session) -> None:
    """Changes since a list, an event a line; an object that leaves the selection is DELETED; a quiet end."""
    for plural, kind in (("configmaps", "config_map"), ("selectionruns", "run")):
        version = session.do("GET", session.at(plural))["metadata"]["resourceVersion"]
        session.do("POST", session.at(plural), session.body(kind, "first", labels={"mine": "yes"}))
        session.do("POST", session.at(plural), session.body(kind, "second", labels={"mine": "no"}))
        for labels in ({"more": "x"}, {"mine": "no"}, {"mine": "yes"}):
            session.do("PATCH", session.at(plural, "first"), {"metadata": {"labels": labels}}, MERGE)
        session.do("DELETE", session.at(plural, "first"))
        query = f"watch=true&resourceVersion={version}"
        session.ask("GET", session.at(plural, query=f"{query}&timeoutSeconds=1&labelSelector=mine%3Dyes"))
        session.ask("GET", session.at(plural, query=f"{query}&timeoutSeconds=1&fieldSelector=metadata.name%3Dsecond"))


@recorded("kube.cluster.Cluster.watch", "kube.list_and_watch.list_and_watch")
def bookmarks(session: Session) -> None:
    """What a bookmark looks like for each kind that is watched: the first one, for which a server need not be waited for."""
    query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    for plural in ("configmaps", "jobs", "pods", "selectionruns"):
        session.ask("GET", session.at(plural, query=f"{query}&timeoutSeconds=1&labelSelector=mine"))


@recorded("kube.cluster.Cluster.watch", "kube.cluster.Cluster.list", "kube.list_and_watch.list_and_watch")
def long_ago(session: Session) -> None:
    """A version that is no longer known ends a watch by an ERROR event, and a list by an answer, of 410."""
    query = "watch=true&resourceVersion=1&allowWatchBookmarks=true&timeoutSeconds=1"
    session.ask("GET", session.at("selectionruns", query=query))
    session.ask("GET", session.at("pods", query="watch=true&resourceVersion=new&timeoutSeconds=1"))
    session.door.compact()
    old = json.dumps({"v": "meta.k8s.io/v1", "rv": 1, "start": "first\u0000"}, separators=(",", ":"))
    token = base64.urlsafe_b64encode(old.encode()).decode().rstrip("=")
    session.ask("GET", session.at("selectionruns", query=f"limit=1&continue={token}"))


# Who may


@recorded(
    "kube.credentials.Credentials.renew", "kube.errors.error_of_answer", "operator.controller.Controller._create_job"
)
def wrong_token(session: Session) -> None:
    """A token that the server does not know."""
    session.ask("GET", session.at("selectionruns", "first"), who="stranger")
    session.ask("GET", session.at("pods", query="watch=true&timeoutSeconds=1"), who="stranger")
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first"), who="stranger")
    session.ask("GET", "/apis/prism.dev/v1alpha1", who="stranger")
    session.ask("GET", "/version", who="stranger")


@recorded(
    "doctor.cluster_checks._leases",
    "doctor.findings.looked",
    "operator.controller.Controller._create_job",
    "follow.pod_log.PodLog.lines",
)
def not_allowed(session: Session) -> None:
    """What an account may not do, by each verb; discovery is for everybody."""
    rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "patch"]}]
    session.account("driver", rules)
    session.ask("GET", session.at("jobs", query="limit=500"), who="driver")
    session.ask("GET", session.at("selectionruns", "first"), who="driver")
    session.ask("GET", session.at("leases", everywhere=True, query="limit=500"), who="driver")
    session.ask("GET", session.at("namespaces", session.namespace), who="driver")
    session.ask("GET", session.at("nodes", query="limit=500"), who="driver")
    session.ask("GET", session.at("pods", query="watch=true&timeoutSeconds=1"), who="driver")
    session.ask("GET", session.at("pods", "first/log", query="container=worker"), who="driver")
    session.ask("GET", session.at("localqueues"), who="driver")
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first"), who="driver")
    session.ask("PATCH", session.at("jobs", "first", query=FORCE), session.body("job", "first"), APPLY, who="driver")
    session.ask("PATCH", session.at("selectionruns", "first/status"), {"status": {}}, MERGE, who="driver")
    session.ask("DELETE", session.at("jobs", "first"), who="driver")
    for path in ("/apis/prism.dev/v1alpha1", "/apis/kueue.x-k8s.io/v1beta1"):
        session.ask("GET", path, who="driver")


@recorded("kube.cluster.Cluster.may", "doctor.cluster_checks.missing_rights")
def access_review(session: Session) -> None:
    """What one may do oneself, asked of the administrator and of an account; an unknown resource is merely not allowed."""
    session.account("driver", [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]}])
    for who, verb, group, plural in (
        ("admin", "create", "batch", "jobs"),
        ("driver", "get", "batch", "jobs"),
        ("driver", "create", "batch", "jobs"),
        ("driver", "get", "kueue.x-k8s.io", "localqueues"),
    ):
        asked = {"verb": verb, "group": group, "resource": plural, "subresource": "", "namespace": session.namespace}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {}}
        body = {**review, "spec": {"resourceAttributes": asked}}
        session.ask("POST", session.at("selfsubjectaccessreviews"), body, who=who)


@recorded("reconcile.attempts.Attempts._judge_refusal", "doctor.run_checks._policies")
def quota(session: Session) -> None:
    """A quota that is used up, for Jobs and for pods; one that needs every pod to say what it asks for."""
    session.do("POST", session.at("resourcequotas"), session.body("quota", "team"))
    session.until(lambda: session.do("GET", session.at("resourcequotas", "team")).get("status", {}).get("used"))
    session.do("POST", session.at("jobs"), session.body("job", "first"))
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "second"))
    session.do("POST", session.at("pods"), session.body("pod", "first"))
    session.ask("POST", session.at("pods", query=STRICT), session.body("pod", "second"))
    silent = session.body("pod", "third")
    del silent["spec"]["containers"][0]["resources"]
    session.ask("POST", session.at("pods", query=STRICT), silent)


@recorded(
    "reconcile.attempts.Attempts._judge_refusal", "doctor.run_checks._policies", "doctor.bucket_probe.try_buckets"
)
def admission_policy(session: Session) -> None:
    """What a ValidatingAdmissionPolicy denies is a 422, as what a schema refuses."""
    name = f"{session.namespace}.recorded.example"
    chosen = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": session.namespace}}}
    session.do("POST", session.at("validatingadmissionpolicies"), session.body("policy", name))
    binding = session.body("policy_binding", name, {"policyName": name, "matchResources": chosen})
    binding["spec"]["validationActions"] = ["Deny"]
    session.do("POST", session.at("validatingadmissionpolicybindings"), binding)
    number = iter(range(1000))

    def denied() -> bool:
        tried = session.body("job", f"tried-{next(number)}")
        return session.send("POST", session.at("jobs", query="dryRun=All"), tried).status == 422

    session.until(denied)
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first"))
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first", labels={"team": "a"}))


@recorded(
    "kube.transport.Transport._note_warnings",
    "doctor.run_checks._policies",
    "reconcile.attempts.Attempts._judge_refusal",
)
def pod_security(session: Session) -> None:
    """A namespace that enforces *restricted* refuses pods, and only warns of the Jobs that will make them."""
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    session.do("PATCH", session.at("namespaces", session.namespace), labels, MERGE)

    def pod(name: str, **spec: Any) -> dict[str, Any]:
        return session.body("pod", name, {"containers": [{"name": "worker", "image": "registry/prism:1"}], **spec})

    bad: dict[str, Any] = {"securityContext": {}}
    volumes = [{"name": "host", "hostPath": {"path": "/data"}}, {"name": "nfs", "nfs": {"server": "a", "path": "/"}}]
    contexts = [
        {"capabilities": {"add": ["IPC_LOCK"], "drop": ["ALL"]}, "allowPrivilegeEscalation": False, "runAsUser": 0},
        {
            "capabilities": {"add": ["NET_BIND_SERVICE"]},
            "seccompProfile": {"type": "Unconfined"},
            "runAsNonRoot": False,
        },
    ]
    containers = [
        {
            "name": f"worker-{place}",
            "image": "registry/prism:1",
            "securityContext": context,
            "ports": [{"containerPort": 1, "hostPort": 8000 + place}],
        }
        for place, context in enumerate(contexts)
    ]
    job = session.body("job", "warned")
    job["spec"]["template"] = {
        "spec": {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "registry/prism:1"}]}
    }
    session.ask("POST", session.at("jobs", query=STRICT), job)
    session.ask("POST", session.at("pods", query=STRICT), session.body("pod", "good"))
    for body in (
        pod("bare", **bad),
        pod("host", hostNetwork=True, hostIPC=True, hostPID=True, volumes=volumes),
        session.body("pod", "contexts", {"containers": containers, "volumes": []}),
    ):
        session.ask("POST", session.at("pods", query=STRICT), body)


# The server itself, and its pods


@recorded("kube.cluster.Cluster.version", "doctor.cluster_checks._server", "kube.cluster.Cluster.serves_selection_runs")
def discovery(session: Session) -> None:
    """The server's version, and what it serves of ours."""
    session.ask("GET", "/version")
    session.ask("GET", "/readyz")
    session.ask("GET", "/apis/prism.dev")
    session.ask("GET", "/apis/prism.dev/v1alpha1")


@recorded("kube.cluster.Cluster.serves_selection_runs")
def new_definition(session: Session) -> None:
    """A definition is answered before it is established, and served a little later; removed, it is served no more."""
    body = session.body("definition", "others.recorded.example")
    names = {"plural": "others", "singular": "other", "kind": "Other"}
    body["spec"] |= {"group": "recorded.example", "names": names}
    body["spec"]["versions"][0]["schema"] = {
        "openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object"}}}
    }
    path = session.at("customresourcedefinitions", body["metadata"]["name"])
    session.ask("GET", "/apis/recorded.example/v1alpha1")
    session.ask("POST", session.at("customresourcedefinitions"), body)
    session.until(lambda: session.send("GET", "/apis/recorded.example/v1alpha1").status == 200)
    session.ask("GET", path)
    session.ask("GET", "/apis/recorded.example/v1alpha1")
    session.do("DELETE", path)
    session.until(lambda: session.send("GET", path).status == 404)
    session.until(lambda: session.send("GET", "/apis/recorded.example/v1alpha1").status == 404)
    session.ask("GET", "/apis/recorded.example/v1alpha1")


@recorded("follow.pod_log.PodLog.lines", "kube.cluster.Cluster.log_lines", "doctor.bucket_probe._said")
def pod_log(session: Session) -> None:
    """Logs of a pod that is not there, has no node, has no such container, or whose node is gone."""
    query = "container=worker&follow=false&timestamps=true"
    session.ask("GET", session.at("pods", "none/log", query=query))
    session.do("POST", session.at("pods"), session.body("pod", "waiting"))
    session.ask("GET", session.at("pods", "waiting/log", query=query))
    session.ask("GET", session.at("pods", "waiting/log", query="container=other"))
    lost = session.body("pod", "lost", {"nodeName": "no-such-node"})
    session.do("POST", session.at("pods"), lost)
    session.ask("GET", session.at("pods", "lost/log", query=query))


@recorded("reconcile.failures.is_seen_evicted")
def eviction(session: Session) -> None:
    """An eviction marks its pod, by which a preemption is known, and lets it end."""
    session.do("POST", session.at("nodes"), session.body("node", "evicting"))
    made = session.do("POST", session.at("pods"), session.body("pod", "first", {"nodeName": "evicting"}))
    running = {"status": {"phase": "Running"}}
    session.do("PATCH", session.at("pods", "first/status"), running, MERGE)

    def evict(name: str, uid: str) -> None:
        options = {"preconditions": {"uid": uid}}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}, "deleteOptions": options}
        session.ask("POST", session.at("pods", f"{name}/eviction"), body)

    evict("none", made["metadata"]["uid"])
    evict("first", "11111111-2222-3333-4444-555555555555")
    evict("first", made["metadata"]["uid"])
    session.ask("GET", session.at("pods", "first"))
    session.ask("DELETE", session.at("pods", "first"), {"gracePeriodSeconds": 0})
    session.ask("GET", session.at("pods", "first"))
    session.do("DELETE", session.at("nodes", "evicting"))
