"""Creating objects, and what a server refuses to create."""

from __future__ import annotations

from typing import Any

from tests.cluster.recording.session import APPLY, FORCE, KINDS, MERGE, STRICT, Session, recorded


@recorded(
    "kube.cluster.Cluster.create",
    "operator.executor.Executor._create",
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
    "operator.executor.Executor._create",
    "operator.leader_election.Lease._take",
    "doctor.bucket_probe._create",
)
def create_existing(session: Session) -> None:
    """A name that is taken."""
    for plural, kind in KINDS.items():
        session.do("POST", session.at(plural), session.body(kind, "first"))
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first"))


@recorded("operator.events.create_event")
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


@recorded("submit._create", "reconcile.failures.classify_create_error", "kube.errors.error_of_answer")
def unknown_field(session: Session) -> None:
    """Strict validation refuses a field that the schema does not know, at the top and far within."""
    for plural, kind in (("jobs", "job"), ("selectionruns", "run")):
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first", {"colour": "red"}))
    deep = session.body("job", "first")
    deep["spec"]["template"]["spec"]["containers"][0]["colour"] = "red"
    session.ask("POST", session.at("jobs", query=STRICT), deep)


@recorded("submit._create", "reconcile.failures.classify_create_error")
def broken_schema(session: Session) -> None:
    """What a custom resource's schema refuses, with its causes."""
    wrong: list[tuple[str, Any]] = [("model", 3), ("model", "UPPER"), ("model", "a" * 101), ("model", "")]
    wrong += [("keep", "best"), ("damping", 0), ("nodes", 0), ("nodes", 9), ("suspend", "yes"), ("uris", [])]
    wrong += [("uris", ["s3://a"] * 4), ("uris", "s3://a"), ("overlay", 3)]
    for field, value in wrong:
        session.ask("POST", session.at("selectionruns", query=STRICT), session.body("run", "first", {field: value}))
    missing = session.body("run", "first")
    del missing["spec"]["model"]
    session.ask("POST", session.at("selectionruns", query=STRICT), missing)
    none = session.body("run", "first")
    del none["spec"]
    session.ask("POST", session.at("selectionruns", query=STRICT), none)
    named = session.body("run", "First_Run")
    session.ask("POST", session.at("selectionruns", query=STRICT), named)


@recorded("submit._create", "submit.run_again", "reconcile.failures.classify_create_error")
def broken_rule(session: Session) -> None:
    """What the CEL rules of a custom resource refuse: at creation, and as changes."""
    for spec in ({"uris": ["/tmp"]}, {"nodes": 8, "gpus": 8}, {"retry": 100}):
        session.ask("POST", session.at("selectionruns", query=STRICT), session.body("run", "first", spec))
    session.ask("POST", session.at("selectionruns", query=STRICT), session.body("run", "n" * 41))
    session.do("POST", session.at("selectionruns"), session.body("run", "first"))
    for spec in ({"model": "large"}, {"overlay": {"any": {"thing": "1"}}}, {"overlay": None}, {"retry": 1}):
        session.ask("PATCH", session.at("selectionruns", "first", query="fieldManager=prism"), {"spec": spec}, MERGE)


@recorded("reconcile.failures.classify_create_error", "operator.executor.Executor._create_job")
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


@recorded("reconcile.failures.classify_create_error", "operator.executor.Executor._create_job")
def wrong_type(session: Session) -> None:
    """A built-in kind with a field of another type: 400, and no causes."""
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first", {"completions": "two"}))
    session.ask("POST", session.at("configmaps", query=STRICT), {"metadata": {"name": "first"}, "data": {"a": 1}})
    micro = session.body("lease", "first", {"renewTime": "2026-01-01T00:00:00Z"})
    session.ask("POST", session.at("leases", query=STRICT), micro)


@recorded("submit._create", "operator.executor.write_status")
def too_large(session: Session) -> None:
    """A record in a ConfigMap has at most 1 MiB, a request at most 3 MiB."""
    for size in (1_100_000, 4_000_000):
        body = session.body("config_map", "first")
        body["data"] = {"status": "x" * size}
        session.ask("POST", session.at("configmaps", query=STRICT), body)


@recorded("doctor.run_checks._policies", "cli.setup_verbs.schedule")
def dry_run(session: Session) -> None:
    """A dry run is judged and answered like the write, and nothing is there afterwards."""
    session.ask("POST", session.at("pods", query=f"{STRICT}&dryRun=All"), session.body("pod", "first"))
    session.ask("GET", session.at("pods", "first"))
    session.ask(
        "PATCH", session.at("cronjobs", "first", query=f"{FORCE}&dryRun=All"), session.body("cron_job", "first"), APPLY
    )
    session.ask("GET", session.at("cronjobs", "first"))
