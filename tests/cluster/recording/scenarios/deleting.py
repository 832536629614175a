"""Deleting objects and namespaces."""

from __future__ import annotations

from tests.cluster.recording.session import APPLY, FORCE, KINDS, MERGE, STRICT, Session, recorded


@recorded("kube.cluster.Cluster.delete", "doctor.bucket_probe.try_buckets", "operator.executor.Executor.execute")
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


@recorded("reconcile.failures.classify_create_error", "operator.executor.Executor._create_job", "submit._create")
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
