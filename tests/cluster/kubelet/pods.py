"""What is written on a pod: its status, its conditions, its end. Shared by the scheduler, pod GC and the kubelet.

Knows nothing of processes. `Host` is any controller with a mirror of the pods.
"""

from __future__ import annotations

import copy
import time
from typing import Protocol

from tests.cluster.kubelet.mirror import Api, Key, Mirror, Refused, Thing, key_of, stamp, uid_of

OVER = ("Succeeded", "Failed")
MESSAGES = {"EvictionByEvictionAPI": "Eviction API: evicting", "DeletionByPodGC": "PodGC: node no longer exists"}
"""Reason of a DisruptionTarget condition -> its message."""


class Host(Protocol):
    api: Api
    pods: Mirror


def pod_path(key: Key, sub: str = "") -> str:
    return f"/api/v1/namespaces/{key[0]}/pods/{key[1]}{sub}"


def patch_status(host: Host, pod: Thing, status: Thing) -> Thing:
    """Refused with 409 if the pod changed meanwhile: its conditions are one list, and others write there too."""
    if all(pod["status"].get(name) == value for name, value in status.items()):
        return pod
    version = {"resourceVersion": pod["metadata"]["resourceVersion"], "uid": uid_of(pod)}
    answer = host.api.ask("PATCH", pod_path(key_of(pod), "/status"), {"metadata": version, "status": status})
    host.pods.put(answer)
    return answer


def disrupt(host: Host, key: Key, reason: str, **status: str) -> Thing:
    """The pod with a DisruptionTarget condition; tried anew when another wrote meanwhile."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": MESSAGES[reason]}
    while True:
        pod = host.api.ask("GET", pod_path(key))
        try:
            return patch_status(host, pod, {"conditions": with_condition(pod, condition), **status})
        except Refused as refusal:
            if refusal.status != 409:
                raise


def delete_now(host: Host, pod: Thing) -> None:
    """What a kubelet does last. A finalizer may still hold the object."""
    if pod["metadata"].get("deletionGracePeriodSeconds") == 0:
        return
    options = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
    try:
        answer = host.api.ask("DELETE", pod_path(key_of(pod)), {**options, "preconditions": {"uid": uid_of(pod)}})
    except Refused as refusal:
        if refusal.status not in (404, 409):
            raise
    else:
        host.pods.put(answer)


def condition_of(pod: Thing, kind: str) -> Thing | None:
    return next((c for c in pod["status"].get("conditions") or [] if c["type"] == kind), None)


def with_condition(pod: Thing, wanted: Thing) -> list[Thing]:
    """The pod's conditions with this one set; its transition time moves only with its status."""
    held = condition_of(pod, wanted["type"])
    since = held["lastTransitionTime"] if held and held["status"] == wanted["status"] else stamp(time.time())
    others = [c for c in pod["status"].get("conditions") or [] if c["type"] != wanted["type"]]
    return [*copy.deepcopy(others), {**wanted, "lastTransitionTime": since}]


def kept_conditions(pod: Thing, *, ready: bool, reason: str = "", message: str = "") -> list[Thing]:
    """The conditions a kubelet keeps, beside those of others."""
    why = {name: text for name, text in (("reason", reason), ("message", message)) if text}
    value, shown = "True" if ready else "False", dict(pod)
    wanted: list[Thing] = [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Initialized", "status": "True"},
        {"type": "ContainersReady", "status": value, **why},
        {"type": "Ready", "status": value, **why},
    ]
    for condition in wanted:
        shown = {**pod, "status": {**pod["status"], "conditions": with_condition(shown, condition)}}
    return list(shown["status"]["conditions"])


def container_status(pod: Thing, state: Thing, num_restarts: int = 0, last: Thing | None = None) -> Thing:
    """Of the pod's one container. `last`: how it ended before its latest restart."""
    given = pod["spec"]["containers"][0]
    return {
        "name": given["name"],
        "image": given["image"],
        "imageID": "",
        "ready": "running" in state,
        "started": "running" in state,
        "restartCount": num_restarts,
        "state": state,
        **({"lastState": {"terminated": last}} if last else {}),
        "containerID": "" if "waiting" in state else f"rig://{uid_of(pod)}",
    }
