"""Data files -> work units: read the rows, set bad ones apart, cut the others into units, stage each unit in the store."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice

from prism_job.data import examples
from prism_job.data.bad_row import UNUSABLE, reason_of
from prism_job.data.data_files import Source
from prism_job.data.examples import BadRow, Content, Layout, UnclearLayout
from prism_job.data.readers import Row, Unreadable
from prism_job.errors import RequestError
from prism_job.plan.plan import UNUSABLE_ROWS, Quarantined, SourceLayout, Unit
from prism_job.plan.sources import NO_PINS, list_sources
from prism_job.progress import Meter, event
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows

PAIRS_PER_UNIT = 16
"""Target pairs of one unit: unfolded rows are large (3.4 MB a pair for 135M parameters at dim 64)."""

FACTOR_UNIT_SHARE = 8
"""One unit in this many, by a hash of its id, carries factor sums; with 1,024 rows a unit they stay under 6 % of a store."""

MIN_FACTOR_ROWS = 1024
"""Curvature rests on at least this many examples, if the pool has them: a last unit may hold a single row."""


@dataclass(frozen=True)
class Example:
    """A good row: index of its data file, line in that file from 1, and both for messages (`where`)."""

    source: int
    line: int
    where: str
    row: Row
    example_id: str


def list_targets(spec: RunSpec, pinned: Mapping[str, str] = NO_PINS) -> tuple[list[Source], list[str], dict[str, str]]:
    """The sources of all target sets, set by set; the name of the set of each; files that hold no rows, with why not."""
    sources: list[Source] = []
    names: list[str] = []
    ignored: dict[str, str] = {}
    for target_set in spec.targets.as_sets():
        found, others = list_sources(target_set.uris, pinned)
        sources += found
        names += [target_set.name] * len(found)
        ignored |= others
    return sources, names, ignored


def read_examples(
    sources: list[Source],
    read: Callable[[Row, int], tuple[Content, Layout]],
    quarantine: list[Quarantined],
    layouts: list[SourceLayout],
    loss_on: str,
    on_content: Callable[[Content], None] | None = None,
) -> Iterator[Example]:
    """The good rows of the sources in order; bad ones are added to `quarantine`, and the layouts of a source to `layouts`.

    Args:
        read: the content and the layout of a row of the source with this index; raises BadRow.
        loss_on: `extraction.lossOn`, for the words about the loss.
        on_content: gets the content of each good row; raises BadRow.

    Raises RequestError: a row fits several layouts, and the document does not say which is meant.
    """
    meter = Meter("plan", len(sources))
    for index, source in enumerate(sources):
        num_rows: Counter[Layout] = Counter()
        num_bad_before = len(quarantine)
        for line, row in source.read():
            try:
                if isinstance(row, Unreadable):
                    raise BadRow(row.reason)
                content, layout = read(row, index)
                example_id = examples.example_id(content)
                if on_content:
                    on_content(content)
            except UnclearLayout as error:
                raise RequestError(error.what, where=f"{source.uri} line {line}", fix=error.fix) from error
            except UNUSABLE as error:
                quarantine.append(Quarantined(source=source.uri, line=line, reason=reason_of(error)))
                continue
            num_rows[layout] += 1
            yield Example(index, line, f"{source.uri} line {line}", row, example_id)
        found = [
            SourceLayout(uri=source.uri, layout=layout.name, rows=rows, loss=layout.loss_text(loss_on))
            for layout, rows in num_rows.items()
        ]
        num_bad = len(quarantine) - num_bad_before
        if num_bad and not found:  # among many files it may stay under maxBadFraction
            found = [SourceLayout(uri=source.uri, layout=UNUSABLE_ROWS, rows=num_bad, loss="nothing")]
        for each in found:
            event("layout", **each.model_dump())
        layouts += found
        meter.add(1)


def cut_units(
    rows: Iterable[Example], size: int, store: Store, staged: set[str], as_text: dict[str, str] | None = None
) -> list[Unit]:
    """Units of `size` examples of one source each, the last of a source smaller. Stages those that are not in `staged`.

    Columns whose values become text when they are staged, and their type, are added to `as_text`.
    """
    units: list[Unit] = []
    for source, of_source in groupby(rows, key=lambda example: example.source):
        while unit := list(islice(of_source, size)):
            units.append(
                Unit(
                    id=shards.unit_id_of([example.example_id for example in unit]),
                    rows=staged_rows.stage_rows(store, [example.row for example in unit], staged, as_text),
                    num_rows=len(unit),
                    source=source,
                    lines=_runs([example.line for example in unit]),
                )
            )
    return units


def _runs(lines: list[int]) -> list[tuple[int, int]]:
    """Rising numbers as runs of consecutive ones: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for line in lines:
        if runs and line == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((line, 1))
    return runs


def factor_units(candidates: list[Unit]) -> list[str]:
    """Units that carry factor sums: one in FACTOR_UNIT_SHARE by a hash of the id, and enough to hold MIN_FACTOR_ROWS."""
    sizes = {unit.id: unit.num_rows for unit in candidates}
    by_hash = sorted(sizes, key=lambda unit_id: (int(unit_id[:8], 16) % FACTOR_UNIT_SHARE != 0, unit_id))
    chosen: list[str] = []
    num_rows = 0
    for unit_id in by_hash:
        if int(unit_id[:8], 16) % FACTOR_UNIT_SHARE != 0 and num_rows >= MIN_FACTOR_ROWS:
            break
        chosen.append(unit_id)
        num_rows += sizes[unit_id]
    return chosen
