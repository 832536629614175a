"""One rank at work: its tasks one after the other, each pass in step with the other ranks of its world.

Does not know which tasks there are, or how a micro-batch is computed.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prism_job.errors import RequestError, Stopped, TransientError
from prism_job.extract import tokenise
from prism_job.extract.batch_size import BatchSize
from prism_job.extract.capture.forward_backward import forward, forward_and_backward
from prism_job.extract.capture.gradients import GradientCapture, LossCapture, refuse_non_finite
from prism_job.extract.capture.layers import Layers
from prism_job.extract.capture.representations import RepresentationCapture
from prism_job.extract.capture.row_format import HIDDEN_STATES, RowFormat
from prism_job.extract.distributed.watchdog import Watchdog
from prism_job.extract.distributed.world import World
from prism_job.extract.passes import Passes, PassTooLarge, is_out_of_memory
from prism_job.extract.tasks import Task
from prism_job.extract.uploads import Uploads
from prism_job.extract.work_unit import CandidateUnit, Preference, TargetTooLarge, TargetUnit
from prism_job.plan.checks import check_bad_fraction
from prism_job.plan.plan import Plan, Quarantined, Unit
from prism_job.progress import Meter
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows


class StopRequest:
    """While entered, SIGTERM sets a flag; the worker looks at it between micro-batches."""

    def __init__(self) -> None:
        self.is_requested = False
        self.handler_before: Callable[..., Any] | int | None = None

    def __enter__(self) -> Self:
        self.handler_before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "is_requested", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.handler_before)


@dataclass
class Worker:
    """One rank at work."""

    spec: RunSpec
    plan: Plan
    world: World
    store: Store
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    layers: Layers | None  # None: losses or hidden states are wanted, and each pass is forward only
    preference: Preference  # how a pair's weight π follows from its losses
    batch_size: BatchSize
    meter: Meter
    watchdog: Watchdog
    uploads: Uploads
    stop: StopRequest = field(default_factory=StopRequest)
    seconds: float = 0.0  # what the passes took
    audit_seconds: float = 0.0  # of these, the passes that only the audit needs
    num_cut: int = 0  # candidates and pairs that go on beyond maxLength; the audit's sample counts with its own unit
    quarantine: list[Quarantined] = field(default_factory=list)
    passes: Passes | None = None  # with the matrices of the current row formats, and of no others
    max_tokens: dict[tuple[RowFormat, ...], int] = field(default_factory=dict)  # what fitted, of the formats before
    num_passes: int = 0

    def run(self, tasks: Iterable[Task], first: Task) -> None:
        """Write the shards of these tasks that nobody has written yet. For its errors see `stages/extract.py`.

        Args:
            first: of the whole world's tasks; its texts are those of measurements.
        """
        try:
            self._run(tasks, first)
        except PassTooLarge as error:
            if not self.batch_size.is_auto:
                raise
            fix = f"run again: micro-batches will have at most {self.batch_size.halve()} tokens"
            raise TransientError(error.what, where=error.where, fix=fix) from error

    def _run(self, tasks: Iterable[Task], first: Task) -> None:
        with self.stop, self.uploads:
            self.watchdog.step("reading the first unit")
            self.batch_size.choose(lambda: self._texts_of(first), lambda texts: self._seconds_of(first, texts))
            for task in tasks:
                if (missing := self._without_what_is_there(task)) is not None:
                    self._extract_or_refuse_audit(missing)
            # A pass gathers the shared weights on all ranks or on none.
            while self._next_pass(has_work=False):
                self._pass_without_work()
        self.watchdog.step("all passes done, waiting for the other ranks")

    def _without_what_is_there(self, task: Task) -> Task | None:
        # Checked again: another group, or this run before a kill, may have written a shard since the plan was made.
        outputs = tuple(
            output
            for output in task.outputs
            if not self.store.exists(shards.shard_key(output.extractor, output.kind, task.unit.id))
        )
        return replace(task, outputs=outputs) if outputs else None

    def _extract_or_refuse_audit(self, task: Task) -> None:
        try:
            return self._extract(task)
        except (MemoryError, RuntimeError, TargetTooLarge) as error:
            is_memory = isinstance(error, TargetTooLarge) or is_out_of_memory(error)
            if not is_memory or not any(output.for_audit for output in task.outputs):
                raise
            cause = error.with_traceback(None)  # which holds the tensors that did not fit
        outputs = tuple(output for output in task.outputs if not output.for_audit)
        if outputs:
            self._extract(replace(task, outputs=outputs))  # raises where the run's own rows do not fit either
        dim = 2 * self.spec.extraction.projection.dim
        what = f"the audit does not fit into memory: its rows have {dim} projected dims a side, twice those of the run"
        fix = "set audit: {examples: 0}, or lower extraction.projection.dim"
        raise RequestError(what, where="spec.audit", fix=fix) from cause

    def _extract(self, task: Task) -> None:
        """One unit through the model, to the uploads."""
        passes = self._passes_for(task.row_formats)
        unit = self._unit(task, passes)
        self._refuse_too_many_bad_rows(task, unit.quarantined)
        for micro_batch in unit.micro_batches(self.batch_size.current):
            self._next_pass(has_work=True)
            started = time.monotonic()
            computed = passes.compute(micro_batch.examples, mean=unit.mean, factors=unit.factors)
            for gradients in computed.gradients:
                refuse_non_finite(gradients, micro_batch.names, task.where)
            seconds = time.monotonic() - started
            self.seconds += seconds
            self.audit_seconds += seconds if task.is_for_audit else 0
            self.watchdog.step(f"pass {self.num_passes}, storing its rows and reading the next")
            self.meter.add(micro_batch.num_new, sum(len(example.ids) for example in micro_batch.examples))
            unit.store(micro_batch, computed)
        self._refuse_too_many_bad_rows(task, unit.quarantined)
        self.num_cut += 0 if task.is_for_audit else unit.num_cut
        self.uploads.put(task.unit, unit.shards())

    def _unit(self, task: Task, passes: Passes) -> TargetUnit | CandidateUnit:
        rows = staged_rows.read_rows(self.store, task.unit.rows)
        if task.is_targets:
            return TargetUnit(task, rows, self.tokenizer, self.spec, passes.capture, self.preference)
        return CandidateUnit(task, rows, self.tokenizer, self.spec, passes.capture)

    def _passes_for(self, row_formats: tuple[RowFormat, ...]) -> Passes:
        if self.passes is None or self.passes.capture.row_formats != row_formats:
            if self.passes:
                self.max_tokens[self.passes.capture.row_formats] = self.passes.max_tokens
            self.passes = None  # frees its matrices, gigabytes of a large model, before others are built
            capture: GradientCapture | LossCapture
            if self.layers is not None:
                capture = GradientCapture(self.model, self.layers, row_formats)
            else:
                capture = (RepresentationCapture if row_formats == (HIDDEN_STATES,) else LossCapture)(self.model)
            can_halve = not (self.world.sharded and self.world.size > 1)
            self.passes = Passes(capture, can_halve=can_halve, max_tokens=self.max_tokens.get(row_formats, sys.maxsize))
        return self.passes

    def _texts_of(self, task: Task) -> list[tokenise.Encoded]:
        return [*self._unit(task, self._passes_for(task.row_formats)).encoded.values()]

    def _seconds_of(self, task: Task, texts: list[tokenise.Encoded]) -> float | None:
        """The faster of two passes of these texts as texts of this task: the first of a shape pays for its preparation."""
        passes, seconds = self._passes_for(task.row_formats), []
        for _ in range(2):
            self._next_pass(has_work=True)
            started = time.monotonic()
            num_tokens_before = passes.max_tokens
            passes.compute(texts, mean=task.is_targets)
            if passes.max_tokens < num_tokens_before:
                return None
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            seconds.append(time.monotonic() - started)
        return min(seconds)

    def _next_pass(self, *, has_work: bool) -> bool:
        """Wait until all ranks of a world that shares its weights are here. Whether any of them has work."""
        self.watchdog.step(f"pass {self.num_passes}, waiting for the other ranks")
        any_work, any_stop = self.world.any_rank(has_work, self.stop.is_requested)
        if any_stop:
            fix = "run again: finished units are kept, only the current unit is computed again"
            raise Stopped("stopped by SIGTERM", where="extract", fix=fix)
        self.watchdog.step(f"pass {self.num_passes}, computing")
        self.num_passes += 1
        return any_work

    def _pass_without_work(self) -> None:
        batch = tokenise.collate([tokenise.Encoded([0, 0], [False, True])], self.world.device)
        try:
            (forward_and_backward if self.layers else forward)(self.model, batch, torch.float32)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fix = "free memory, or give each rank a larger share of the model (more ranks or nodes)"
            raise TransientError("out of memory in a pass without work", where="extract", fix=fix) from error

    def _refuse_too_many_bad_rows(self, task: Task, quarantined: dict[int, str]) -> None:
        """Counted against the whole plan, so that a run that must fail fails at the first unit that proves it."""
        if not isinstance(task.unit, Unit):  # the audit's sample: its rows count where they stand in the data
            return
        lines = list(task.unit.line_numbers())
        known = {(entry.source, entry.line) for entry in self.quarantine}
        self.quarantine += [
            Quarantined(source=task.origin, line=lines[index], reason=reason)
            for index, reason in quarantined.items()
            if (task.origin, lines[index]) not in known
        ]
        num_good = self.plan.num_examples - len(self.quarantine)
        check_bad_fraction([*self.plan.quarantine, *self.quarantine], num_good, self.spec)
