"""Parts of an example -> canonical content: what the layouts of candidates and of targets share. Does not know columns."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from prism_job.data.bad_row import SYSTEM_COLUMNS, BadRow, line_of, unclear, wrong_type
from prism_job.data.messages import (
    Message,
    check_response,
    parse_json,
    read_messages,
    system_and,
    without_nulls,
    without_weights,
)

Content = dict[str, Any]
"""Canonical training content: exactly the keys of one layout."""

Row = dict[str, Any]

TURNS, LAST_TURN = "the assistant's turns", "the assistant's last turn"
"""What carries the loss in a conversation."""


@dataclass(frozen=True, eq=False)
class Layout:
    """One convention of column names. A row has it if none of `columns` is null.

    `loss`: what carries the loss, for people. `parts`: the `columns:` that read such rows. `content` raises BadRow.
    """

    name: str
    columns: tuple[str, ...]
    loss: str
    parts: dict[str, str | list[str]]
    content: Callable[[Row], Any]

    @property
    def line(self) -> str:
        """`parts` as YAML in one line."""
        return line_of(**self.parts)

    def loss_text(self, loss_on: str) -> str:
        """What carries the loss under this `extraction.lossOn`."""
        return LAST_TURN if loss_on == "last" and self.loss == TURNS else self.loss


def alpaca_prompt(row: Row) -> list[Message]:
    """Alpaca's instruction and input as a user turn, after `system` and the questions and answers of `history`."""
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise wrong_type(history, "history", "a list of questions with their answers")
    for number, said in enumerate(history):
        if not isinstance(said, list | tuple) or len(said) != 2 or not all(isinstance(text, str) for text in said):
            raise BadRow(f"history[{number}] is not a question and its answer")
        messages += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    texts = [text_of(row[name], name) for name in ("instruction", "input") if row.get(name) is not None]
    messages.append({"role": "user", "content": "\n".join(text for text in texts if text.strip())})
    return system_and(row.get("system"), messages)


def pair(prompt: Any, response: Any, name: str) -> tuple[Any, Any]:
    """Prompt and response: both text, or both messages. Raises BadRow."""
    if isinstance(prompt, str) and isinstance(response, str):
        for column, text in (("prompt", prompt), (name, response)):
            if text.startswith("[{") and _TURNS_AS_TEXT.match(text):
                raise BadRow(
                    f"{column} holds a list of turns as text, as CSV does; save the rows as JSON lines or parquet"
                )
        return prompt, response_text(response, name)
    if isinstance(prompt, str) or isinstance(response, str):
        raise BadRow(f"prompt and {name} must both be strings or both be message lists")
    messages = read_messages(response, name)
    if messages[0]["role"] != "assistant":
        raise BadRow(f"no response: {name} must begin with a turn of role 'assistant'")
    check_response(messages, name)
    return without_weights(read_messages(prompt, "prompt")), messages


_TURNS_AS_TEXT = re.compile(r"""\[\{\s*(['"])(role|content|from|value)\1\s*:""")


def template_inputs(row: Row) -> Row:
    """What a chat template gets beside messages, whichever columns hold these."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}


def with_template_inputs(content: Content, row: Row) -> Content:
    """Adds what else a chat template gets: `tools` and `chat_template_kwargs`. Plain text has no template."""
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if (tools is None and kwargs is None) or isinstance(content.get("prompt"), str):
        return content
    if isinstance(tools, str):  # as in TRL: parquet cannot hold schemas of different shapes, JSON text can
        tools = parse_json(tools, "tools") if tools.strip() else None
    if tools and not isinstance(tools, list):
        raise BadRow("tools is not a list of JSON schemas")
    if tools:
        content["tools"] = without_nulls(tools)
    if isinstance(kwargs, str):
        kwargs = parse_json(kwargs, "chat_template_kwargs") if kwargs.strip() else None
    if kwargs and not isinstance(kwargs, dict):
        raise wrong_type(kwargs, "chat_template_kwargs", "an object")
    if kwargs and (given := without_nulls(kwargs)):
        reserved = sorted(RESERVED & given.keys())
        if reserved:
            raise BadRow(f"chat_template_kwargs may not hold '{reserved[0]}', which PRISM sets itself")
        content["chat_template_kwargs"] = given
    return content


def refuse_stray_columns(row: Row, content: Content, layout: Layout, section: str) -> None:
    """Raises UnclearLayout: a column that the layout does not read holds a system prompt, a part of the question, or images."""
    names = [name for name in row if name in STRAY]
    if not names:  # nearly all: no time for more
        return
    _refuse_stray_system(row, content, layout, section)
    _refuse_stray_question(row, content, layout, section)
    for name in names:
        if name in MEDIA and row[name]:
            what = f"column '{name}' is beside the text, and PRISM reads text alone"
            raise unclear(what, section, [(layout.line, "to learn the text without it")])


def _refuse_stray_question(row: Row, content: Content, layout: Layout, section: str) -> None:
    part = next((part for part in ("user", "prompt") if part in layout.parts), None)
    if part is None:
        return  # whole conversations, or plain text, for which another rule says what stands beside it
    if part == "prompt" and isinstance(content["prompt"], list):
        return  # the turns are the question
    source = layout.parts[part]
    own = [source] if isinstance(source, str) else source
    asked = "\n".join(row[name] for name in own if is_text(row.get(name)))
    for name in QUESTIONS:
        if name in own or not is_text(row.get(name)) or len(row[name].split()) < 2:
            continue
        if row[name].strip() in asked or asked.strip() in row[name]:
            continue
        what = f"column '{name}' holds text that this layout does not read, and that '{own[0]}' does not repeat"
        joined = line_of(**{**layout.parts, part: [*own, name]})
        raise unclear(what, section, [(layout.line, "without it"), (joined, "as a part of the question")])


def _refuse_stray_system(row: Row, content: Content, layout: Layout, section: str) -> None:
    name = next((name for name in SYSTEM_COLUMNS if is_text(row.get(name))), None)
    first = content.get("messages", content.get("prompt"))
    if name is None or first is None:
        return
    if isinstance(first, list) and first[0]["role"] in ("system", "developer"):
        return
    readings = [(layout.line, "without it")]
    # A system turn needs a conversation: text becomes its turns.
    renamed = {"prompt": "messages"} if section == "targets" else {}
    if isinstance(first, str):
        renamed = {"prompt": "user", "completion": "assistant"}
    parts = {renamed.get(part, part): source for part, source in layout.parts.items()}
    if parts.keys() & {"messages", "user"}:
        readings.append((line_of(**parts, system=name), "as a system turn"))
    raise unclear(f"column '{name}' holds a system prompt that this layout does not read", section, readings)


QUESTIONS = ("instruction", "question", "query", "problem", "input", "context")
"""Columns that mostly hold the question or a part of it."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")

STRAY = frozenset({*SYSTEM_COLUMNS, *QUESTIONS, *MEDIA})

RESERVED = frozenset({
    "conversation", "conversations", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of transformers' apply_chat_template, which no row may set."""


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(value, name, "text")
    return value


def response_text(value: Any, name: str) -> str:
    """Text that carries loss. Raises BadRow: it is not text, or empty."""
    if not isinstance(value, str):
        raise wrong_type(value, name, "text")
    if not value or value.isspace():
        raise BadRow(f"no response: {name} is empty")
    return value


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a column holds text that is not blank."""
    return isinstance(value, str) and not value.isspace() and value != ""
