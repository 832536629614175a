"""What is not there: groups, versions, resources, objects and namespaces that the server does not have."""

from __future__ import annotations

from tests.cluster.recording.session import APPLY, FORCE, MERGE, STRICT, Session, recorded


@recorded("kube.cluster.Cluster.served_version", "submit.list_records", "kube.cluster.Cluster.serves_selection_runs")
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
    "doctor.cluster_checks._check_namespace",
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


@recorded("submit._create", "operator.executor.Executor._create", "kube.cluster.Cluster.get")
def missing_namespace(session: Session) -> None:
    """A namespace that is not there: making something says so, reading says the object is missing, a list is empty."""
    session.namespace = "nowhere"
    for plural, kind in (("jobs", "job"), ("selectionruns", "run"), ("configmaps", "config_map")):
        session.ask("POST", session.at(plural, query=STRICT), session.body(kind, "first"))
        session.ask("GET", session.at(plural, "first"))
        session.ask("GET", session.at(plural, query="limit=500"))
    session.ask("PATCH", session.at("services", "first", query=FORCE), session.body("service", "first"), APPLY)
