"""The extract stage: for every unit the store lacks, its rows through the model, and one atomic put."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from prism_job.errors import DataError, RequestError, Stopped, TransientError
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import GradientBatch, GradientCapture, refuse_non_finite, rows_of
from prism_job.extract.distributed.spawner import spawn_ranks
from prism_job.extract.distributed.watchdog import Watchdog
from prism_job.extract.distributed.world import Topology, World, shard_weights, zero3_settings
from prism_job.extract.model import Layers, captured_layers, load_model, load_tokenizer
from prism_job.extract.uploads import Shard, Uploads
from prism_job.extract.work_unit import CandidateUnit, Computed, Pass, Passes, TargetTooLarge, TargetUnit
from prism_job.plan.checks import check_bad_fraction
from prism_job.plan.extractor import audit_spec, extractor_parts
from prism_job.plan.plan import Block, Plan, Quarantined, Unit, read_plan
from prism_job.progress import Meter, event
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows


def extract(run: SelectionRun, topology: Topology, arguments: list[str]) -> dict[str, Any]:
    """Write the shards that the plan's store lacks: here, or by one process a rank. Returns the last words.

    Args:
        arguments: those of this stage, handed to each rank as they are.

    Raises:
        RequestError: no plan, a model that cannot be captured, or an audit that does not fit into memory.
        DataError: the model changed since the plan; non-finite weights or gradients; too many bad rows.
        RankFailed: a rank ended badly.
        Stopped: SIGTERM came; the micro-batch in hand is done, the unit in hand is lost.
    """
    plan = read_plan(run)
    if not plan.num_missing:
        return {"units": 0, "examples": 0, "tokens": 0, "seconds": 0.0, "auditSeconds": 0.0}
    if "RANK" not in os.environ:
        _refuse_changed_model(run.spec, plan)
        topology = replace(topology, ranks=topology.ranks or max(1, torch.cuda.device_count()))
        if topology.ranks * topology.nodes > 1:
            return spawn_ranks(arguments, topology)
    with Watchdog(run.spec.extraction.step_timeout_seconds) as watchdog:
        return _work(run.spec, plan, topology, watchdog)


def _work(spec: RunSpec, plan: Plan, topology: Topology, watchdog: Watchdog) -> dict[str, Any]:
    deepspeed, limit_seconds = spec.extraction.deepspeed, spec.extraction.step_timeout_seconds
    world = World.join(topology, deepspeed, limit_seconds)
    event("loading", model=spec.model.uri, device=str(world.device))
    tokenizer = load_tokenizer(spec.model)
    settings = zero3_settings(deepspeed, spec.model.dtype) if world.sharded else None
    model = load_model(spec.model, world.device, settings)
    layers = captured_layers(model, spec.extraction.layers)
    _refuse_unfitting(spec, model.config, layers)
    engine = shard_weights(model, settings) if settings else None  # held: its hooks gather the weights
    worker = _Worker.start(spec, plan, world, tokenizer, model if engine is None else engine.module, layers, watchdog)
    with worker.stop, worker.uploads:
        worker.drive(worker.all_passes())
    watchdog.step("all passes done, waiting for the other ranks")
    world.leave()
    worker.meter.report()
    seconds = [form.seconds for form in (worker.own, worker.audit) if form is not None]
    return {
        "units": worker.uploads.num_written,
        "examples": worker.meter.done,
        "tokens": worker.meter.tokens,
        "seconds": round(sum(seconds), 3),
        "auditSeconds": round(sum(seconds[1:]), 3),
    }


def _refuse_changed_model(spec: RunSpec, plan: Plan) -> None:
    if digest(extractor_parts(spec)) != plan.extractor:
        raise DataError(
            "the model or the extraction settings are not those of the plan",
            where=spec.model.uri,
            fix="run the plan stage again: it finds what the new extractor lacks",
        )


def _refuse_unfitting(spec: RunSpec, config: Any, layers: Layers) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions and spec.extraction.max_length > positions:
        raise RequestError(
            f"maxLength {spec.extraction.max_length} is more than the model's {positions} positions",
            where="spec.extraction.maxLength",
            fix=f"set it to {positions} or less",
        )
    dim, codec = spec.extraction.projection.dim, spec.extraction.codec
    unfolded_dims = len(layers.modules) * dim**2
    if codec.kind == "sign" and codec.dims > unfolded_dims:
        raise RequestError(
            f"codec.dims {codec.dims} is more than the {unfolded_dims} dims there are to fold "
            f"({len(layers.modules)} layers × {dim}²)",
            where="spec.extraction.codec.dims",
            fix=f"set it to {2 ** (unfolded_dims.bit_length() - 1)} or less, or raise projection.dim",
        )


@dataclass(eq=False)
class _Form:
    """One form of rows, that of the request or that of its audit, and what the store lacks of it.

    Attributes:
        spec: the request with the projection and codec of this form.
        seconds: what its passes took.
    """

    spec: RunSpec
    extractor: str
    missing: Mapping[shards.Kind, list[str]]
    model: Any
    layers: Layers
    seconds: float = 0.0

    def lacked(self, kind: shards.Kind, unit: Block) -> bool:
        """At the time of the plan."""
        return unit.id in self.missing[kind] or (kind == "candidates" and unit.id in self.missing["factors"])

    def let_go(self) -> None:
        """Its matrices, gigabytes of a large model; built again where they are needed again."""
        for name in ("folded", "unfolded"):
            vars(self).pop(name, None)

    @cached_property
    def folded(self) -> GradientCapture:
        """Built when first needed: a run whose audit is there already holds no matrices for it."""
        projected, codec = self.spec.extraction.projection, self.spec.extraction.codec
        fold_dims = codec.dims if codec.kind == "sign" else None
        return GradientCapture(self.model, self.layers, projected.dim, projected.seed, fold_dims)

    @cached_property
    def unfolded(self) -> GradientCapture:
        return self.folded.unfolded()


@dataclass
class _Worker:
    """One rank at work: its units one after the other, each pass in lockstep with its world."""

    spec: RunSpec
    plan: Plan
    world: World
    store: Store
    tokenizer: PreTrainedTokenizerBase
    own: _Form
    audit: _Form | None
    meter: Meter
    stop: _StopSignal
    watchdog: Watchdog
    uploads: Uploads
    bad: list[Quarantined] = field(default_factory=list)
    tokens_that_fit: dict[tuple[int, ...], int] = field(default_factory=dict)
    in_hand: str = "extract"
    form: _Form = field(init=False)

    @staticmethod
    def start(
        spec: RunSpec,
        plan: Plan,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        model: Any,
        layers: Layers,
        watchdog: Watchdog,
    ) -> _Worker:
        missing: dict[shards.Kind, list[str]] = {
            "candidates": plan.missing_candidates,
            "targets": plan.missing_targets,
            "factors": plan.missing_factors,
        }
        own, audit = _Form(spec, plan.extractor, missing, model, layers), None
        if plan.audit is not None:
            missing = {
                "candidates": plan.audit.missing_candidates,
                "sums": plan.audit.missing_sums,
                "factors": plan.audit.missing_factors,
            }
            audit = _Form(audit_spec(spec), plan.audit.extractor, missing, model, layers)
        num_rows = sum(unit.num_rows for unit, _ in _work_of(plan, own, audit))
        store = open_store(spec.store)
        return _Worker(
            spec,
            plan,
            world,
            store,
            tokenizer,
            own,
            audit,
            Meter("extract", num_rows),
            _StopSignal(),
            watchdog,
            Uploads(store),
        )

    def drive(self, passes: Passes) -> None:
        """Make each pass that is wanted, together with the other ranks, until no rank wants one."""
        number = 0
        self.watchdog.step("reading the first unit")
        wanted = next(passes, None)
        while True:
            self.watchdog.step(f"pass {number}, waiting for the other ranks")
            any_work, stopping = self.world.agree(has_work=wanted is not None, stopping=self.stop.asked)
            if stopping:
                fix = "run again: finished units are kept, only the unit in hand is computed anew"
                raise Stopped("stopped by SIGTERM", where="extract", fix=fix)
            if not any_work:
                return
            self.watchdog.step(f"pass {number}, computing")
            if wanted is None:
                self._compute(self._dummy())  # The weights of this pass are gathered by all ranks or by none.
            else:
                started = time.monotonic()
                computed = self._compute(wanted)
                self.form.seconds += time.monotonic() - started
                self.meter.add(wanted.num_new, sum(len(example.ids) for example in wanted.batch))
                self.watchdog.step(f"pass {number}, between passes")
                try:
                    wanted = passes.send(computed)
                except StopIteration:
                    wanted = None
            number += 1

    def all_passes(self) -> Passes:
        """The passes of every unit of this rank's share that nobody has written yet; hands its shards to the uploads."""
        for unit, forms in self.world.share(_work_of(self.plan, self.own, self.audit)):
            try:
                if "candidates" in forms.values():
                    (self.form,) = forms
                    if self.audit is not None and self.form is self.own:
                        self.audit.let_go()
                    yield from self._candidate_passes(self.form, unit)
                else:
                    yield from self._target_passes(cast(Unit, unit), forms)
            except (MemoryError, RuntimeError, TargetTooLarge) as error:
                if self.form is self.audit and (isinstance(error, TargetTooLarge) or _is_out_of_memory(error)):
                    raise _audit_does_not_fit(self.spec) from error
                raise

    def _candidate_passes(self, form: _Form, unit: Block) -> Passes:
        wants_rows, wants_factors = self._lacks(form, "candidates", unit), self._lacks(form, "factors", unit)
        if not wants_rows and not wants_factors:
            return
        where = self.plan.sources[unit.source] if isinstance(unit, Unit) else "the audit's sample"
        self.in_hand = f"{where}, unit {unit.id}"
        unit_rows = staged_rows.read_rows(self.store, unit.rows)
        found = CandidateUnit.read(unit_rows, self.tokenizer, form.spec, form.folded, factors=wants_factors)
        self._check_quarantine(unit, found.quarantined)
        yield from found.passes(form.folded, form.spec)
        self._check_quarantine(unit, found.quarantined)
        shards_of_unit: list[Shard] = []
        # Factors first: whoever sees the unit's rows may trust that the factors the plan wanted are there too.
        if found.factors is not None:
            shards_of_unit.append(
                (form.extractor, "factors", found.factor_arrays(), {"num_tokens": found.factors.num_tokens})
            )
        if wants_rows:
            quarantined = {str(place): reason for place, reason in found.quarantined.items()}
            shards_of_unit.append((form.extractor, "candidates", found.arrays(), {"quarantined": quarantined}))
        self.uploads.put(unit, shards_of_unit)

    def _target_passes(self, unit: Unit, forms: Mapping[_Form, shards.Kind]) -> Passes:
        forms = {form: kind for form, kind in forms.items() if self._lacks(form, kind, unit)}
        if not forms:
            return
        source = self.plan.target_sources[unit.source]
        self.in_hand = f"{source}, unit {unit.id}"
        unit_rows = staged_rows.read_rows(self.store, unit.rows)
        captures = []
        for form in forms:
            self.form = form  # whose matrices are built here, and may fit no memory
            captures.append(form.unfolded)
        self.form = next(iter(forms))  # the audit's rows come out of the request's own passes
        found = TargetUnit.read(unit, source, unit_rows, self.spec, captures)
        yield from found.passes(captures, self.tokenizer, self.spec)
        shards_of_unit: list[Shard] = []
        for number, (form, kind) in enumerate(forms.items()):
            arrays = found.sums(number) if kind == "sums" else found.arrays(number)
            notes = {"layers": form.layers.names, "dim": form.unfolded.dim}
            shards_of_unit.append((form.extractor, kind, arrays, notes))
        self.uploads.put(unit, shards_of_unit)

    def _lacks(self, form: _Form, kind: shards.Kind, unit: Block) -> bool:
        # Looked up again: another group, or this run before a kill, may have written it since the plan.
        return unit.id in form.missing[kind] and not self.store.exists(shards.shard_key(form.extractor, kind, unit.id))

    def _check_quarantine(self, unit: Block, quarantined: dict[int, str]) -> None:
        if not isinstance(unit, Unit):  # the audit's: its rows count where they stand in the data
            return
        source, lines = self.plan.sources[unit.source], list(unit.line_numbers())
        known = {(entry.source, entry.line) for entry in self.bad}
        self.bad += [
            Quarantined(source=source, line=lines[place], reason=reason)
            for place, reason in quarantined.items()
            if (source, lines[place]) not in known
        ]
        # Counted against the whole plan, so a run that must fail in the end fails at the first unit that proves it.
        check_bad_fraction([*self.plan.quarantine, *self.bad], self.plan.num_examples - len(self.bad), self.spec)

    def _compute(self, wanted: Pass) -> Computed:
        """One pass; where it does not fit into memory, its halves, and from then on nothing larger than a half."""
        size, longest = len(wanted.batch), max(len(example.ids) for example in wanted.batch)
        widths = tuple(capture.width for capture in wanted.captures)
        if size > 1 and size * longest > self.tokens_that_fit.get(widths, 2**62):
            return self._halves(wanted)
        try:
            with ExitStack() as entered:
                for capture in wanted.captures:
                    entered.enter_context(capture)
                batch = tokenise.collate(wanted.batch, wanted.captures[0].device)
                found = rows_of(wanted.captures, batch, mean=wanted.mean, factors=wanted.factors)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._shrink(widths, size * longest, error)
        else:
            for rows in found:
                refuse_non_finite(rows, wanted.names, self.in_hand)
            return Computed(found, [])
        if size > 1:
            return self._halves(wanted)
        if len(widths) > 1 and not self._compute(replace(wanted, captures=wanted.captures[:1])).too_large:
            raise _audit_does_not_fit(self.spec)
        return Computed([_zero_rows(capture) for capture in wanted.captures], [0])

    def _shrink(self, widths: tuple[int, ...], tokens: int, error: BaseException) -> None:
        if self.world.sharded and self.world.size > 1:
            fix = f"set extraction.tokensPerBatch under {tokens}: ranks that share the weights cannot go on alone"
            fix += "; or set audit: {examples: 0}, whose rows come out of this pass" if len(widths) > 1 else ""
            raise TransientError(f"out of memory in a pass of {tokens} tokens", where="extract", fix=fix) from error
        if widths not in self.tokens_that_fit:
            event("memory", tokens=tokens, note="out of memory: passes of this size are halved from here on")
        self.tokens_that_fit[widths] = max(1, tokens // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _halves(self, wanted: Pass) -> Computed:
        middle = len(wanted.batch) // 2
        parts = [
            self._compute(replace(wanted, batch=wanted.batch[part], names=wanted.names[part]))
            for part in (slice(0, middle), slice(middle, None))
        ]
        rows = [
            GradientBatch(*(torch.cat([getattr(half, each.name) for half in halves]) for each in fields(GradientBatch)))
            for halves in zip(*(part.rows for part in parts), strict=True)
        ]
        return Computed(rows, [*parts[0].too_large, *(middle + place for place in parts[1].too_large)])

    def _dummy(self) -> Pass:
        return Pass([self.own.folded], [tokenise.Encoded([0, 0], [False, True])], ["dummy"], False, None, 0)


def _work_of(plan: Plan, own: _Form, audit: _Form | None) -> list[tuple[Block, dict[_Form, shards.Kind]]]:
    """The units that the store lacked, each with the shards wanted of it, in the order of the work: pairs first, with what the
    audit keeps of them, then candidates, and the audit's sample of them last."""

    def lacking(
        units: Sequence[Block], kinds: Mapping[_Form, shards.Kind]
    ) -> list[tuple[Block, dict[_Form, shards.Kind]]]:
        once = {unit.id: unit for unit in units}  # what stands in several target sets is one unit
        wanted = [
            (unit, {form: kind for form, kind in kinds.items() if form.lacked(kind, unit)}) for unit in once.values()
        ]
        return [(unit, forms) for unit, forms in wanted if forms]

    of_pairs: dict[_Form, shards.Kind] = {own: "targets"} if audit is None else {own: "targets", audit: "sums"}
    work = [*lacking(plan.targets, of_pairs), *lacking(plan.candidates, {own: "candidates"})]
    if audit is not None and plan.audit is not None:
        work += lacking(plan.audit.units, {audit: "candidates"})
    return work


def _audit_does_not_fit(spec: RunSpec) -> RequestError:
    return RequestError(
        f"the audit does not fit into memory: its rows have {2 * spec.extraction.projection.dim} projected dims a side, twice "
        "those of the run",
        where="spec.audit",
        fix="set audit: {examples: 0}, or lower extraction.projection.dim",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _zero_rows(capture: GradientCapture) -> GradientBatch:
    zero = torch.zeros(1, device=capture.device)
    return GradientBatch(torch.zeros(1, capture.width, device=capture.device), zero, zero.int(), zero)


class _StopSignal:
    """While entered, SIGTERM sets a flag; the worker looks at it between micro-batches."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Callable[..., Any] | int | None = None

    def __enter__(self) -> _StopSignal:
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)
