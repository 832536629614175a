"""What is wrong with a row, in words: the reasons that quarantine shows, and the `columns:` line that would read the row.

Does not decide which layout a row has.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

MAX_COLUMNS_SHOWN = 8
"""Column names that a message lists."""

MAX_COLUMNS_COMPARED, LONGEST_COMPARED = 256, 64
"""Columns whose names are compared with a missing one, and the longest of these names: any file can hold thousands."""

REQUESTS = (
    "instruction", "instructions", "question", "prompt", "query", "problem", "task", "user", "request", "input", "inputs",
    "context", "text",
)  # fmt: skip
"""Names of columns that mostly hold what comes before a response, in the order in which a message joins them."""

RESPONSES = (
    "response", "responses", "solution", "answer", "answers", "output", "completion", "target", "targets", "code",
    "assistant", "reply", "chosen", "summary",
)  # fmt: skip
"""Names of columns that mostly hold a response. A solution beside an answer leads to it, so it comes first."""

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Names of columns that hold a system prompt."""


class BadRow(Exception):
    """This row cannot be used; the text says why, and what a good one has."""


class UnclearLayout(BadRow):
    """The row can be read in several ways. No row must be read before the document decides: it stops the run."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}; {fix}")


UNUSABLE = (BadRow, ValueError, TypeError, RecursionError)
"""What may be raised where a row is read. Lone surrogates, endless nesting: nothing in a row may end the run."""


def reason_of(error: Exception) -> str:
    """Why a row cannot be used, as quarantine keeps it: any file can hold it, and a template's error stays short."""
    return str(error)[:500].encode("utf-8", "backslashreplace").decode()


def unclear(what: str, section: str, readings: Iterable[tuple[str, str]]) -> UnclearLayout:
    """Names the `columns:` line of each reading. `readings`: line and what it learns."""
    lines = "; or ".join(f"columns: {line} {meaning}".rstrip() for line, meaning in readings)
    return UnclearLayout(what, f"write in spec.{section} which is meant: {lines}")


def describe_columns(row: Mapping[str, Any], missing: str = "") -> str:
    """The columns of a row, for a message, and before them the one whose name is nearest to that of the missing one."""
    compared = [name for name in islice(row, MAX_COLUMNS_COMPARED) if name != missing and len(name) <= LONGEST_COMPARED]
    near = difflib.get_close_matches(missing, compared, n=1) if missing else []
    return "".join(f"did you mean {name!r}? " for name in near) + _columns_found(row)


def _columns_found(row: Mapping[str, Any]) -> str:
    names = ", ".join(repr(str(name))[:40] for name in list(row)[:MAX_COLUMNS_SHOWN]) or "none"
    more = f" and {len(row) - MAX_COLUMNS_SHOWN} more" if len(row) > MAX_COLUMNS_SHOWN else ""
    return f"columns found: {names}{more}"


def suggest_columns(row: Mapping[str, Any]) -> str:
    """What to write for a candidate of unknown columns: their names where they are usual ones, else an example."""
    requests = _named(row, REQUESTS)
    response = next(iter(_named(row, RESPONSES)), None)
    system = dict([("system", name) for name in SYSTEM_COLUMNS if name in row][:1])
    dialogue = next((name for name, value in row.items() if are_turns(value)), None)
    if dialogue is not None:
        last = row[dialogue][-1]
        ends = isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt", "model")
        if ends or response is not None:
            answer = {} if ends or response is None else {"assistant": response}
            return f"write candidates.columns: {line_of(messages=dialogue, **answer, **system)}"
    if not requests or response is None:
        return (
            "name yours: candidates.columns: {user: QUESTION, assistant: ANSWER}, {messages: COLUMN} or {text: COLUMN} "
            "(docs/data.md)"
        )
    line = line_of(user=requests, assistant=response, **system)
    return f"if these are question and answer, write candidates.columns: {line}"


def are_turns(value: Any) -> bool:
    """Whether a value looks like the turns of a conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & value[0].keys())
    )


def _named(row: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """The columns of text that have one of these names, in the order of `names`."""
    by_name = {str(column).lower(): column for column, value in row.items() if isinstance(value, str)}
    return [by_name[name] for name in names if name in by_name]


def line_of(**parts: str | list[str]) -> str:
    """`columns` as YAML in one line."""
    return "{" + ", ".join(f"{part}: {_yaml(source)}" for part, source in parts.items()) + "}"


def _yaml(source: str | list[str]) -> str:
    if isinstance(source, list):
        return _yaml(source[0]) if len(source) == 1 else "[" + ", ".join(map(_yaml, source)) + "]"
    return source if re.fullmatch(r"[A-Za-z_][\w-]*", source) else json.dumps(source, ensure_ascii=False)


def wrong_type(value: Any, name: str, wanted: str) -> BadRow:
    """A value of a column is not what its layout needs."""
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return BadRow(
            f"{name} holds a whole column, as pandas' to_json writes it: write the file again with "
            "to_json(…, orient='records', lines=True), one row a line"
        )
    return BadRow(f"{name} is a {type(value).__name__}, not {wanted}")
