"""What to do next for one run: (record, observed objects, now) -> actions and status. Pure: no API call, no clock.

The decision depends on what exists, not on what happened: a lost event costs nothing, and any host can continue. Actions are
executed in order and the status is written last; if a host dies in between, the next pass decides the same again. This file
has the flow of a run from stage to stage. The attempts at one stage are in attempts.py, what a failure leads to in
failure_policy.py.
"""

import datetime
from dataclasses import dataclass, field
from typing import Any

from launcher.reconcile.actions import Action, Decision, Delete, Observed, Timeouts
from launcher.reconcile.attempts import ENDED, Attempts, next_attempt
from launcher.reconcile.child_status import is_being_deleted, is_finished
from launcher.reconcile.conditions import Conditions, sentence
from launcher.reconcile.failure_policy import RUN_FAILING_REASONS
from launcher.reconcile.gpu_time import GpuTime, are_gpus_known
from launcher.render.run_objects import stages
from launcher.resource.document import request_digest
from launcher.resource.names import ROUND_LABEL
from launcher.resource.record import Record
from launcher.resource.status import PENDING, Phase, StageStatus, Status, parse_time, time_text
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun
from prism_job.spec.used import variables_of


class UnknownStatus(SpecError):
    """A status that this version cannot read: it neither continues the run nor overwrites the status."""


def decide(record: Record, observed: Observed, now: datetime.datetime, timeouts: Timeouts | None = None) -> Decision:
    """One reconcile pass.

    Args:
        record: as last read; its status is what an earlier pass wrote.
        observed: the run's children.
        now: the time. A clock that jumps costs at most a wait of `max_backoff_seconds`, or ends one early.

    Raises:
        UnknownStatus: the current round was written by a later version, or cannot be read. Nothing is done or written.
    """
    before = record.status
    if before.unknown and record.round <= before.round:
        words = ", ".join(dict.fromkeys(before.unknown))
        raise UnknownStatus(
            f"the status has values that this version does not know: {words}"
            f"{f' ({before.message})' if before.message else ''}",
            where=f"{record.namespace}/{record.name}",
            fix="let the version of PRISM that wrote it continue the run, or submit it under another name",
        )
    if record.is_deleting:
        return Decision((), before)
    try:
        run = record.parse()
    except SpecError as error:
        return _reject(record, before, observed, error, now)
    status = _continue_or_begin_round(record, run, before, observed, now)
    attempts = Attempts(record, run, observed, now, timeouts or Timeouts(), status)
    return _ReconcilePass(record, run, observed, now, status, attempts).decide()


def _reject(record: Record, before: Status, observed: Observed, error: SpecError, now: datetime.datetime) -> Decision:
    """A document that cannot be run: reported once, without a crash loop. A corrected one starts normally."""
    is_new_round = record.round > before.round
    conditions = Conditions(before, record.generation, now)
    if before.is_terminal and before.holds("Accepted") and not is_new_round:
        # It has run already: a terminal phase stays.
        changes = {"observed_generation": record.generation, "conditions": conditions.all()}
        return Decision((), before.model_copy(update=changes))
    conditions.set("Accepted", False, "InvalidSpec", str(error.what))
    conditions.end(complete=False, reason="InvalidSpec", message=str(error.what))
    status = Status(
        observed_generation=record.generation,
        round=record.round,
        phase="Failed",
        message=sentence(f"{error.what}; {error.fix}"),
        completion_time=(None if is_new_round else before.completion_time) or time_text(now),
        gpu_seconds=before.gpu_seconds,
        gpu=before.gpu,
        price=before.price,
        webhook=None if is_new_round else before.webhook,
        conditions=conditions.all(),
    )
    return Decision(tuple(_delete_unfinished_jobs(record, observed)), status)


def _continue_or_begin_round(
    record: Record, run: SelectionRun, before: Status, observed: Observed, now: datetime.datetime
) -> Status:
    """The status as it was, or a fresh one where a round begins. GPU time counts through all rounds."""
    if before.start_time and before.holds("Accepted") and run.spec.retry <= before.round:
        return before.model_copy(update={"observed_generation": record.generation})
    return Status(
        observed_generation=record.generation,
        round=run.spec.retry,
        request=request_digest(run),
        start_time=time_text(now),
        gpu_seconds=before.gpu_seconds + GpuTime(run, observed, before, now).running(before.stages),
        gpu=before.gpu,
        conditions=before.conditions,
    )


@dataclass
class _ReconcilePass:
    """One pass over one accepted run: stage after stage, until one has not ended."""

    record: Record
    run: SelectionRun
    observed: Observed
    now: datetime.datetime
    status: Status
    attempts: Attempts
    stages: dict[tuple[str, int], StageStatus] = field(default_factory=dict)

    def decide(self) -> Decision:
        self.actions, self.requeue_times = self.attempts.actions, self.attempts.requeue_times
        self.conditions = Conditions(self.status, self.record.generation, self.now)
        self.gpu_time = GpuTime(self.run, self.observed, self.status, self.now)
        self.conditions.set("Accepted", True, "Valid")
        if self.status.is_terminal:
            return self._clean_up()
        self._delete_jobs_of_earlier_rounds()
        if self.record.is_cancelled:
            return self._end_run("Cancelled", "Cancelled", "cancelled; finished shards are kept")
        if self.run.spec.suspend:
            return self._suspend()
        self.conditions.set("Suspended", False, "Running")
        return self._advance()

    def _advance(self) -> Decision:
        plan = self._observe_and_start("plan")
        if plan.state == "Failed":
            return self._end_run("Failed", plan.reason, f"plan: {plan.message}")
        if plan.state != "Succeeded":
            return self._wait("Planning", plan)
        num_missing, num_units = self.status.missing_units, self.status.units
        self.conditions.set("Planned", True, "Planned", f"{num_missing} of {num_units} units to extract")
        if not num_missing:
            self.conditions.set("Extracted", True, "NothingMissing", "the store holds every unit")
        elif unfinished := self._extract():
            return unfinished
        gpu_seconds = self._ended_gpu_seconds() + self.gpu_time.running(self.stages.values())
        if are_gpus_known(self.run):
            used = {"gpuSeconds": gpu_seconds, "gpu": self.status.gpu}
            self.attempts.used = variables_of(used, self.run.spec.gpu_hour_price)
        reduce = self._observe_and_start("reduce")
        if reduce.state == "Failed":
            return self._end_run("Failed", reduce.reason, f"reduce: {reduce.message}")
        if reduce.state != "Succeeded":
            return self._wait("Reducing", reduce)
        self.conditions.set("Reduced", True, "Reduced")
        warning = f"; {reduce.message}" if reduce.message else ""
        return self._end_run("Complete", "Complete", f"{self.status.selected} examples selected{warning}")

    def _extract(self) -> Decision | None:
        """All groups, one step. None once every unit is stored: a group succeeds only if no unit is missing any more."""
        groups = [self._observe("extract", group) for group in range(self.attempts.cluster.groups)]
        done = [group for group in groups if group.state == "Succeeded"]
        failed = [group for group in groups if group.state == "Failed"]
        run_failing = [group for group in failed if group.reason in RUN_FAILING_REASONS]
        is_over = bool(done or run_failing or len(failed) == len(groups))
        if is_over:
            groups = [self._keep(self.attempts.stop_group(group, has_succeeded=bool(done))) for group in groups]
        else:
            groups = [self._keep(self.attempts.start_if_due(group)) for group in groups]
        # Two groups may have extracted the same unit.
        num_units = min(self.status.missing_units or 0, sum(group.units or 0 for group in groups))
        self._set(groups=f"{len(done)}/{len(groups)}", shards=f"{num_units}/{self.status.missing_units}")
        if done:
            self.conditions.set("Extracted", True, "Extracted", f"{num_units} units")
            return None
        if is_over:
            worst = (run_failing or failed)[0]
            return self._end_run("Failed", worst.reason, f"extract, group {worst.group}: {worst.message}")
        return self._wait("Extracting", *groups)

    def _observe_and_start(self, stage: str) -> StageStatus:
        return self._keep(self.attempts.start_if_due(self._observe(stage, 0)))

    def _observe(self, stage: str, group: int) -> StageStatus:
        entry = self.attempts.observe_stage(stage, group)
        self._set(**self.attempts.results)
        return entry

    def _keep(self, entry: StageStatus) -> StageStatus:
        self.stages[entry.stage, entry.group] = entry
        self._set(stages=self._all_stages())
        return entry

    def _suspend(self) -> Decision:
        """Stop the Jobs. A stage whose Job is stopped has another attempt later, which counts as no restart."""
        self._delete_unfinished_jobs()
        for entry in [self.status.stage(*stage_and_group) for stage_and_group in stages(self.attempts.cluster)]:
            job = self.attempts.job(entry)
            if entry.state in ENDED or (job is not None and not is_being_deleted(job) and is_finished(job)):
                continue  # its outcome is read once the run is resumed
            if entry.started or job is not None:
                self.stages[entry.stage, entry.group] = next_attempt(entry)
        self.conditions.set("Suspended", True, "Suspended", "spec.suspend is true")
        self._set(phase="Suspended", message="suspended; finished shards are kept", stages=self._all_stages())
        return self._decision()

    def _wait(self, phase: Phase, *entries: StageStatus) -> Decision:
        """The run's message is that of a stage that waits, else of one that runs."""
        with_message = sorted((entry for entry in entries if entry.message), key=lambda it: it.state == "Running")
        shown = next((one for one in with_message if one.state in ("Waiting", "Queued", "Pending", "Running")), None)
        self._set(phase=phase, message="")
        if shown is not None:
            title = f"{shown.stage} {shown.group}" if shown.stage == "extract" else shown.stage
            self._set(message=sentence(f"{title}: {shown.message}"))
        return self._decision()

    def _end_run(self, phase: Phase, reason: str, message: str) -> Decision:
        self._delete_unfinished_jobs()
        self.conditions.end(complete=phase == "Complete", reason=reason, message=message)
        for entry in self.status.stages:
            if entry.state not in ENDED:
                self.stages[entry.stage, entry.group] = entry.model_copy(update={"state": "Stopped"})
        self._set(
            phase=phase, message=sentence(message), completion_time=time_text(self.now), stages=self._all_stages()
        )
        return self._decision()

    def _clean_up(self) -> Decision:
        """A terminal phase stays. Jobs that still run are stopped; the record is deleted when its time to live is over."""
        self._delete_unfinished_jobs()
        ttl_seconds, ended = self.run.spec.ttl_seconds_after_finished, self.status.completion_time
        if ttl_seconds is not None and ended:
            if self.status.webhook == PENDING:  # not for ever: no operator may be left that has a webhook
                ttl_seconds = max(ttl_seconds, int(2 * self.attempts.timeouts.webhook_seconds))
            due = parse_time(ended) + datetime.timedelta(seconds=ttl_seconds)
            if self.now >= due:
                kind, namespace, name = self.record.kind, self.record.namespace, self.record.metadata["name"]
                self.actions.append(Delete(kind, namespace, name, self.record.uid))
            else:
                self.requeue_times.append(due)
        return self._decision()

    def _delete_unfinished_jobs(self) -> None:
        deletions = _delete_unfinished_jobs(self.record, self.observed)
        self.actions += [one for one in deletions if one not in self.actions]

    def _delete_jobs_of_earlier_rounds(self) -> None:
        for job in self.observed.jobs.values():
            job_round = job["metadata"].get("labels", {}).get(ROUND_LABEL)
            if job_round != str(self.status.round) and not is_being_deleted(job):
                self.actions.append(self.attempts.delete_job(job))

    def _set(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)

    def _ended_gpu_seconds(self) -> int:
        """Of all attempts that have ended until now."""
        return self.gpu_time.found.gpu_seconds + self.gpu_time.ended_since(self.stages.values())

    def _all_stages(self) -> tuple[StageStatus, ...]:
        before = {(entry.stage, entry.group): entry for entry in self.status.stages}
        return tuple({**before, **self.stages}.values())

    def _decision(self) -> Decision:
        self.attempts.delete_superseded_jobs(self.status.stages)
        restarts = sum(entry.restarts + entry.preemptions for entry in self.status.stages)
        gpu_seconds = self._ended_gpu_seconds()
        has_price = self.run.spec.gpu_hour_price is not None and are_gpus_known(self.run)
        price = self.run.spec.price_of(gpu_seconds / 3600) if has_price else None
        self._set(restarts=restarts, gpu_seconds=gpu_seconds, price=price, conditions=self.conditions.all())
        return Decision(tuple(self.actions), self.status, min(self.requeue_times, default=None))


def _delete_unfinished_jobs(record: Record, observed: Observed) -> list[Action]:
    """Jobs that have ended keep their pods and logs."""
    return [
        Delete("Job", record.namespace, job["metadata"]["name"], job["metadata"]["uid"])
        for job in observed.jobs.values()
        if not is_being_deleted(job) and not is_finished(job)
    ]
