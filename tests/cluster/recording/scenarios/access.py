"""What authentication, authorization and admission refuse."""

from __future__ import annotations

from typing import Any

from tests.cluster.recording.session import APPLY, FORCE, MERGE, STRICT, Session, recorded


@recorded("kube.credentials.Credentials.renew", "kube.errors.error_of_answer", "operator.executor.Executor._create_job")
def wrong_token(session: Session) -> None:
    """A token that the server does not know."""
    session.ask("GET", session.at("selectionruns", "first"), who="stranger")
    session.ask("GET", session.at("pods", query="watch=true&timeoutSeconds=1"), who="stranger")
    session.ask("POST", session.at("jobs", query=STRICT), session.body("job", "first"), who="stranger")
    session.ask("GET", "/apis/prism.dev/v1alpha1", who="stranger")
    session.ask("GET", "/version", who="stranger")


@recorded(
    "doctor.cluster_checks._leases",
    "doctor.findings.run_check",
    "operator.executor.Executor._create_job",
    "follow.logs.pod_log.PodLog.lines",
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


@recorded("kube.cluster.Cluster.may", "doctor.rights.missing_rights")
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


@recorded("reconcile.failures.classify_create_error", "doctor.run_checks._policies")
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


@recorded("reconcile.failures.classify_create_error", "doctor.run_checks._policies", "doctor.bucket_probe.try_buckets")
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
    "kube.transport.Transport._note_warnings", "doctor.run_checks._policies", "reconcile.failures.classify_create_error"
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
