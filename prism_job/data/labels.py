"""What a column says about a row: a label that it is good or bad, a group where it belongs. Neither changes a score."""

import json
import reprlib
from typing import Any

from prism_job.data.bad_row import describe_columns
from prism_job.errors import RequestError

_YES = {"1", "1.0", "true", "yes"}
_NO = {"0", "0.0", "false", "no"}


OF_CANDIDATES, OF_TARGETS = "evaluation.label (--label)", "evaluation.targetLabel (--target-label)"
"""Field of the document, and option of `prism evaluate`, that name a column of labels."""


def label_of(row: dict[str, Any], column: str, positive: str | None, where: str, field: str = OF_CANDIDATES) -> bool:
    """Whether the row is good: the column holds `positive`, or, where that is None, 1, true or yes; case does not matter.

    Args:
        field: what named the column, for messages.

    Raises RequestError: the column is missing or null, or `positive` is None and it holds neither yes nor no.
    """
    if row.get(column) is None:
        what = f"no '{column}' in this row, which {field} names; {describe_columns(row, column)}"
        raise RequestError(what, where=where, fix="name a column that all rows have")
    # A list or an object cannot be compared, and may be nested too deep to print.
    value = "" if isinstance(row[column], list | dict) else str(row[column]).lower()
    if positive is not None:
        return value == positive.lower()
    if value not in _YES | _NO:
        fix = "use 1/0, true/false or yes/no; for a label of candidates, positive (--positive) names the good value"
        raise RequestError(f"'{column}' holds {reprlib.repr(row[column])}, neither yes nor no", where=where, fix=fix)
    return value in _YES


def refuse_one_sided(num_good: int, num_rows: int, column: str, where: str) -> None:
    """Raises RequestError where a label marks all rows good, or all bad: there is nothing to compare."""
    if num_good in (0, num_rows):
        what = f"column '{column}' marks all {num_rows:,} candidates {'good' if num_good else 'bad'}"
        fix = "name a column with both kinds, or the value that means good, positive (--positive)"
        raise RequestError(what, where=where, fix=fix)


LONGEST_GROUP = 256
"""Characters of a group's name: longer text is content, not a group."""


def group_of(row: dict[str, Any], column: str, where: str) -> str | None:
    """The group that the column puts the row into: its text, or a number, true or false as JSON. None: no value.

    Raises RequestError: a list, an object, or text longer than LONGEST_GROUP.
    """
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, list | dict):
        what = f"'{column}' holds {reprlib.repr(value)}, which is no group"
        raise RequestError(what, where=where, fix="name a column of text, numbers, or true and false")
    name = json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    if len(name) > LONGEST_GROUP:
        what = f"'{column}' holds text of {len(name):,} characters, which is no group"
        raise RequestError(what, where=where, fix=f"name a column of at most {LONGEST_GROUP} characters")
    return name.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair would be no text of a manifest
