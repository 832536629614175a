"""The texts of examples and target pairs, for people. Reads each staged unit once."""

from collections.abc import Sequence

from prism_job.data import examples
from prism_job.data.content import Row
from prism_job.plan.plan import Plan, Unit
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import staged_rows


def example_texts(spec: RunSpec, plan: Plan, store: Store, rows: Sequence[int]) -> list[str]:
    """Of these candidates, given by their index in plan order."""
    columns = spec.candidates.columns
    staged = _staged(plan.candidates, rows, store)
    return [examples.as_text(examples.candidate_content(staged[row][0], columns)) for row in rows]


def pair_texts(spec: RunSpec, plan: Plan, store: Store, pairs: Sequence[int]) -> list[str]:
    """Of these target pairs, each part with its name before it."""
    columns_of = spec.targets.columns_by_set()
    staged = _staged(plan.targets, pairs, store)
    texts = []
    for pair in pairs:
        row, source = staged[pair]
        content = examples.target_content(row, False, columns_of[plan.target_sets[source]])
        texts.append(examples.as_text(content, labelled=True))
    return texts


def _staged(units: list[Unit], rows: Sequence[int], store: Store) -> dict[int, tuple[Row, int]]:
    """Index in the order of all units' rows -> the row, and the index of its source."""
    waiting, start = sorted(set(rows), reverse=True), 0
    found: dict[int, tuple[Row, int]] = {}
    for unit in units:
        inside = []
        while waiting and waiting[-1] < start + unit.num_rows:
            inside.append(waiting.pop())
        if inside:
            of_unit = staged_rows.read_rows(store, unit.rows)
            found |= {row: (of_unit[row - start], unit.source) for row in inside}
        start += unit.num_rows
    return found
