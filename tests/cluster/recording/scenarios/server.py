"""What the server states about itself, logs, evictions."""

from __future__ import annotations

from tests.cluster.recording.session import MERGE, Session, recorded


@recorded(
    "kube.cluster.Cluster.version", "doctor.cluster_checks._check_server", "kube.cluster.Cluster.serves_selection_runs"
)
def discovery(session: Session) -> None:
    """The server's version, and what it serves of ours."""
    session.ask("GET", "/version")
    session.ask("GET", "/readyz")
    session.ask("GET", "/apis/prism.dev")
    session.ask("GET", "/apis/prism.dev/v1alpha1")


@recorded("kube.cluster.Cluster.served_version")
def versions_of_a_group(session: Session) -> None:
    """A group of two kinds: its versions, newest first, the one that is preferred, and what each of them serves.

    The preferred version has one of the two kinds alone. A version may be deprecated, or no longer served.
    """
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}

    def define(plural: str, kind: str, **versions: dict[str, object]) -> str:
        body = session.body("definition", f"{plural}.versions.example")
        names = {"plural": plural, "singular": kind.lower(), "kind": kind}
        rows = [
            {"name": name, "served": True, "storage": False, "schema": schema, **row} for name, row in versions.items()
        ]
        body["spec"] |= {"group": "versions.example", "names": names, "versions": rows}
        session.do("POST", session.at("customresourcedefinitions"), body)
        return session.at("customresourcedefinitions", body["metadata"]["name"])

    group, deprecated = "/apis/versions.example", {"deprecated": True, "deprecationWarning": "Use v1beta2 instead."}
    paths = [
        define("queues", "Queue", v1alpha1={"served": False}, v1beta1=deprecated, v1beta2={"storage": True}),
        define("plans", "Plan", v1alpha2={"deprecated": True}, v1={"storage": True}, v10beta1={}),
    ]
    session.until(
        lambda: session.send("GET", group).status == 200 and len(session.send("GET", group).body["versions"]) == 5
    )
    everything = [f"{version}/queues" for version in ("v1beta2", "v1beta1")]
    everything += [f"{version}/plans" for version in ("v1", "v1alpha2", "v10beta1")]
    for path in everything:  # a version that is listed may not be served yet, and then its storage may be initialising
        session.until(lambda path=path: session.send("GET", f"{group}/{path}").status == 200)
    session.ask("GET", group)
    for version in ("v1", "v1beta2", "v1beta1", "v1alpha1"):
        session.ask("GET", f"{group}/{version}")
        session.ask("GET", f"{group}/{version}/namespaces/{session.namespace}/queues")
    session.ask("GET", f"{group}/v1beta1/namespaces/{session.namespace}/queues/none")
    session.ask("GET", f"{group}/v1alpha2/namespaces/{session.namespace}/plans")
    for path in paths:
        session.do("DELETE", path)
    session.until(lambda: session.send("GET", group).status == 404)


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


@recorded("follow.logs.pod_log.PodLog.lines", "kube.cluster.Cluster.log_lines", "doctor.bucket_probe._log_lines")
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


@recorded("reconcile.child_status.is_any_evicted")
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
