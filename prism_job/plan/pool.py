"""The rows of a document, read once: units of candidates and of targets, and what a plan refuses of them.

The plan reads so, and the estimate. Does not know tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prism_job.data import examples
from prism_job.data.data_files import Source
from prism_job.data.examples import Content, Layout
from prism_job.data.readers import Row
from prism_job.plan import checks
from prism_job.plan.plan import Quarantined, SourceLayout, Unit
from prism_job.plan.sample import Sample
from prism_job.plan.units import PAIRS_PER_UNIT, Example, cut_units, read_examples
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store

OnContent = Callable[[Content], None]
"""Gets the content of each good row, before it is staged. Raises BadRow: the row cannot be used after all."""


@dataclass(frozen=True)
class Pool:
    """The candidates: their units, how they were read, which rows are unusable, and the audit's sample."""

    units: list[Unit]
    layouts: list[SourceLayout]
    quarantine: list[Quarantined]
    sample: Sample
    labels: checks.Labels
    shares: checks.GroupShares

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    def check(self, spec: RunSpec, target_layouts: list[SourceLayout], more_bad: list[Quarantined]) -> None:
        """Raises as the functions of `checks` do. `more_bad`: rows of the units that the tokenizer makes unusable."""
        checks.check_bad_fraction([*self.quarantine, *more_bad], self.num_rows - len(more_bad), spec)
        checks.check_columns(self.layouts, target_layouts, spec)
        self.labels.check_both_kinds()
        self.shares.check_shares()


def read_targets(
    spec: RunSpec,
    sources: list[Source],
    sets: list[str],
    store: Store,
    staged: set[str],
    on_content: OnContent | None = None,
    *,
    needs_rejected: bool,
) -> tuple[list[Unit], list[SourceLayout]]:
    """The units of the targets, and how their sources were read. `sets`: the set of each source.

    Raises DataError: a bad target; RequestError: a set without targets, a row without its label.
    """
    bad: list[Quarantined] = []
    layouts: list[SourceLayout] = []
    labels, columns_of = checks.Labels(spec.evaluation), spec.targets.columns_by_set()

    def read(row: Row, source: int) -> tuple[Content, Layout]:
        return examples.read_target(row, needs_rejected, columns_of[sets[source]])

    def rows() -> Iterator[Example]:
        for example in read_examples(sources, read, bad, layouts, spec.extraction.loss_on, on_content):
            labels.check_target(example)
            yield example

    units = cut_units(rows(), PAIRS_PER_UNIT, store, staged)
    checks.check_targets(units, bad, sets, spec)
    return units, layouts


def read_pool(
    spec: RunSpec,
    sources: list[Source],
    store: Store,
    staged: set[str],
    as_text: dict[str, str] | None = None,
    on_content: OnContent | None = None,
    on_row: Callable[[str, str | int | None], None] | None = None,
) -> Pool:
    """The candidates. `on_row` gets the id of each good row, and its group where the budget is shared.

    Raises RequestError: a row that fits several layouts, or has no label or group that the document names.
    """
    labels, shares = checks.Labels(spec.evaluation), checks.GroupShares(spec.selection)
    quarantine: list[Quarantined] = []
    layouts: list[SourceLayout] = []
    sample = Sample(spec.audit.examples)

    def read(row: Row, _: int) -> tuple[Content, Layout]:
        return examples.read_candidate(row, spec.candidates.columns)

    def rows() -> Iterator[Example]:
        for example in read_examples(sources, read, quarantine, layouts, spec.extraction.loss_on, on_content):
            labels.check_candidate(example)
            group = shares.check_candidate(example)
            if on_row:
                on_row(example.example_id, group)
            sample.add(example.example_id, example.row)
            yield example

    units = cut_units(rows(), spec.extraction.examples_per_shard, store, staged, as_text)
    return Pool(units, layouts, quarantine, sample, labels, shares)
