"""One work unit -> the arrays of its shards, as generators of the passes they need. Not: which unit, by which rank, where to.

A generator yields each pass that it wants and is sent what came of it. So whoever drives it (run.py) decides in one place
about lockstep with other ranks, about memory and about stopping.

Shapes: N rows of the unit, B examples of a pass, D stored dims.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prism_job.data import examples
from prism_job.data.data_files import Row
from prism_job.data.examples import BadRow
from prism_job.errors import DataError
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import FactorSums, GradientBatch, GradientCapture
from prism_job.plan.plan import Unit
from prism_job.spec.document import RunSpec
from prism_job.store import codec, shards

Arrays = dict[str, NDArray[Any]]

SIDES = ("chosen", "rejected")


class TargetTooLarge(DataError):
    """A response of a target does not fit into memory alone."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch wanted.

    Attributes:
        captures: one for each form of rows that is wanted.
        names: example ids, for messages.
        factors: sums to add to, of one capture alone.
        num_new: examples that this pass finishes; of a pair only the wanted response counts.
    """

    captures: Sequence[GradientCapture]
    batch: list[tokenise.Encoded]
    names: list[str]
    mean: bool
    factors: FactorSums | None
    num_new: int


@dataclass(frozen=True)
class Computed:
    """What came of a pass, by capture. Examples at `too_large` fit no memory: their rows are zero, their token counts 0."""

    rows: list[GradientBatch]
    too_large: list[int]


Passes = Generator[Pass, Computed, None]


@dataclass
class CandidateUnit:
    """The rows of a unit of candidates.

    Attributes:
        quarantined: place in the unit -> why the row cannot be used; it stays a zero row.
    """

    ids: list[str]
    encoded: list[tokenise.Encoded | None]
    quarantined: dict[int, str]
    stored: Arrays
    columns: Columns
    factors: FactorSums | None

    @staticmethod
    def read(
        unit_rows: list[Row],
        tokenizer: PreTrainedTokenizerBase,
        spec: RunSpec,
        capture: GradientCapture,
        *,
        factors: bool,
    ) -> CandidateUnit:
        ids: list[str] = []
        encoded: list[tokenise.Encoded | None] = []
        quarantined: dict[int, str] = {}
        for place, row in enumerate(unit_rows):
            content = examples.candidate_content(row)
            ids.append(examples.example_id(content))
            try:
                encoded.append(tokenise.encode_candidate(content, tokenizer, spec.extraction.max_length))
            except BadRow as error:
                encoded.append(None)
                quarantined[place] = str(error)
        # Encoded batch by batch: a unit's float32 rows would be gigabytes with codec float16.
        stored = codec.zeros(spec.extraction.codec.kind, len(ids), capture.width)
        sums = capture.new_factors() if factors else None
        return CandidateUnit(ids, encoded, quarantined, stored, Columns(len(ids)), sums)

    def passes(self, capture: GradientCapture, spec: RunSpec) -> Passes:
        good = [place for place, example in enumerate(self.encoded) if example is not None]
        for places in _micro_batches(self.encoded, good, spec):
            batch = [_given(self.encoded[place]) for place in places]
            names = [self.ids[place] for place in places]
            computed = yield Pass([capture], batch, names, False, self.factors, len(places))
            (rows,) = computed.rows
            for name, part in codec.encode(spec.extraction.codec.kind, rows.rows_BD.float().cpu().numpy()).items():
                self.stored[name][places] = part
            for position in computed.too_large:
                self.quarantined[places[position]] = (
                    f"its {len(batch[position].ids)} tokens do not fit into memory alone"
                )
            self.columns.fill(places, rows)

    def arrays(self) -> Arrays:
        return {"ids": shards.id_bytes(self.ids), **self.columns.arrays(), **self.stored}

    def factor_arrays(self) -> Arrays:
        assert self.factors is not None
        # Symmetric: the upper half holds everything.
        upper = np.triu_indices(self.factors.inputs_LPP.shape[1])
        return {
            "inputs": self.factors.inputs_LPP.float().cpu().numpy()[:, *upper],
            "outputs": self.factors.outputs_LPP.float().cpu().numpy()[:, *upper],
        }


@dataclass
class TargetUnit:
    """The rows of a unit of pairs: ḡ(y⁺) − ḡ(y⁻), unfolded float32, with the NLL of both sides.

    Attributes:
        rows_of_captures: [N, D] each.
        columns: what stands beside them, the same for each capture.
    """

    unit: Unit
    source: str
    contents: list[examples.Content]
    rows_of_captures: list[NDArray[np.float32]]
    columns: Arrays

    @staticmethod
    def read(
        unit: Unit, source: str, unit_rows: list[Row], spec: RunSpec, captures: Sequence[GradientCapture]
    ) -> TargetUnit:
        needs_rejected = spec.scoring.weighting == "preference"
        contents = [examples.target_content(row, needs_rejected=needs_rejected) for row in unit_rows]
        ids = [examples.example_id(content) for content in contents]
        rows = [np.zeros((len(contents), capture.width), np.float32) for capture in captures]
        return TargetUnit(unit, source, contents, rows, {"ids": shards.id_bytes(ids)})

    def passes(self, captures: Sequence[GradientCapture], tokenizer: PreTrainedTokenizerBase, spec: RunSpec) -> Passes:
        """Both responses of all pairs: the more texts to choose from, the more alike the lengths of a micro-batch."""
        num, ids = len(self.contents), shards.hex_ids(self.columns["ids"])
        encoded = [self._encode(place, side, tokenizer, spec) for side in SIDES for place in range(num)]
        columns = Columns(2 * num)
        for texts in _micro_batches(
            encoded, [text for text, example in enumerate(encoded) if example is not None], spec
        ):
            batch = [_given(encoded[text]) for text in texts]
            names = [f"{ids[text % num]} ({SIDES[text // num]})" for text in texts]
            computed = yield Pass(captures, batch, names, True, None, sum(text < num for text in texts))
            for position in computed.too_large:
                side, num_tokens = SIDES[texts[position] // num], len(batch[position].ids)
                what = f"its {side} response of {num_tokens} tokens does not fit into memory alone"
                raise self._unusable(texts[position] % num, what, TargetTooLarge)
            for rows_ND, found in zip(self.rows_of_captures, computed.rows, strict=True):
                for text, row_D in zip(texts, found.rows_BD.float().cpu().numpy(), strict=True):
                    rows_ND[text % num] += row_D if text < num else -row_D
            columns.fill(texts, computed.rows[0])
        for side, part in zip(SIDES, (slice(0, num), slice(num, None)), strict=True):
            self.columns |= {f"{side}_nll": columns.nll_N[part], f"{side}_tokens": columns.tokens_N[part]}

    def arrays(self, capture: int) -> Arrays:
        return {"rows": self.rows_of_captures[capture], **self.columns}

    def sums(self, capture: int) -> Arrays:
        """What the audit keeps in place of the rows: Σ w_q row_q of the unit for each weighting of scoring, float32 [D] each.

        w is π_q (equation 2, from these NLLs; 0 where there is no rejected response) or 1.
        """
        beside, rows_ND = self.columns, self.rows_of_captures[capture]
        chosen, rejected = (beside[f"{side}_nll"] / np.maximum(beside[f"{side}_tokens"], 1) for side in SIDES)
        preference_N = np.exp(-np.logaddexp(0, chosen - rejected))
        weights = {
            "preference": np.where(beside["rejected_tokens"] > 0, preference_N, 0.0),
            "uniform": np.ones(len(chosen)),
        }
        arrays = dict(beside)
        for name, weight_N in weights.items():
            total_D = np.zeros(rows_ND.shape[1])
            for weight, row_D in zip(weight_N.tolist(), rows_ND, strict=True):
                total_D += weight * row_D
            arrays[name] = total_D.astype(np.float32)
        return arrays

    def _encode(
        self, place: int, side: str, tokenizer: PreTrainedTokenizerBase, spec: RunSpec
    ) -> tokenise.Encoded | None:
        content = self.contents[place]
        if side not in content:
            return None
        try:
            return tokenise.encode_response(
                content["prompt"], content[side], content.get("tools"), tokenizer, spec.extraction.max_length
            )
        except BadRow as error:
            raise self._unusable(place, f"its {side} response: {error}") from error

    def _unusable(self, place: int, what: str, kind: type[DataError] = DataError) -> DataError:
        line = list(self.unit.line_numbers())[place]
        fix = "mend or remove that row, or raise extraction.maxLength"
        return kind(f"unusable target, {what}", where=f"{self.source} line {line}", fix=fix)


class Columns:
    """The numbers beside the rows of a unit, one a row; zeros where a row is quarantined."""

    def __init__(self, num_rows: int) -> None:
        self.nll_N = np.zeros(num_rows, np.float64)
        self.tokens_N = np.zeros(num_rows, np.int32)
        self.norm_N = np.zeros(num_rows, np.float32)

    def fill(self, places: list[int], result: GradientBatch) -> None:
        self.nll_N[places] = result.nll_B.double().cpu().numpy()
        self.tokens_N[places] = result.tokens_B.cpu().numpy()
        self.norm_N[places] = result.norm_B.float().cpu().numpy()

    def arrays(self) -> Arrays:
        return {"nll": self.nll_N, "tokens": self.tokens_N, "norm": self.norm_N}


def _micro_batches(encoded: list[tokenise.Encoded | None], places: list[int], spec: RunSpec) -> list[list[int]]:
    lengths = [len(_given(encoded[place]).ids) for place in places]
    batches = tokenise.micro_batches(lengths, spec.extraction.tokens_per_batch)
    return [[places[position] for position in batch] for batch in batches]


def _given(encoded: tokenise.Encoded | None) -> tokenise.Encoded:
    assert encoded is not None
    return encoded
