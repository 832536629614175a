"""What one run needs of a cluster: its queue, nodes, policies, image, and the things that it names. Not: its buckets.

Asked of the objects that would be made, podOverlay included. Nothing is made: policies are asked by a dry run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from launcher.doctor.findings import Finding, error, looked, ok, warning
from launcher.kube.cluster import Cluster
from launcher.kube.errors import NotFound, Refused
from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun

Object = dict[str, Any]

DECIMAL = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
UNITS = DECIMAL | BINARY
AUTOSCALING = (
    "none where an autoscaler adds such nodes; else ask for less, or the pods wait until startupTimeoutSeconds"
)


def examine_run(cluster: Cluster, namespace: str, run: SelectionRun) -> Iterator[Finding]:
    """Every check of one run; what may not be looked at is a warning that says so."""
    spec = run.spec.cluster
    assert spec is not None, "parse_for_cluster refuses a run without"
    yield from looked("image", lambda: _image(spec))
    yield from looked("queue", lambda: _queue(cluster, namespace, spec))
    yield from looked("nodes", lambda: _nodes(cluster, namespace, run, spec))
    yield from looked("service account", lambda: _service_account(cluster, namespace, spec))
    yield from looked("weights claim", lambda: _weights_claim(cluster, namespace, spec))
    yield from looked("secrets", lambda: _secrets(spec))
    for stage in ("plan", "extract"):
        yield from looked("policies", lambda stage=stage: _policies(cluster, namespace, run, stage))  # type: ignore[misc]


def _image(spec: ClusterSpec) -> Iterator[Finding]:
    if "@sha256:" in spec.image:
        yield ok("image", f"pinned by digest: {spec.image}")
    else:
        fix = "name it by digest (registry/prism@sha256:…): every pod of every attempt then runs the same"
        yield warning("image", f"{spec.image} is a tag, which may change while a run goes on", fix)


def _queue(cluster: Cluster, namespace: str, spec: ClusterSpec) -> Iterator[Finding]:
    if spec.queue_name is None:
        return
    try:
        queues = {one["metadata"]["name"]: one for one in cluster.list("LocalQueue", namespace).items}
    except NotFound:
        what = f"queueName {spec.queue_name} is given, and there is no Kueue in this cluster"
        yield error("queue", what, "install Kueue, or leave out spec.cluster.queueName")
        return
    if spec.queue_name not in queues:
        here = ", ".join(sorted(queues)) or "none"
        yield error("queue", f"no LocalQueue {spec.queue_name} in {namespace}", f"there: {here}")
        return
    conditions = queues[spec.queue_name].get("status", {}).get("conditions") or ()
    inactive = [one for one in conditions if one["type"] == "Active" and one["status"] == "False"]
    if inactive:
        what = f"{spec.queue_name} is not active: {inactive[0].get('message', '')}"
        yield warning("queue", what, "ask who runs Kueue here")
    else:
        yield ok("queue", f"LocalQueue {spec.queue_name}")


def _nodes(cluster: Cluster, namespace: str, run: SelectionRun, spec: ClusterSpec) -> Iterator[Finding]:
    """The extract stage's pods on the nodes as they are, empty. What runs there, and taints, are not looked at."""
    pod = job_of(Attempt(run, "extract", namespace=namespace))["spec"]["template"]["spec"]
    wanted = requests_of(pod)
    nodes = [one for one in cluster.list("Node", None).items if _is_ready(one) and _is_chosen(one, pod)]
    room = [{name: quantity(str(value)) for name, value in _allocatable(one).items()} for one in nodes]
    short = False
    for name, amount in wanted.items():
        most = max((one.get(name, 0.0) for one in room), default=0.0)
        if most < amount:
            short = True
            what = f"a pod asks for {_amount(name, amount)}; the most that any of {len(nodes)} ready nodes has is"
            yield warning("nodes", f"{what} {_amount(name, most)}", AUTOSCALING)
    num_pods = spec.groups * spec.nodes_per_group
    fitting = sum(
        min((math.floor(one.get(name, 0.0) / amount) for name, amount in wanted.items()), default=num_pods)
        for one in room
    )
    asked = ", ".join(_amount(name, amount) for name, amount in wanted.items())
    if short:
        return
    if fitting < spec.nodes_per_group:
        what = f"{fitting} pods of {asked} fit at once; a group needs {spec.nodes_per_group} of them together"
        yield warning("nodes", what, AUTOSCALING)
    elif fitting < num_pods:
        what = f"{fitting} of {num_pods} pods ({spec.groups} groups × {spec.nodes_per_group}) of {asked} fit at once"
        yield warning("nodes", what, f"none: the first groups do the work of those that wait; {AUTOSCALING}")
    else:
        yield ok("nodes", f"room for {num_pods} pods of {asked} on {len(nodes)} ready nodes, were they empty")


def _service_account(cluster: Cluster, namespace: str, spec: ClusterSpec) -> Iterator[Finding]:
    name = spec.service_account
    if name is None:
        return
    if cluster.find("ServiceAccount", namespace, name) is None:
        fix = f"make it: kubectl -n {namespace} create serviceaccount {name}; bind a role of your cloud to it"
        yield error("service account", f"no {name} in {namespace}", fix)
    else:
        yield ok("service account", name)


def _weights_claim(cluster: Cluster, namespace: str, spec: ClusterSpec) -> Iterator[Finding]:
    name = spec.weights_claim
    if name is None:
        return
    claim = cluster.find("PersistentVolumeClaim", namespace, name)
    if claim is None:
        yield error("weights claim", f"no PersistentVolumeClaim {name} in {namespace}", "make it, or leave it out")
        return
    modes = claim.get("spec", {}).get("accessModes") or []
    phase = claim.get("status", {}).get("phase", "unknown")
    if spec.groups * spec.nodes_per_group > 1 and not {"ReadWriteMany"} & set(modes):
        what = f"{name} is {', '.join(modes) or 'of no access mode'}: pods on several nodes cannot write it"
        yield warning("weights claim", what, "take a claim that is ReadWriteMany")
    elif phase == "Lost":
        yield error("weights claim", f"{name} has lost its volume", "make it anew")
    else:
        yield ok("weights claim", f"{name}, {phase}")


def _secrets(spec: ClusterSpec) -> Iterator[Finding]:
    named = [one.value_from.secret_key_ref for one in spec.env if one.value_from is not None]
    if named:
        names = ", ".join(f"{one.name} (key {one.key})" for one in named)
        yield ok("secrets", f"not read, by design: {names}; a pod that misses one waits, and `prism status` says so")


def _policies(cluster: Cluster, namespace: str, run: SelectionRun, stage: Any) -> Iterator[Finding]:
    """Would a pod of this stage be let in: Pod Security, quotas, admission webhooks."""
    job = job_of(Attempt(run, stage, namespace=namespace))
    template = job["spec"]["template"]
    # Without the right to make pods, which a driver does not need, the Job is asked about, which is answered by warnings.
    as_pod = cluster.may("create", "", "pods", namespace)
    if not as_pod and not cluster.may("create", "batch", "jobs", namespace):
        fix = "none needed with an operator, which makes them; else have somebody look who may make Jobs here"
        yield warning("policies", f"{stage}: not checked: you may make neither pods nor Jobs in {namespace}", fix)
        return
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": f"{job['metadata']['name']}-doctor", "namespace": namespace},
        "spec": template["spec"],
    }
    before = list(cluster.warnings)
    cluster.warnings.clear()
    try:
        cluster.create(pod if as_pod else job, dry_run=True)
    except Refused as refused:
        yield error("policies", f"a pod of {stage} is refused: {refused.what}", "change it by spec.cluster.podOverlay")
        return
    finally:
        said = list(cluster.warnings)
        cluster.warnings[:] = before
    for one in said:
        yield warning("policies", f"{stage}: {one}", "change it by spec.cluster.podOverlay; such pods may be refused")
    if not said:
        how = "" if as_pod else ", as far as its Job tells (you may not make pods)"
        yield ok("policies", f"a pod of {stage} is let in{how}; {_pod_security(cluster, namespace)}")


def _pod_security(cluster: Cluster, namespace: str) -> str:
    try:
        found = cluster.find("Namespace", "", namespace) or {"metadata": {}}
    except Refused:
        return "the namespace's own labels may not be read"
    level = (found["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")
    return f"the namespace enforces Pod Security {level}" if level else "the namespace names no Pod Security level"


def requests_of(pod: Object) -> dict[str, float]:
    """Resource -> amount, of all containers of a pod together."""
    wanted: dict[str, float] = {}
    for container in pod["containers"]:
        requests, limits = ((container.get("resources") or {}).get(name) or {} for name in ("requests", "limits"))
        # A limit without a request is a request too.
        for name, amount in {**requests, **{name: limits[name] for name in limits.keys() - requests.keys()}}.items():
            if quantity(str(amount)):
                wanted[name] = wanted.get(name, 0.0) + quantity(str(amount))
    return wanted


def quantity(text: str) -> float:
    """'500m' is 0.5, '16Gi' is 2^34. What is no quantity counts as nothing."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([A-Za-z]*)", text.strip())
    try:
        return float(match[1]) * UNITS.get(match[2], 0.0) if match else 0.0
    except ValueError:
        return 0.0


def _amount(name: str, value: float) -> str:
    if name in ("memory", "ephemeral-storage"):
        return f"{value / 2**30:,.3g} GiB {name}"
    return f"{value:,.4g} {name}"


def _allocatable(node: Object) -> Object:
    return dict(node.get("status", {}).get("allocatable") or {})


def _is_ready(node: Object) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    is_ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return is_ready and not node.get("spec", {}).get("unschedulable")


def _is_chosen(node: Object, pod: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    return all(labels.get(name) == value for name, value in (pod.get("nodeSelector") or {}).items())
