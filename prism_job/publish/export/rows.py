"""The rows of an export: those that are selected, in plan order, from the store; in a format, with columns added. No files.

Shapes: N candidates in plan order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.data.examples import BadRow, Content, candidate_content, example_id
from prism_job.data.readers import Row
from prism_job.errors import RequestError
from prism_job.plan.chained import selected_rows
from prism_job.publish.export.formats import FORMATS, UnfitError, as_messages
from prism_job.publish.export.notes import Notes
from prism_job.publish.origins import Origins
from prism_job.publish.published import Published
from prism_job.spec.ranking import SelectionSpec
from prism_job.storage.address import open_store

AS_TEXT = "written as text, because JSON has no such type"
SEVERAL_LAYOUTS = "several layouts in one file, of which trainers take one"
LEFT_OUT = "left out by --format, which writes the training content alone"


@dataclass(frozen=True)
class Columns:
    """What each row becomes: a format by name (None: the row as it was), and columns that are added, by name."""

    format: str | None = None
    weight: str | None = None
    score: str | None = None


def export_rows(selection: Published, columns: Columns, notes: Notes) -> Iterator[Row]:
    """The selected rows as they are written.

    Raises RequestError: the format cannot hold a row, or the row has a column of that name already; names source and line.
    """
    added = _added_columns(selection, columns)
    convert = _converter(selection, columns, notes)
    layouts: dict[str, None] = {}
    as_text = selection.plan().as_text or {}
    for number, row in _selected_rows(selection):
        notes.add(AS_TEXT, *(f"{column} ({name})" for column, name in as_text.items() if column in row))
        try:
            changed = convert(row)
        except (UnfitError, BadRow) as error:
            fix = "use --format trl, which holds every example, or none: the rows as they were"
            what = f"{columns.format} cannot hold this example: {error}"
            raise RequestError(what, where=_place_of(number, selection), fix=fix) from error
        taken = [name for name in added if name in changed]
        if taken:
            what = f"the row has a column {taken[0]!r} already"
            raise RequestError(what, where=_place_of(number, selection), fix="choose another name for the new column")
        layouts[next(iter(changed), "")] = None
        yield changed | {name: float(values_N[number]) for name, values_N in added.items()}
    if columns.format and len(layouts) > 1:
        notes.add(SEVERAL_LAYOUTS, *layouts)


def _place_of(number: int, selection: Published) -> str:
    plan = selection.plan()
    sources, lines = Origins(plan).of(np.array([number]))
    return f"{plan.sources[sources[0]]} line {lines[0]}"


def _selected_rows(selection: Published) -> Iterator[tuple[int, Row]]:
    selected_N = selection.table("scores.parquet", ["selected"])["selected"].to_numpy()
    return selected_rows(selection.plan(), selected_N, open_store(selection.manifest.spec.spec.store))


def _converter(selection: Published, columns: Columns, notes: Notes) -> Callable[[Row], Row]:
    if columns.format is None:
        return lambda row: row
    mapping = selection.manifest.spec.spec.candidates.columns
    name, to_row = columns.format, FORMATS[columns.format]
    known: set[tuple[str, ...]] = set()

    def convert(row: Row) -> Row:
        content = candidate_content(row, mapping)
        changed = to_row(content)
        wanted = content if name == "trl" else as_messages(content)
        if example_id(candidate_content(changed)) != example_id(wanted):
            raise UnfitError("read back, it would be another one")
        if tuple(row) not in known:
            known.add(tuple(row))
            notes.add(LEFT_OUT, *_carried(row, content, lambda rest: candidate_content(rest, mapping)))
        return changed

    return convert


def _carried(row: Row, content: Content, content_of: Callable[[Row], Content]) -> list[str]:
    """The columns that are no part of the content: without them it is the same."""

    def is_used(column: str) -> bool:
        try:
            return content_of({name: value for name, value in row.items() if name != column}) != content
        except BadRow:
            return True

    return [column for column, value in row.items() if value not in (None, "", []) and not is_used(column)]


def _added_columns(selection: Published, columns: Columns) -> dict[str, NDArray[Any]]:
    """Name -> a number for each candidate."""
    if columns.weight is None and columns.score is None:
        return {}
    table = selection.table("scores.parquet", ["score", "selected"])
    score_N, selected_N = table["score"].to_numpy(zero_copy_only=False), table["selected"].to_numpy()
    weight_N = rank_weights(score_N, selected_N, selection.manifest.spec.spec.selection)
    by_name = {columns.weight: weight_N, columns.score: score_N}
    return {name: values_N for name, values_N in by_name.items() if name is not None}


def rank_weights(score_N: NDArray[Any], selected_N: NDArray[Any], rule: SelectionSpec) -> NDArray[Any]:
    """The share of the selected examples that rank no better: 1 for the best, 1 / n for the last of n, equal for equal scores.

    Best is the end of the ranking that the rule prefers.
    """
    sign = 1.0 if rule.keep == "highest" or rule.drop == "lowest" else -1.0
    ranked = np.sort(sign * score_N[selected_N])
    return np.searchsorted(ranked, sign * score_N, side="right") / max(len(ranked), 1)
