"""A row of a data file -> the training content it stands for, by the layouts of TRL. Does not know tokens or files.

Candidates: `messages`, or `prompt` + `completion`, or `text`. Targets: `prompt` + `chosen` + `rejected`.
Other columns are carried along and change nothing: only the content makes the example's id.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prism_job.spec.data import ColumnsSpec
from prism_job.spec.digest import digest

Content = dict[str, Any]
"""Canonical training content: exactly the keys of one layout."""

Message = dict[str, Any]

MAX_COLUMNS_SHOWN = 8
"""Column names that a message lists."""


class BadRow(Exception):
    """This row cannot be used; the text says why, and what a good one has."""


@dataclass(frozen=True)
class Layout:
    """One convention of column names: a row has it if none of `columns` is null. `content` raises BadRow."""

    columns: tuple[str, ...]
    content: Callable[[dict[str, Any]], Content]


def candidate_content(row: dict[str, Any], columns: ColumnsSpec | None = None) -> Content:
    """The content of a candidate row: that of the first layout whose columns it has.

    Raises BadRow: no known columns, no response, or wrong types.
    """
    for layout in CANDIDATE_LAYOUTS:
        if all(row.get(column) is not None for column in layout.columns):
            return layout.content(row)
    if row.get("prompt") is not None:
        raise BadRow("no response: there is a prompt but no completion")
    raise BadRow(f"no messages, prompt + completion, or text; {describe_columns(row)}")


def _conversation(row: dict[str, Any]) -> Content:
    messages = _messages(row["messages"], "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no response: messages holds no turn of role 'assistant'")
    return _with_tools({"messages": messages}, row)


def _prompt_and_completion(row: dict[str, Any]) -> Content:
    prompt, completion = _pair(row["prompt"], row["completion"], "completion")
    return _with_tools({"prompt": prompt, "completion": completion}, row)


CANDIDATE_LAYOUTS = (
    Layout(("messages",), _conversation),
    Layout(("prompt", "completion"), _prompt_and_completion),
    Layout(("text",), lambda row: {"text": _text(row["text"], "text")}),
)
UNSUPPORTED_LAYOUTS = {
    ("conversations",): "ShareGPT's conversations: make each turn {role, content} and name the column messages",
    ("instruction", "output"): "Alpaca's instruction and output: name them prompt and completion",
}
"""Columns of other well-known layouts -> what to do with them."""


def describe_columns(row: dict[str, Any]) -> str:
    """The columns of a row, for a message; and what to do if they are those of an unsupported layout."""
    names = ", ".join(repr(str(name))[:40] for name in list(row)[:MAX_COLUMNS_SHOWN]) or "none"
    more = f" and {len(row) - MAX_COLUMNS_SHOWN} more" if len(row) > MAX_COLUMNS_SHOWN else ""
    hints = (hint for columns, hint in UNSUPPORTED_LAYOUTS.items() if all(column in row for column in columns))
    hint = next((f"; {hint}" for hint in hints), "")
    return f"columns found: {names}{more}{hint}"


def target_content(row: dict[str, Any], needs_rejected: bool, columns: ColumnsSpec | None = None) -> Content:
    """The content of a target row: prompt, chosen and, unless the weighting does without it, rejected.

    Raises BadRow: a part is missing or of the wrong type, or chosen and rejected are identical.
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
        raise BadRow("chosen and rejected are identical")
    return _with_tools({"prompt": canonical, "chosen": chosen, "rejected": rejected}, row)


def example_id(content: Content) -> str:
    """32 hex digits of the content: the same content in any file is the same example."""
    return digest(content)


def as_text(content: Content, *, labelled: bool = False) -> str:
    """The example as the report prints it; `labelled`: with the name of each part before it."""
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
    # TRL's "implicit prompt": the common beginning of two whole conversations.
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise BadRow("no 'prompt' (it may be left out only where chosen and rejected are whole conversations)")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise BadRow("chosen and rejected are identical")
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
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name}[{index}] has no role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRow(f"{name}[{index}] has no text content")
        messages.append(_without_nulls(message))
    return messages


def _without_nulls(value: Any) -> Any:
    # Parquet fills absent keys of a struct with null, at any depth. The same message from jsonl must get the same id.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _with_tools(content: Content, row: dict[str, Any]) -> Content:
    tools = row.get("tools")
    if isinstance(tools, str):  # as in TRL: parquet cannot hold schemas of different shapes, JSON text can
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"tools is text, but not JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise BadRow("tools is not a list of JSON schemas")
    if tools:
        content["tools"] = _without_nulls(tools)
    return content
