"""The state of Jobs, and of their pods: evicted, ended, lost, or not running and why. Pure. Does not decide what follows."""

import datetime
from collections.abc import Sequence

from launcher.reconcile.failure_policy import Cause
from launcher.resource.names import WORKER_CONTAINER
from launcher.resource.object import Object
from launcher.resource.status import parse_time, time_text
from prism_job.spec.cluster import ClusterSpec


def is_owned_by(found: Object, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in found["metadata"].get("ownerReferences") or ())


def true_conditions(found: Object) -> dict[str, Object]:
    """Conditions that hold, by type."""
    return {one["type"]: one for one in found.get("status", {}).get("conditions") or () if one["status"] == "True"}


def is_finished(job: Object) -> bool:
    """Whether it has completed or failed: all its pods have ended."""
    return not true_conditions(job).keys().isdisjoint(("Complete", "Failed"))


def is_suspended(job: Object) -> bool:
    """Whether its controller reports it as suspended, which lags a moment behind `spec.suspend`."""
    return "Suspended" in true_conditions(job)


def is_being_deleted(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]


def have_all_ended(pods: Sequence[Object]) -> bool:
    """Whether every pod is seen to have ended. Pods and Jobs are watched apart: the end of a Job may be seen first."""
    return all(pod.get("status", {}).get("phase") in ("Succeeded", "Failed") for pod in pods)


def is_any_evicted(pods: Sequence[Object]) -> bool:
    """Whether any pod has DisruptionTarget: an eviction, a preemption, a node that is gone."""
    return any("DisruptionTarget" in true_conditions(pod) for pod in pods)


def terminated_worker(pod: Object) -> Object | None:
    """How the worker container ended: exitCode, reason, message. None while it runs."""
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == WORKER_CONTAINER:
            found = container.get("state", {}).get("terminated")
            return dict(found) if found else None
    return None


def running_times(pod: Object) -> tuple[datetime.datetime, datetime.datetime | None] | None:
    """When the worker container started and ended, None while it runs; None where it has not started."""
    for container in pod.get("status", {}).get("containerStatuses") or ():
        state = container.get("state") or {}
        times = state.get("terminated") or state.get("running") or {}
        if container["name"] == WORKER_CONTAINER and times.get("startedAt"):
            ended = times.get("finishedAt")
            return parse_time(times["startedAt"]), parse_time(ended) if ended else None
    return None


def running_since(job: Object, pods: Sequence[Object], found: str | None) -> str | None:
    """When the first container of the attempt started, as `found` by an earlier pass or now.

    None while the Job is suspended: its pods are taken away, and it may have others later.
    """
    if job["spec"].get("suspend"):
        return None
    times = [running_times(pod) for pod in pods if not is_being_deleted(pod)]
    return found or min((time_text(start) for start, _ in filter(None, times)), default=None)


def stopped_at(job: Object) -> datetime.datetime | None:
    """When the Job completed, failed or was suspended; None while it may run."""
    conditions = true_conditions(job)
    suspended = conditions.get("Suspended") if job["spec"].get("suspend") else None
    found = conditions.get("Complete") or conditions.get("Failed") or suspended
    return parse_time(found["lastTransitionTime"]) if found else None


def why_not_running(job: Object, pods: Sequence[Object], pod_warning: str, cluster: ClusterSpec) -> tuple[Cause, str]:
    """(QUEUED or NOT_RUNNING, the reason for people) of a Job without a running pod.

    Args:
        pod_warning: why its pods could not be created, from its events; empty if unknown.
    """
    if job["spec"].get("suspend"):
        queue = f"waits for Kueue's queue {cluster.queue_name}" if cluster.queue_name else None
        return Cause.QUEUED, queue or "its Job is suspended: set the Job's spec.suspend to false"
    for pod in pods:
        status = pod.get("status", {})
        for one in status.get("conditions") or ():
            if one["type"] == "PodScheduled" and one["status"] == "False":
                return Cause.NOT_RUNNING, f"{one.get('reason', 'not scheduled')}: {one.get('message', '')}"
        for container in status.get("containerStatuses") or ():
            waiting = container.get("state", {}).get("waiting")
            if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return Cause.NOT_RUNNING, f"{waiting['reason']}: {waiting.get('message', '')}"
    if pods:
        return Cause.NOT_RUNNING, pod_warning or "its container is being created"
    return Cause.NOT_RUNNING, pod_warning or "its pods are being created"


def lost_pod_message(pods: Sequence[Object]) -> str:
    """Which running pod is being removed or is not ready, and since when. Empty where all are well.

    The node controller gives no reason for the pods of a node that stops reporting.
    """
    for pod in pods:
        name, metadata, status = pod["metadata"]["name"], pod["metadata"], pod.get("status", {})
        if status.get("phase") in ("Succeeded", "Failed") or terminated_worker(pod) is not None:
            continue
        node = f" on node {pod['spec']['nodeName']}" if pod.get("spec", {}).get("nodeName") else ""
        if "deletionTimestamp" in metadata:
            asked = parse_time(metadata["deletionTimestamp"])
            asked -= datetime.timedelta(seconds=int(metadata.get("deletionGracePeriodSeconds") or 0))
            return f"Terminating since {time_text(asked)}: pod {name}{node}"
        for one in status.get("conditions") or ():
            if one["type"] == "Ready" and one["status"] != "True":
                since = one.get("lastTransitionTime", "an unknown time")
                why = ": ".join(filter(None, (one.get("reason"), one.get("message"))))
                return f"NotReady since {since}: pod {name}{node}; {why or 'its node does not report'}"
    return ""
