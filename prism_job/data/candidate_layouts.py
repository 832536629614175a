"""The layouts of candidates: which columns make one, and the content of a row that has it. Does not know tokens or files."""

from functools import lru_cache

from prism_job.data.bad_row import (
    REQUESTS,
    RESPONSES,
    BadRow,
    UnclearLayout,
    are_turns,
    describe_columns,
    line_of,
    suggest_columns,
    unclear,
)
from prism_job.data.columns import columns_name, columns_parts, mapped
from prism_job.data.content import (
    TURNS,
    Content,
    Layout,
    Row,
    alpaca_prompt,
    is_text,
    pair,
    refuse_stray_columns,
    response_text,
    template_inputs,
    with_template_inputs,
)
from prism_job.data.messages import Message, check_response, read_messages, system_and
from prism_job.spec.data import ColumnsSpec

SECTION = "candidates"


def _conversation(row: Row) -> Content:
    messages = read_messages(row["messages"], "messages")
    _refuse_stray_response(messages, "messages", row)
    return _learnt(messages, "messages", row)


def _prompt_and_completion(row: Row) -> Content:
    prompt, completion = pair(row["prompt"], row["completion"], "completion")
    return with_template_inputs({"prompt": prompt, "completion": completion}, row)


def _plain_text(row: Row) -> Content:
    for name, needs_words in _beside_text(tuple(row)):
        if is_text(row[name]) and (not needs_words or len(row[name].split()) > 1):
            raise _unclear_text(name)
    for name, value in row.items():
        if isinstance(value, list) and are_turns(value):
            readings = [(line_of(text="text"), "to learn text alone"), (line_of(messages=name), "")]
            raise unclear(f"column '{name}' holds a conversation beside 'text'", SECTION, readings)
    return {"text": response_text(row["text"], "text")}


def _sharegpt(row: Row) -> Content:
    messages = system_and(row.get("system"), read_messages(row["conversations"], "conversations"))
    _refuse_stray_response(messages, "conversations", row)
    return _learnt(messages, "conversations", row)


def _alpaca(row: Row) -> Content:
    messages = alpaca_prompt(row)
    messages.append({"role": "assistant", "content": response_text(row["output"], "output")})
    return _learnt(messages, "output", row)


LAYOUTS = (
    Layout("messages", ("messages",), TURNS, {"messages": "messages"}, _conversation),
    Layout(
        "prompt + completion",
        ("prompt", "completion"),
        "completion",
        {"prompt": "prompt", "completion": "completion"},
        _prompt_and_completion,
    ),
    Layout("text", ("text",), "the whole text", {"text": "text"}, _plain_text),
    Layout("conversations (ShareGPT)", ("conversations",), TURNS, {"messages": "conversations"}, _sharegpt),
    Layout(
        "instruction + output (Alpaca)",
        ("instruction", "output"),
        "output",
        {"user": ["instruction", "input"], "assistant": "output"},
        _alpaca,
    ),
)


def read_candidate(row: Row, columns: ColumnsSpec | None) -> tuple[Content, Layout]:
    """The content of a row and its layout: that of `columns`, or the only one whose columns it has.

    Raises BadRow: no known columns, no response, or wrong types; UnclearLayout: several layouts fit.
    """
    if columns is not None and (parts := mapped(row, columns)) is not None:
        layout = _mapped_layout(columns)
        return layout.content(template_inputs(row) | parts), layout
    found = _fitting(tuple([name for name, value in row.items() if value is not None]))
    if len(found) == 1:
        content = found[0].content(row)
        refuse_stray_columns(row, content, found[0], SECTION)
        return content, found[0]
    if found:
        names = " and ".join(f"'{layout.name}'" for layout in found)
        raise unclear(f"several layouts fit: {names}", SECTION, [(layout.line, "") for layout in found])
    if row.get("prompt") is not None and not any(is_text(row.get(name)) for name in RESPONSES):
        raise BadRow(f"no response: there is a prompt but no completion; {describe_columns(row)}")
    named = "" if columns is None else "nothing in the columns that candidates.columns names, and "
    raise BadRow(f"{named}no known layout (docs/data.md); {describe_columns(row)}; {suggest_columns(row)}")


@lru_cache(maxsize=4096)
def _fitting(names: tuple[str, ...]) -> tuple[Layout, ...]:
    """The layouts of a row with something in these columns. Cached: most rows of a file have the same."""
    return tuple(layout for layout in LAYOUTS if all(column in names for column in layout.columns))


@lru_cache(maxsize=4096)
def _beside_text(names: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """Columns that make it unclear what `text` is, and whether only several words do: a task may be the name of a kind."""
    lower = [(name, name.lower()) for name in names if name != "text"]
    return tuple(
        (name, low in REQUESTS) for name, low in lower if low in RESPONSES or low in REQUESTS or name == "role"
    )


@lru_cache(maxsize=256)
def _mapped_layout(columns: ColumnsSpec) -> Layout:
    given = columns.given()
    if "text" in given:
        loss, content = "the whole text", lambda parts: {"text": response_text(parts["text"], "text")}
    elif "messages" in given:
        loss, content = TURNS, _mapped_messages
    elif "user" in given:
        loss, content = "assistant", _mapped_turns
    else:
        loss, content = "completion", _prompt_and_completion
    return Layout(columns_name(columns), (), loss, columns_parts(columns), content)


def _mapped_messages(parts: Row) -> Content:
    messages = system_and(parts.get("system"), read_messages(parts["messages"], "messages"))
    if "assistant" in parts:
        if messages[-1]["role"] == "assistant":
            raise BadRow("messages ends with a turn of the assistant, and assistant gives one more; remove one of them")
        answer = {"role": "assistant", "content": response_text(parts["assistant"], "assistant")}
        messages = [*messages, answer]
    return _learnt(messages, "messages", parts)


def _mapped_turns(parts: Row) -> Content:
    answer = {"role": "assistant", "content": response_text(parts["assistant"], "assistant")}
    return _learnt(system_and(parts.get("system"), [{"role": "user", "content": parts["user"]}, answer]), "", parts)


def _refuse_stray_response(messages: list[Message], column: str, row: Row) -> None:
    """Raises UnclearLayout: the conversation ends before a response, and another column holds one."""
    if messages[-1]["role"] == "assistant":
        return
    for name, value in row.items():
        if name.lower() in RESPONSES and is_text(value):
            what = f"{column} ends with a turn of the {messages[-1]['role']}, and column '{name}' may hold the response"
            readings = [
                (line_of(messages=column), "without it"),
                (line_of(messages=column, assistant=name), "as the last turn"),
            ]
            raise unclear(what, SECTION, readings)


def _unclear_text(other: str) -> UnclearLayout:
    if other == "role":
        what = "column 'role' stands beside 'text': each row looks like one message of a conversation"
        error = unclear(what, SECTION, [(line_of(text="text"), "to learn each text by itself")])
        return UnclearLayout(what, f"make one row of each conversation (messages), or {error.fix}")
    what = f"column '{other}' stands beside 'text': text may be all there is to learn, or one half of an example"
    pair_line = (
        {"user": "text", "assistant": other} if other.lower() in RESPONSES else {"user": other, "assistant": "text"}
    )
    readings = [
        (line_of(text="text"), "to learn text alone"),
        (line_of(**pair_line), "for question and answer"),
    ]
    return unclear(what, SECTION, readings)


def _learnt(messages: list[Message], name: str, row: Row) -> Content:
    check_response(messages, name)
    return with_template_inputs({"messages": messages}, row)
