"""How an attempt stands, read from its Job and pods: ended and in which way, or not running and why. Pure. Not: what follows.

The Job's own reason does not tell an eviction from a crash: its pods are looked at as well (KUBERNETES.md, traps A to C).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.reconcile.actions import CreateError
from launcher.resource.names import WORKER_CONTAINER
from launcher.resource.status import StageState
from launcher.resource.timestamps import parse_time, time_text
from prism_job.errors import DataError, RequestError
from prism_job.spec.cluster import ClusterSpec

Object = dict[str, Any]

EXACT = 2**53
"""What a count stays below: JSON as others read it has no larger integers."""

ADDRESS = re.compile(r"(s3://|/)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,2043}")
"""Of a manifest: last words are a pod's own, and people see them in their terminals."""

DENIED = re.compile('^\\S+ "[^"]*" is forbidden: |^admission webhook "[^"]*" denied the request')
"""How an admission policy, and a webhook, begin their answers."""

MEANINGS = {
    75: "a transient error",
    137: "killed, often out of memory",
    143: "stopped by SIGTERM",
}


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended.

    Attributes:
        kind: request and data can't be mended by another attempt; preempted and crashed can.
        message: for people; begins with the exit code where there is one.
        words: the stage's last words, where it ended well.
    """

    kind: Literal["succeeded", "request", "data", "preempted", "crashed"]
    message: str
    time: datetime.datetime
    words: dict[str, Any] = field(default_factory=dict)


def is_there(job: Object) -> bool:
    """Whether nobody has deleted it."""
    return "deletionTimestamp" not in job["metadata"]


def is_finished(job: Object) -> bool:
    """Whether it has completed or failed: its pods have all ended."""
    found = job.get("status", {}).get("conditions") or ()
    return any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in found)


def is_suspended(job: Object) -> bool:
    """Whether its controller says so: it goes on saying so for a moment after the Job was let go."""
    found = job.get("status", {}).get("conditions") or ()
    return any(one["type"] == "Suspended" and one["status"] == "True" for one in found)


def ending_of(job: Object, pods: Sequence[Object], disrupted: bool) -> AttemptOutcome | None:
    """None while the Job has neither completed nor failed.

    Args:
        disrupted: a pod of it was seen being evicted, now or by an earlier pass; such a pod may be gone by now.
    """
    final = {one["type"]: one for one in job.get("status", {}).get("conditions") or () if one["status"] == "True"}
    if "Complete" in final:
        time = parse_time(final["Complete"]["lastTransitionTime"])
        return AttemptOutcome("succeeded", "", time, _words(pods))
    if "Failed" not in final:  # FailureTarget comes first, while pods still end: the next attempt waits for Failed
        return None
    failed = final["Failed"]
    time, reason = parse_time(failed["lastTransitionTime"]), failed.get("reason", "")
    said = failed.get("message", "")
    if disrupted or (reason == "PodFailurePolicy" and "DisruptionTarget" in said):
        return AttemptOutcome("preempted", f"evicted: {said}", time)
    kinds: dict[int, Literal["request", "data"]] = {RequestError.exit_code: "request", DataError.exit_code: "data"}
    codes = _exit_codes(pods)
    for code, kind in kinds.items():
        if code in codes or (reason == "PodFailurePolicy" and f"exit code {code}" in said):
            return AttemptOutcome(kind, f"exit code {code}: {codes.get(code) or said}", time)
    if codes:
        code, message = next(iter(codes.items()))
        meaning = f" ({MEANINGS[code]})" if code in MEANINGS else ""
        return AttemptOutcome("crashed", f"exit code {code}{meaning}: {message or said}", time)
    return AttemptOutcome("crashed", f"{reason}: {said}", time)


def are_told_ended(pods: Sequence[Object]) -> bool:
    """Whether every pod is seen to have ended. Pods and Jobs are watched apart: an ended Job may be told of first."""
    return all(pod.get("status", {}).get("phase") in ("Succeeded", "Failed") for pod in pods)


def is_seen_evicted(pods: Sequence[Object]) -> bool:
    """Whether any pod carries DisruptionTarget: an eviction, a preemption, a node that went away."""
    return any(
        one["type"] == "DisruptionTarget" and one["status"] == "True"
        for pod in pods
        for one in pod.get("status", {}).get("conditions") or ()
    )


def count(words: Mapping[str, Any], name: str) -> int | None:
    """A number among last words; what an image of another version says there may be anything."""
    found = words.get(name)
    if not isinstance(found, int) or isinstance(found, bool):
        return None
    return found if 0 <= found < EXACT else None


def has_termination_message(stage: str, words: Mapping[str, Any]) -> bool:
    """Whether a stage that ended well says all that is needed to go on."""
    if stage == "plan":
        return all(count(words, name) is not None for name in ("units", "missing", "examples", "pairs", "badRows"))
    return stage != "reduce" or bool(ADDRESS.fullmatch(str(words.get("manifest"))))


def why_not_running(job: Object, pods: Sequence[Object], note: str, cluster: ClusterSpec) -> tuple[StageState, str]:
    """(Queued or Pending, the reason in words) of a Job without a running pod.

    Args:
        note: what events say of pods that could not be made.
    """
    if job["spec"].get("suspend"):
        queue = f"Kueue's queue {cluster.queue_name}" if cluster.queue_name else "somebody to resume its Job"
        return "Queued", f"waits for {queue}"
    for pod in pods:
        status = pod.get("status", {})
        for one in status.get("conditions") or ():
            if one["type"] == "PodScheduled" and one["status"] == "False":
                return "Pending", f"{one.get('reason', 'not scheduled')}: {one.get('message', '')}"
        for container in status.get("containerStatuses") or ():
            waiting = container.get("state", {}).get("waiting")
            if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return "Pending", f"{waiting['reason']}: {waiting.get('message', '')}"
    if pods:
        return "Pending", note or "its container is being created"
    return "Pending", note or "its pods are being made"


def lost_pod_message(pods: Sequence[Object]) -> str:
    """Of pods that run as far as is known: which one is being removed, or not ready, and since when; empty where all are well.

    Of a pod whose node stops reporting the node controller says no reason.
    """
    for pod in pods:
        name, metadata, status = pod["metadata"]["name"], pod["metadata"], pod.get("status", {})
        if status.get("phase") in ("Succeeded", "Failed") or _terminated(pod) is not None:
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
                return f"NotReady since {since}: pod {name}{node}; {why or 'nothing is heard from its node'}"
    return ""


def is_denied(refusal: CreateError) -> bool:
    """Whether an object was refused by an admission policy or webhook, which may let the same one pass later.

    A policy answers 422 as a broken object does, but says that the object is forbidden, not that it is invalid; a webhook may
    choose any code (KUBERNETES.md).
    """
    return bool(DENIED.search(refusal.message))


def _exit_codes(pods: Sequence[Object]) -> dict[int, str]:
    """Exit code -> message of pods that failed by themselves; those that were told to go count for nothing."""
    found: dict[int, str] = {}
    for pod in pods:
        ended = _terminated(pod)
        if ended is None or ended["exitCode"] == 0 or "deletionTimestamp" in pod["metadata"]:
            continue
        out_of_memory = "out of memory (OOMKilled); " if ended.get("reason") == "OOMKilled" else ""
        message = ended.get("message", "")
        words = _parse(message)
        if "error" in words:
            message = f"{words['error']} ({words.get('where', '')}); {words.get('fix', '')}"
        else:
            message = (message.strip().splitlines() or [""])[-1]
        found.setdefault(ended["exitCode"], f"{out_of_memory}{message}")
    return found


def _words(pods: Sequence[Object]) -> dict[str, Any]:
    """The last words of the pods that ended well; numbers of several nodes add up."""
    words: dict[str, Any] = {}
    for pod in pods:
        ended = _terminated(pod)
        if ended is None or ended["exitCode"] != 0:
            continue
        for name, value in _parse(ended.get("message", "")).items():
            is_count = isinstance(value, int) and not isinstance(value, bool)
            words[name] = words.get(name, 0) + value if is_count else value
    return words


def _terminated(pod: Object) -> dict[str, Any] | None:
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == WORKER_CONTAINER:
            found = container.get("state", {}).get("terminated")
            return dict(found) if found else None
    return None


def _parse(message: str) -> dict[str, Any]:
    try:
        words = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}
