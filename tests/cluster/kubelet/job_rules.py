"""What a Job controller decides: a batch/v1 Job and its pods in, what to do out. Pure.

In the order of Kubernetes' own syncJob (pkg/controller/job), with its conditions, reasons and messages, for the Jobs that the
launcher makes: Indexed, as many pods at once as completions, FailJob rules only. Left out is all else: deadlines, removal
after a time, the wait before a pod is replaced, restartPolicy OnFailure.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.kubelet.mirror import Thing, key_of, stamp, uid_of

TRACKING = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"
LETTERS = "bcdfghjklmnpqrstvwxz2456789"


@dataclass
class Decision:
    """What one look at a Job leads to. The status is written between the deletions and the stripping of finalizers."""

    status: Thing
    delete: list[Thing] = field(default_factory=list)
    release: list[Thing] = field(default_factory=list)  # finalizer off first, then deleted: counts for nothing
    create: list[int] = field(default_factory=list)
    strip: list[Thing] = field(default_factory=list)
    counted: set[str] = field(default_factory=set)
    events: list[tuple[str, str]] = field(default_factory=list)


def decide(job: Thing, pods: list[Thing], counted: set[str], now: float) -> Decision:
    """One sync. `counted` holds the uids of pods that the status counts already though their finalizer is still on."""
    spec, status = job["spec"], copy.deepcopy(job.get("status") or {})
    if spec["completionMode"] != "Indexed" or spec["completions"] != spec["parallelism"]:
        raise ValueError(
            f"Job {'/'.join(key_of(job))}: only Indexed Jobs with parallelism = completions are known here"
        )
    found = Decision(status)
    tracked = [pod for pod in pods if TRACKING in (pod["metadata"].get("finalizers") or [])]
    if "deletionTimestamp" in job["metadata"] or any(_condition(status, kind) for kind in ("Complete", "Failed")):
        found.strip = tracked
        return found

    suspended = bool(spec.get("suspend"))
    if not suspended and "startTime" not in status:
        status["startTime"] = stamp(now)
    active = [pod for pod in pods if _is_active(pod)]
    terminating = [pod for pod in pods if _is_terminating(pod)]
    fresh = [pod for pod in tracked if uid_of(pod) not in counted]
    failed = [pod for pod in fresh if _phase(pod) == "Failed"]
    succeeded = [pod for pod in fresh if _phase(pod) == "Succeeded"]
    done = _indexes(status.get("completedIndexes", "")) | {_index(pod) for pod in succeeded}

    ending = _ending(job, failed, status)
    if ending and ending[0] == "FailureTarget":
        # The survivors are deleted in this very sync, and count as failed before they have ended.
        found.delete = active
        failed = [pod for pod in fresh if _phase(pod) != "Succeeded"]
        found.strip = tracked
        terminating = terminating + active
        active = []
    else:
        found.strip = [pod for pod in tracked if _phase(pod) in ("Succeeded", "Failed")]
        if suspended:
            found.release = active
        else:
            _manage(found, active, terminating, done, spec["completions"])
        released = {uid_of(pod) for pod in found.release}
        terminating = terminating + found.release
        active = [pod for pod in active if uid_of(pod) not in released]
        _say_suspended(found, suspended, now)
        if len(done) >= spec["completions"] and not ending and not suspended:
            ending = ("SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods")

    found.counted = {uid_of(pod) for pod in failed + succeeded}
    status["active"] = len(active)  # those that will be created are added by whoever creates them
    status["ready"] = sum(_is_ready(pod) for pod in active)
    status["terminating"] = len(terminating)
    status["failed"], status["succeeded"] = status.get("failed", 0) + len(failed), len(done)
    if done:
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


def _ending(job: Thing, failed: list[Thing], status: Thing) -> tuple[str, str, str] | None:
    """The interim condition that holds or should, its reason and message."""
    for kind in ("FailureTarget", "SuccessCriteriaMet"):
        if held := _condition(status, kind):
            return kind, held["reason"], held["message"]
    for pod in failed:
        if message := _matched_rule(job["spec"], pod):
            return "FailureTarget", "PodFailurePolicy", message
    if status.get("failed", 0) + len(failed) > job["spec"]["backoffLimit"]:
        return "FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    return None


def _manage(found: Decision, active: list[Thing], terminating: list[Thing], done: set[int], completions: int) -> None:
    """Which pods to release and which to create, so that one runs for each index that is not done."""
    taken: set[int] = set()
    for pod in sorted(active, key=lambda pod: pod["metadata"]["creationTimestamp"]):
        if (index := _index(pod)) in taken | done:
            found.release.append(pod)
        else:
            taken.add(index)
    taken |= done | {_index(pod) for pod in terminating}
    found.create = [index for index in range(completions) if index not in taken]


def _say_suspended(found: Decision, suspended: bool, now: float) -> None:
    status = found.status
    held = next((c for c in status.get("conditions") or [] if c["type"] == "Suspended"), None)
    if suspended:
        if _set_condition(status, "Suspended", "True", "JobSuspended", "Job suspended", now):
            found.events.append(("Suspended", "Job suspended"))
    elif held and _set_condition(status, "Suspended", "False", "JobResumed", "Job resumed", now):
        status["startTime"] = stamp(now)
        found.events.append(("Resumed", "Job resumed"))


def _matched_rule(spec: Thing, pod: Thing) -> str:
    """How a failed pod matches the first rule of podFailurePolicy that it does; empty if it matches none."""
    where, status = "/".join(key_of(pod)), pod.get("status") or {}
    for number, rule in enumerate((spec.get("podFailurePolicy") or {}).get("rules") or []):
        if (rule["action"], rule.get("onExitCodes", {}).get("operator", "In")) != ("FailJob", "In"):
            raise ValueError(f"podFailurePolicy of {where}: only FailJob, and exit codes that are In, are known here")
        matching = f"matching FailJob rule at index {number}"
        if codes := rule.get("onExitCodes"):
            for container in status.get("containerStatuses") or []:
                ended = (container.get("state") or {}).get("terminated")
                if ended and container["name"] == codes["containerName"] and ended["exitCode"] in codes["values"]:
                    said = f"Container {container['name']} for pod {where} failed with exit code {ended['exitCode']}"
                    return f"{said} {matching}"
        for pattern in rule.get("onPodConditions") or []:
            if _condition(status, pattern["type"]):
                return f"Pod {where} has condition {pattern['type']} {matching}"
    return ""


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


def _index(pod: Thing) -> int:
    return int(pod["metadata"]["annotations"][INDEX])


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


def job_to_pod(job: Thing, index: int) -> Thing:
    """The pod of one index of a Job."""
    template, (namespace, name) = copy.deepcopy(job["spec"]["template"]), key_of(job)
    given, spec = template.get("metadata") or {}, template["spec"]
    labels = {**(given.get("labels") or {}), "job-name": name, "batch.kubernetes.io/job-name": name}
    labels |= {"controller-uid": uid_of(job), "batch.kubernetes.io/controller-uid": uid_of(job)}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid_of(job)}
    metadata: dict[str, Any] = {
        **given,
        # A name is cut so that with five random letters it has 63 characters at most, as a real one's.
        "name": f"{name}-{index}-"[:58] + "".join(random.choices(LETTERS, k=5)),
        "generateName": f"{name}-{index}-",
        "namespace": namespace,
        "labels": labels,
        "finalizers": [*(given.get("finalizers") or []), TRACKING],
        "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
    }
    labels[INDEX] = str(index)
    metadata["annotations"] = {**(given.get("annotations") or {}), INDEX: str(index)}
    spec["hostname"] = f"{name}-{index}"
    source = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
    for container in spec["containers"]:
        env = container["env"] = list(container.get("env") or [])
        if all(variable["name"] != "JOB_COMPLETION_INDEX" for variable in env):
            env.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
