"""One row of a data file -> the training content it stands for, by the conventions of TRL, or its label. Not: tokens, files.

Candidates: `messages`, or `prompt` + `completion`, or `text`. Targets: `prompt` + `chosen` + `rejected`.
Columns not named here are carried along and change nothing: the content alone makes the example's id.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

from prism_job.errors import RequestError
from prism_job.spec.digest import digest

Content = dict[str, Any]
"""Canonical training content: exactly the keys of one convention."""

Message = dict[str, Any]


MAX_COLUMNS_SHOWN = 8
"""Column names that a message lists."""

_YES = {"1", "1.0", "true", "yes"}
_NO = {"0", "0.0", "false", "no"}


class BadRow(Exception):
    """This row cannot be used; the text says why and what a good one has."""


def candidate_content(row: dict[str, Any]) -> Content:
    """The content of a candidate row.

    Raises:
        BadRow: no known columns, no response, or wrong types.
    """
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow("no response: messages holds no turn of role 'assistant'")
        return _with_tools({"messages": messages}, row)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = _pair(row["prompt"], row["completion"], "completion")
        return _with_tools({"prompt": prompt, "completion": completion}, row)
    if row.get("text") is not None:
        return {"text": _text(row["text"], "text")}
    if row.get("prompt") is not None:
        raise BadRow("no response: there is a prompt but no completion")
    raise BadRow(f"no messages, prompt + completion, or text; {_columns(row)}")


def _columns(row: dict[str, Any]) -> str:
    """The columns there are, and what to do where they are those of another well-known convention."""
    names = ", ".join(repr(str(name))[:40] for name in list(row)[:MAX_COLUMNS_SHOWN]) or "none"
    more = f" and {len(row) - MAX_COLUMNS_SHOWN} more" if len(row) > MAX_COLUMNS_SHOWN else ""
    hint = ""
    if "conversations" in row:
        hint = "; ShareGPT's conversations: make each turn {role, content} and name the column messages"
    elif "instruction" in row and "output" in row:
        hint = "; Alpaca's instruction and output: name them prompt and completion"
    return f"columns found: {names}{more}{hint}"


def target_content(row: dict[str, Any], needs_rejected: bool) -> Content:
    """The content of a target row: prompt, chosen and, unless the weighting does without it, rejected.

    Raises:
        BadRow: a part is missing, of the wrong type, or chosen equals rejected.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None and (name == "chosen" or needs_rejected):
            needed = " (weighting: preference needs it; uniform does not)" if name == "rejected" else ""
            raise BadRow(f"no '{name}'{needed}")
    chosen, rejected, prompt = row["chosen"], row.get("rejected"), row.get("prompt")
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    canonical, chosen = _pair(prompt, chosen, "chosen")
    if rejected is None:
        return _with_tools({"prompt": canonical, "chosen": chosen}, row)
    _, rejected = _pair(prompt, rejected, "rejected")
    if chosen == rejected:
        raise BadRow("chosen equals rejected: such a pair prefers nothing")
    return _with_tools({"prompt": canonical, "chosen": chosen, "rejected": rejected}, row)


def label_of(row: dict[str, Any], column: str, positive: str | None, where: str) -> bool:
    """Whether the row is good by this column: it holds `positive`, or without that 1, true or yes; in any case of letters.

    Raises:
        RequestError: nothing stands there, or without `positive` neither yes nor no does; names `where`, source and line.
    """
    if row.get(column) is None:
        raise RequestError(
            f"no '{column}' in this row; {_columns(row)}", where=where, fix="name a column that all rows have"
        )
    # A list or an object is no value to compare, and may be nested too deep to be written out.
    value = "" if isinstance(row[column], list | dict) else str(row[column]).lower()
    if positive is not None:
        return value == positive.lower()
    if value not in _YES | _NO:
        fix = "use 1/0, true/false or yes/no; for a label of candidates, positive (--positive) names the good value"
        raise RequestError(f"'{column}' holds {reprlib.repr(row[column])}, neither yes nor no", where=where, fix=fix)
    return value in _YES


def refuse_one_sided(num_good: int, num_rows: int, column: str, where: str) -> None:
    """Raises RequestError where a label calls all rows good, or all bad: there is nothing to tell apart."""
    if num_good in (0, num_rows):
        what = f"column '{column}' calls all {num_rows:,} candidates {'good' if num_good else 'bad'}"
        fix = "name a column with both kinds, or the value that means good, positive (--positive)"
        raise RequestError(what, where=where, fix=fix)


def example_id(content: Content) -> str:
    """32 hex digits of the content; the same text anywhere is the same example."""
    return digest(content)


def shown_text(content: Content, *, labelled: bool = False) -> str:
    """The example as a person reads it in a report; `labelled`: with the name of each part before it."""
    parts = []
    for key in ("messages", "prompt", "completion", "chosen", "rejected", "text"):
        value = content.get(key)
        if value is None:
            continue
        turns = [value] if isinstance(value, str) else [_turn(message) for message in value]
        parts.append((f"{key}: " if labelled else "") + "\n".join(turns))
    return "\n".join(parts)


def _turn(message: Message) -> str:
    return f"{message['role']}: {message.get('content', message.get('tool_calls'))}"


def _pair(prompt: Any, response: Any, name: str) -> tuple[Any, Any]:
    if isinstance(prompt, str) and isinstance(response, str):
        return _text(prompt, "prompt", may_be_empty=True), _text(response, name)
    if isinstance(prompt, str) or isinstance(response, str):
        raise BadRow(f"prompt and {name} must both be strings or both be message lists")
    messages = _messages(response, name)
    if messages[0]["role"] != "assistant":
        raise BadRow(f"no response: {name} must begin with a turn of role 'assistant'")
    return _messages(prompt, "prompt"), messages


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    # TRL's "implicit prompt": whole conversations whose common beginning is the prompt.
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise BadRow("no 'prompt' (it may be left out only where chosen and rejected are whole conversations)")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise BadRow("chosen equals rejected: such a pair prefers nothing")
    if not shared:
        raise BadRow("no 'prompt', and chosen and rejected do not begin with a message in common that could be it")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, not text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"no response: {name} is empty")
    return value


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is not a list of messages")
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name}[{position}] has no role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRow(f"{name}[{position}] has no text content")
        messages.append(_without_nulls(message))
    return messages


def _without_nulls(value: Any) -> Any:
    # Parquet fills absent keys of a struct with null, at any depth; the same message from jsonl must get the same id.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _with_tools(content: Content, row: dict[str, Any]) -> Content:
    tools = row.get("tools")
    if isinstance(tools, str):  # as TRL: parquet cannot hold schemas of unlike shapes, JSON text can
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"tools is text, but not JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise BadRow("tools is not a list of JSON schemas")
    if tools:
        content["tools"] = _without_nulls(tools)
    return content
