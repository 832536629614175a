"""What to do next for one run: (record, what is seen, now) -> actions and status. Pure: no API call, no clock.

It looks at what is, not at what happened, so a lost event costs nothing, and whoever reconciles next goes on from the same
facts. Actions are done in order, the status is written last; a host that dies between two of them leaves a state from which
the same decision comes again. How Jobs fail, and which traps lie there, was measured on a real API server (KUBERNETES.md).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher import render
from launcher.conditions import Conditions, sentence
from launcher.failures import Ended, are_told_ended, ending_of, is_seen_evicted, why_not_running
from launcher.resource import (
    ATTEMPT,
    GROUP_LABEL,
    ROUND,
    STAGE,
    Phase,
    Record,
    StageStatus,
    Status,
    UnknownStatus,
    job_name,
    parse_time,
    request_digest,
    time_text,
)
from prism_job.cluster_spec import ClusterSpec
from prism_job.errors import SpecError
from prism_job.spec import SelectionRun

Object = dict[str, Any]

STARTUP_TIMEOUT, INVALID_POD = "StartupTimeout", "InvalidPod"

HOPELESS = ("WrongRequest", "DamagedData", INVALID_POD)
"""Reasons by which one group's failure is that of all."""

NUM_KEPT = 3
"""Ended attempts of a stage, or group, whose Jobs stay: for their logs. Of 256 groups, all of them would fill a namespace."""

EXACT = 2**53
"""What a count stays below: JSON as others read it has no larger integers."""

ADDRESS = re.compile(r"(s3://|/)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,2043}")
"""Of a manifest: last words are a pod's own, and people see them in their terminals."""


@dataclass(frozen=True)
class Refusal:
    """A Job that the API server would not make: the HTTP status, its words, and since when that is so without a break."""

    code: int
    message: str
    since: datetime.datetime


@dataclass(frozen=True)
class Seen:
    """What the cluster holds of one run.

    Attributes:
        jobs: by name.
        pods: all of the run's.
        notes: by Job name, what its events say of pods that could not be made.
        refused: by Job name, the last answer to its Create where that was a no.
    """

    jobs: Mapping[str, Object]
    pods: Sequence[Object] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)

    def pods_of(self, job: Object) -> list[Object]:
        uid = job["metadata"]["uid"]
        return [
            pod for pod in self.pods if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", ()))
        ]


@dataclass(frozen=True)
class Apply:
    """Server-side apply: the object is then so, whatever it was."""

    object: Object


@dataclass(frozen=True)
class Create:
    """Make an object that must not be there. One of the same name that another owner left is waited for, never taken over."""

    object: Object


@dataclass(frozen=True)
class Delete:
    """Remove an object, and in the background all that it owns. `uid`: only if it is still this one."""

    kind: str
    namespace: str
    name: str
    uid: str


Action = Apply | Create | Delete


@dataclass(frozen=True)
class Decision:
    """What to do, in this order; then the status to write; and when to look again even if nothing happens."""

    actions: tuple[Action, ...]
    status: Status
    look_again: datetime.datetime | None = None


@dataclass(frozen=True)
class Patience:
    """Waiting times. Tests shorten them."""

    backoff_seconds: float = 10
    """After the first crash; doubled after each further one."""

    longest_backoff_seconds: float = 300

    stuck_seconds: float = 300
    """A pod that should be gone, or that its Job counts and nobody sees, for so long: the attempt is given up."""

    untold_seconds: float = 10
    """A Job that ended before we were told how its pods did: so long is waited for that."""


def decide(record: Record, seen: Seen, now: datetime.datetime, patience: Patience | None = None) -> Decision:
    """One reconcile pass.

    Args:
        record: as last seen; its status is what an earlier pass wrote.
        seen: the run's children.
        now: the time; a clock that jumps costs at most a wait of `longest_backoff_seconds`, or an early end of one.

    Raises:
        UnknownStatus: the round in hand is a later version's, or nobody's that we can read: nothing is done or written.
    """
    if record.is_deleting:
        return Decision((), record.status)
    before = record.status
    if before.unknown and record.round <= before.round:
        raise UnknownStatus(
            f"its status says {', '.join(dict.fromkeys(before.unknown))}, which this version does not know",
            where=f"{record.namespace}/{record.name}",
            fix="let the version that wrote it go on, or raise spec.retry to run it again under this one",
        )
    try:
        run = record.parse()
    except SpecError as error:
        return _refuse(record, before, seen, error, now)
    begun = _begin(record, run, before, now)
    return _Pass(record, run, seen, now, patience or Patience(), begun).decide()


def _refuse(record: Record, before: Status, seen: Seen, error: SpecError, now: datetime.datetime) -> Decision:
    """A document that cannot be run: said once, without a crash loop; a mended one is taken up."""
    is_new_round = record.round > before.round
    if before.is_terminal and before.holds("Accepted") and not is_new_round:
        said = Conditions(before, record.generation, now).all()
        # It was run already: a terminal phase stays.
        return Decision((), before.model_copy(update={"observed_generation": record.generation, "conditions": said}))
    conditions = Conditions(before, record.generation, now)
    conditions.set("Accepted", False, "InvalidSpec", str(error.what))
    conditions.set("Complete", False, "InvalidSpec")
    conditions.set("Failed", True, "InvalidSpec", str(error.what))
    written = Status(
        observed_generation=record.generation,
        round=record.round,
        phase="Failed",
        message=sentence(f"{error.what}; {error.fix}"),
        completion_time=(None if is_new_round else before.completion_time) or time_text(now),
        conditions=conditions.all(),
    )
    return Decision(tuple(_stop(record, seen)), written)


def _begin(record: Record, run: SelectionRun, before: Status, now: datetime.datetime) -> Status:
    """The status to go on from: that of before, or a fresh one where a round begins."""
    asked = run.spec.retry
    if before.start_time and before.holds("Accepted") and asked <= before.round:
        return before.model_copy(update={"observed_generation": record.generation})
    return Status(
        observed_generation=record.generation,
        round=asked,
        request=request_digest(run),
        start_time=time_text(now),
        conditions=before.conditions,
    )


@dataclass
class _Pass:
    """One pass over one accepted run: stage after stage, as far as it gets."""

    record: Record
    run: SelectionRun
    seen: Seen
    now: datetime.datetime
    patience: Patience
    status: Status
    actions: list[Action] = field(default_factory=list)
    again: list[datetime.datetime] = field(default_factory=list)
    stages: dict[tuple[str, int], StageStatus] = field(default_factory=dict)

    @property
    def cluster(self) -> ClusterSpec:
        assert self.run.spec.cluster is not None
        return self.run.spec.cluster

    def decide(self) -> Decision:
        self.begun = self.status
        self.conditions = Conditions(self.status, self.record.generation, self.now)
        self.conditions.set("Accepted", True, "Valid")
        if self.status.is_terminal:
            return self._after_the_end()
        self._drop_earlier_rounds()
        if self.record.is_cancelled:
            return self._end("Cancelled", "Cancelled", "cancelled; finished shards are kept")
        if self.run.spec.suspend:
            return self._suspend()
        self.conditions.set("Suspended", False, "Running")
        return self._advance()

    def _advance(self) -> Decision:
        plan = self._step("plan", 0)
        if plan.state == "Failed":
            return self._end("Failed", plan.reason, f"plan: {plan.message}")
        if plan.state != "Succeeded":
            return self._wait("Planning", plan)
        planned = self.status
        self.conditions.set("Planned", True, "Planned", f"{planned.missing_units} of {planned.units} units to extract")
        if not planned.missing_units:
            self.conditions.set("Extracted", True, "NothingMissing", "the store holds every unit")
        elif waiting := self._extract():
            return waiting
        reduce = self._step("reduce", 0)
        if reduce.state == "Failed":
            return self._end("Failed", reduce.reason, f"reduce: {reduce.message}")
        if reduce.state != "Succeeded":
            return self._wait("Reducing", reduce)
        self.conditions.set("Reduced", True, "Reduced")
        return self._end("Complete", "Complete", f"{self.status.selected} examples selected")

    def _extract(self) -> Decision | None:
        """Every group a step on. None once all units are there: a group that ends well has seen to every unit."""
        groups = [self._judge("extract", group) for group in range(self.cluster.groups)]
        done = [group for group in groups if group.state == "Succeeded"]
        failed = [group for group in groups if group.state == "Failed"]
        hopeless = [group for group in failed if group.reason in HOPELESS]
        is_over = bool(done or hopeless) or len(failed) == len(groups)
        groups = [self._keep(self._spare(group) if is_over else self._start_if_due(group)) for group in groups]
        # Groups that help each other may meet at a unit.
        units = min(self.status.missing_units or 0, sum(group.units or 0 for group in groups))
        self._note(groups=f"{len(done)}/{len(groups)}", shards=f"{units}/{self.status.missing_units}")
        if done:
            self.conditions.set("Extracted", True, "Extracted", f"{units} units")
            return None
        if hopeless or len(failed) == len(groups):
            worst = (hopeless or failed)[0]
            return self._end("Failed", worst.reason, f"extract, group {worst.group}: {worst.message}")
        return self._wait("Extracting", *groups)

    def _step(self, stage: Any, group: int) -> StageStatus:
        """Judge one stage's attempts, and start the next one where it is due."""
        return self._keep(self._start_if_due(self._judge(stage, group)))

    def _judge(self, stage: Any, group: int) -> StageStatus:
        """Look at a stage's attempt in hand, and at those after it that were made already."""
        entry, is_over = self.status.stage(stage, group), True
        while is_over and entry.state not in ("Succeeded", "Failed"):
            job = self._job_of(entry)
            if job is None and not entry.started:
                return self._judge_refusal(entry)
            entry, is_over = self._look(entry.model_copy(update={"started": True}), job)
        return entry

    def _judge_refusal(self, entry: StageStatus) -> StageStatus:
        """An attempt that was not made: a pod that breaks a rule never will be; a quota, or a policy, may let it pass yet."""
        refusal = self.seen.refused.get(self._name_of(entry))
        if refusal is None:
            return entry
        if refusal.code in (400, 422):
            return _failed(entry, INVALID_POD, f"its Job is refused: {refusal.message}")
        if self.now >= self._deadline(refusal.since):
            wait_seconds = self.cluster.startup_timeout_seconds
            return _failed(entry, STARTUP_TIMEOUT, f"its Job was refused for {wait_seconds} s: {refusal.message}")
        return entry

    def _written(self, entry: StageStatus) -> StageStatus:
        """As an earlier pass left it."""
        return self.begun.stage(entry.stage, entry.group)

    def _name_of(self, entry: StageStatus) -> str:
        return job_name(self.run.metadata.name, entry.stage, entry.group, self.status.round, entry.attempt)

    def _job_of(self, entry: StageStatus) -> Object | None:
        return self.seen.jobs.get(self._name_of(entry))

    def _deadline(self, since: datetime.datetime) -> datetime.datetime:
        """Until when a pod must run."""
        return since + datetime.timedelta(seconds=self.cluster.startup_timeout_seconds)

    def _keep(self, entry: StageStatus) -> StageStatus:
        self.stages[entry.stage, entry.group] = entry
        self._note(stages=self._all_stages())
        return entry

    def _spare(self, entry: StageStatus) -> StageStatus:
        """Once extraction is over, the groups still at it are stopped: that counts against none, and none begins again."""
        before = self.status.stage(entry.stage, entry.group)
        return before if entry.attempt != before.attempt or entry.reason.startswith("TooMany") else entry

    def _start_if_due(self, entry: StageStatus) -> StageStatus:
        if entry.started or entry.state in ("Succeeded", "Failed"):
            return entry
        due = parse_time(entry.not_before) if entry.not_before else self.now
        longest = datetime.timedelta(seconds=self.patience.longest_backoff_seconds)
        if self.now < due <= self.now + longest:  # later than that: the clock was set back
            self.again.append(due)
            return entry.model_copy(update={"state": "Waiting"})
        namespace, owner = self.record.namespace, self.record.owner_reference
        place = (entry.stage, entry.group)
        around = [*render.support(self.run, namespace, owner), *render.service(self.run, namespace, *place, owner)]
        job = render.job(self.run, namespace, *place, self.status.round, entry.attempt, owner)
        self.actions += [*(Apply(one) for one in around if Apply(one) not in self.actions), Create(job)]
        begun = entry.model_copy(update={"started": True, "state": "Pending", "not_before": None})
        refusal = self.seen.refused.get(self._name_of(entry))
        if refusal is None:
            return begun
        self.again.append(self._deadline(refusal.since))
        return begun.model_copy(
            update={"started": False, "message": sentence(f"its Job is refused: {refusal.message}")}
        )

    def _look(self, entry: StageStatus, job: Object | None) -> tuple[StageStatus, bool]:
        """How the attempt in hand stands; True where it is over, and the entry speaks of what comes after it."""
        if job is None or "deletionTimestamp" in job["metadata"]:
            if entry.reason == STARTUP_TIMEOUT:  # by us: it was given up, and the word of it lost
                return _failed(entry, STARTUP_TIMEOUT, entry.message), True
            kind: Any = "preempted" if entry.disrupted else "crashed"
            return self._again(entry, Ended(kind, "its Job was deleted by somebody else", self.now)), True
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

    def _again(self, entry: StageStatus, ended: Ended) -> StageStatus:
        """The entry of the next attempt, or of the stage's failure where it has had all its attempts."""
        counter, limit = ("restarts", self.cluster.max_restarts)
        wait_seconds = min(self.patience.backoff_seconds * 2**entry.restarts, self.patience.longest_backoff_seconds)
        if ended.kind == "preempted":
            counter, limit, wait_seconds = "preemptions", self.cluster.max_preemptions, 0.0
        count = getattr(entry, counter) + 1
        if count > limit:
            message = f"{ended.message} (attempt {entry.attempt + 1}; no more than {limit} {counter})"
            return _failed(entry, f"TooMany{counter.capitalize()}", message)
        due = ended.time + datetime.timedelta(seconds=wait_seconds)
        message = sentence(f"attempt {entry.attempt + 1}: {ended.message}")
        following = _next_attempt(entry).model_copy(update={counter: count, "message": message})
        return following.model_copy(update={"not_before": time_text(due)}) if wait_seconds else following

    def _watch(self, entry: StageStatus, job: Object, pods: list[Object]) -> tuple[StageStatus, bool]:
        """An attempt that goes on: does it run, why not, and is it stuck?"""
        entry, stuck = self._stuck(entry, job, pods)
        written = self._written(entry)
        if stuck and written.attempt == entry.attempt and written.disrupted:
            return self._again(entry, Ended("preempted", stuck, self.now)), True
        if stuck:  # said first, done after: whoever finds its Job gone must know why
            self.again.append(self.now)
            return entry.model_copy(update={"disrupted": True, "message": sentence(stuck)}), False
        note = self.seen.notes.get(job["metadata"]["name"], "")
        pending = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
        if len(pending) < len(pods):
            _, why = why_not_running(job, pending, note, self.cluster) if pending else ("", "")
            return entry.model_copy(update={"state": "Running", "message": sentence(why), "reason": ""}), False
        state, why = why_not_running(job, pods, note, self.cluster)
        entry = entry.model_copy(update={"state": state, "message": sentence(why), "reason": ""})
        if state == "Queued":
            return entry, False
        since = job.get("status", {}).get("startTime")
        if since is None:  # not taken up yet, or let go by a queue a moment ago: it starts to count then
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
        patience = datetime.timedelta(seconds=self.patience.stuck_seconds)
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

    def _is_untold(self, entry: StageStatus, pods: list[Object], ended: Ended) -> bool:
        """Whether a Job's end was told of before that of its pods, and this is soon enough to wait for it."""
        if are_told_ended(pods) and (ended.kind != "succeeded" or _has_last_words(entry, ended.words)):
            return False
        patience = datetime.timedelta(seconds=self.patience.untold_seconds)
        due = ended.time + patience
        if not self.now < due <= self.now + 2 * patience:  # later than that: our clock is not the cluster's
            return False
        self.again.append(due)
        return True

    def _succeed(self, entry: StageStatus, ended: Ended) -> StageStatus:
        """Take over the last words. A stage whose words are lost is done again: it finds its work done, and says so."""
        words = ended.words
        if not _has_last_words(entry, words):
            return self._again(entry, Ended("crashed", "it ended well, but its last words are lost", ended.time))
        if entry.stage == "plan":
            self._note(
                units=words["units"],
                missing_units=words["missing"],
                examples=words["examples"],
                pairs=words["pairs"],
                bad_rows=words["badRows"],
            )
        elif entry.stage == "reduce":
            bad = _count(words, "badRows")
            bad = self.status.bad_rows if bad is None else bad
            self._note(manifest=words["manifest"], selected=_count(words, "selected"), bad_rows=bad)
        units = _count(words, "units") if entry.stage == "extract" else None
        return entry.model_copy(update={"state": "Succeeded", "message": "", "units": units})

    def _suspend(self) -> Decision:
        self.actions += [one for one in _stop(self.record, self.seen) if one not in self.actions]
        entries = [self.status.stage(*place) for place in render.stages(self.cluster)]
        for entry in entries:
            if entry.state not in ("Succeeded", "Failed") and (entry.started or self._job_of(entry)):
                self.stages[entry.stage, entry.group] = _next_attempt(entry)
        self.conditions.set("Suspended", True, "Suspended", "spec.suspend is true")
        self._note(phase="Suspended", message="suspended; finished shards are kept", stages=self._all_stages())
        return self._decision()

    def _wait(self, phase: Phase, *entries: StageStatus) -> Decision:
        waits = sorted((entry for entry in entries if entry.message), key=lambda it: it.state == "Running")
        about = next((entry for entry in waits if entry.state in ("Waiting", "Queued", "Pending", "Running")), None)
        place = f"{about.stage} {about.group}" if about and about.stage == "extract" else about and about.stage
        self._note(phase=phase, message=sentence(f"{place}: {about.message}") if about else "")
        return self._decision()

    def _end(self, phase: Phase, reason: str, message: str) -> Decision:
        self.actions += [one for one in _stop(self.record, self.seen) if one not in self.actions]
        self.conditions.set("Complete", phase == "Complete", reason, message if phase == "Complete" else "")
        self.conditions.set("Failed", phase != "Complete", reason, message if phase != "Complete" else "")
        still = [entry for entry in self.status.stages if entry.state not in ("Succeeded", "Failed")]
        self.stages |= {(one.stage, one.group): one.model_copy(update={"state": "Stopped"}) for one in still}
        self._note(
            phase=phase, message=sentence(message), completion_time=time_text(self.now), stages=self._all_stages()
        )
        return self._decision()

    def _after_the_end(self) -> Decision:
        """A terminal phase stays. What still runs is stopped; the record goes when its time is over."""
        self.actions += [one for one in _stop(self.record, self.seen) if one not in self.actions]
        ttl, ended = self.run.spec.ttl_seconds_after_finished, self.status.completion_time
        if ttl is not None and ended:
            due = parse_time(ended) + datetime.timedelta(seconds=ttl)
            if self.now >= due:
                self.actions.append(_delete_record(self.record))
            else:
                self.again.append(due)
        return self._decision()

    def _drop_earlier_rounds(self) -> None:
        for job in self.seen.jobs.values():
            if job["metadata"].get("labels", {}).get(ROUND) != str(self.status.round) and _is_there(job):
                self.actions.append(self._delete(job))

    def _drop_earlier_attempts(self) -> None:
        """One Job at a time: those of attempts given up, and of a host that went on from an older status, are removed.

        So are those that ended, but for the latest.
        """
        at_work = {(one.stage, str(one.group)): one for one in self.status.stages}
        for job in self.seen.jobs.values():
            labels = job["metadata"].get("labels", {})
            entry, attempt = at_work.get((labels.get(STAGE), labels.get(GROUP_LABEL))), labels.get(ATTEMPT, "")
            is_of_round = labels.get(ROUND) == str(self.status.round) and attempt.isdecimal()
            if entry is None or not is_of_round or not _is_there(job):
                continue
            in_hand = entry.attempt + (entry.state == "Failed")  # of one that failed for good, none is
            if _is_finished(job):  # it was judged once that is written
                in_hand = self._written(entry).attempt - NUM_KEPT
            if int(attempt) >= in_hand:
                continue
            if (gone := self._delete(job)) not in self.actions:
                self.actions.insert(0, gone)

    def _delete(self, job: Object) -> Delete:
        return Delete("Job", self.record.namespace, job["metadata"]["name"], job["metadata"]["uid"])

    def _note(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)

    def _all_stages(self) -> tuple[StageStatus, ...]:
        kept: dict[tuple[str, int], StageStatus] = {(entry.stage, entry.group): entry for entry in self.status.stages}
        return tuple({**kept, **self.stages}.values())

    def _decision(self) -> Decision:
        self._drop_earlier_attempts()
        restarts = sum(entry.restarts + entry.preemptions for entry in self.status.stages)
        self._note(restarts=restarts, conditions=self.conditions.all())
        return Decision(tuple(self.actions), self.status, min(self.again, default=None))


def _count(words: Mapping[str, Any], name: str) -> int | None:
    """A number among last words; what an image of another version says there may be anything."""
    found = words.get(name)
    if not isinstance(found, int) or isinstance(found, bool):
        return None
    return found if 0 <= found < EXACT else None


def _has_last_words(entry: StageStatus, words: Mapping[str, Any]) -> bool:
    if entry.stage == "plan":
        return all(_count(words, name) is not None for name in ("units", "missing", "examples", "pairs", "badRows"))
    return entry.stage != "reduce" or bool(ADDRESS.fullmatch(str(words.get("manifest"))))


def _next_attempt(entry: StageStatus) -> StageStatus:
    return StageStatus(
        stage=entry.stage,
        group=entry.group,
        attempt=entry.attempt + 1,
        restarts=entry.restarts,
        preemptions=entry.preemptions,
    )


def _failed(entry: StageStatus, reason: str, message: str) -> StageStatus:
    return entry.model_copy(update={"state": "Failed", "reason": reason, "message": sentence(message)})


def _stop(record: Record, seen: Seen) -> list[Action]:
    """Delete the Jobs that still run; those that ended keep their pods and logs."""
    return [
        Delete("Job", record.namespace, job["metadata"]["name"], job["metadata"]["uid"])
        for job in seen.jobs.values()
        if _is_there(job) and not _is_finished(job)
    ]


def _delete_record(record: Record) -> Delete:
    return Delete(str(record.object["kind"]), record.namespace, record.metadata["name"], record.uid)


def _is_there(job: Object) -> bool:
    return "deletionTimestamp" not in job["metadata"]


def _is_finished(job: Object) -> bool:
    found = job.get("status", {}).get("conditions") or ()
    return any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in found)
