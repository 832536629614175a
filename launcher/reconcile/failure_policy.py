"""What each failure of an attempt leads to: one table, cause -> action. Nothing else decides whether an attempt is restarted.

`failures.py` finds the cause from what a Job and its pods show; `attempts.py` carries the action out.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Cause(StrEnum):
    """Why an attempt ended without success, or does not run yet."""

    WRONG_REQUEST = "exit code 64 in any pod: the document or its data are invalid"
    DAMAGED_DATA = "exit code 65 in any pod: stored data fail their checks"
    INVALID_JOB = "the API server refuses the Job as invalid (400, 422)"
    EVICTED = "a pod has DisruptionTarget: eviction, preemption by priority, drained or deleted node"
    POD_LOST = "a pod neither runs nor ends: its node no longer reports"
    OUT_OF_MEMORY = "a container was OOMKilled"
    CRASHED = "any other exit code (1, 75, 137, 143 …), or a Job that failed for another reason"
    JOB_DELETED = "somebody deleted the Job"
    NO_RESULT = "the pods exited 0, but the termination message with their result is missing"
    NOT_CREATED = "a quota, an admission policy or a missing right holds the Job back"
    NOT_RUNNING = "no pod runs: image pull error, unschedulable, quota on pods"
    QUEUED = "the Job is suspended by Kueue, or by hand"


class FailureAction(StrEnum):
    """What follows."""

    FAIL_RUN = "the stage fails, and the run with it, whatever the other groups do"
    RESTART_NOW = "the next attempt starts at once"
    RESTART_WITH_BACKOFF = "the next attempt starts after 10 s, doubled after each crash, at most 300 s"
    WAIT = "the attempt stays as it is"


Limit = Literal["max_restarts", "max_preemptions", "startup_timeout_seconds"]


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        limit: field of spec.cluster. Beyond it the stage fails; of several groups only this one, and the others continue.
        reason: of a failed stage, and of the condition Failed where the run fails by it.
    """

    action: FailureAction
    limit: Limit | None = None
    reason: str = ""


FAILURE_POLICY: dict[Cause, Rule] = {
    Cause.WRONG_REQUEST: Rule(FailureAction.FAIL_RUN, None, "WrongRequest"),
    Cause.DAMAGED_DATA:  Rule(FailureAction.FAIL_RUN, None, "DamagedData"),
    Cause.INVALID_JOB:   Rule(FailureAction.FAIL_RUN, None, "InvalidPod"),
    Cause.EVICTED:       Rule(FailureAction.RESTART_NOW, "max_preemptions", "TooManyPreemptions"),
    Cause.POD_LOST:      Rule(FailureAction.RESTART_NOW, "max_preemptions", "TooManyPreemptions"),
    Cause.OUT_OF_MEMORY: Rule(FailureAction.RESTART_WITH_BACKOFF, "max_restarts", "TooManyRestarts"),
    Cause.CRASHED:       Rule(FailureAction.RESTART_WITH_BACKOFF, "max_restarts", "TooManyRestarts"),
    Cause.JOB_DELETED:   Rule(FailureAction.RESTART_WITH_BACKOFF, "max_restarts", "TooManyRestarts"),
    Cause.NO_RESULT:     Rule(FailureAction.RESTART_WITH_BACKOFF, "max_restarts", "TooManyRestarts"),
    Cause.NOT_CREATED:   Rule(FailureAction.WAIT, "startup_timeout_seconds", "StartupTimeout"),
    Cause.NOT_RUNNING:   Rule(FailureAction.WAIT, "startup_timeout_seconds", "StartupTimeout"),
    Cause.QUEUED:        Rule(FailureAction.WAIT),
}  # fmt: skip

STARTUP_TIMEOUT = FAILURE_POLICY[Cause.NOT_RUNNING].reason

RUN_FAILING_REASONS = [rule.reason for rule in FAILURE_POLICY.values() if rule.action is FailureAction.FAIL_RUN]
"""A group that failed for one of these fails the run."""
