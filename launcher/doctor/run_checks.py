"""What one run needs of a cluster: image, queue, nodes, policies, and the objects that it names. Does not test buckets.

Checks the objects that the run would create, podOverlay included. Creates nothing: policies are tested by a dry run.
"""

from collections.abc import Iterator
from typing import Any

from launcher.doctor.findings import Finding, error, ok, run_check, warning
from launcher.doctor.node_capacity import check_nodes
from launcher.kube.cluster import Cluster
from launcher.kube.errors import NotFound, Refused, UnknownVersion
from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun


def examine_run(cluster: Cluster, namespace: str, run: SelectionRun) -> Iterator[Finding]:
    """Every check of one run; a check that is not allowed becomes a warning."""
    spec = run.spec.cluster
    assert spec is not None, "parse_for_cluster requires it"
    yield from run_check("image", lambda: _image(spec))
    yield from run_check("queue", lambda: _queue(cluster, namespace, spec))
    yield from run_check("nodes", lambda: check_nodes(cluster, namespace, run, spec))
    yield from run_check("service account", lambda: _service_account(cluster, namespace, spec))
    yield from run_check("weights claim", lambda: _weights_claim(cluster, namespace, spec))
    yield from run_check("secrets", lambda: _secrets(spec))
    for stage in ("plan", "extract"):
        yield from run_check("policies", lambda stage=stage: _policies(cluster, namespace, run, stage))  # type: ignore[misc]


def _image(spec: ClusterSpec) -> Iterator[Finding]:
    if "@sha256:" in spec.image:
        yield ok("image", f"pinned by digest: {spec.image}")
    else:
        fix = "use a digest (registry/prism@sha256:…), so that all pods of all attempts run the same image"
        yield warning("image", f"{spec.image} is a tag, which may change during a run", fix)


def _queue(cluster: Cluster, namespace: str, spec: ClusterSpec) -> Iterator[Finding]:
    if spec.queue_name is None:
        return
    try:
        queues = {queue["metadata"]["name"]: queue for queue in cluster.list("LocalQueue", namespace).items}
    except NotFound:
        what = f"queueName {spec.queue_name} is set, but Kueue is not installed"
        yield error("queue", what, "install Kueue, or remove spec.cluster.queueName")
        return
    except UnknownVersion as unknown:
        fix = "upgrade PRISM to have queues checked; runs are not affected: their Jobs only carry Kueue's label"
        yield warning("queue", f"{spec.queue_name} is not checked: {unknown.what}", fix)
        return
    if spec.queue_name not in queues:
        names = ", ".join(sorted(queues)) or "none"
        yield error("queue", f"no LocalQueue {spec.queue_name} in {namespace}", f"use one of: {names}")
        return
    conditions = queues[spec.queue_name].get("status", {}).get("conditions") or ()
    inactive = [it for it in conditions if it["type"] == "Active" and it["status"] == "False"]
    if inactive:
        what = f"{spec.queue_name} is not active: {inactive[0].get('message', '')}"
        yield warning("queue", what, "ask the cluster's Kueue administrator")
    else:
        yield ok("queue", f"LocalQueue {spec.queue_name}")


def _service_account(cluster: Cluster, namespace: str, spec: ClusterSpec) -> Iterator[Finding]:
    name = spec.service_account
    if name is None:
        return
    if cluster.find("ServiceAccount", namespace, name) is None:
        fix = f"create it: kubectl -n {namespace} create serviceaccount {name}; bind a role of your cloud to it"
        yield error("service account", f"no ServiceAccount {name} in {namespace}", fix)
    else:
        yield ok("service account", name)


def _weights_claim(cluster: Cluster, namespace: str, spec: ClusterSpec) -> Iterator[Finding]:
    name = spec.weights_claim
    if name is None:
        return
    claim = cluster.find("PersistentVolumeClaim", namespace, name)
    if claim is None:
        fix = "create it, or remove spec.cluster.weightsClaim"
        yield error("weights claim", f"no PersistentVolumeClaim {name} in {namespace}", fix)
        return
    modes = claim.get("spec", {}).get("accessModes") or []
    phase = claim.get("status", {}).get("phase", "unknown")
    if spec.groups * spec.nodes_per_group > 1 and not {"ReadWriteMany"} & set(modes):
        what = f"{name} is {', '.join(modes) or 'without an access mode'}: pods on several nodes cannot write to it"
        yield warning("weights claim", what, "use a claim with ReadWriteMany")
    elif phase == "Lost":
        yield error("weights claim", f"{name} has lost its volume", "create it again")
    else:
        yield ok("weights claim", f"{name}, {phase}")


def _secrets(spec: ClusterSpec) -> Iterator[Finding]:
    named = [env.value_from.secret_key_ref for env in spec.env if env.value_from is not None]
    if named:
        names = ", ".join(f"{secret.name} (key {secret.key})" for secret in named)
        what = f"not read, by design: {names}; a pod without its secret waits, and `prism status` reports it"
        yield ok("secrets", what)


def _policies(cluster: Cluster, namespace: str, run: SelectionRun, stage: Any) -> Iterator[Finding]:
    """Would a pod of this stage be admitted: Pod Security, quotas, admission webhooks."""
    job = job_of(Attempt(run, stage, namespace=namespace))
    template = job["spec"]["template"]
    # A driver has no right to create pods: the dry run then creates the Job, which is answered with warnings only.
    as_pod = cluster.may("create", "", "pods", namespace)
    if not as_pod and not cluster.may("create", "batch", "jobs", namespace):
        fix = "none needed with an operator, which creates them; else ask someone who may create Jobs here"
        yield warning("policies", f"{stage}: not checked: you may create neither pods nor Jobs in {namespace}", fix)
        return
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": f"{job['metadata']['name']}-doctor", "namespace": namespace},
        "spec": template["spec"],
    }
    fix = "change the pod with spec.cluster.podOverlay"
    before = list(cluster.warnings)
    cluster.warnings.clear()
    try:
        cluster.create(pod if as_pod else job, dry_run=True)
    except Refused as refused:
        yield error("policies", f"a pod of {stage} is refused: {refused.what}", fix)
        return
    finally:
        warnings = list(cluster.warnings)
        cluster.warnings[:] = before
    for line in warnings:
        yield warning("policies", f"{stage}: {line}", f"{fix}; such pods may be refused")
    if not warnings:
        limit = "" if as_pod else ", judged by its Job only (you may not create pods)"
        yield ok("policies", f"a pod of {stage} is admitted{limit}; {_pod_security(cluster, namespace)}")


def _pod_security(cluster: Cluster, namespace: str) -> str:
    try:
        it = cluster.find("Namespace", "", namespace) or {"metadata": {}}
    except Refused:
        return "the namespace's labels may not be read"
    level = (it["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")
    return f"the namespace enforces Pod Security {level}" if level else "the namespace sets no Pod Security level"
