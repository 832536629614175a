"""The attempts at one stage, or one group of it: start one, observe it, restart or fail, until the stage has ended. Pure.

Does not know what the end of a stage means for the run or for other groups. How Jobs fail was measured on a real API server
(docs/architecture.md, Kubernetes).
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.reconcile.actions import Action, Apply, Create, Delete, Observed, Timeouts
from launcher.reconcile.child_status import (
    have_all_ended,
    is_any_evicted,
    is_being_deleted,
    is_finished,
    is_suspended,
    lost_pod_message,
    running_since,
    why_not_running,
)
from launcher.reconcile.conditions import sentence
from launcher.reconcile.failure_policy import FAILURE_POLICY, STARTUP_TIMEOUT, Cause, FailureAction
from launcher.reconcile.failures import AttemptOutcome, classify_attempt, classify_create_error
from launcher.reconcile.termination_message import count, gpu_in, is_complete, warnings_in
from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from launcher.render.service import services
from launcher.render.shared_objects import shared_objects
from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL, STAGE_LABEL
from launcher.resource.object import Object
from launcher.resource.record import Record
from launcher.resource.status import StageStatus, Status, parse_time, time_text
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun

ENDED = ("Succeeded", "Failed")
NUM_KEPT = 3
"""Ended attempts of a stage or group whose Jobs are kept for their logs. Of 256 groups, all of them would fill a namespace."""


@dataclass
class Attempts:
    """The attempts at all stages of one run, in one pass.

    Attributes:
        status: as the pass found it, or fresh where a round begins.
        actions: to be executed in this order.
        requeue_times: when to look again even if nothing changes.
        results: fields of the status, from the results of stages that have ended.
        used: environment of reduction that states what the run has used.
    """

    record: Record
    run: SelectionRun
    observed: Observed
    now: datetime.datetime
    timeouts: Timeouts
    status: Status
    actions: list[Action] = field(default_factory=list)
    requeue_times: list[datetime.datetime] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    used: Mapping[str, str] = field(default_factory=dict)

    @property
    def cluster(self) -> ClusterSpec:
        assert self.run.spec.cluster is not None
        return self.run.spec.cluster

    def observe_stage(self, stage: str, group: int) -> StageStatus:
        """The stage after its current attempt, and later ones whose Jobs exist already, were observed."""
        entry, is_over = self.status.stage(stage, group), True
        while is_over and entry.state not in ENDED:
            job = self.job(entry)
            if job is None and not entry.started:
                return self._observe_create_error(entry)
            entry, is_over = self._observe_attempt(entry.model_copy(update={"started": True}), job)
        return entry

    def start_if_due(self, entry: StageStatus) -> StageStatus:
        """Create the Job of the current attempt if it has none and its backoff is over."""
        if entry.started or entry.state in ENDED:
            return entry
        due = parse_time(entry.not_before) if entry.not_before else self.now
        max_backoff = datetime.timedelta(seconds=self.timeouts.max_backoff_seconds)
        if self.now < due <= self.now + max_backoff:  # later than that: the clock was set back
            self.requeue_times.append(due)
            return entry.model_copy(update={"state": "Waiting"})
        attempt = replace(self._attempt(entry), used=self.used if entry.stage == "reduce" else {})
        shared = [*shared_objects(self.run, attempt.namespace, attempt.owner), *services(attempt)]
        self.actions += [*(Apply(one) for one in shared if Apply(one) not in self.actions), Create(job_of(attempt))]
        started = entry.model_copy(update={"started": True, "state": "Pending", "not_before": None})
        error = self.observed.create_errors.get(attempt.job_name)
        if error is None:
            return started
        self.requeue_times.append(self._startup_deadline(error.since))
        message = sentence(f"its Job is refused: {error.message}")
        return started.model_copy(update={"started": False, "message": message})

    def stop_group(self, entry: StageStatus, *, has_succeeded: bool) -> StageStatus:
        """Once extraction is over, a group that still runs is stopped: nothing is counted against it, nothing is restarted.

        Args:
            has_succeeded: whether any group has. Otherwise a group that failed keeps its state: it is why the run failed.
        """
        if entry.state == "Failed" and not has_succeeded:
            return entry
        before = self._as_found(entry)
        return before if entry.attempt != before.attempt or entry.reason.startswith("TooMany") else entry

    def delete_superseded_jobs(self, stages: Sequence[StageStatus]) -> None:
        """Delete the Jobs of attempts that were given up, or that a host with an older status created; and old ended ones."""
        current = {(one.stage, str(one.group)): one for one in stages}
        for job in self.observed.jobs.values():
            labels = job["metadata"].get("labels", {})
            entry = current.get((labels.get(STAGE_LABEL), labels.get(GROUP_LABEL)))
            number = labels.get(ATTEMPT_LABEL, "")
            is_of_round = labels.get(ROUND_LABEL) == str(self.status.round) and number.isdecimal()
            if entry is None or not is_of_round or is_being_deleted(job):
                continue
            first_kept = entry.attempt + (entry.state == "Failed")  # a failed stage has no current attempt
            if is_finished(job):  # its end is in the status only once that is written
                first_kept = self._as_found(entry).attempt - NUM_KEPT
            if int(number) < first_kept and (deletion := self.delete_job(job)) not in self.actions:
                self.actions.insert(0, deletion)

    def job(self, entry: StageStatus) -> Object | None:
        """The Job of the current attempt."""
        return self.observed.jobs.get(self._attempt(entry).job_name)

    def delete_job(self, job: Object) -> Delete:
        return Delete("Job", self.record.namespace, job["metadata"]["name"], job["metadata"]["uid"])

    def _observe_create_error(self, entry: StageStatus) -> StageStatus:
        """An attempt without a Job: fail if its Create was refused for good, or for too long."""
        error = self.observed.create_errors.get(self._attempt(entry).job_name)
        if error is None:
            return entry
        rule = FAILURE_POLICY[classify_create_error(error)]
        if rule.action is FailureAction.FAIL_RUN:
            return _failed(entry, rule.reason, f"its Job is refused: {error.message}")
        if self.now >= self._startup_deadline(error.since):
            seconds = self.cluster.startup_timeout_seconds
            return _failed(entry, rule.reason, f"its Job was refused for {seconds} s: {error.message}")
        return entry

    def _observe_attempt(self, entry: StageStatus, job: Object | None) -> tuple[StageStatus, bool]:
        """The state of the current attempt; True where it is over, and the entry describes what comes after it."""
        if job is None or is_being_deleted(job):
            if entry.reason == STARTUP_TIMEOUT:  # deleted by us, and the status with the failure was not written
                return _failed(entry, STARTUP_TIMEOUT, entry.message), True
            cause = Cause.EVICTED if entry.disrupted else Cause.JOB_DELETED
            return self._restart_or_fail(entry, cause, "its Job was deleted by somebody else", self.now), True
        pods = self.observed.pods_of(job)
        entry = entry.model_copy(update={"running_since": running_since(job, pods, entry.running_since)})
        if is_any_evicted(pods) and not entry.disrupted:
            entry = entry.model_copy(update={"disrupted": True})
        outcome = classify_attempt(job, pods, entry.disrupted)
        if outcome is None:
            return self._observe_unfinished(entry, job, pods)
        if self._waits_for_pod_status(entry, pods, outcome):
            return entry.model_copy(update={"state": "Running"}), False
        if outcome.cause is None:
            return self._succeed(entry, outcome), True
        return self._restart_or_fail(entry, outcome.cause, outcome.message, outcome.time), True

    def _restart_or_fail(
        self, entry: StageStatus, cause: Cause, message: str, ended_at: datetime.datetime
    ) -> StageStatus:
        """Apply the failure policy: the entry of the next attempt, or of the failed stage."""
        rule = FAILURE_POLICY[cause]
        if rule.action is FailureAction.FAIL_RUN:
            return _failed(entry, rule.reason, message)
        assert rule.limit in ("max_restarts", "max_preemptions"), cause
        counter, limit = rule.limit.removeprefix("max_"), getattr(self.cluster, rule.limit)
        num_counted = getattr(entry, counter) + 1
        if num_counted > limit:
            message = f"{message} (attempt {entry.attempt + 1}; no more than {limit} {counter})"
            return _failed(entry, rule.reason, message)
        message = sentence(f"attempt {entry.attempt + 1}: {message}")
        following = next_attempt(entry).model_copy(update={counter: num_counted, "message": message})
        if rule.action is FailureAction.RESTART_NOW:
            return following
        backoff_seconds = min(self.timeouts.backoff_seconds * 2**entry.restarts, self.timeouts.max_backoff_seconds)
        due = ended_at + datetime.timedelta(seconds=backoff_seconds)
        return following.model_copy(update={"not_before": time_text(due)})

    def _observe_unfinished(self, entry: StageStatus, job: Object, pods: list[Object]) -> tuple[StageStatus, bool]:
        """An attempt that has not ended: are pods lost, does it run, and if not, why and for how long?

        An attempt is given up in two passes, the reason written in the first: whoever finds the Job deleted must know why.
        """
        entry, lost = self._find_lost_pods(entry, job, pods)
        before = self._as_found(entry)
        if lost and before.attempt == entry.attempt and before.disrupted:
            return self._restart_or_fail(entry, Cause.POD_LOST, lost, self.now), True
        if lost:
            self.requeue_times.append(self.now)
            return entry.model_copy(update={"disrupted": True, "message": sentence(lost)}), False
        pod_warning = self.observed.pod_warnings.get(job["metadata"]["name"], "")
        pending = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
        if len(pending) < len(pods):
            why = why_not_running(job, pending, pod_warning, self.cluster)[1] if pending else lost_pod_message(pods)
            return entry.model_copy(update={"state": "Running", "message": sentence(why), "reason": ""}), False
        cause, why = why_not_running(job, pods, pod_warning, self.cluster)
        state = "Queued" if cause is Cause.QUEUED else "Pending"
        entry = entry.model_copy(update={"state": state, "message": sentence(why), "reason": ""})
        started_at = job.get("status", {}).get("startTime")
        # The time counts once the Job's controller has started it. After a suspension the earlier start time stands there
        # for a moment.
        if FAILURE_POLICY[cause].limit is None or started_at is None or is_suspended(job):
            return entry, False
        deadline = self._startup_deadline(parse_time(started_at))
        if self.now < deadline:
            self.requeue_times.append(deadline)
            return entry, False
        message = f"no pod ran within {self.cluster.startup_timeout_seconds} s: {why or 'no reason is known'}"
        if before.attempt == entry.attempt and before.reason == STARTUP_TIMEOUT:
            return _failed(entry, STARTUP_TIMEOUT, message), True
        self.requeue_times.append(self.now)
        return entry.model_copy(update={"reason": STARTUP_TIMEOUT, "message": sentence(message)}), False

    def _find_lost_pods(self, entry: StageStatus, job: Object, pods: list[Object]) -> tuple[StageStatus, str]:
        """Which pods are lost; empty if none are. Pods of a node that stops reporting never end, nor does their Job."""
        timeout = datetime.timedelta(seconds=self.timeouts.lost_pod_seconds)
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                deadline = parse_time(pod["metadata"]["deletionTimestamp"]) + timeout  # which includes the pod's grace
                if self.now >= deadline:
                    return entry, f"pod {pod['metadata']['name']} never ended; its node may be gone"
                self.requeue_times.append(deadline)
        status = job.get("status", {})
        if self.now < parse_time(status.get("startTime") or job["metadata"]["creationTimestamp"]) + timeout:
            return entry, ""  # it may count pods that the cache does not have yet
        num_counted = status.get("active", 0) + status.get("terminating", 0)
        if num_counted <= len(pods):
            return entry.model_copy(update={"missing_since": None}), ""
        since = entry.missing_since or time_text(self.now)
        deadline = parse_time(since) + timeout
        if self.now >= deadline:
            return entry, f"its Job counts {num_counted} pods of which {len(pods)} exist; a node may be gone"
        self.requeue_times.append(deadline)
        return entry.model_copy(update={"missing_since": since}), ""

    def _waits_for_pod_status(self, entry: StageStatus, pods: list[Object], outcome: AttemptOutcome) -> bool:
        """Whether the end of the Job was seen before that of its pods, and not long ago."""
        if have_all_ended(pods) and (outcome.cause is not None or is_complete(entry.stage, outcome.result)):
            return False
        timeout = datetime.timedelta(seconds=self.timeouts.pod_status_seconds)
        due = outcome.time + timeout
        if not self.now < due <= self.now + 2 * timeout:  # later than that: our clock and the cluster's differ
            return False
        self.requeue_times.append(due)
        return True

    def _succeed(self, entry: StageStatus, outcome: AttemptOutcome) -> StageStatus:
        """Take over the result. Without it the stage is repeated: it finds its work done and reports the result again."""
        result = outcome.result
        if not is_complete(entry.stage, result):
            message = "it succeeded, but its termination message is missing"
            return self._restart_or_fail(entry, Cause.NO_RESULT, message, outcome.time)
        if entry.stage == "plan":
            counts = {"units": "units", "missing_units": "missing", "examples": "examples", "pairs": "pairs"}
            self.results |= {name: result[key] for name, key in counts.items()} | {"bad_rows": result["badRows"]}
        elif entry.stage == "reduce":
            self.results |= {"manifest": result["manifest"], "selected": count(result, "selected")}
            self.results |= {} if (bad := count(result, "badRows")) is None else {"bad_rows": bad}
        units = count(result, "units") if entry.stage == "extract" else None
        self.results |= {"gpu": gpu} if (gpu := gpu_in(result)) else {}
        message = sentence(warnings_in(result))
        return entry.model_copy(update={"state": "Succeeded", "message": message, "units": units})

    def _as_found(self, entry: StageStatus) -> StageStatus:
        """The stage as an earlier pass wrote it."""
        return self.status.stage(entry.stage, entry.group)

    def _attempt(self, entry: StageStatus) -> Attempt:
        namespace, owner = self.record.namespace, self.record.owner_reference
        return Attempt(self.run, entry.stage, entry.group, self.status.round, entry.attempt, namespace, owner)

    def _startup_deadline(self, since: datetime.datetime) -> datetime.datetime:
        """Until when a pod must run."""
        return since + datetime.timedelta(seconds=self.cluster.startup_timeout_seconds)


def next_attempt(entry: StageStatus) -> StageStatus:
    """Not started yet. The counts of earlier attempts continue."""
    return StageStatus(
        stage=entry.stage,
        group=entry.group,
        attempt=entry.attempt + 1,
        restarts=entry.restarts,
        preemptions=entry.preemptions,
    )


def _failed(entry: StageStatus, reason: str, message: str) -> StageStatus:
    return entry.model_copy(update={"state": "Failed", "reason": reason, "message": sentence(message)})
