"""Data files -> work units: reads the rows, sets bad ones apart, cuts the rest into units and stages them in the store."""

from __future__ import annotations

from collections.abc import Callable

from prism_job.data import data_files, examples
from prism_job.data.data_files import Row, Source, Unreadable
from prism_job.data.examples import BadRow, Content
from prism_job.plan.plan import Quarantined, Unit
from prism_job.progress import Meter
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows

PAIRS_PER_UNIT = 16
"""Target pairs of one unit: unfolded rows are large (3.4 MB a pair for 135M parameters at dim 64)."""

FACTOR_UNIT_SHARE = 8
"""One unit in this many, by a hash of its id, carries factor sums; with 1,024 rows a unit they stay under 6 % of a store."""

MIN_FACTOR_ROWS = 1024
"""Curvature never rests on fewer examples than this, where the pool has them: a last unit may hold a single row."""


def list_targets(spec: RunSpec) -> tuple[list[Source], list[str]]:
    """The data files of all target sets, set by set, and the name of the set of each."""
    listed = [(source, one.name) for one in spec.targets.as_sets() for source in data_files.list_sources(one.uris)[0]]
    return [source for source, _ in listed], [name for _, name in listed]


def cut_units(
    sources: list[Source],
    parse: Callable[[Row], Content],
    size: int,
    store: Store,
    known: set[str],
    show: Callable[[Row, str, str], None] = lambda row, example_id, where: None,
) -> tuple[list[Unit], list[Quarantined]]:
    """Read the sources, cut their good rows into units of `size`, stage those that are not `known`; and the bad rows.

    Args:
        show: is shown each good row with its id and place, in plan order; what it raises ends the reading.
    """
    units: list[Unit] = []
    bad: list[Quarantined] = []
    meter = Meter("plan", len(sources))
    for position, source in enumerate(sources):
        waiting: list[tuple[int, Row, str]] = []
        for line, row in data_files.read_rows(source):
            try:
                if isinstance(row, Unreadable):
                    raise BadRow(row.reason)
                example_id = examples.example_id(parse(row))
            except (BadRow, ValueError, TypeError, RecursionError) as error:
                # Lone surrogates, dates within messages, endless nesting: nothing in a row may end the run.
                reason = str(error)[:500].encode("utf-8", "backslashreplace").decode()
                bad.append(Quarantined(source=source.uri, line=line, reason=reason))
                continue
            show(row, example_id, f"{source.uri} line {line}")
            waiting.append((line, row, example_id))
            if len(waiting) == size:
                units.append(_stage(position, waiting, store, known))
                waiting = []
        if waiting:
            units.append(_stage(position, waiting, store, known))
        meter.add(1)
    return units, bad


def _stage(source: int, waiting: list[tuple[int, Row, str]], store: Store, known: set[str]) -> Unit:
    name = staged_rows.stage_rows(store, [row for _, row, _ in waiting], known)
    lines: list[tuple[int, int]] = []
    for line, _, _ in waiting:
        if lines and line == sum(lines[-1]):
            lines[-1] = (lines[-1][0], lines[-1][1] + 1)
        else:
            lines.append((line, 1))
    unit_id = shards.unit_id_of([example_id for _, _, example_id in waiting])
    return Unit(id=unit_id, rows=name, num_rows=len(waiting), source=source, lines=lines)


def factor_units(candidates: list[Unit]) -> list[str]:
    """Units that carry factor sums: one in FACTOR_UNIT_SHARE by a hash of the id, and enough to hold MIN_FACTOR_ROWS."""
    sizes = {unit.id: unit.num_rows for unit in candidates}
    by_chance = sorted(sizes, key=lambda unit_id: (int(unit_id[:8], 16) % FACTOR_UNIT_SHARE != 0, unit_id))
    chosen: list[str] = []
    rows_chosen = 0
    for unit_id in by_chance:
        if int(unit_id[:8], 16) % FACTOR_UNIT_SHARE != 0 and rows_chosen >= MIN_FACTOR_ROWS:
            break
        chosen.append(unit_id)
        rows_chosen += sizes[unit_id]
    return chosen
