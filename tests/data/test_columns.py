"""`columns:` of the document: what it may hold, what it makes of a row, and which rows it leaves to their own layout."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_job.data.examples import BadRow, candidate_content, read_candidate, read_target, target_content
from prism_job.errors import SpecError
from prism_job.spec.data import ColumnsSpec, template_parts
from prism_job.spec.document import check_document
from tests.conftest import Row, turn
from tests.run_document import run_document


def columns(**parts: Any) -> ColumnsSpec:
    return ColumnsSpec.model_validate(parts)


GSM8K = {"question": "Two plus two?", "answer": "#### 4"}
DOLLY = {"instruction": "Who sings?", "context": "", "response": "A lark.", "category": "open_qa"}
MBPP = {"task_id": 7, "text": "Add one.", "code": "x + 1", "test_list": ["assert x"]}
COSMOPEDIA = {"prompt": "Write a lesson.", "text": "A lesson.", "token_length": 5}
ASKED = [turn("user", "Who sings?")]


@pytest.mark.parametrize(
    ("parts", "row", "content"),
    [
        ({"prompt": "question", "completion": "answer"}, GSM8K, {"prompt": "Two plus two?", "completion": "#### 4"}),
        (
            {"prompt": "Q: {question}\nA: {{", "completion": "answer"},
            GSM8K,
            {"prompt": "Q: Two plus two?\nA: {", "completion": "#### 4"},
        ),
        (
            {"user": ["instruction", "context"], "assistant": "response"},
            DOLLY,
            {"messages": [*ASKED, turn("assistant", "A lark.")]},
        ),
        (
            {"user": ["instruction", "context"], "assistant": "response", "system": "Kind: {category}"},
            DOLLY | {"context": "Of birds."},
            {
                "messages": [
                    turn("system", "Kind: open_qa"),
                    turn("user", "Who sings?\nOf birds."),
                    turn("assistant", "A lark."),
                ]
            },
        ),
        (
            {"user": "text", "assistant": "code"},
            MBPP,
            {"messages": [turn("user", "Add one."), turn("assistant", "x + 1")]},
        ),
        ({"text": "{task_id}. {text}"}, MBPP, {"text": "7. Add one."}),
        ({"text": "text"}, COSMOPEDIA, {"text": "A lesson."}),
        ({"prompt": "prompt", "completion": "text"}, COSMOPEDIA, {"prompt": "Write a lesson.", "completion": "A lesson."}),
        (
            {"messages": "dialog", "system": "rules", "tools": "functions"},
            {"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "functions": '[{"name": "f"}]'},
            {"messages": [turn("user", "Hi"), turn("assistant", "Ho")], "tools": [{"name": "f"}]},
        ),
        (
            {"messages": "input", "assistant": "output", "system": "system_prompt"},
            {"input": [turn("user", "Hi")], "output": "Ho", "system_prompt": ""},
            {"messages": [turn("user", "Hi"), turn("assistant", "Ho")]},
        ),
        (
            {"user": "a", "assistant": "b"},
            {"a": "Hi", "b": "Ho", "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}},
            {
                "messages": [turn("user", "Hi"), turn("assistant", "Ho")],
                "tools": [{"name": "f"}],
                "chat_template_kwargs": {"x": 1},
            },
        ),
        ({"prompt": "a", "completion": "b"}, {"a": 2, "b": Decimal("1.50")}, {"prompt": "2", "completion": "1.50"}),
        ({"prompt": "a", "completion": "b"}, {"text": "An own layout."}, {"text": "An own layout."}),
        ({"prompt": "a", "completion": "b"}, {"a": None, "b": None, "text": "Nulls."}, {"text": "Nulls."}),
    ],
    ids=str,
)  # fmt: skip
def test_columns_make_a_candidate(parts: Row, row: Row, content: Row) -> None:
    assert candidate_content(row, columns(**parts)) == content


@pytest.mark.parametrize(
    ("parts", "row", "prompt"),
    [
        ({"user": "q", "chosen": "a", "rejected": "b"}, {"q": "Who?", "a": "Me", "b": "You"}, [turn("user", "Who?")]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"q": "Who?", "a": "Me", "b": "You"}, "Who?"),
        (
            {"messages": "before", "chosen": "a", "rejected": "b"},
            {"before": [turn("user", "Who?")], "a": "Me", "b": "You"},
            [turn("user", "Who?")],
        ),
        ({"chosen": "a", "rejected": "b"}, {"a": "It is me", "b": "It is you", "note": "of two words"}, "It is"),
    ],
)
def test_columns_make_a_target(parts: Row, row: Row, prompt: Any) -> None:
    content, layout = read_target(row, True, columns(**parts))
    assert content["prompt"] == prompt
    assert [str(content[side][0]["content"] if isinstance(prompt, list) else content[side]).split()[-1].lower()
            for side in ("chosen", "rejected")] == ["me", "you"]  # fmt: skip
    assert layout.name.startswith("columns: {")


def test_of_a_target_without_a_rejected_response_columns_take_the_rest() -> None:
    given = columns(user="q", chosen="a", rejected="b")
    assert "rejected" not in target_content({"q": "Who?", "a": "Me"}, False, given)
    with pytest.raises(BadRow, match="no 'rejected'"):
        target_content({"q": "Who?", "a": "Me"}, True, given)


@pytest.mark.parametrize(
    ("parts", "row", "reason"),
    [
        (
            {"prompt": "question", "completion": "answer"},
            {"question": "Two?"},
            "no 'answer', which columns names for completion",
        ),
        ({"prompt": "question", "completion": "answer"}, {"question": "Two?", "answer": None}, "no 'answer'"),
        ({"prompt": "{a} {b}", "completion": "c"}, {"a": "x", "c": "y"}, "no 'b', which columns names for prompt"),
        ({"user": ["a", "b"], "assistant": "c"}, {"c": "y"}, "no 'a', which columns names for user"),
        ({"text": "a"}, {"a": ["x"]}, "text is a list, not text or a number"),
        ({"text": "{a}"}, {"a": True}, "text is a bool, not text or a number"),
        ({"text": "a"}, {"a": float("nan")}, "text is a float"),
        ({"user": "a", "assistant": "b"}, {"a": "x", "b": " "}, "assistant is empty"),
        ({"messages": "a"}, {"a": "x"}, "messages is text, but not JSON"),
        (
            {"messages": "a", "assistant": "b"},
            {"a": [turn("user", "Hi"), turn("assistant", "Ho")], "b": "Hm"},
            "messages ends with a turn of the assistant, and assistant gives one more",
        ),
        ({"messages": "a"}, {"b": "x"}, "nothing in the columns that candidates.columns names, and no known layout"),
        ({"prompt": "a", "completion": "b"}, {"a": {"0": "x"}, "b": {"0": "y"}}, "orient='records'"),
    ],
)
def test_a_row_that_columns_cannot_read_is_refused_by_name(parts: Row, row: Row, reason: str) -> None:
    with pytest.raises(BadRow) as refusal:
        candidate_content(row, columns(**parts))
    assert reason in str(refusal.value)


def test_the_layout_of_columns_is_the_line_that_the_document_would_hold() -> None:
    _, layout = read_candidate(DOLLY, columns(user=["instruction", "context"], assistant="response"))
    assert (layout.name, layout.loss) == ("columns: {user: [instruction, context], assistant: response}", "assistant")


def test_a_template_is_text_and_columns_and_its_braces_are_doubled() -> None:
    assert template_parts("{a b}: {c.d}!") == (("", "a b"), (": ", "c.d"), ("!", None))
    assert template_parts("{{x}} {a}") == (("{x} ", "a"), ("", None))
    for template in ("{", "{a", "a}", "{}", "{{a}}", "{a} }"):
        with pytest.raises(ValueError, match=r"brace|without a column"):
            template_parts(template)


def document(candidates: Any = None, targets: Any = None, of_set: Any = None) -> Row:
    made = run_document()
    if candidates is not None:
        made["spec"]["candidates"]["columns"] = candidates
    if targets is not None:
        made["spec"]["targets"]["columns"] = targets
    if of_set is not None:
        made["spec"]["targets"] = {"sets": [{"name": "one", "uris": ["s3://bucket/t.jsonl"], "columns": of_set}]}
    return made


@pytest.mark.parametrize(
    "given",
    [
        {"candidates": {"prompt": "question", "completion": ["answer", "more"], "tools": "functions"}},
        {"candidates": {"text": "{title}\n{body}"}},
        {"candidates": {"messages": "dialog", "system": "rules"}},
        {"candidates": {"user": "q", "assistant": "a"}, "targets": {"user": "q", "chosen": "a", "rejected": "b"}},
        {"targets": {"chosen": "a", "rejected": "b"}},
        {"of_set": {"messages": "m", "chosen": "a"}},
    ],
    ids=str,
)
def test_a_document_may_name_columns_as_text_list_or_template(given: Row) -> None:
    parsed = check_document(document(**given), "selection.yaml")
    assert check_document(parsed.to_document(), "spec.yaml") == parsed, "the replaying document is the same"


CANDIDATE_CHOICES = (
    "messages + [system] + [assistant] + [tools]; or user + assistant + [system] + [tools]; "
    "or prompt + completion + [tools]"
)
TARGET_CHOICES = "user + chosen + [system] + [rejected] + [tools]; or messages + chosen"


@pytest.mark.parametrize(
    ("given", "mentions"),
    [
        ({"candidates": {}}, ("spec.candidates.columns: nothing makes no example", CANDIDATE_CHOICES)),
        ({"candidates": {"prompt": "a"}}, ("spec.candidates.columns: prompt makes no example", CANDIDATE_CHOICES)),
        ({"candidates": {"messages": "a", "text": "b"}}, ("messages + text makes no example", "; or text")),
        (
            {"candidates": {"prompt": "a", "chosen": "b", "rejected": "c"}},
            ("prompt + chosen + rejected makes no example",),
        ),
        (
            {"targets": {"prompt": "a", "completion": "b"}},
            ("spec.targets.columns", TARGET_CHOICES, "; or chosen + rejected"),
        ),
        ({"of_set": {"rejected": "a"}}, ("spec.targets.sets.0.columns", "rejected makes no example")),
        ({"candidates": {"messages": ["a", "b"]}}, ("messages must be one column",)),
        ({"candidates": {"text": "{a"}}, ("spec.candidates.columns", "a brace without its other half")),
        ({"candidates": {"text": ["{a}", "b"]}}, ("a list holds columns; write one template instead",)),
        ({"candidates": {"text": 5}}, ("spec.candidates.columns.text",)),
        ({"candidates": {"text": {"column": "a"}}}, ("spec.candidates.columns.text",)),
        ({"candidates": {"text": []}}, ("spec.candidates.columns.text",)),
        ({"candidates": {"question": "a"}}, ("spec.candidates.columns.question: unknown field",)),
    ],
    ids=str,
)
def test_a_document_whose_columns_make_no_example_is_refused_with_the_choices(
    given: Row, mentions: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as refusal:
        check_document(document(**given), "selection.yaml")
    for mention in mentions:
        assert mention in refusal.value.what


def test_every_columns_line_of_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = [yaml.safe_load(line)["columns"] for line in re.findall(r"`(columns: \{.*?\})`", text)]
    assert len(lines) == 10
    for line in lines:
        given: Row = {"targets": line} if "chosen" in line else {"candidates": line}
        check_document(document(**given), "selection.yaml")
    assert {"prompt": "Q: {question}\nA: ", "completion": "answer"} in lines
