"""The life of a stage's attempts: start one, watch it, give it up, begin the next, until the stage has ended. Pure.

Not: what a stage's end means for the run, or for its other groups. How Jobs fail, and which traps lie there, was measured on
a real API server (KUBERNETES.md).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.reconcile.actions import Action, Apply, Create, Delete, Object, Observed, Timeouts
from launcher.reconcile.conditions import sentence
from launcher.reconcile.failures import (
    AttemptOutcome,
    are_told_ended,
    count,
    ending_of,
    has_termination_message,
    is_denied,
    is_finished,
    is_seen_evicted,
    is_suspended,
    is_there,
    lost_pod_message,
    why_not_running,
)
from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from launcher.render.run_objects import shared_objects
from launcher.render.service import services
from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL, STAGE_LABEL, job_name
from launcher.resource.record import Record
from launcher.resource.status import StageStatus, Status
from launcher.resource.timestamps import parse_time, time_text
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun

STARTUP_TIMEOUT, INVALID_POD = "StartupTimeout", "InvalidPod"

HOPELESS = ("WrongRequest", "DamagedData", INVALID_POD)
"""Reasons by which one group's failure is that of all."""

NUM_KEPT = 3
"""Ended attempts of a stage, or group, whose Jobs stay: for their logs. Of 256 groups, all of them would fill a namespace."""


@dataclass
class Attempts:
    """Those of all stages of one run, in one pass.

    Attributes:
        begun: the status that the pass goes on from.
        actions: what is to be done, in this order.
        again: when to look again even if nothing happens.
        facts: fields of the status, from the last words of stages that have ended.
    """

    record: Record
    run: SelectionRun
    seen: Observed
    now: datetime.datetime
    patience: Timeouts
    begun: Status
    actions: list[Action] = field(default_factory=list)
    again: list[datetime.datetime] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> ClusterSpec:
        assert self.run.spec.cluster is not None
        return self.run.spec.cluster

    def judge(self, stage: str, group: int) -> StageStatus:
        """Look at a stage's attempt in hand, and at those after it that were made already."""
        entry, is_over = self.begun.stage(stage, group), True
        while is_over and entry.state not in ("Succeeded", "Failed"):
            job = self.job_of(entry)
            if job is None and not entry.started:
                return self._judge_refusal(entry)
            entry, is_over = self._look(entry.model_copy(update={"started": True}), job)
        return entry

    def _judge_refusal(self, entry: StageStatus) -> StageStatus:
        """An attempt that was not made: an object that is wrong never will be; a quota, or a policy, may let it pass yet."""
        refusal = self.seen.create_errors.get(self._name_of(entry))
        if refusal is None:
            return entry
        if refusal.code in (400, 422) and not is_denied(refusal):
            return _failed(entry, INVALID_POD, f"its Job is refused: {refusal.message}")
        if self.now >= self._deadline(refusal.since):
            wait_seconds = self.cluster.startup_timeout_seconds
            return _failed(entry, STARTUP_TIMEOUT, f"its Job was refused for {wait_seconds} s: {refusal.message}")
        return entry

    def stop_group(self, entry: StageStatus, *, has_succeeded: bool) -> StageStatus:
        """Once extraction is over, the groups still at it are stopped: that counts against none, and none begins again.

        Args:
            has_succeeded: whether a group has. Where none has, one that failed for good says why the run did.
        """
        if entry.state == "Failed" and not has_succeeded:
            return entry
        before = self._written(entry)
        return before if entry.attempt != before.attempt or entry.reason.startswith("TooMany") else entry

    def start_if_due(self, entry: StageStatus) -> StageStatus:
        """Make the Job of the attempt in hand where there is none, and no wait is left."""
        if entry.started or entry.state in ("Succeeded", "Failed"):
            return entry
        due = parse_time(entry.not_before) if entry.not_before else self.now
        longest = datetime.timedelta(seconds=self.patience.max_backoff_seconds)
        if self.now < due <= self.now + longest:  # later than that: the clock was set back
            self.again.append(due)
            return entry.model_copy(update={"state": "Waiting"})
        namespace, owner = self.record.namespace, self.record.owner_reference
        attempt = Attempt(self.run, entry.stage, entry.group, self.begun.round, entry.attempt, namespace, owner)
        around = [*shared_objects(self.run, namespace, owner), *services(attempt)]
        self.actions += [*(Apply(one) for one in around if Apply(one) not in self.actions), Create(job_of(attempt))]
        begun = entry.model_copy(update={"started": True, "state": "Pending", "not_before": None})
        refusal = self.seen.create_errors.get(self._name_of(entry))
        if refusal is None:
            return begun
        self.again.append(self._deadline(refusal.since))
        return begun.model_copy(
            update={"started": False, "message": sentence(f"its Job is refused: {refusal.message}")}
        )

    def drop_earlier(self, stages: Sequence[StageStatus]) -> None:
        """One Job at a time: those of attempts given up, and of a host that went on from an older status, are removed.

        So are those that ended, but for the latest.
        """
        at_work = {(one.stage, str(one.group)): one for one in stages}
        written = {(one.stage, one.group): one.attempt for one in self.begun.stages}
        for job in self.seen.jobs.values():
            labels = job["metadata"].get("labels", {})
            entry, attempt = (
                at_work.get((labels.get(STAGE_LABEL), labels.get(GROUP_LABEL))),
                labels.get(ATTEMPT_LABEL, ""),
            )
            is_of_round = labels.get(ROUND_LABEL) == str(self.begun.round) and attempt.isdecimal()
            if entry is None or not is_of_round or not is_there(job):
                continue
            in_hand = entry.attempt + (entry.state == "Failed")  # of one that failed for good, none is
            if is_finished(job):  # it was judged once that is written
                in_hand = written.get((entry.stage, entry.group), 0) - NUM_KEPT
            if int(attempt) >= in_hand:
                continue
            if (gone := self.delete(job)) not in self.actions:
                self.actions.insert(0, gone)

    def job_of(self, entry: StageStatus) -> Object | None:
        """Of the attempt in hand."""
        return self.seen.jobs.get(self._name_of(entry))

    def delete(self, job: Object) -> Delete:
        """Remove this very Job, and its pods."""
        return Delete("Job", self.record.namespace, job["metadata"]["name"], job["metadata"]["uid"])

    def _look(self, entry: StageStatus, job: Object | None) -> tuple[StageStatus, bool]:
        """How the attempt in hand stands; True where it is over, and the entry speaks of what comes after it."""
        if job is None or "deletionTimestamp" in job["metadata"]:
            if entry.reason == STARTUP_TIMEOUT:  # by us: it was given up, and the word of it lost
                return _failed(entry, STARTUP_TIMEOUT, entry.message), True
            kind: Any = "preempted" if entry.disrupted else "crashed"
            return self._again(entry, AttemptOutcome(kind, "its Job was deleted by somebody else", self.now)), True
        pods = self.seen.pods_of(job)
        if is_seen_evicted(pods) and not entry.disrupted:
            entry = entry.model_copy(update={"disrupted": True})
        ended = ending_of(job, pods, entry.disrupted)
        if ended is None:
            return self._watch(entry, job, pods)
        if self._is_untold(entry, pods, ended):
            return entry.model_copy(update={"state": "Running"}), False
        if ended.kind == "succeeded":
            return self._succeed(entry, ended), True
        if ended.kind in ("request", "data"):
            reason = "WrongRequest" if ended.kind == "request" else "DamagedData"
            return _failed(entry, reason, ended.message), True
        return self._again(entry, ended), True

    def _again(self, entry: StageStatus, ended: AttemptOutcome) -> StageStatus:
        """The entry of the next attempt, or of the stage's failure where it has had all its attempts."""
        counter, limit = ("restarts", self.cluster.max_restarts)
        wait_seconds = min(self.patience.backoff_seconds * 2**entry.restarts, self.patience.max_backoff_seconds)
        if ended.kind == "preempted":
            counter, limit, wait_seconds = "preemptions", self.cluster.max_preemptions, 0.0
        so_many = getattr(entry, counter) + 1
        if so_many > limit:
            message = f"{ended.message} (attempt {entry.attempt + 1}; no more than {limit} {counter})"
            return _failed(entry, f"TooMany{counter.capitalize()}", message)
        due = ended.time + datetime.timedelta(seconds=wait_seconds)
        message = sentence(f"attempt {entry.attempt + 1}: {ended.message}")
        following = next_attempt(entry).model_copy(update={counter: so_many, "message": message})
        return following.model_copy(update={"not_before": time_text(due)}) if wait_seconds else following

    def _watch(self, entry: StageStatus, job: Object, pods: list[Object]) -> tuple[StageStatus, bool]:
        """An attempt that goes on: does it run, why not, and is it stuck?"""
        entry, stuck = self._stuck(entry, job, pods)
        written = self._written(entry)
        if stuck and written.attempt == entry.attempt and written.disrupted:
            return self._again(entry, AttemptOutcome("preempted", stuck, self.now)), True
        if stuck:  # said first, done after: whoever finds its Job gone must know why
            self.again.append(self.now)
            return entry.model_copy(update={"disrupted": True, "message": sentence(stuck)}), False
        note = self.seen.pod_warnings.get(job["metadata"]["name"], "")
        pending = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
        if len(pending) < len(pods):
            _, why = why_not_running(job, pending, note, self.cluster) if pending else ("", lost_pod_message(pods))
            return entry.model_copy(update={"state": "Running", "message": sentence(why), "reason": ""}), False
        state, why = why_not_running(job, pods, note, self.cluster)
        entry = entry.model_copy(update={"state": state, "message": sentence(why), "reason": ""})
        if state == "Queued":
            return entry, False
        since = job.get("status", {}).get("startTime")
        # Not taken up yet, or let go by a queue a moment ago: it starts to count once its controller has seen that. Until then
        # the time of a start before the suspension stands there.
        if since is None or is_suspended(job):
            return entry, False
        deadline = self._deadline(parse_time(since))
        if self.now < deadline:
            self.again.append(deadline)
            return entry, False
        message = f"no pod ran within {self.cluster.startup_timeout_seconds} s: {why or 'nobody says why'}"
        if written.attempt == entry.attempt and written.reason == STARTUP_TIMEOUT:
            return _failed(entry, STARTUP_TIMEOUT, message), True
        self.again.append(self.now)  # said first, as above
        return entry.model_copy(update={"reason": STARTUP_TIMEOUT, "message": sentence(message)}), False

    def _stuck(self, entry: StageStatus, job: Object, pods: list[Object]) -> tuple[StageStatus, str]:
        """Pods on a node that nobody reports from never end, and their Job never gets a condition."""
        patience = datetime.timedelta(seconds=self.patience.lost_pod_seconds)
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                # The deletion's time has the pod's grace in it.
                deadline = parse_time(pod["metadata"]["deletionTimestamp"]) + patience
                if self.now >= deadline:
                    return entry, f"pod {pod['metadata']['name']} never ended; its node may be gone"
                self.again.append(deadline)
        status = job.get("status", {})
        if self.now < parse_time(status.get("startTime") or job["metadata"]["creationTimestamp"]) + patience:
            return entry, ""  # it may count what we have not been told of yet
        counted = status.get("active", 0) + status.get("terminating", 0)
        if counted <= len(pods):
            return entry.model_copy(update={"missing_since": None}), ""
        since = entry.missing_since or time_text(self.now)
        deadline = parse_time(since) + patience
        if self.now >= deadline:
            return entry, f"its Job counts {counted} pods of which {len(pods)} exist; a node may be gone"
        self.again.append(deadline)
        return entry.model_copy(update={"missing_since": since}), ""

    def _is_untold(self, entry: StageStatus, pods: list[Object], ended: AttemptOutcome) -> bool:
        """Whether a Job's end was told of before that of its pods, and this is soon enough to wait for it."""
        if are_told_ended(pods) and (ended.kind != "succeeded" or has_termination_message(entry.stage, ended.words)):
            return False
        patience = datetime.timedelta(seconds=self.patience.pod_status_seconds)
        due = ended.time + patience
        if not self.now < due <= self.now + 2 * patience:  # later than that: our clock is not the cluster's
            return False
        self.again.append(due)
        return True

    def _succeed(self, entry: StageStatus, ended: AttemptOutcome) -> StageStatus:
        """Take over the last words. A stage whose words are lost is done again: it finds its work done, and says so."""
        words = ended.words
        if not has_termination_message(entry.stage, words):
            return self._again(
                entry, AttemptOutcome("crashed", "it ended well, but its last words are lost", ended.time)
            )
        if entry.stage == "plan":
            counts = {"units": "units", "missing_units": "missing", "examples": "examples", "pairs": "pairs"}
            self.facts |= {name: words[said] for name, said in counts.items()} | {"bad_rows": words["badRows"]}
        elif entry.stage == "reduce":
            self.facts |= {"manifest": words["manifest"], "selected": count(words, "selected")}
            self.facts |= {} if (bad := count(words, "badRows")) is None else {"bad_rows": bad}
        units = count(words, "units") if entry.stage == "extract" else None
        return entry.model_copy(update={"state": "Succeeded", "message": "", "units": units})

    def _written(self, entry: StageStatus) -> StageStatus:
        """As an earlier pass left it."""
        return self.begun.stage(entry.stage, entry.group)

    def _name_of(self, entry: StageStatus) -> str:
        return job_name(self.run.metadata.name, entry.stage, entry.group, self.begun.round, entry.attempt)

    def _deadline(self, since: datetime.datetime) -> datetime.datetime:
        """Until when a pod must run."""
        return since + datetime.timedelta(seconds=self.cluster.startup_timeout_seconds)


def next_attempt(entry: StageStatus) -> StageStatus:
    """Not begun; what was counted of those before goes on counting."""
    return StageStatus(
        stage=entry.stage,
        group=entry.group,
        attempt=entry.attempt + 1,
        restarts=entry.restarts,
        preemptions=entry.preemptions,
    )


def _failed(entry: StageStatus, reason: str, message: str) -> StageStatus:
    return entry.model_copy(update={"state": "Failed", "reason": reason, "message": sentence(message)})
