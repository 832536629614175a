"""Classifies how an attempt ended: its Job and pods -> cause. Pure. What follows stands in failure_policy.py.

The Job's own reason does not distinguish an eviction from a crash, so its pods are read too (docs/architecture.md, Kubernetes).
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.reconcile.actions import CreateError
from launcher.reconcile.child_status import terminated_worker, true_conditions
from launcher.reconcile.failure_policy import Cause
from launcher.reconcile.termination_message import error_of, result_of
from launcher.resource.object import Object
from launcher.resource.status import parse_time
from prism_job.errors import DataError, RequestError

CAUSE_OF_EXIT_CODE = {RequestError.exit_code: Cause.WRONG_REQUEST, DataError.exit_code: Cause.DAMAGED_DATA}

EXIT_CODE_MEANINGS = {75: "a transient error", 137: "killed, often out of memory", 143: "stopped by SIGTERM"}

ADMISSION_DENIED = re.compile('^\\S+ "[^"]*" is forbidden: |^admission webhook "[^"]*" denied the request')
"""How the answers of an admission policy and of a webhook begin."""


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended.

    Attributes:
        cause: None where it succeeded.
        message: for people; begins with the exit code where there is one.
        result: from the termination message, where it succeeded.
    """

    cause: Cause | None
    message: str
    time: datetime.datetime
    result: dict[str, Any] = field(default_factory=dict)


def classify_attempt(job: Object, pods: Sequence[Object], was_evicted: bool) -> AttemptOutcome | None:
    """None while the Job has neither completed nor failed.

    Args:
        was_evicted: a pod of it was seen being evicted, now or by an earlier pass; such a pod may be gone by now.
    """
    conditions = true_conditions(job)
    if "Complete" in conditions:
        return AttemptOutcome(None, "", parse_time(conditions["Complete"]["lastTransitionTime"]), result_of(pods))
    if "Failed" not in conditions:  # FailureTarget comes first, while pods still end: the next attempt waits for Failed
        return None
    failed = conditions["Failed"]
    time = parse_time(failed["lastTransitionTime"])
    reason, job_message = failed.get("reason", ""), failed.get("message", "")
    by_policy = job_message if reason == "PodFailurePolicy" else ""
    if was_evicted or "DisruptionTarget" in by_policy:
        return AttemptOutcome(Cause.EVICTED, f"evicted: {job_message}", time)
    exits = _failed_exits(pods)
    for code, cause in CAUSE_OF_EXIT_CODE.items():
        if code in exits or f"exit code {code}" in by_policy:
            return AttemptOutcome(cause, f"exit code {code}: {exits.get(code, ('', ''))[1] or job_message}", time)
    if exits:
        code, (container_reason, message) = next(iter(exits.items()))
        meaning = f" ({EXIT_CODE_MEANINGS[code]})" if code in EXIT_CODE_MEANINGS else ""
        cause = Cause.OUT_OF_MEMORY if container_reason == "OOMKilled" else Cause.CRASHED
        return AttemptOutcome(cause, f"exit code {code}{meaning}: {message or job_message}", time)
    return AttemptOutcome(Cause.CRASHED, f"{reason}: {job_message}", time)


def classify_create_error(error: CreateError) -> Cause:
    """NOT_CREATED for what may pass: a quota, an admission policy or webhook that may accept the same Job later.

    A policy answers 422 as for a broken object, but its message reads "is forbidden" instead of "is invalid"; a webhook may
    choose any code (docs/architecture.md, Kubernetes).
    """
    is_invalid = error.code in (400, 422) and not ADMISSION_DENIED.search(error.message)
    return Cause.INVALID_JOB if is_invalid else Cause.NOT_CREATED


def _failed_exits(pods: Sequence[Object]) -> dict[int, tuple[str, str]]:
    """Exit code -> (container reason, error) of pods that failed by themselves. Pods that were being deleted do not count."""
    exits: dict[int, tuple[str, str]] = {}
    for pod in pods:
        ended = terminated_worker(pod)
        if ended is None or ended["exitCode"] == 0 or "deletionTimestamp" in pod["metadata"]:
            continue
        reason = ended.get("reason", "")
        out_of_memory = "out of memory (OOMKilled); " if reason == "OOMKilled" else ""
        exits.setdefault(ended["exitCode"], (reason, f"{out_of_memory}{error_of(ended.get('message', ''))}"))
    return exits
