"""The layouts of targets: where a pair's prompt stands, and the content of the pair. Does not know tokens or files."""

from functools import lru_cache
from typing import Any

from prism_job.data.bad_row import REQUESTS, BadRow, are_turns, describe_columns, line_of, unclear
from prism_job.data.columns import columns_name, columns_parts, mapped
from prism_job.data.content import (
    Content,
    Layout,
    Row,
    alpaca_prompt,
    is_text,
    pair,
    refuse_stray_columns,
    template_inputs,
    text_of,
    with_template_inputs,
)
from prism_job.data.implicit_prompt import SIDES, implicit_prompt, shares_a_mark
from prism_job.data.messages import Message, read_messages, system_and, without_weights
from prism_job.spec.data import ColumnsSpec

SECTION = "targets"

NO_PAIR = ("no 'chosen'", "no 'rejected'")
"""How the reason begins where a row lacks a side."""


def _prompt(row: Row) -> Any:
    return row["prompt"]


def _sharegpt(row: Row) -> list[Message]:
    messages = system_and(row.get("system"), read_messages(row["conversations"], "conversations"))
    if messages[-1]["role"] == "assistant":
        raise BadRow("conversations must end before the response, and its last turn is the assistant's")
    return messages


def _messages(row: Row) -> list[Message]:
    return read_messages(row["messages"], "messages")


def _question(row: Row) -> list[Message]:
    return system_and(row.get("system"), [{"role": "user", "content": text_of(row["question"], "question")}])


LOSS = "chosen and rejected"
PROMPTS = (
    Layout(
        "prompt + chosen + rejected",
        ("prompt",),
        LOSS,
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        _prompt,
    ),
    Layout(
        "conversations + chosen + rejected (ShareGPT)",
        ("conversations",),
        LOSS,
        {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        _sharegpt,
    ),
    Layout(
        "instruction + chosen + rejected (Alpaca)",
        ("instruction",),
        LOSS,
        {"user": ["instruction", "input"], "chosen": "chosen", "rejected": "rejected"},
        alpaca_prompt,
    ),
    Layout(
        "question + chosen + rejected (Orca)",
        ("question",),
        LOSS,
        {"user": "question", "chosen": "chosen", "rejected": "rejected"},
        _question,
    ),
)
"""Columns that hold the prompt of `chosen` and `rejected`; `content` gives the prompt: text, or messages."""

BESIDE_ONE_TURN = Layout(
    "messages + chosen + rejected",
    ("messages",),
    LOSS,
    {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
    _messages,
)
"""Where chosen is one turn. Elsewhere `messages` repeats what `chosen` holds, as in UltraFeedback."""

IMPLICIT = Layout(
    "chosen + rejected (implicit prompt)", SIDES, LOSS, {"chosen": "chosen", "rejected": "rejected"}, lambda _: None
)


def read_target(row: Row, needs_rejected: bool, columns: ColumnsSpec | None) -> tuple[Content, Layout]:
    """The content of a pair and its layout: prompt, chosen and, unless the weighting does without it, rejected.

    Raises BadRow: a part is missing or of the wrong type, or chosen and rejected are identical; UnclearLayout.
    """
    if columns is not None and (parts := mapped(row, columns)) is not None:
        _check_sides(parts, needs_rejected, row)
        prompt = _mapped_prompt(parts)
        layout = _mapped_layout(columns)
        parts = template_inputs(row) | parts
        return _pair_content(prompt, parts, is_conversation="user" in parts or "messages" in parts), layout
    _check_sides(row, needs_rejected, row)
    found = [layout for layout in PROMPTS if row.get(layout.columns[0]) is not None]
    if len(found) > 1 and _are_whole(row):  # the turns decide, and the columns repeat one of them
        found = found[:1]
    if len(found) > 1:
        names = " and ".join(f"'{layout.columns[0]}'" for layout in found)
        raise unclear(f"the prompt may be in {names}", SECTION, [(layout.line, "") for layout in found])
    if not found and isinstance(row["chosen"], dict) and row.get("messages") is not None:
        found = [BESIDE_ONE_TURN]
    if not found:
        _check_no_other_prompt(row)
        content = _pair_content(None, row)
        refuse_stray_columns(row, content, IMPLICIT, SECTION)
        return content, IMPLICIT
    layout = found[0]
    prompt = layout.content(row)
    if isinstance(prompt, str):
        _check_begins_once(prompt, row)
    content = _pair_content(prompt, row, is_conversation=layout is not PROMPTS[0])
    refuse_stray_columns(row, content, layout, SECTION)
    return content, layout


def _are_whole(row: Row) -> bool:
    """Whether both sides are conversations that begin before the response."""
    sides = [row[name] for name in SIDES if row.get(name) is not None]
    return all(isinstance(side, list) for side in sides) and all(
        read_messages(side, name)[0]["role"] != "assistant" for side, name in zip(sides, SIDES, strict=False)
    )


def _check_sides(row: Row, needs_rejected: bool, whole_row: Row) -> None:
    for name in SIDES:
        if row.get(name) is None and (name == "chosen" or needs_rejected):
            needed = " (weighting: preference needs it; uniform does not)" if name == "rejected" else ""
            write = line_of(user="QUESTION", chosen="GOOD", rejected="BAD")
            hint = f"if it has another name, write targets.columns: {write}"
            raise BadRow(f"no '{name}'{needed}; {describe_columns(whole_row)}; {hint}")


def _mapped_prompt(parts: Row) -> Any:
    if "user" in parts:
        return system_and(parts.get("system"), [{"role": "user", "content": parts["user"]}])
    if "messages" in parts:
        return system_and(parts.get("system"), read_messages(parts["messages"], "messages"))
    return parts.get("prompt")


@lru_cache(maxsize=256)
def _mapped_layout(columns: ColumnsSpec) -> Layout:
    return Layout(columns_name(columns), (), LOSS, columns_parts(columns), _mapped_prompt)


def _pair_content(prompt: Any, row: Row, *, is_conversation: bool = False) -> Content:
    """`is_conversation`: a response that is text is a turn of the assistant."""
    sides = {name: _as_turns(row[name], is_conversation) for name in SIDES if row.get(name) is not None}
    if prompt is None or (isinstance(prompt, str) and all(isinstance(value, list) for value in sides.values())):
        if is_text(prompt):
            _check_are_whole(sides)
        given, (prompt, sides) = prompt, implicit_prompt(sides)
        if is_text(given):
            _check_is_in(given, prompt)
    elif isinstance(prompt, list) and all(isinstance(value, list) for value in sides.values()):
        prompt = without_weights(read_messages(prompt, "prompt"))
        sides = {name: _after(prompt, read_messages(value, name), name) for name, value in sides.items()}
    elif isinstance(prompt, list) and any(isinstance(value, str) for value in sides.values()):
        raise BadRow(
            "prompt is a list of turns, and chosen or rejected text; if that is what the assistant says, write "
            "targets.columns: {messages: prompt, chosen: chosen, rejected: rejected}"
        )
    content: Content = {}
    for name, value in sides.items():
        content["prompt"], content[name] = pair(prompt, value, name)
    if content["chosen"] == content.get("rejected"):
        raise BadRow("chosen and rejected are identical")
    return with_template_inputs(content, row)


def _as_turns(value: Any, is_conversation: bool) -> Any:
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    return [{"role": "assistant", "content": value}] if is_conversation and isinstance(value, str) else value


def _after(prompt: list[Message], messages: list[Message], name: str) -> list[Message]:
    """The response of a conversation that may be whole. Raises BadRow: it begins with other turns than the prompt."""
    if without_weights(messages[: len(prompt)]) == prompt and len(messages) > len(prompt):
        return messages[len(prompt) :]
    if messages[0]["role"] != "assistant":
        raise BadRow(
            f"no response: {name} begins neither with a turn of the assistant nor with the turns of the prompt"
        )
    return messages


def _check_are_whole(sides: dict[str, Any]) -> None:
    for name, value in sides.items():
        if read_messages(value, name)[0]["role"] == "assistant":
            raise BadRow(
                f"prompt is text, and {name} a list of turns that begins with the response; if prompt is the question, write "
                "targets.columns: {user: prompt, chosen: chosen, rejected: rejected}"
            )


def _check_is_in(prompt: str, messages: list[Message]) -> None:
    # UltraFeedback and its kind repeat a turn of whole conversations as text.
    if not any(
        isinstance(text := message.get("content"), str) and text.strip() == prompt.strip() for message in messages
    ):
        line = line_of(chosen="chosen", rejected="rejected")
        raise BadRow(
            "prompt is none of the turns that chosen and rejected share; if it should not be read, write "
            f"targets.columns: {line}; if it is the question, {{user: prompt, chosen: chosen, rejected: rejected}}"
        )


def _check_no_other_prompt(row: Row) -> None:
    """A beginning that two texts share by chance is no prompt. Raises UnclearLayout: another column may hold it."""
    if not all(isinstance(row.get(name), str) for name in SIDES):
        return
    if shares_a_mark(row["chosen"], row["rejected"]):
        return
    may_ask = {name: value for name, value in row.items() if name not in SIDES and value}
    for name in sorted(may_ask, key=lambda name: name.lower() not in REQUESTS):  # usual names first
        value = may_ask[name]
        if name.lower() in REQUESTS or are_turns(value) or (is_text(value) and len(value.split()) > 1):
            part = "messages" if are_turns(value) else "user"
            readings = [
                (line_of(**{part: name}, chosen="chosen", rejected="rejected"), f"if '{name}' is the question"),
                (line_of(chosen="chosen", rejected="rejected"), "if the common beginning of both is the prompt"),
            ]
            raise unclear(f"no 'prompt': it may be in '{name}', or the common beginning", SECTION, readings)


def _check_begins_once(prompt: str, row: Row) -> None:
    """Raises UnclearLayout: both responses repeat a prompt of several words, which would stand there twice."""
    sides = [row[name] for name in SIDES if row.get(name) is not None]
    if len(prompt.split()) > 1 and all(isinstance(side, str) and side.startswith(prompt) for side in sides):
        readings = [
            (line_of(chosen="chosen", rejected="rejected"), "if they repeat it"),
            (PROMPTS[0].line, "if the responses begin so after the prompt"),
        ]
        raise unclear("chosen and rejected both begin with the whole prompt", SECTION, readings)
