"""The fake nodes as the API server sees them: Node objects and Leases, the scheduler, and the pod garbage collector.

Knows nothing of processes: kubelet.py runs what is bound here, or by a real scheduler.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from kubernetes.utils import parse_quantity

from tests.cluster.kubelet.mirror import Controller, Key, Refused, Thing, Unreachable, key_of, stamp, uid_of
from tests.cluster.kubelet.pods import OVER, condition_of, delete_now, disrupt, patch_status, pod_path, with_condition

HEARTBEAT_SECONDS = 20.0
RENEW_SECONDS = 2.0
"""Between renewals of a node's Lease; a real kubelet's are 10 apart."""
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


class Nodes(Controller):
    """The Node objects; and the scheduler and the pod garbage collector, where no real ones are at work.

    Args:
        with_controllers: play those two, and say of a node itself that nothing is heard from it. Otherwise nodes have
            Leases, for a real controller to see.

    `log_port`: where the kubelet shows containers' logs; 0: nowhere. To be set before `register`.
    """

    ALL = ("", "")

    def __init__(
        self, kubeconfig: Path, nodes: Mapping[str, Mapping[str, str]], with_controllers: bool, pod_gc_seconds: float
    ) -> None:
        super().__init__(kubeconfig, "default-scheduler")
        self.capacities, self.away = {name: dict(capacity) for name, capacity in nodes.items()}, set[str]()
        self.with_controllers, self._pod_gc_seconds, self.log_port = with_controllers, pod_gc_seconds, 0
        self.pods = self.mirror("/api/v1/pods", lambda _: self.queue.add(self.ALL, 0.02))
        self.nodes = self.mirror("/api/v1/nodes", lambda _: self.queue.add(self.ALL, 0.02))
        self._assumed: dict[str, str] = {}  # pod uid: node, until the mirror shows it
        self._homeless: dict[str, float] = {}  # pod uid: when its node was first missed
        self._beat = time.monotonic()

    def register(self) -> None:
        for name in self.capacities:
            labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
            try:
                self.api.ask("POST", "/api/v1/nodes", node)
            except Refused as refusal:
                if refusal.reason != "AlreadyExists":
                    raise
            self.report(name)

    def report(self, name: str) -> None:
        """The Node's status: what it holds, and whether anything is heard from it."""
        now, known = stamp(time.time()), name not in self.away
        capacity = {"pods": "110", "ephemeral-storage": "1Ti", **self.capacities[name]}
        ready = {
            "type": "Ready",
            "status": "True" if known else "Unknown",
            "reason": "KubeletReady" if known else "NodeStatusUnknown",
            "message": "kubelet is posting ready status" if known else "Kubelet stopped posting node status.",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        status: Thing = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        status["addresses"] = [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}]
        if self.log_port:
            status["daemonEndpoints"] = {"kubeletEndpoint": {"Port": self.log_port}}
        self.api.ask("PATCH", f"/api/v1/nodes/{name}/status", {"status": status})

    def start(self) -> None:
        super().start()
        if not self.with_controllers:
            threading.Thread(target=self._renew_leases, name="node leases", daemon=True).start()

    def _renew_leases(self) -> None:
        while not self.api.stopping.is_set():
            for name in sorted(self.capacities.keys() - self.away):
                with contextlib.suppress(Refused, Unreachable):
                    self._renew_lease(name)
            self.api.stopping.wait(RENEW_SECONDS)

    def _renew_lease(self, name: str) -> None:
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40}
        spec["renewTime"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        try:
            self.api.ask("PATCH", f"{LEASES}/{name}", {"spec": spec})
        except Refused as refusal:
            if refusal.status != 404:
                raise
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
            self.api.ask("POST", LEASES, {**lease, "spec": spec})

    def sync(self, key: Key) -> None:
        pods = self.pods.all()
        existing = {node["metadata"]["name"] for node in self.nodes.all()}
        for pod in pods:
            if pod["spec"].get("nodeName"):
                self._assumed.pop(uid_of(pod), None)
        if self.with_controllers:
            self._collect(pods, existing)
            waiting = [pod for pod in pods if _wants_a_node(pod) and uid_of(pod) not in self._assumed]
            if waiting:
                self._bind(waiting, pods)
        if time.monotonic() - self._beat > HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            for name in self.capacities.keys() - self.away:
                if name in existing:
                    self.report(name)
        self.queue.add(key, HEARTBEAT_SECONDS + 0.1)

    def _bind(self, waiting: list[Thing], pods: list[Thing]) -> None:
        nodes = sorted(self.nodes.all(), key=key_of)
        used: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for pod in pods:
            place = pod["spec"].get("nodeName") or self._assumed.get(uid_of(pod))
            if place and pod["status"].get("phase") not in OVER:
                used[place].update(_requests(pod))
        for pod in sorted(waiting, key=lambda pod: (pod["metadata"]["creationTimestamp"], key_of(pod))):
            against = {node["metadata"]["name"]: why_not(pod, node, used[node["metadata"]["name"]]) for node in nodes}
            place = next((name for name, reasons in against.items() if not reasons), None)
            if place is None:
                self._unschedulable(pod, unschedulable_message(list(against.values())))
                continue
            used[place].update(_requests(pod))
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}}
            target = {"apiVersion": "v1", "kind": "Node", "name": place}
            try:
                self.api.ask("POST", pod_path(key_of(pod), "/binding"), {**binding, "target": target})
            except Refused as refusal:
                if refusal.status not in (404, 409):  # gone, or bound by another
                    raise
            else:
                self._assumed[uid_of(pod)] = place

    def _unschedulable(self, pod: Thing, message: str) -> None:
        wanted = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        held = condition_of(pod, "PodScheduled")
        if held and all(held.get(name) == value for name, value in wanted.items()):
            return
        conditions = with_condition(pod, wanted)
        patch_status(self, pod, {"conditions": conditions})
        self.tell(pod, "Pod", "FailedScheduling", message, warning=True)

    def _collect(self, pods: list[Thing], existing: set[str]) -> None:
        """Pod GC: unscheduled pods that are being deleted, and after a while the pods of Nodes that are gone."""
        present = {uid_of(pod) for pod in pods}
        self._homeless = {uid: since for uid, since in self._homeless.items() if uid in present}
        for pod in pods:
            place, over = pod["spec"].get("nodeName"), pod["status"].get("phase") in OVER
            if not place and "deletionTimestamp" in pod["metadata"] and uid_of(pod) not in self._assumed:
                _fail_and_delete(self, pod, disrupted=False)
            elif (
                place
                and place not in existing
                and not (over and pod["metadata"].get("deletionGracePeriodSeconds") == 0)
            ):
                left = (
                    self._homeless.setdefault(uid_of(pod), time.monotonic()) + self._pod_gc_seconds - time.monotonic()
                )
                if left > 0:
                    self.queue.add(self.ALL, left + 0.01)
                else:
                    _fail_and_delete(self, pod, disrupted=not over)


def _fail_and_delete(host: Nodes, pod: Thing, *, disrupted: bool) -> None:
    try:
        if disrupted:
            disrupt(host, key_of(pod), "DeletionByPodGC", phase="Failed")
        elif pod["status"].get("phase") not in OVER:
            patch_status(host, pod, {"phase": "Failed"})
        delete_now(host, pod)
    except Refused as refusal:
        if refusal.status != 404:
            raise


@functools.lru_cache(maxsize=1024)
def _quantity(text: str) -> Decimal:
    return Decimal(parse_quantity(text))


def _requests(pod: Thing) -> dict[str, Any]:
    """What a pod takes of a node: requests, else limits."""
    total: collections.Counter[str] = collections.Counter({"pods": 1})
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        for name, text in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            total[name] += _quantity(str(text))  # type: ignore[assignment]
    return total


def _wants_a_node(pod: Thing) -> bool:
    settled = pod["spec"].get("nodeName") or "deletionTimestamp" in pod["metadata"]
    return not settled and pod["status"].get("phase") not in OVER


def why_not(pod: Thing, node: Thing, used: Mapping[str, Any]) -> list[str]:
    """Why a pod does not fit on a node, in the scheduler's words; nothing if it does."""
    ready = next((c["status"] for c in node["status"].get("conditions") or [] if c["type"] == "Ready"), "Unknown")
    if ready != "True":
        return ["node(s) had untolerated taint {node.kubernetes.io/unreachable: }"]
    labels = node["metadata"].get("labels") or {}
    if any(labels.get(name) != value for name, value in (pod["spec"].get("nodeSelector") or {}).items()):
        return ["node(s) didn't match Pod's node affinity/selector"]
    free = node["status"].get("allocatable") or {}
    short = [
        name
        for name, amount in _requests(pod).items()
        if amount > 0 and used.get(name, 0) + amount > _quantity(str(free.get(name, "0")))
    ]
    return [f"Insufficient {name}" for name in sorted(short)]


def unschedulable_message(reasons: list[list[str]]) -> str:
    """'0/2 nodes are available: 1 Insufficient cpu, 2 Insufficient nvidia.com/gpu.'"""
    if not reasons:
        return "no nodes available to schedule pods"
    counts = collections.Counter(reason for node in reasons for reason in node)
    told = ", ".join(sorted(f"{count} {reason}" for reason, count in counts.items()))
    return f"0/{len(reasons)} nodes are available: {told}."
