"""What to do next for one run: (record, what is seen, now) -> actions and status. Pure: no API call, no clock.

It looks at what is, not at what happened, so a lost event costs nothing, and whoever reconciles next goes on from the same
facts. Actions are done in order, the status is written last; a host that dies between two of them leaves a state from which
the same decision comes again. Here stands how a run flows from stage to stage; attempts.py knows how one stage fares.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

from launcher.reconcile.actions import Action, Decision, Delete, Observed, Timeouts
from launcher.reconcile.attempts import HOPELESS, Attempts, next_attempt
from launcher.reconcile.conditions import Conditions, sentence
from launcher.reconcile.failures import is_finished, is_there
from launcher.render.run_objects import stages
from launcher.resource.document import request_digest
from launcher.resource.names import ROUND_LABEL
from launcher.resource.record import Record
from launcher.resource.status import Phase, StageStatus, Status
from launcher.resource.timestamps import parse_time, time_text
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun


class UnknownStatus(SpecError):
    """A status that this version cannot go on from: not ours to continue, or to overwrite."""


def decide(record: Record, seen: Observed, now: datetime.datetime, patience: Timeouts | None = None) -> Decision:
    """One reconcile pass.

    Args:
        record: as last seen; its status is what an earlier pass wrote.
        seen: the run's children.
        now: the time; a clock that jumps costs at most a wait of `max_backoff_seconds`, or an early end of one.

    Raises:
        UnknownStatus: the round in hand is a later version's, or nobody's that we can read: nothing is done or written.
    """
    before = record.status
    if before.unknown and record.round <= before.round:
        words = ", ".join(dict.fromkeys(before.unknown))
        raise UnknownStatus(
            f"this version does not know what its status says: {words}{f' ({before.message})' if before.message else ''}",
            where=f"{record.namespace}/{record.name}",
            fix="let the version of PRISM that wrote it go on, or submit it under another name",
        )
    if record.is_deleting:
        return Decision((), before)
    try:
        run = record.parse()
    except SpecError as error:
        return _refuse(record, before, seen, error, now)
    begun = _begin(record, run, before, now)
    attempts = Attempts(record, run, seen, now, patience or Timeouts(), begun)
    return _Pass(record, run, seen, now, begun, attempts).decide()


def _refuse(record: Record, before: Status, seen: Observed, error: SpecError, now: datetime.datetime) -> Decision:
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
    seen: Observed
    now: datetime.datetime
    status: Status
    attempts: Attempts
    stages: dict[tuple[str, int], StageStatus] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.actions, self.again = self.attempts.actions, self.attempts.again

    def decide(self) -> Decision:
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
        groups = [self._judge("extract", group) for group in range(self.attempts.cluster.groups)]
        done = [group for group in groups if group.state == "Succeeded"]
        failed = [group for group in groups if group.state == "Failed"]
        hopeless = [group for group in failed if group.reason in HOPELESS]
        if done or hopeless or len(failed) == len(groups):
            groups = [self._keep(self.attempts.stop_group(group, has_succeeded=bool(done))) for group in groups]
        else:
            groups = [self._keep(self.attempts.start_if_due(group)) for group in groups]
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

    def _step(self, stage: str, group: int) -> StageStatus:
        """Judge one stage's attempts, and start the next one where it is due."""
        return self._keep(self.attempts.start_if_due(self._judge(stage, group)))

    def _judge(self, stage: str, group: int) -> StageStatus:
        entry = self.attempts.judge(stage, group)
        self._note(**self.attempts.facts)
        return entry

    def _keep(self, entry: StageStatus) -> StageStatus:
        self.stages[entry.stage, entry.group] = entry
        self._note(stages=self._all_stages())
        return entry

    def _suspend(self) -> Decision:
        self._stop_jobs()
        entries = [self.status.stage(*place) for place in stages(self.attempts.cluster)]
        for entry in entries:
            job = self.attempts.job_of(entry)
            if entry.state in ("Succeeded", "Failed") or (job is not None and is_there(job) and is_finished(job)):
                continue  # it has ended, which is judged once the run goes on
            if entry.started or job is not None:
                self.stages[entry.stage, entry.group] = next_attempt(entry)
        self.conditions.set("Suspended", True, "Suspended", "spec.suspend is true")
        self._note(phase="Suspended", message="suspended; finished shards are kept", stages=self._all_stages())
        return self._decision()

    def _wait(self, phase: Phase, *entries: StageStatus) -> Decision:
        waits = sorted((entry for entry in entries if entry.message), key=lambda it: it.state == "Running")
        about = next((entry for entry in waits if entry.state in ("Waiting", "Queued", "Pending", "Running")), None)
        self._note(phase=phase, message="")
        if about is not None:
            place = f"{about.stage} {about.group}" if about.stage == "extract" else about.stage
            self._note(message=sentence(f"{place}: {about.message}"))
        return self._decision()

    def _end(self, phase: Phase, reason: str, message: str) -> Decision:
        self._stop_jobs()
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
        self._stop_jobs()
        ttl, ended = self.run.spec.ttl_seconds_after_finished, self.status.completion_time
        if ttl is not None and ended:
            due = parse_time(ended) + datetime.timedelta(seconds=ttl)
            if self.now >= due:
                self.actions.append(_delete_record(self.record))
            else:
                self.again.append(due)
        return self._decision()

    def _stop_jobs(self) -> None:
        self.actions += [one for one in _stop(self.record, self.seen) if one not in self.actions]

    def _drop_earlier_rounds(self) -> None:
        for job in self.seen.jobs.values():
            if job["metadata"].get("labels", {}).get(ROUND_LABEL) != str(self.status.round) and is_there(job):
                self.actions.append(self.attempts.delete(job))

    def _note(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)

    def _all_stages(self) -> tuple[StageStatus, ...]:
        kept: dict[tuple[str, int], StageStatus] = {(entry.stage, entry.group): entry for entry in self.status.stages}
        return tuple({**kept, **self.stages}.values())

    def _decision(self) -> Decision:
        self.attempts.drop_earlier(self.status.stages)
        restarts = sum(entry.restarts + entry.preemptions for entry in self.status.stages)
        self._note(restarts=restarts, conditions=self.conditions.all())
        return Decision(tuple(self.actions), self.status, min(self.again, default=None))


def _stop(record: Record, seen: Observed) -> list[Action]:
    """Delete the Jobs that still run; those that ended keep their pods and logs."""
    return [
        Delete("Job", record.namespace, job["metadata"]["name"], job["metadata"]["uid"])
        for job in seen.jobs.values()
        if is_there(job) and not is_finished(job)
    ]


def _delete_record(record: Record) -> Delete:
    return Delete(str(record.object["kind"]), record.namespace, record.metadata["name"], record.uid)
