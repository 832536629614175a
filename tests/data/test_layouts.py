"""Layouts of rows: each becomes the content that its users expect, the same conversation in any of them is the same example,
and a row that can be read in two ways stops the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_job.data.examples import (
    BadRow,
    UnclearLayout,
    candidate_content,
    example_id,
    read_candidate,
    read_target,
    target_content,
)
from prism_job.plan.sources import list_sources
from prism_job.spec.data import CandidatesSpec, TargetsSpec
from tests.conftest import Row, turn, write_jsonl


def said(sender: str, value: Any, **more: Any) -> Row:
    """A turn of ShareGPT."""
    return {"from": sender, "value": value, **more}


HI = [turn("user", "Hi"), turn("assistant", "Hello")]
CALL = {"name": "add", "arguments": {"a": 1, "b": [2]}}
CALLED = [turn("user", "1+2?"), {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}]
CALLED_AS_TEXT = [
    CALLED[0],
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
    },
]

HI_PART, HEL_PART = {"type": "text", "text": "Hi"}, {"type": "text", "text": "Hel"}
PLAIN_PAIR = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}

CANDIDATES: list[tuple[str, Row, Row]] = [
    ("messages", {"messages": HI, "id": 5}, {"messages": HI}),
    (
        "messages",
        {"messages": [turn("assistant", "Welcome."), *HI]},
        {"messages": [turn("assistant", "Welcome."), *HI]},
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [HI_PART]}, {"role": "assistant", "content": [HEL_PART] * 2}]},
        {"messages": [turn("user", "Hi"), turn("assistant", "HelHel")]},
    ),
    (
        "messages",
        {"messages": [turn("user", "Hi") | {"weight": 0}, turn("assistant", "No") | {"weight": 0.0}, *HI]},
        {"messages": [turn("user", "Hi"), turn("assistant", "No") | {"weight": 0}, *HI]},
    ),
    ("messages", {"messages": CALLED_AS_TEXT}, {"messages": CALLED}),
    (
        "messages",
        {"messages": HI, "chat_template_kwargs": {"enable_thinking": False, "x": None}},
        {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    ("prompt + completion", {"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "2 + 2 =", "completion": " 4"}),
    ("text", {"text": "Two and two.", "code": "", "target": 3, "task": "qa"}, {"text": "Two and two."}),
    (
        "conversations (ShareGPT)",
        {
            "system_prompt": None,
            "conversations": [
                said("system", "s", weight=None),
                said("human", "Hi", weight=0.0),
                said("gpt", "Hello", weight=1.0),
            ],
        },
        {"messages": [turn("system", "s"), *HI]},
    ),
    (
        "conversations (ShareGPT)",
        {
            "system": "Be kind.",
            "tools": '[{"name": "add"}]',
            "conversations": [
                said("user", "1+2?"),
                said("function_call", json.dumps(CALL)),
                said("observation", "3"),
                said("bing", "Three"),
            ],
        },
        {
            "messages": [turn("system", "Be kind."), *CALLED, turn("tool", "3"), turn("assistant", "Three")],
            "tools": [{"name": "add"}],
        },
    ),
    ("conversations (ShareGPT)", {"conversations": HI}, {"messages": HI}),
    ("messages", {"messages": json.dumps(HI)}, {"messages": HI}),
    ("messages", {"messages": [each | {"tool_calls": []} for each in HI]}, {"messages": HI}),
    ("messages", {"messages": [turn("Human", "Hi"), turn("GPT", "Hello")]}, {"messages": HI}),
    ("messages", {"messages": [turn("prompter", "Hi"), HI[1]]}, {"messages": [turn("prompter", "Hi"), HI[1]]}),
    (
        "instruction + output (Alpaca)",
        {"instruction": "Put into plural.", "input": "word", "output": "words"},
        {"messages": [turn("user", "Put into plural.\nword"), turn("assistant", "words")]},
    ),
    (
        "instruction + output (Alpaca)",
        {"instruction": "Hi", "input": "", "output": "Hello", "system": "s", "history": [["One?", "Two."]]},
        {"messages": [turn("system", "s"), turn("user", "One?"), turn("assistant", "Two."), *HI]},
    ),
    (
        "instruction + output (Alpaca)",
        {
            "instruction": "Say hi.",
            "output": "Hello",
            "question": "Say hi.",
            "prompt": "### Say hi. ###",
            "image": None,
        },
        {"messages": [turn("user", "Say hi."), turn("assistant", "Hello")]},
    ),
]


@pytest.mark.parametrize(("name", "row", "content"), CANDIDATES, ids=[name for name, _, _ in CANDIDATES])
def test_a_candidate_in_each_layout_is_the_content_it_stands_for(name: str, row: Row, content: Row) -> None:
    found, layout = read_candidate(row, None)
    assert (layout.name, found) == (name, content)


QUESTION, GOOD, BAD = "Which bird swims?", "A penguin swims well.", "A sparrow swims well."
ASKED = [turn("user", QUESTION)]
PAIR = {"prompt": ASKED, "chosen": [turn("assistant", GOOD)], "rejected": [turn("assistant", BAD)]}
WHOLE = {"chosen": [*ASKED, turn("assistant", GOOD)], "rejected": [*ASKED, turn("assistant", BAD)]}
ONE_TURN = {"chosen": said("gpt", GOOD), "rejected": said("gpt", BAD)}
TEXTS = {"chosen": GOOD, "rejected": BAD}
KIND = turn("system", "Be kind.")
IMPLICIT = "chosen + rejected (implicit prompt)"
WITH_SYSTEM = PAIR | {"prompt": [KIND, *ASKED]}


def marked(before: str, *sides: str) -> Row:
    return {"chosen": before + sides[0], "rejected": before + sides[1]}


HH = "\n\nHuman: Which?\n\nAssistant: This?\n\nHuman: Yes.\n\nAssistant:"
TARGETS: list[tuple[str, Row, Row]] = [
    ("prompt + chosen + rejected", PAIR, PAIR),
    ("prompt + chosen + rejected", PLAIN_PAIR, PLAIN_PAIR),
    ("prompt + chosen + rejected", WHOLE | {"prompt": QUESTION, "messages": WHOLE["chosen"], "score_chosen": 8.0}, PAIR),
    ("prompt + chosen + rejected", WHOLE | {"prompt": ASKED}, PAIR),
    ("prompt + chosen + rejected", WHOLE | {"prompt": QUESTION, "question": QUESTION}, PAIR),
    (IMPLICIT, WHOLE, PAIR),
    (IMPLICIT, WHOLE | {"chosen": [ASKED[0] | {"name": None}, turn("assistant", GOOD)]}, PAIR),
    (IMPLICIT, marked(HH, " A gull.", " A goose."), {"prompt": HH, "chosen": " A gull.", "rejected": " A goose."}),
    (IMPLICIT, marked(HH, " A gull", " A gull swims."), {"prompt": HH, "chosen": " A gull", "rejected": " A gull swims."}),
    (
        IMPLICIT,
        marked("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Good day", "Good night") | {"note": "of two words"},
        {
            "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "chosen": "Good day",
            "rejected": "Good night",
        },
    ),
    (IMPLICIT, marked("The sky is b", "lue.", "lack."), {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}),
    ("conversations + chosen + rejected (ShareGPT)", {"conversations": [said("human", QUESTION)], **ONE_TURN}, PAIR),
    ("messages + chosen + rejected", {"messages": ASKED, **ONE_TURN}, PAIR),
    ("instruction + chosen + rejected (Alpaca)", {"instruction": QUESTION, "input": "", **TEXTS}, PAIR),
    ("question + chosen + rejected (Orca)", {"system": "Be kind.", "question": QUESTION, **TEXTS}, WITH_SYSTEM),
    ("question + chosen + rejected (Orca)", {"system": "", "question": QUESTION, **TEXTS}, PAIR),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "content"), TARGETS, ids=[name for name, _, _ in TARGETS])
def test_a_target_in_each_layout_is_the_content_it_stands_for(name: str, row: Row, content: Row) -> None:
    found, layout = read_target(row, True, None)
    assert (layout.name, found) == (name, content)


# Laws


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
EXCHANGES = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
AS_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def conversation(system: str | None, exchanges: list[tuple[str, str]]) -> list[Row]:
    turns = [turn(role, text) for said in exchanges for role, text in zip(("user", "assistant"), said, strict=True)]
    return [*([turn("system", system)] if system else []), *turns]


def candidate_forms(system: str | None, exchanges: list[tuple[str, str]]) -> list[Row]:
    messages = conversation(system, exchanges)
    as_parts = [each | {"content": [{"type": "text", "text": each["content"]}], "name": None} for each in messages]
    sharegpt = [said(AS_SHAREGPT[each["role"]], each["content"]) for each in messages]
    *history, (question, answer) = exchanges
    alpaca = {"instruction": question, "output": answer, "history": [list(each) for each in history], "system": system}
    return [
        {"messages": messages},
        {"messages": as_parts},
        {"conversations": sharegpt},
        {"conversations": sharegpt[1:], "system": system} if system else {"conversations": sharegpt},
        alpaca,
    ]


def pair_forms(system: str | None, exchanges: list[tuple[str, str]], bad: str) -> list[Row]:
    *before, (question, good) = exchanges
    prompt = [*conversation(system, before), turn("user", question)]
    chosen, rejected = turn("assistant", good), turn("assistant", bad)
    whole = {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}
    sharegpt = [said(AS_SHAREGPT[each["role"]], each["content"]) for each in prompt]
    history = [list(each) for each in before]
    alpaca = {"instruction": question, "system": system, "history": history, "chosen": good, "rejected": bad}
    forms = [
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        {"prompt": prompt, **whole},
        {"prompt": question, **whole},
        whole,
        {"conversations": sharegpt, "chosen": said("gpt", good), "rejected": said("gpt", bad)},
        alpaca,
    ]
    orca = {"system": system, "question": question, "chosen": good, "rejected": bad}
    return forms if before else [*forms, orca]


def one(values: set[str]) -> bool:
    return len(values) == 1


@settings(max_examples=60)
@given(system=st.none() | TEXT, exchanges=EXCHANGES, bad=TEXT)
def test_the_same_conversation_in_any_layout_is_the_same_example(
    system: str | None, exchanges: list[tuple[str, str]], bad: str
) -> None:
    assert one({example_id(candidate_content(row)) for row in candidate_forms(system, exchanges)})
    if bad != exchanges[-1][1]:
        assert one({example_id(target_content(row, True)) for row in pair_forms(system, exchanges, bad)})


def test_a_time_within_a_turn_is_the_same_text_in_the_plan_and_in_the_staged_row() -> None:
    row = {"messages": [HI[0], HI[1] | {"timestamp": datetime(2023, 4, 9, 0, 2, tzinfo=UTC)}]}
    staged = json.loads(json.dumps(row, default=str))
    assert example_id(candidate_content(row)) == example_id(candidate_content(staged))


def rows_of(path: Path) -> list[Row]:
    (source,), _ = list_sources([str(path)])
    return [row for _, row in source.read() if isinstance(row, dict)]


@pytest.mark.parametrize(
    ("rows", "content_of"),
    [
        ([row for _, row, _ in CANDIDATES], candidate_content),
        ([row for _, row, _ in TARGETS], lambda row: target_content(row, True)),
    ],
    ids=["candidates", "targets"],
)
def test_a_row_is_the_same_example_in_parquet_and_in_jsonl(
    rows: list[Row], content_of: Callable[[Row], Row], tmp_path: Path
) -> None:
    """Parquet has null in the columns that a row lacks, and in the keys that one of its messages lacks."""
    names = {name for row in rows for name in row}
    for row in rows:
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names}]), tmp_path / "a.parquet")
        write_jsonl(tmp_path / "a.jsonl", [row])
        (stored,), (plain,) = rows_of(tmp_path / "a.parquet"), rows_of(tmp_path / "a.jsonl")
        assert stored.keys() == names
        assert example_id(content_of(stored)) == example_id(content_of(plain))


# What is refused


def assistant(**more: Any) -> Row:
    return {"role": "assistant", **more}


BAD_CANDIDATES: list[tuple[Row, str]] = [
    (
        {"messages": [turn("user", "Hi"), turn("assistant", " \n ")]},
        "messages[1] is a turn of the assistant without content",
    ),
    ({"messages": [turn("user", "Hi"), assistant()]}, "messages[1] has no text content"),
    ({"messages": [*HI, turn("user", "Hi"), turn("assistant", "")]}, "messages[3] is a turn of the assistant without"),
    ({"messages": [turn("user", "Hi"), turn("assistant", "No") | {"weight": 0}]}, "have weight 0"),
    ({"messages": [turn("user", "Hi"), turn("assistant", "No") | {"weight": 0.5}]}, "messages[1] has the weight 0.5"),
    ({"messages": [turn("user", "Hi"), turn("assistant", "No") | {"weight": "0"}]}, "messages[1] has the weight '0'"),
    ({"messages": "[]"}, "messages holds no message"),
    ({"messages": "Hi"}, "messages is text, but not JSON"),
    ({"messages": []}, "messages holds no message"),
    ({"messages": ["Hi"]}, "messages[0] is a str"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}, HI[1]]}, "type 'image_url'"),
    (
        {"messages": [*CALLED[:1], assistant(tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]},
        "arguments of f",
    ),
    (
        {"messages": [*CALLED[:1], assistant(tool_calls=[{"function": {"name": "f", "arguments": "[]"}}])]},
        "not an object",
    ),
    ({"messages": [*CALLED[:1], assistant(tool_calls=[{"function": "f"}])]}, "messages[1]: a tool call"),
    ({"messages": HI, "chat_template_kwargs": {"chat_template": "x"}}, "may not hold 'chat_template'"),
    ({"messages": HI, "chat_template_kwargs": {"tools": []}}, "may not hold 'tools'"),
    ({"messages": HI, "chat_template_kwargs": [1]}, "chat_template_kwargs is a list, not an object"),
    (
        {"conversations": [said(None, "Hi"), said("gpt", "Hello")]},
        "conversations[0] has no role that PRISM knows: from is None",
    ),
    (
        {"conversations": [said("narrator", "Hi"), said("gpt", "Hello")]},
        "from is 'narrator'; it may be human, user, gpt",
    ),
    ({"conversations": [said("human", None), said("gpt", "Hello")]}, "conversations[0] has no text content"),
    (
        {"conversations": [said("human", "Hi"), said("function_call", "add(1)")]},
        "conversations[1] of function_call is text",
    ),
    ({"conversations": [said("system", "a"), *HI], "system": "b"}, "two system prompts"),
    ({"conversations": HI, "system": ["b"]}, "system is a list, not text"),
    ({"instruction": "Add", "output": "  "}, "output is empty"),
    ({"instruction": ["Add"], "output": "1"}, "instruction is a list, not text"),
    ({"instruction": "Add", "output": "1", "history": [["one"]]}, "history[0] is not a question and its answer"),
    ({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "x", "1": "y"}}, "orient='records', lines=True"),
    ({"text": {"0": "a", "1": "b"}}, "orient='records', lines=True"),
    ({"question": "Two?", "answer": "4"}, "candidates.columns: {user: question, assistant: answer}"),
    (
        {"instruction": "Who?", "context": "", "response": "A lark.", "category": "qa"},
        "candidates.columns: {user: [instruction, context], assistant: response}",
    ),
    (
        {"id": 1, "system_prompt": "Be kind.", "question": "Two?", "response": "4"},
        "candidates.columns: {user: question, assistant: response, system: system_prompt}",
    ),
    ({"dialog": HI, "answer": "4"}, "candidates.columns: {messages: dialog}"),
    (
        {"input": HI[:1], "output": "Hello", "system_prompt": ""},
        "candidates.columns: {messages: input, assistant: output, system: system_prompt}",
    ),
    ({"dialog": HI[:1]}, "{messages: COLUMN} or {text: COLUMN}"),
    ({"prompt": json.dumps(HI[:1]), "completion": json.dumps(HI[1:])}, "prompt holds a list of turns as text"),
    ({"prompt": "Hi", "completion": str(HI[1:])}, "completion holds a list of turns as text"),
    ({"problem": "Two?", "answer": "4", "solution": "2 + 2 = 4"}, "{user: problem, assistant: solution}"),
    ({"sentence": "One."}, "columns found: 'sentence'; name yours"),
]
BAD_TARGETS: list[tuple[Row, str]] = [
    ({"chosen": WHOLE["chosen"], "rejected": [*WHOLE["chosen"], *HI]}, "chosen is the beginning of rejected"),
    ({"chosen": "The sky is", "rejected": "The sky"}, "rejected is the beginning of chosen"),
    ({"chosen": "Yes.", "rejected": "No."}, "no common beginning"),
    ({"chosen": "Same.", "rejected": "Same."}, "identical"),
    (PAIR | {"rejected": [turn("assistant", "  ")]}, "rejected[0] is a turn of the assistant without content"),
    (WHOLE | {"prompt": "What else?"}, "prompt is none of the turns"),
    (PAIR | TEXTS, "targets.columns: {messages: prompt, chosen: chosen, rejected: rejected}"),
    (PAIR | {"prompt": QUESTION}, "targets.columns: {user: prompt, chosen: chosen, rejected: rejected}"),
    (WHOLE | {"prompt": [turn("user", "What else?")]}, "chosen begins neither"),
    ({"conversations": HI, **ONE_TURN}, "its last turn is the assistant's"),
    ({side: json.dumps(turns) for side, turns in WHOLE.items()}, "prompt holds a list of turns as text"),
    ({"prompt": "Hi", "good": "yes"}, "no 'chosen'; columns found: 'prompt', 'good'; if it has another name"),
    (
        {"chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]},
        "do not begin with a message in common",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_CANDIDATES, ids=[reason for _, reason in BAD_CANDIDATES])
def test_a_bad_candidate_is_refused_by_its_turn_or_column(row: Row, reason: str) -> None:
    with pytest.raises(BadRow) as refusal:
        candidate_content(row)
    assert reason in str(refusal.value)
    assert not isinstance(refusal.value, UnclearLayout)


@pytest.mark.parametrize(("row", "reason"), BAD_TARGETS, ids=[reason for _, reason in BAD_TARGETS])
def test_a_bad_target_is_refused_by_its_turn_or_column(row: Row, reason: str) -> None:
    with pytest.raises(BadRow) as refusal:
        target_content(row, True)
    assert reason in str(refusal.value)
    assert not isinstance(refusal.value, UnclearLayout)


UNCLEAR: list[tuple[str, Row, tuple[str, ...]]] = [
    (
        "candidates",
        {"text": "Write a function.", "code": "def f(): pass"},
        ("{text: text}", "{user: text, assistant: code}"),
    ),
    (
        "candidates",
        {"prompt": "Write a lesson.", "text": "A lesson."},
        ("{text: text}", "{user: prompt, assistant: text}"),
    ),
    ("candidates", {"messages": HI, "text": "Hi. Hello."}, ("{messages: messages}", "{text: text}")),
    (
        "candidates",
        {"messages": HI, "prompt": "Hi", "completion": "Hello"},
        ("{messages: messages}", "{prompt: prompt, completion: completion}"),
    ),
    (
        "candidates",
        {"conversations": HI, "instruction": "Hi", "output": "Hello"},
        ("{messages: conversations}", "{user: [instruction, input], assistant: output}"),
    ),
    (
        "candidates",
        {"messages": HI, "system": "Be kind."},
        ("{messages: messages}", "{messages: messages, system: system}"),
    ),
    (
        "candidates",
        {"prompt": "a", "completion": "b", "system_prompt": "Be kind."},
        ("{prompt: prompt, completion: completion}", "{user: prompt, assistant: completion, system: system_prompt}"),
    ),
    ("candidates", {"text": "How do I bake?", "role": "prompter"}, ("{text: text}",)),
    ("candidates", {"text": "Hi. Hello.", "dialog": HI}, ("{text: text}", "{messages: dialog}")),
    (
        "candidates",
        {"messages": [*HI, turn("user", "Bye")], "response": "Farewell."},
        ("{messages: messages}", "{messages: messages, assistant: response}"),
    ),
    (
        "candidates",
        {"instruction": "Sum up.", "context": "A long text.", "output": "Short."},
        ("{user: [instruction, input], assistant: output}", "{user: [instruction, input, context], assistant: output}"),
    ),
    (
        "candidates",
        {"prompt": "Sum up: ", "completion": "Short.", "input": "A long text."},
        ("{prompt: prompt, completion: completion}", "{prompt: [prompt, input], completion: completion}"),
    ),
    ("candidates", {"messages": HI, "images": ["a.png"]}, ("{messages: messages}",)),
    (
        "targets",
        {"question": "Which one?", "context": QUESTION, **TEXTS},
        (
            "{user: question, chosen: chosen, rejected: rejected}",
            "{user: [question, context], chosen: chosen, rejected: rejected}",
        ),
    ),
    (
        "targets",
        {"trajectory": ASKED, "chosen": "The sky is blue.", "rejected": "The sky is red."},
        ("{messages: trajectory, chosen: chosen, rejected: rejected}", "{chosen: chosen, rejected: rejected}"),
    ),
    (
        "targets",
        {"system": "You are kind.", "input": QUESTION, **TEXTS},
        ("{user: input, chosen: chosen, rejected: rejected}",),
    ),
    (
        "targets",
        {"prompt": "a", "question": "b", **TEXTS},
        (
            "{prompt: prompt, chosen: chosen, rejected: rejected}",
            "{user: question, chosen: chosen, rejected: rejected}",
        ),
    ),
    (
        "targets",
        {"input": QUESTION, **TEXTS},
        ("{user: input, chosen: chosen, rejected: rejected}", "{chosen: chosen, rejected: rejected}"),
    ),
    (
        "targets",
        {"prompt": "The sky", "chosen": "The sky is blue.", "rejected": "The sky is red."},
        ("{chosen: chosen, rejected: rejected}", "{prompt: prompt, chosen: chosen, rejected: rejected}"),
    ),
    (
        "targets",
        PAIR | {"system": "Be kind."},
        ("{messages: prompt, chosen: chosen, rejected: rejected, system: system}",),
    ),
]


@pytest.mark.parametrize(("section", "row", "lines"), UNCLEAR, ids=[" + ".join(row) for _, row, _ in UNCLEAR])
def test_a_row_of_two_readings_names_the_columns_line_of_each_which_reads_it(
    section: str, row: Row, lines: tuple[str, ...]
) -> None:
    with pytest.raises(UnclearLayout) as refusal:
        candidate_content(row) if section == "candidates" else target_content(row, True)
    assert f"spec.{section}" in refusal.value.fix
    for line in lines:
        assert f"columns: {line}" in refusal.value.fix
    for line in re.findall(r"columns: (\{.*?\})", refusal.value.fix):
        advised = yaml.safe_load(line)
        if section == "candidates":
            read_candidate(row, CandidatesSpec.model_validate({"uris": ["a"], "columns": advised}).columns)
        else:
            read_target(row, True, TargetsSpec.model_validate({"uris": ["a"], "columns": advised}).columns)


def test_a_response_is_not_needed_twice_where_the_weighting_is_uniform() -> None:
    assert target_content({"question": QUESTION, "chosen": GOOD}, False) == {"prompt": ASKED, "chosen": PAIR["chosen"]}
    with pytest.raises(BadRow, match="no 'prompt'"):
        target_content({"chosen": GOOD}, False)


# Anything at all

ODD: list[Any] = [
    None,
    True,
    0,
    0.5,
    "",
    " ",
    "gpt",
    "{}",
    "[1]",
    "{",
    [],
    [None],
    ["a"],
    {},
    {"0": "a"},
    {"type": "text"},
]


def changed(value: Any) -> Iterator[Any]:
    """The value with one thing in it, at any depth, replaced by something odd, or left out."""
    yield from ODD
    if isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            yield from (value | {key: other} for other in changed(value[key]))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from ([*value[:index], other, *value[index + 1 :]] for other in changed(item))


@pytest.mark.parametrize("side", ["candidates", "targets"])
def test_no_row_ends_in_another_error_than_a_bad_row(side: str) -> None:
    of_target: Callable[[Row], Row] = lambda row: target_content(row, True)  # noqa: E731
    cases, content_of = (CANDIDATES, candidate_content) if side == "candidates" else (TARGETS, of_target)
    rows = [row for _, valid, _ in cases for row in changed(valid) if isinstance(row, dict)]
    num_read = 0
    for row in rows:
        before = json.dumps(row)
        try:
            content = content_of(row)
        except BadRow:
            continue
        num_read += 1
        assert content_of(content) == content, "content is a row, and means itself"
        assert example_id(content)
        assert json.dumps(row) == before, "a row is staged as it was"
    assert 0.1 * len(rows) < num_read < 0.9 * len(rows)
