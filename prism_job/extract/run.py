"""The extract stage: for every unit the store lacks, its rows through the model, and one atomic put."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prism_job import examples
from prism_job.errors import DataError, RequestError, Stopped
from prism_job.examples import BadRow
from prism_job.extract import data
from prism_job.extract.gradients import FactorSums, GradientCapture, Rows, refuse_non_finite
from prism_job.extract.model import captured_layers, load_model, load_tokenizer
from prism_job.plan import Plan, Quarantined, Unit, check_bad_fraction, extractor_parts, read_plan
from prism_job.progress import Meter, event
from prism_job.spec import RunSpec, SelectionRun, digest
from prism_job.storage import codec, shards, staged
from prism_job.storage.objects import Store, open_store


def extract(run: SelectionRun) -> dict[str, Any]:
    """Write the shards that the plan's store lacks. Returns the last words.

    Raises:
        RequestError: no plan, or a model that cannot be captured.
        DataError: the model changed since the plan; non-finite weights or gradients; too many bad rows.
        Stopped: SIGTERM came; the micro-batch in hand is done, the unit in hand is lost.
    """
    plan = read_plan(run)
    if not plan.num_missing:
        return {"units": 0, "examples": 0, "tokens": 0}
    _refuse_changed_model(run.spec, plan)
    with _Worker.start(run.spec, plan) as worker:
        for unit in plan.targets:
            worker.extract_targets(unit)
        for unit in plan.candidates:
            worker.extract_candidates(unit)
    worker.meter.say()
    return {"units": worker.num_written, "examples": worker.meter.done, "tokens": worker.meter.tokens}


def _refuse_changed_model(spec: RunSpec, plan: Plan) -> None:
    if digest(extractor_parts(spec)) != plan.extractor:
        raise DataError(
            "the model or the extraction settings are not those of the plan",
            where=spec.model.uri,
            fix="run the plan stage again: it finds what the new extractor lacks",
        )


@dataclass
class _Worker:
    spec: RunSpec
    plan: Plan
    store: Store
    tokenizer: PreTrainedTokenizerBase
    folded: GradientCapture
    unfolded: GradientCapture
    stop: _StopSignal
    meter: Meter
    num_written: int = 0
    bad: list[Quarantined] = field(default_factory=list)

    @staticmethod
    def start(spec: RunSpec, plan: Plan) -> _Worker:
        stop = _StopSignal()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        event("loading", model=spec.model.uri, device=str(device))
        tokenizer = load_tokenizer(spec.model)
        model = load_model(spec.model, device)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions and spec.extraction.max_length > positions:
            raise RequestError(
                f"maxLength {spec.extraction.max_length} is more than the model's {positions} positions",
                where="spec.extraction.maxLength",
                fix=f"set it to {positions} or less",
            )
        layers = captured_layers(model, spec.extraction.layers)
        projected = spec.extraction.projection
        fold_dims = spec.extraction.codec.dims if spec.extraction.codec.kind == "sign" else None
        unfolded_dims = len(layers.modules) * projected.dim**2
        if fold_dims and fold_dims > unfolded_dims:
            raise RequestError(
                f"codec.dims {fold_dims} is more than the {unfolded_dims} dims there are to fold "
                f"({len(layers.modules)} layers × {projected.dim}²)",
                where="spec.extraction.codec.dims",
                fix=f"set it to {2 ** (unfolded_dims.bit_length() - 1)} or less, or raise projection.dim",
            )
        unfolded = GradientCapture(model, layers, projected.dim, projected.seed, None)
        folded = GradientCapture(model, layers, projected.dim, projected.seed, fold_dims) if fold_dims else unfolded
        missing = set(plan.missing_candidates) | set(plan.missing_factors)
        num_rows = sum(unit.num_rows for unit in plan.candidates if unit.id in missing)
        num_pairs = sum(unit.num_rows for unit in plan.targets if unit.id in plan.missing_targets)
        store = open_store(spec.store)
        meter = Meter("extract", num_rows + num_pairs)
        return _Worker(spec, plan, store, tokenizer, folded, unfolded, stop, meter)

    def __enter__(self) -> _Worker:
        self.stop.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.restore()

    def _lacks(self, kind: shards.Kind, unit: Unit) -> bool:
        missing = {
            "candidates": self.plan.missing_candidates,
            "targets": self.plan.missing_targets,
            "factors": self.plan.missing_factors,
        }[kind]
        # Looked up again: another worker, or this run before a kill, may have written it since the plan.
        key = shards.shard_key(self.plan.extractor, kind, unit.id)
        return unit.id in missing and not self.store.exists(key)

    def extract_candidates(self, unit: Unit) -> None:
        wants_rows, wants_factors = self._lacks("candidates", unit), self._lacks("factors", unit)
        if not wants_rows and not wants_factors:
            return
        ids, encoded, quarantined = self._encode_candidates(unit)
        factors = self.folded.new_factors() if wants_factors else None
        good = [place for place, example in enumerate(encoded) if example is not None]
        # Encoded batch by batch: a unit's float32 rows would be gigabytes with codec float16.
        kind = self.spec.extraction.codec.kind
        stored = codec.zeros(kind, unit.num_rows, self.folded.width)
        columns = _Columns(unit.num_rows)
        with self.folded:
            for places, result in self._passes(self.folded, encoded, good, ids, unit, mean=False, factors=factors):
                for name, part in codec.encode(kind, result.rows_BD.float().cpu().numpy()).items():
                    stored[name][places] = part
                columns.fill(places, result)
        # Factors first: whoever sees the unit's rows may trust that the factors the plan wanted are there too.
        if factors is not None:
            self._write("factors", unit, _factor_arrays(factors), {"num_tokens": factors.num_tokens})
        if wants_rows:
            arrays = {"ids": shards.id_bytes(ids), **columns.arrays(), **stored}
            self._write("candidates", unit, arrays, {"quarantined": quarantined})
        self.num_written += 1

    def extract_targets(self, unit: Unit) -> None:
        """Rows of a unit of pairs: ḡ(y⁺) − ḡ(y⁻), unfolded float32, with the token-mean NLL of both sides."""
        if not self._lacks("targets", unit):
            return
        contents = [self._target(row, place, unit) for place, row in enumerate(staged.read_rows(self.store, unit.rows))]
        ids = [examples.example_id(content) for content in contents]
        rows_ND = np.zeros((unit.num_rows, self.unfolded.width), np.float32)
        arrays: dict[str, NDArray[Any]] = {"ids": shards.id_bytes(ids)}
        with self.unfolded:
            for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
                places_with = [place for place, content in enumerate(contents) if side in content]
                encoded = [self._encode_side(content, side, unit, place) for place, content in enumerate(contents)]
                columns = _Columns(unit.num_rows)
                passes = self._passes(
                    self.unfolded, encoded, places_with, ids, unit, mean=True, counted=side == "chosen"
                )
                for places, result in passes:
                    rows_ND[places] += sign * result.rows_BD.float().cpu().numpy()
                    columns.fill(places, result)
                arrays |= {f"{side}_nll": columns.nll_N, f"{side}_tokens": columns.tokens_N}
        notes = {"layers": self.unfolded.layers.names, "dim": self.unfolded.dim}
        self._write("targets", unit, {**arrays, "rows": rows_ND}, notes)
        self.num_written += 1

    def _passes(
        self,
        capture: GradientCapture,
        encoded: list[data.Encoded | None],
        places: list[int],
        ids: list[str],
        unit: Unit,
        *,
        mean: bool,
        counted: bool = True,
        factors: FactorSums | None = None,
    ) -> Iterator[tuple[list[int], Rows]]:
        lengths = [len(_given(encoded[place]).ids) for place in places]
        for batch in data.micro_batches(lengths, self.spec.extraction.tokens_per_batch):
            chosen = [places[position] for position in batch]
            collated = data.collate([_given(encoded[place]) for place in chosen], capture.device)
            result = capture.rows(collated, mean=mean, factors=factors)
            refuse_non_finite(result, [ids[place] for place in chosen], f"unit {unit.id}")
            yield chosen, result
            self.meter.add(len(chosen) if counted else 0, int(collated.real_BT.sum()))
            self.stop.check()

    def _encode_candidates(self, unit: Unit) -> tuple[list[str], list[data.Encoded | None], dict[str, str]]:
        ids: list[str] = []
        encoded: list[data.Encoded | None] = []
        quarantined: dict[str, str] = {}
        lines = list(unit.line_numbers())
        for place, row in enumerate(staged.read_rows(self.store, unit.rows)):
            content = examples.candidate_content(row)
            ids.append(examples.example_id(content))
            try:
                encoded.append(data.encode_candidate(content, self.tokenizer, self.spec.extraction.max_length))
            except BadRow as error:
                encoded.append(None)
                quarantined[str(place)] = str(error)
                source = self.plan.sources[unit.source]
                self.bad.append(Quarantined(source=source, line=lines[place], reason=str(error)))
        # Counted against the whole plan, so a run that must fail in the end fails at the first unit that proves it.
        everything = [*self.plan.quarantine, *self.bad]
        check_bad_fraction(everything, self.plan.num_examples - len(self.bad), self.spec)
        return ids, encoded, quarantined

    def _target(self, row: dict[str, Any], place: int, unit: Unit) -> examples.Content:
        return examples.target_content(row, needs_rejected=self.spec.scoring.weighting == "preference")

    def _encode_side(self, content: examples.Content, side: str, unit: Unit, place: int) -> data.Encoded | None:
        if side not in content:
            return None
        try:
            return data.encode_response(
                content["prompt"], content[side], content.get("tools"), self.tokenizer, self.spec.extraction.max_length
            )
        except BadRow as error:
            line = list(unit.line_numbers())[place]
            raise DataError(
                f"unusable target, its {side} response: {error}",
                where=f"{self.plan.target_sources[unit.source]} line {line}",
                fix="mend or remove that row, or raise extraction.maxLength",
            ) from error

    def _write(self, kind: shards.Kind, unit: Unit, arrays: dict[str, NDArray[Any]], notes: dict[str, Any]) -> None:
        num_bytes = shards.write_shard(self.store, self.plan.extractor, kind, unit.id, arrays, notes)
        event("shard", kind=kind, unit=unit.id, rows=unit.num_rows, bytes=num_bytes)


class _Columns:
    """The numbers beside the rows of a unit, one a row; zeros where a row is quarantined."""

    def __init__(self, num_rows: int) -> None:
        self.nll_N = np.zeros(num_rows, np.float64)
        self.tokens_N = np.zeros(num_rows, np.int32)
        self.norm_N = np.zeros(num_rows, np.float32)

    def fill(self, places: list[int], result: Rows) -> None:
        self.nll_N[places] = result.nll_B.double().cpu().numpy()
        self.tokens_N[places] = result.tokens_B.cpu().numpy()
        self.norm_N[places] = result.norm_B.float().cpu().numpy()

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"nll": self.nll_N, "tokens": self.tokens_N, "norm": self.norm_N}


class _StopSignal:
    """SIGTERM sets a flag; the worker looks at it between micro-batches."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Callable[..., Any] | int | None = None

    def install(self) -> None:
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def check(self) -> None:
        if self.asked:
            fix = "run again: finished units are kept, only the unit in hand is computed anew"
            raise Stopped("stopped by SIGTERM", where="extract", fix=fix)


def _factor_arrays(factors: FactorSums) -> dict[str, NDArray[Any]]:
    # Symmetric: the upper half holds everything.
    upper = np.triu_indices(factors.inputs_LPP.shape[1])
    return {
        "inputs": factors.inputs_LPP.float().cpu().numpy()[:, *upper],
        "outputs": factors.outputs_LPP.float().cpu().numpy()[:, *upper],
    }


def _given(encoded: data.Encoded | None) -> data.Encoded:
    assert encoded is not None
    return encoded
