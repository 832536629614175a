"""Whether the cluster's nodes have room for a run's pods. Looks at the nodes as if they were empty; ignores taints."""

import math
import re
from collections.abc import Iterator

from launcher.doctor.findings import Finding, ok, warning
from launcher.kube.cluster import Cluster
from launcher.reconcile.child_status import true_conditions
from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from launcher.resource.object import Object
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun

DECIMAL = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
UNITS = DECIMAL | BINARY
AUTOSCALING = "none if an autoscaler adds such nodes; else request less, or the pods wait until startupTimeoutSeconds"


def check_nodes(cluster: Cluster, namespace: str, run: SelectionRun, spec: ClusterSpec) -> Iterator[Finding]:
    """Can the extract stage's pods be scheduled, all of them at once?"""
    pod = job_of(Attempt(run, "extract", namespace=namespace))["spec"]["template"]["spec"]
    requests = requests_of(pod)
    nodes = [node for node in cluster.list("Node", None).items if _is_ready(node) and _is_selected(node, pod)]
    allocatable = [node.get("status", {}).get("allocatable") or {} for node in nodes]
    capacities = [{name: quantity(str(value)) for name, value in amounts.items()} for amounts in allocatable]
    is_too_large = False
    for name, amount in requests.items():
        most = max((capacity.get(name, 0.0) for capacity in capacities), default=0.0)
        if most < amount:
            is_too_large = True
            what = f"a pod requests {_amount(name, amount)}; the largest of {len(nodes)} ready nodes has"
            yield warning("nodes", f"{what} {_amount(name, most)}", AUTOSCALING)
    num_pods = spec.groups * spec.nodes_per_group
    num_fitting = sum(
        min((math.floor(capacity.get(name, 0.0) / amount) for name, amount in requests.items()), default=num_pods)
        for capacity in capacities
    )
    requested = ", ".join(_amount(name, amount) for name, amount in requests.items())
    if is_too_large:
        return
    if num_fitting < spec.nodes_per_group:
        what = f"{num_fitting} pods of {requested} fit at once; a group needs {spec.nodes_per_group} at once"
        yield warning("nodes", what, AUTOSCALING)
    elif num_fitting < num_pods:
        what = f"{num_fitting} of {num_pods} pods ({spec.groups} groups × {spec.nodes_per_group}) of {requested} fit at once"
        yield warning("nodes", what, f"none: the groups that run also do the work of those that wait; {AUTOSCALING}")
    else:
        what = f"room for {num_pods} pods of {requested} on {len(nodes)} ready nodes, if nothing else runs there"
        yield ok("nodes", what)


def requests_of(pod: Object) -> dict[str, float]:
    """Resource -> amount, summed over the containers of a pod."""
    total: dict[str, float] = {}
    for container in pod["containers"]:
        requests, limits = ((container.get("resources") or {}).get(name) or {} for name in ("requests", "limits"))
        # A limit without a request also sets the request.
        for name, amount in {**requests, **{name: limits[name] for name in limits.keys() - requests.keys()}}.items():
            if quantity(str(amount)):
                total[name] = total.get(name, 0.0) + quantity(str(amount))
    return total


def quantity(text: str) -> float:
    """'500m' is 0.5, '16Gi' is 2^34; 0 for anything else than a quantity."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([A-Za-z]*)", text.strip())
    try:
        return float(match[1]) * UNITS.get(match[2], 0.0) if match else 0.0
    except ValueError:
        return 0.0


def _amount(name: str, value: float) -> str:
    if name in ("memory", "ephemeral-storage"):
        return f"{value / 2**30:,.3g} GiB {name}"
    return f"{value:,.4g} {name}"


def _is_ready(node: Object) -> bool:
    return "Ready" in true_conditions(node) and not node.get("spec", {}).get("unschedulable")


def _is_selected(node: Object, pod: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    return all(labels.get(name) == value for name, value in (pod.get("nodeSelector") or {}).items())
