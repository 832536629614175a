"""Counts what will go through the model: units, texts, tokens, micro-batches. Does not know what they cost.

Units are cut by the plan's own code and tokens counted by extraction's own tokenisation, so the figures are those of the run.
Writes nothing to store or output.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prism_job.data.bad_row import BadRow, reason_of
from prism_job.data.data_files import Source
from prism_job.data.examples import Content
from prism_job.estimate.budget import BudgetCheck
from prism_job.extract import tokenise
from prism_job.plan.checks import refuse_output_inside_data
from prism_job.plan.plan import Block, Quarantined, Unit
from prism_job.plan.pool import read_pool, read_targets
from prism_job.plan.sources import list_sources
from prism_job.plan.units import factor_units, list_targets
from prism_job.spec.document import RunSpec
from prism_job.spec.extraction import LossOn
from prism_job.storage.folder import LocalFolder

UNREAD = -1
"""Length of a text that is not in the sample; 0 is that of a row that extraction quarantines."""


@dataclass(frozen=True)
class Load:
    """Sums over texts that go through the model; floats where they are scaled from a sample."""

    texts: float = 0
    tokens: float = 0  # without padding, as extraction reports them
    padded: float = 0  # tokens of the micro-batches, padding counted
    squares: float = 0  # Σ of padded lengths squared, the cost of attention
    supervised: float = 0  # tokens that carry loss

    def plus(self, other: Load) -> Load:
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> Load:
        return Load(*(value * factor for value in astuple(self)))


@dataclass(frozen=True)
class Workload:
    """Everything that a run extracts into an empty store. Units are listed without repeats, as in extraction."""

    candidates: list[Unit]
    targets: list[Unit]
    factors: list[str]  # ids of the units that carry factor sums
    num_examples: int  # rows that the plan lists, repeated units included
    num_pairs: int
    num_bad: int  # rows that the plan or the tokenisation quarantines; scaled where there is a sample
    staged_bytes: int  # of the rows of all units, as the store keeps them
    pool: Load  # texts of the candidates
    pairs: Load  # texts of both sides of the targets
    factor_load: Load  # texts of the units with factors
    longest: int  # tokens of the longest text
    largest_batch: int  # texts of the largest micro-batch
    supervised_share: float  # largest share of a micro-batch's padded tokens that carries loss
    is_exact: bool  # every text was tokenised
    bad_share: float = 0.0  # num_bad over all rows of the candidates
    first_bad: Quarantined | None = None  # of the rows that num_bad counts
    num_cut: int = 0  # rows of the candidates that go on beyond maxLength, and pairs of which a side does; scaled
    num_cut_pairs: int = 0
    sampled: list[Block] = field(default_factory=list)  # units of the audit's sample
    audit: Load = Load()  # texts of the sample; the audit's rows of targets need no passes of their own
    audit_factor_load: Load = Load()  # those of them that carry factor sums

    @property
    def audited(self) -> Load:
        """Texts whose gradients are projected for the audit: its sample, and the targets beside their own rows."""
        return self.audit.plus(self.pairs) if self.sampled else Load()

    @property
    def load(self) -> Load:
        return self.pool.plus(self.pairs).plus(self.audit)


def measure(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, sample: int = 1) -> Workload:
    """Read the data and count.

    Args:
        sample: tokenise one row in this many and scale; 1 tokenises all. All rows are read either way.

    Raises RequestError, DataError: what plan, extract and reduce would raise for these data; with a sample, only what is
        certain from the rows of the sample.
    """
    settings = (tokenizer, spec.extraction.max_length, spec.extraction.loss_on)
    refuse_output_inside_data(spec)
    sides, pool = _SideCounts(sample, settings, tokenise.sides_of(spec.scoring)), _TokenCounts(sample)
    reasons: dict[int, str] = {}  # index of a row that the tokenisation quarantines -> why
    budget_check = BudgetCheck(spec.selection)
    staging = _ByteCounter()
    staged: set[str] = set()

    def count_candidate(content: Content) -> None:
        try:
            encoded = tokenise.encode_candidate(content, *settings) if pool.is_next_read else None
            pool.add(encoded)
            pool.num_cut += bool(encoded and encoded.num_cut)
        except BadRow as error:  # extraction quarantines it, and keeps its place in the unit
            reasons[len(pool.tokens)] = reason_of(error)
            pool.add_bad()

    target_sources, target_sets, _ = list_targets(spec)
    needs_rejected = spec.scoring.weighting == "preference"
    targets, target_layouts = read_targets(
        spec, target_sources, target_sets, staging, staged, sides.count, needs_rejected=needs_rejected
    )
    sources, _ = list_sources(spec.candidates.uris)
    read = read_pool(spec, sources, staging, staged, None, count_candidate, budget_check.add)
    candidates, quarantine, unit_size = read.units, read.quarantine, spec.extraction.examples_per_shard
    sampled, positions = read.sample.stage(unit_size, staging, staged), read.sample.positions
    unreadable = _quarantined(reasons, candidates, sources)
    read.check(spec, target_layouts, unreadable)  # the fraction as the reduce stage has it
    budget_check.check(pool.supervised, is_exact=sample == 1)
    num_examples, bad = read.num_rows, [*quarantine, *unreadable]
    num_bad = len(quarantine) + round(len(reasons) * pool.scale)

    factors = factor_units(candidates) if spec.scoring.curvature.kind == "kfac" else []
    budget = spec.extraction.expected_tokens_per_batch
    batches = _BatchCounter(budget)
    pool_load = batches.load(candidates, pool)
    pair_load = batches.load(targets, *sides.texts.values())
    sample_load = Load()
    for start in range(0, len(positions), unit_size):
        sample_load = sample_load.plus(batches.load_of(positions[start : start + unit_size], pool))
    if sample > 1 and positions:  # too few of its rows were tokenised
        sample_load = pool_load.times(len(positions) / len(pool.tokens))
    return Workload(
        candidates=list({unit.id: unit for unit in candidates}.values()),
        targets=list({unit.id: unit for unit in targets}.values()),
        factors=factors,
        num_examples=num_examples,
        num_pairs=sum(unit.num_rows for unit in targets),
        num_bad=num_bad,
        bad_share=num_bad / (num_examples + len(quarantine)),
        first_bad=next(iter(bad), None),
        num_cut=round(pool.num_cut * pool.scale),
        num_cut_pairs=round(sides.num_cut * sides.texts["chosen"].scale),
        staged_bytes=staging.num_bytes,
        pool=pool_load,
        pairs=pair_load,
        factor_load=_BatchCounter(budget).load(candidates, pool, chosen=set(factors)),
        longest=batches.longest,
        largest_batch=batches.largest,
        supervised_share=batches.supervised_share,
        is_exact=sample == 1,
        sampled=sampled,
        audit=sample_load,
        audit_factor_load=sample_load if factors else Load(),
    )


@dataclass(frozen=True)
class Pairs:
    """What goes through a preference model: the texts of both sides of the targets, in its own tokens."""

    load: Load
    longest: int
    supervised_share: float


def measure_pairs(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, sample: int = 1) -> Pairs:
    """Count the targets' tokens with a preference model's tokenizer; for `sample` see `measure`.

    Raises DataError: a target that this tokenizer's tokens make unusable.
    """
    sides = _SideCounts(sample, (tokenizer, spec.extraction.max_length, spec.extraction.loss_on))
    sources, sets, _ = list_targets(spec)
    units, _ = read_targets(spec, sources, sets, _ByteCounter(), set(), sides.count, needs_rejected=True)
    batches = _BatchCounter(spec.extraction.expected_tokens_per_batch)
    return Pairs(batches.load(units, *sides.texts.values()), batches.longest, batches.supervised_share)


def _quarantined(reasons: dict[int, str], units: list[Unit], sources: list[Source]) -> list[Quarantined]:
    """The rows that `reasons` names by their index in these units."""
    lines = ((unit.source, line) for unit in units for line in unit.line_numbers())
    return [
        Quarantined(source=sources[source].uri, line=line, reason=reasons[index])
        for index, (source, line) in enumerate(lines)
        if index in reasons
    ]


class _TokenCounts:
    """Token counts of texts in the order of their rows: 8 bytes a text, never the tokens."""

    def __init__(self, sample: int) -> None:
        self.sample = sample
        self.tokens, self.supervised = array("i"), array("i")
        self.num_cut = 0  # rows of the sample

    @property
    def is_next_read(self) -> bool:
        """The next text is one of the sample."""
        return len(self.tokens) % self.sample == 0

    def add(self, encoded: tokenise.Encoded | None) -> None:
        """None: not read, or not there."""
        self.tokens.append(len(encoded.ids) if encoded else UNREAD)
        self.supervised.append(encoded.num_supervised if encoded else UNREAD)

    def add_bad(self) -> None:
        self.tokens.append(0)
        self.supervised.append(0)

    @property
    def scale(self) -> float:
        return len(self.tokens) / max(1, sum(length != UNREAD for length in self.tokens))


class _SideCounts:
    """Token counts of those sides of the targets that pass. `settings`: tokenizer, maxLength and lossOn."""

    def __init__(
        self,
        sample: int,
        settings: tuple[PreTrainedTokenizerBase, int, LossOn],
        sides: tuple[str, ...] = tokenise.SIDES,
    ) -> None:
        self.texts = {side: _TokenCounts(sample) for side in sides}
        self.settings = settings
        self.num_cut = 0  # pairs of the sample

    def count(self, content: Content) -> None:
        """Raises BadRow, as extraction does."""
        encoded = tokenise.encode_target(content, *self.settings) if self.texts["chosen"].is_next_read else {}
        for side, texts in self.texts.items():  # weighting: uniform needs no rejected response
            texts.add(encoded.get(side))
        self.num_cut += any(each.num_cut for side, each in encoded.items() if side in self.texts)


class _BatchCounter:
    """Cuts units into micro-batches as extraction will, and keeps the largest."""

    def __init__(self, tokens_per_batch: int) -> None:
        self.budget = tokens_per_batch
        self.longest = self.largest = 0
        self.supervised_share = 0.0

    def load(self, units: list[Unit], *texts: _TokenCounts, chosen: set[str] | None = None) -> Load:
        """The sums over these units (those `chosen`), scaled where there is a sample; repeated units count once."""
        total, start, seen = Load(), 0, set[str]()
        for unit in units:
            indices = range(start, start + unit.num_rows)
            start += unit.num_rows
            if unit.id in seen or (chosen is not None and unit.id not in chosen):
                continue
            seen.add(unit.id)
            total = total.plus(self.load_of(indices, *texts))
        return total.times(texts[0].scale) if texts[0].sample > 1 else total

    def load_of(self, indices: Sequence[int], *texts: _TokenCounts) -> Load:
        """The sums over one unit, whose rows have these indices; each row has one text in each of `texts`."""
        total = Load()
        read = [(each, index) for each in texts for index in indices if each.tokens[index] > 0]
        lengths = [each.tokens[index] for each, index in read]
        supervised = [each.supervised[index] for each, index in read]
        for batch in tokenise.micro_batches(lengths, self.budget):
            total = total.plus(self._batch(lengths, supervised, batch))
        return total

    def _batch(self, lengths: list[int], supervised: list[int], batch: list[int]) -> Load:
        longest = lengths[batch[0]]
        padded = longest * len(batch)
        loss = sum(supervised[index] for index in batch)
        self.longest, self.largest = max(self.longest, longest), max(self.largest, len(batch))
        self.supervised_share = max(self.supervised_share, loss / padded)
        return Load(len(batch), sum(lengths[index] for index in batch), padded, padded * longest, loss)


class _ByteCounter(LocalFolder):
    """A store that counts the bytes of what is put and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(str(Path()))
        self.num_bytes = 0

    def put(self, key: str, content: bytes) -> None:
        self.num_bytes += len(content)
