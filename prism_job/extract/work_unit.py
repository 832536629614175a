"""The rows of one work unit: what is to be computed for them, and the arrays of their shards.

Does not know which rank computes them, or where they are written.

Shapes: N rows of the unit, D stored dims.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prism_job.data import examples
from prism_job.data.bad_row import BadRow, reason_of
from prism_job.data.readers import Row
from prism_job.errors import DataError
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import GradientBatch, GradientCapture, LossCapture
from prism_job.extract.capture.sketches import FactorSums
from prism_job.extract.passes import Computed
from prism_job.extract.tasks import Output, Task
from prism_job.extract.tokenise import SIDES
from prism_job.extract.uploads import Arrays, NewShard
from prism_job.plan.plan import Unit
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec
from prism_job.store import codec, shards

Preference = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(token-mean NLL of the chosen responses, of the rejected ones) -> π of each pair."""


class TargetTooLarge(DataError):
    """A response of a target does not fit into memory alone."""


@dataclass(frozen=True)
class MicroBatch:
    """Texts that go through the model together."""

    indices: list[int]  # of these texts among those of their unit
    examples: list[tokenise.Encoded]
    names: list[str]  # their example ids, for messages
    num_new: int  # examples that they finish; of a pair only the chosen response counts


class CandidateUnit:
    """The rows of a unit of candidates, folded and encoded, and its factor sums where they are wanted."""

    mean = False

    def __init__(
        self,
        task: Task,
        rows: list[Row],
        tokenizer: PreTrainedTokenizerBase,
        spec: RunSpec,
        capture: GradientCapture | LossCapture,
    ) -> None:
        self.task, self.extraction = task, spec.extraction
        self.quarantined: dict[int, str] = {}  # index of a row -> why it cannot be used; it stays a zero row
        self.ids: list[str] = []
        self.encoded: dict[int, tokenise.Encoded] = {}
        for index, row in enumerate(rows):
            content = examples.candidate_content(row, task.columns)
            self.ids.append(examples.example_id(content))
            try:
                self.encoded[index] = tokenise.encode_candidate(
                    content, tokenizer, self.extraction.max_length, self.extraction.loss_on
                )
            except BadRow as error:
                self.quarantined[index] = reason_of(error)
        # Encoded micro-batch by micro-batch: a unit's float32 rows would be gigabytes with codec float16.
        self.codec = spec.codec_kind
        self.stored = codec.zeros(self.codec, len(self.ids), capture.widths[0])
        self.columns = Columns(len(self.ids))
        self.layers = digest(capture.notes["layers"])
        self.factors: FactorSums | None = None
        if any(output.kind == "factors" for output in task.outputs):
            assert isinstance(capture, GradientCapture)
            self.factors = capture.new_factors()

    def micro_batches(self, tokens_per_batch: int) -> Iterator[MicroBatch]:
        for indices in _micro_batches(self.encoded, tokens_per_batch):
            batch = [self.encoded[index] for index in indices]
            yield MicroBatch(indices, batch, [self.ids[index] for index in indices], len(indices))

    def store(self, micro_batch: MicroBatch, computed: Computed) -> None:
        (gradients,) = computed.gradients
        encoded_rows = codec.encode(self.codec, gradients.rows_BD.float().cpu().numpy())
        for name, array in encoded_rows.items():
            self.stored[name][micro_batch.indices] = array
        self.columns.store(micro_batch.indices, gradients)
        for position in computed.too_large:
            num_tokens = len(micro_batch.examples[position].ids)
            reason = f"its {num_tokens} tokens do not fit into memory alone"
            self.quarantined[micro_batch.indices[position]] = reason

    def shards(self) -> list[NewShard]:
        """One for each output of the task."""
        return [
            self._factors(output) if output.kind == "factors" else self._rows(output) for output in self.task.outputs
        ]

    @property
    def num_cut(self) -> int:
        """Rows that go on beyond maxLength."""
        return sum(text.num_cut > 0 for index, text in self.encoded.items() if index not in self.quarantined)

    def _rows(self, output: Output) -> NewShard:
        quarantined = {str(index): reason for index, reason in self.quarantined.items()}
        columns: Arrays = {"nll": self.columns.nll_N, "tokens": self.columns.tokens_N, "norm": self.columns.norm_N}
        arrays = {"ids": shards.id_bytes(self.ids), **columns, **self.stored}
        notes = {"quarantined": quarantined, "cut": self.num_cut, "layers": self.layers}
        return NewShard(output, arrays, notes)

    def _factors(self, output: Output) -> NewShard:
        assert self.factors is not None
        # Symmetric: the upper half holds everything.
        upper = np.triu_indices(output.row_format.dim)
        sums = {"inputs": self.factors.inputs_LPP, "outputs": self.factors.outputs_LPP}
        arrays = {name: sum_LPP.float().cpu().numpy()[:, *upper] for name, sum_LPP in sums.items()}
        return NewShard(output, arrays, {"num_tokens": self.factors.num_tokens, "layers": self.layers})


class TargetUnit:
    """The rows of a unit of pairs, ḡ(y⁺) − ḡ(y⁻), unfolded float32, in each row format of its task; the NLL of both sides.

    The texts of N pairs are the N chosen responses, then the N rejected ones. All are cut into micro-batches together: the
    more texts to choose from, the more alike the lengths of a micro-batch.
    """

    mean = True
    factors = None

    def __init__(
        self,
        task: Task,
        rows: list[Row],
        tokenizer: PreTrainedTokenizerBase,
        spec: RunSpec,
        capture: GradientCapture | LossCapture,
        preference: Preference,
    ) -> None:
        self.task, self.extraction, self.preference = task, spec.extraction, preference
        self.quarantined: dict[int, str] = {}  # never any: a target that cannot be used is an error
        self.of_layers = dict(capture.notes)
        needs_rejected = spec.scoring.weighting == "preference"
        contents = [examples.target_content(row, needs_rejected, task.columns) for row in rows]
        self.ids = [examples.example_id(content) for content in contents]
        pairs = self._encode(contents, tokenizer)
        self.encoded = {
            number * len(pairs) + index: sides[side]
            for number, side in enumerate(tokenise.sides_of(spec.scoring))
            for index, sides in enumerate(pairs)
            if side in sides
        }
        self.rows = [np.zeros((len(contents), width), np.float32) for width in capture.widths]
        self.columns = Columns(len(SIDES) * len(pairs))

    def micro_batches(self, tokens_per_batch: int) -> Iterator[MicroBatch]:
        num_pairs = len(self.ids)
        for texts in _micro_batches(self.encoded, tokens_per_batch):
            names = [f"{self.ids[text % num_pairs]} ({SIDES[text // num_pairs]})" for text in texts]
            num_chosen = sum(text < num_pairs for text in texts)
            yield MicroBatch(texts, [self.encoded[text] for text in texts], names, num_chosen)

    def store(self, micro_batch: MicroBatch, computed: Computed) -> None:
        """Raises TargetTooLarge for the first response that does not fit into memory alone."""
        num_pairs, texts = len(self.ids), micro_batch.indices
        for position in computed.too_large:
            index, side = texts[position] % num_pairs, SIDES[texts[position] // num_pairs]
            num_tokens = len(micro_batch.examples[position].ids)
            reason = f"its {side} response of {num_tokens} tokens does not fit into memory alone"
            raise self._unusable({index: reason}, TargetTooLarge)
        for rows_ND, gradients in zip(self.rows, computed.gradients, strict=True):
            for text, row_D in zip(texts, gradients.rows_BD.float().cpu().numpy(), strict=True):
                rows_ND[text % num_pairs] += row_D if text < num_pairs else -row_D
        self.columns.store(texts, computed.gradients[0])

    def shards(self) -> list[NewShard]:
        """One for each output of the task."""
        num_pairs = len(self.ids)
        beside: Arrays = {"ids": shards.id_bytes(self.ids)}
        for side, part in zip(SIDES, (slice(0, num_pairs), slice(num_pairs, None)), strict=True):
            beside |= {f"{side}_nll": self.columns.nll_N[part], f"{side}_tokens": self.columns.tokens_N[part]}
        new_shards = []
        for output in self.task.outputs:
            rows_ND = self.rows[self.task.row_formats.index(output.row_format)]
            notes = self.of_layers | {"dim": output.row_format.dim, "cut": self.num_cut}
            new_shards.append(NewShard(output, beside | self._of_rows(output, rows_ND, beside), notes))
        return new_shards

    @property
    def num_cut(self) -> int:
        """Pairs of which a side goes on beyond maxLength."""
        return len({text % len(self.ids) for text, encoded in self.encoded.items() if encoded.num_cut})

    def _of_rows(self, output: Output, rows_ND: NDArray[np.float32], columns: Arrays) -> Arrays:
        """What a shard keeps of the rows. For the audit their sums; where the weights come from another model, which may
        change, each row, in half of its bytes: its rounding (2^-11) is far below the noise of a projection."""
        if output.kind == "nll":
            return {}
        if output.kind == "sums":
            return _weighted_sums(rows_ND, columns, self.preference)
        return codec.encode_float16(rows_ND) if output.for_audit else {"rows": rows_ND}

    def _encode(
        self, contents: list[examples.Content], tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, tokenise.Encoded]]:
        """Raises DataError, which names all pairs of the unit that cannot be tokenised."""
        pairs, bad = [], {}
        max_length, loss_on = self.extraction.max_length, self.extraction.loss_on
        for index, content in enumerate(contents):
            try:
                pairs.append(tokenise.encode_target(content, tokenizer, max_length, loss_on))
            except BadRow as error:
                bad[index] = str(error)
        if bad:
            raise self._unusable(bad)
        return pairs

    def _unusable(self, reasons: dict[int, str], error_class: type[DataError] = DataError) -> DataError:
        """`reasons`: of pairs, by their index in the unit."""
        assert isinstance(self.task.unit, Unit)
        lines = list(self.task.unit.line_numbers())
        counted = "; ".join(f"{count} × {reason}" for reason, count in Counter(reasons.values()).most_common(3))
        where = ", ".join(f"{self.task.origin} line {lines[index]}" for index in list(reasons)[:3])
        fix = "correct or remove those rows, or raise extraction.maxLength"
        return error_class(f"unusable target(s): {counted}", where=where, fix=fix)


def _weighted_sums(rows_ND: NDArray[np.float32], columns: Arrays, preference: Preference) -> Arrays:
    """What the audit keeps in place of the rows: Σ w_q row_q for each `scoring.weighting`, float32 [D] each.

    w is π_q (equation 2; 0 where there is no rejected response) or 1.
    """
    chosen, rejected = (columns[f"{side}_nll"] / np.maximum(columns[f"{side}_tokens"], 1) for side in SIDES)
    preference_N = np.where(columns["rejected_tokens"] > 0, preference(chosen, rejected), 0.0)
    sums: Arrays = {}
    for weighting, weight_N in (("preference", preference_N), ("uniform", np.ones(len(chosen)))):
        total_D = np.zeros(rows_ND.shape[1])
        for weight, row_D in zip(weight_N.tolist(), rows_ND, strict=True):
            total_D += weight * row_D
        sums[weighting] = total_D.astype(np.float32)
    return sums


class Columns:
    """The numbers beside the rows of a unit, one a text; zeros where a row is quarantined."""

    def __init__(self, num_texts: int) -> None:
        self.nll_N = np.zeros(num_texts, np.float64)
        self.tokens_N = np.zeros(num_texts, np.int32)
        self.norm_N = np.zeros(num_texts, np.float32)

    def store(self, indices: list[int], gradients: GradientBatch) -> None:
        self.nll_N[indices] = gradients.nll_B.double().cpu().numpy()
        self.tokens_N[indices] = gradients.tokens_B.cpu().numpy()
        self.norm_N[indices] = gradients.norm_B.float().cpu().numpy()


def _micro_batches(encoded: dict[int, tokenise.Encoded], tokens_per_batch: int) -> Iterator[list[int]]:
    """The indices of the texts of each micro-batch: a function of the unit alone."""
    indices = list(encoded)
    lengths = [len(example.ids) for example in encoded.values()]
    for positions in tokenise.micro_batches(lengths, tokens_per_batch):
        yield [indices[position] for position in positions]
