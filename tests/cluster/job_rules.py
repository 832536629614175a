"""What a Job controller decides: a batch/v1 Job and its pods in, what to do out. Pure.

In the order of Kubernetes' own syncJob (pkg/controller/job), with its conditions, reasons and messages. Left out:
successPolicy, backoffLimitPerIndex, adoption, and the restarts of restartPolicy OnFailure.
"""

from __future__ import annotations

import copy
import random
import time
from calendar import timegm
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.mirror import Thing, key_of, stamp, uid_of

TRACKING = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"
LETTERS = "bcdfghjklmnpqrstvwxz2456789"


@dataclass
class Decision:
    """What one look at a Job leads to. The status is written between the deletions and the stripping of finalizers."""

    status: Thing
    delete: list[Thing] = field(default_factory=list)
    release: list[Thing] = field(default_factory=list)  # finalizer off first, then deleted: counts for nothing
    create: list[int | None] = field(default_factory=list)
    strip: list[Thing] = field(default_factory=list)
    counted: set[str] = field(default_factory=set)
    again_seconds: float | None = None
    expired: bool = False
    events: list[tuple[str, str]] = field(default_factory=list)


def decide(job: Thing, pods: list[Thing], counted: set[str], now: float, pod_backoff_seconds: float = 10.0) -> Decision:
    """One sync. `counted` holds the uids of pods that the status counts already though their finalizer is still on."""
    spec, status = job["spec"], copy.deepcopy(job.get("status") or {})
    found = Decision(status)
    tracked = [pod for pod in pods if TRACKING in (pod["metadata"].get("finalizers") or [])]
    finished = next((c for kind in ("Complete", "Failed") if (c := _condition(status, kind))), None)
    if finished or "deletionTimestamp" in job["metadata"]:
        found.strip = tracked
        if finished and "deletionTimestamp" not in job["metadata"] and spec.get("ttlSecondsAfterFinished") is not None:
            left = _seconds(finished["lastTransitionTime"]) + spec["ttlSecondsAfterFinished"] - now
            found.expired, found.again_seconds = left <= 0, max(left, 0.01)
        return found

    suspended, indexed = bool(spec.get("suspend")), spec.get("completionMode") == "Indexed"
    completions = spec.get("completions")
    if not suspended and "startTime" not in status:
        status["startTime"] = stamp(now)
    active = [pod for pod in pods if _is_active(pod)]
    terminating = [pod for pod in pods if _is_terminating(pod)]
    fresh = [pod for pod in tracked if uid_of(pod) not in counted]
    failed = [pod for pod in fresh if _has_failed(pod, spec)]
    num_failed = status.get("failed", 0) + sum(_action(spec, pod)[0] != "Ignore" for pod in failed)
    succeeded = [pod for pod in fresh if _phase(pod) == "Succeeded"]
    done = _indexes(status.get("completedIndexes", ""))
    if indexed:
        done |= {i for pod in succeeded if (i := _index(pod)) is not None and i < completions}
        num_succeeded = len(done)
    else:
        num_succeeded = status.get("succeeded", 0) + len(succeeded)

    ending = _ending(job, failed, num_failed, now, found)
    if ending and ending[0] == "FailureTarget":
        # The survivors are deleted in this very sync, and count as failed before they have ended.
        found.delete = active
        failed = [pod for pod in fresh if _phase(pod) != "Succeeded"]
        num_failed = status.get("failed", 0) + sum(_action(spec, pod)[0] != "Ignore" for pod in failed)
        found.strip, found.counted = tracked, {uid_of(pod) for pod in failed + succeeded}
        terminating = terminating + active
        active = []
    else:
        found.strip = [pod for pod in tracked if _phase(pod) == "Succeeded" or _has_failed(pod, spec)]
        found.counted = {uid_of(pod) for pod in failed + succeeded}
        if suspended:
            found.release = active
        else:
            _manage(found, job, pods, active, terminating, done, num_succeeded, now, pod_backoff_seconds)
        released = {uid_of(pod) for pod in found.release}
        terminating = terminating + found.release
        active = [pod for pod in active if uid_of(pod) not in released]
        _say_suspended(found, suspended, now)
        if completions is None:
            complete = num_succeeded > 0 and not active and not found.create
        else:
            complete = num_succeeded >= completions
        if complete and not ending and not suspended:
            ending = ("SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods")

    status["active"] = len(active)  # those that will be created are added by whoever creates them
    status["ready"] = sum(_is_ready(pod) for pod in active)
    status["terminating"] = len(terminating)
    status["failed"], status["succeeded"] = num_failed, num_succeeded
    if indexed and done:
        status["completedIndexes"] = _ranges(done)
    if ending:
        interim, reason, message = ending
        if _condition(status, interim) is None:
            _set_condition(status, interim, "True", reason, message, now)
        elif not terminating and not found.strip:
            _set_condition(status, "Failed" if interim == "FailureTarget" else "Complete", "True", reason, message, now)
            if interim != "FailureTarget":
                status["completionTime"] = stamp(now)
            found.events.append((reason, message) if interim == "FailureTarget" else ("Completed", "Job completed"))
    for name in ("active", "failed", "succeeded"):
        if not status[name]:
            del status[name]
    return found


def _ending(
    job: Thing, failed: list[Thing], num_failed: int, now: float, found: Decision
) -> tuple[str, str, str] | None:
    """The interim condition that holds or should, its reason and message."""
    spec, status = job["spec"], found.status
    for kind in ("FailureTarget", "SuccessCriteriaMet"):
        if held := _condition(status, kind):
            return kind, held["reason"], held["message"]
    for pod in failed:
        action, message = _action(spec, pod)
        if action == "FailJob":
            return "FailureTarget", "PodFailurePolicy", message
    if num_failed > spec.get("backoffLimit", 6):
        return "FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if spec.get("activeDeadlineSeconds") is not None and not spec.get("suspend"):
        left = _seconds(status["startTime"]) + spec["activeDeadlineSeconds"] - now
        if left <= 0:
            return "FailureTarget", "DeadlineExceeded", "Job was active longer than specified deadline"
        found.again_seconds = left + 0.01
    return None


def _manage(
    found: Decision,
    job: Thing,
    pods: list[Thing],
    active: list[Thing],
    terminating: list[Thing],
    done: set[int],
    num_succeeded: int,
    now: float,
    pod_backoff_seconds: float,
) -> None:
    """Which pods to release and which to create, so that as many run as the Job wants."""
    spec = job["spec"]
    completions, parallelism = spec.get("completions"), spec.get("parallelism", 1)
    held = active + terminating if _only_replaces_failed(spec) else active
    if completions is None:
        wanted = len(active) if num_succeeded else parallelism
    else:
        wanted = min(completions - num_succeeded, parallelism)
    taken: set[int] = set()
    if spec.get("completionMode") == "Indexed":
        for pod in sorted(active, key=lambda pod: pod["metadata"]["creationTimestamp"]):
            if (index := _index(pod)) is None or index in taken or index in done or index >= completions:
                found.release.append(pod)
            else:
                taken.add(index)
    kept = [pod for pod in active if pod not in found.release]
    found.release += kept[max(wanted, 0) :]
    missing = wanted - len(held)
    if not _only_replaces_failed(spec):
        missing += len(found.release)
    if missing <= 0:
        return
    ended = [at for pod in pods if _phase(pod) == "Failed" for at in [_ended_at(pod)] if at]
    if ended:
        wait = max(ended) + min(pod_backoff_seconds * 2 ** (len(ended) - 1), 600) - now
        if wait > 0:
            found.again_seconds = min(wait, found.again_seconds or wait)
            return
    if spec.get("completionMode") == "Indexed":
        taken |= {i for pod in held if (i := _index(pod)) is not None}
        found.create += [i for i in range(completions) if i not in done and i not in taken][:missing]
    else:
        found.create = [None] * missing


def _say_suspended(found: Decision, suspended: bool, now: float) -> None:
    status = found.status
    held = next((c for c in status.get("conditions") or [] if c["type"] == "Suspended"), None)
    if suspended:
        status.pop("startTime", None)
        if _set_condition(status, "Suspended", "True", "JobSuspended", "Job suspended", now):
            found.events.append(("Suspended", "Job suspended"))
    elif held and _set_condition(status, "Suspended", "False", "JobResumed", "Job resumed", now):
        status["startTime"] = stamp(now)
        found.events.append(("Resumed", "Job resumed"))


def _action(spec: Thing, pod: Thing) -> tuple[str, str]:
    """What the first matching rule of podFailurePolicy says: FailJob with its message, Ignore or Count (also if none)."""
    where, status = "/".join(key_of(pod)), pod.get("status") or {}
    for number, rule in enumerate((spec.get("podFailurePolicy") or {}).get("rules") or []):
        if codes := rule.get("onExitCodes"):
            for container in status.get("containerStatuses") or []:
                ended = (container.get("state") or {}).get("terminated")
                if not ended or ended["exitCode"] == 0:
                    continue
                if codes.get("containerName") not in (None, container["name"]):
                    continue
                if (ended["exitCode"] in codes["values"]) == (codes["operator"] == "In"):
                    return rule["action"], (
                        f"Container {container['name']} for pod {where} failed with exit code {ended['exitCode']}"
                        f" matching {rule['action']} rule at index {number}"
                    )
        for pattern in rule.get("onPodConditions") or []:
            for held in status.get("conditions") or []:
                if (held["type"], held["status"]) == (pattern["type"], pattern.get("status", "True")):
                    return rule["action"], (
                        f"Pod {where} has condition {held['type']} matching {rule['action']} rule at index {number}"
                    )
    return "Count", ""


def _phase(pod: Thing) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def _is_active(pod: Thing) -> bool:
    return _phase(pod) not in ("Succeeded", "Failed") and "deletionTimestamp" not in pod["metadata"]


def _is_terminating(pod: Thing) -> bool:
    return _phase(pod) not in ("Succeeded", "Failed") and "deletionTimestamp" in pod["metadata"]


def _is_ready(pod: Thing) -> bool:
    return any(
        c["type"] == "Ready" and c["status"] == "True" for c in (pod.get("status") or {}).get("conditions") or []
    )


def _only_replaces_failed(spec: Thing) -> bool:
    return spec.get("podReplacementPolicy") == "Failed" or bool(spec.get("podFailurePolicy"))


def _has_failed(pod: Thing, spec: Thing) -> bool:
    if _phase(pod) == "Failed":
        return True
    return not _only_replaces_failed(spec) and "deletionTimestamp" in pod["metadata"] and _phase(pod) != "Succeeded"


def _index(pod: Thing) -> int | None:
    said = (pod["metadata"].get("annotations") or {}).get(INDEX)
    return int(said) if said is not None else None


def _ended_at(pod: Thing) -> float | None:
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        if at := ((container.get("state") or {}).get("terminated") or {}).get("finishedAt"):
            return _seconds(at)
    return None


def _seconds(at: str) -> float:
    return timegm(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S"))


def _condition(status: Thing, kind: str) -> Thing | None:
    """The condition, if it is True."""
    return next((c for c in status.get("conditions") or [] if c["type"] == kind and c["status"] == "True"), None)


def _set_condition(status: Thing, kind: str, value: str, reason: str, message: str, now: float) -> bool:
    """Whether this changed anything."""
    conditions = status.setdefault("conditions", [])
    held = next((c for c in conditions if c["type"] == kind), None)
    if held and held["status"] == value:
        return False
    if held:
        conditions.remove(held)
    times = {"lastProbeTime": stamp(now), "lastTransitionTime": stamp(now)}
    conditions.append({"type": kind, "status": value, **times, "reason": reason, "message": message})
    return True


def _indexes(text: str) -> set[int]:
    """'0,2-4' -> {0, 2, 3, 4}."""
    spans = [part.split("-") for part in text.split(",") if part]
    return {index for span in spans for index in range(int(span[0]), int(span[-1]) + 1)}


def _ranges(indexes: Iterable[int]) -> str:
    spans: list[list[int]] = []
    for index in sorted(indexes):
        if spans and spans[-1][-1] == index - 1:
            spans[-1] = [spans[-1][0], index]
        else:
            spans.append([index])
    return ",".join("-".join(map(str, span)) for span in spans)


def job_to_pod(job: Thing, index: int | None) -> Thing:
    """The pod of a Job, of one index where the Job is Indexed."""
    template, (namespace, name) = copy.deepcopy(job["spec"]["template"]), key_of(job)
    prefix = f"{name}-" if index is None else f"{name}-{index}-"
    given, spec = template.get("metadata") or {}, template["spec"]
    labels = {**(given.get("labels") or {}), "job-name": name, "batch.kubernetes.io/job-name": name}
    labels |= {"controller-uid": uid_of(job), "batch.kubernetes.io/controller-uid": uid_of(job)}
    metadata: dict[str, Any] = {
        **given,
        # A name is cut so that with five random letters it has 63 characters at most, as a real one's.
        "name": prefix[:58] + "".join(random.choices(LETTERS, k=5)),
        "generateName": prefix,
        "namespace": namespace,
        "labels": labels,
        "finalizers": [*(given.get("finalizers") or []), TRACKING],
        "ownerReferences": [
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": name,
                "uid": uid_of(job),
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
    if index is not None:
        labels[INDEX] = str(index)
        metadata["annotations"] = {**(given.get("annotations") or {}), INDEX: str(index)}
        spec["hostname"] = f"{name}-{index}"
        source = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
        for container in [*spec["containers"], *(spec.get("initContainers") or [])]:
            env = container["env"] = list(container.get("env") or [])
            if all(variable["name"] != "JOB_COMPLETION_INDEX" for variable in env):
                env.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
