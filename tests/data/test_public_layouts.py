"""The layouts of public data sets, one row each of our own: what a person sees of it, which is what a run learns or refuses.

The parts have tests of their own; this table is the whole way from a file to the tokens that carry loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from launcher.follow.inspect_text import inspect_text
from tests.conftest import Job, turn
from tests.models import build_tokenizer

Row = dict[str, Any]

TEMPLATE = (
    "{% if enable_thinking %}<think>{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ (message['content'] or '') | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Trims, drops tool calls, and has a setting: as the templates of public models do."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with a BOS, which it writes before plain text."""
    tokenizer = build_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[bos]
    )
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def seen(job: Job, model: str, path: Path, *options: str) -> str:
    facts = job.passes("inspect", "--model", model, "--max-length", "64", "--rows", "9", *options, str(path))
    return inspect_text(facts).replace("\n    │ ", "|")


ASK, HI = turn("user", "Hi"), [turn("user", "Hi"), turn("assistant", "Hello")]
LEARNT = "|<|im_start|>user|Hi<|im_end|>|<|im_start|>assistant|⟦Hello<|im_end|>↵⟧"
BAD, STOPS = "line 1: unusable: ", "line 1: this row stops the run: "
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

CANDIDATES: dict[str, tuple[list[Row], str]] = {
    "Alpaca": (
        [{"instruction": "Put into plural.", "input": "word", "output": "words"}],
        "instruction + output (Alpaca), loss on output",
    ),
    "Alpaca's input": (
        [{"instruction": "Put into plural.", "input": "word", "output": "words"}],
        "|Put into plural.|word<|im_end|>|<|im_start|>assistant|⟦words<|im_end|>↵⟧",
    ),
    "ShareGPT": ([{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}], LEARNT),
    "OpenHermes": (
        [
            {
                "custom_instruction": None,
                "conversations": [
                    {"from": "human", "value": "Hi", "weight": 0.0},
                    {"from": "gpt", "value": "Hello", "weight": 1.0},
                ],
                "hash": None,
            }
        ],
        LEARNT,
    ),
    "content in parts": (
        [{"messages": [each | {"content": [{"type": "text", "text": each["content"]}]} for each in HI]}],
        LEARNT,
    ),
    "GSM8K": (
        [{"question": "2 + 2?", "answer": "#### 4"}],
        BAD + "no known layout (docs/data.md); columns found: 'question', 'answer'; if these are question and answer, "
        "write candidates.columns: {user: question, assistant: answer}",
    ),
    "Dolly": (
        [{"instruction": "Who sings?", "context": "", "response": "A lark.", "category": "open_qa"}],
        "write candidates.columns: {user: [instruction, context], assistant: response}",
    ),
    "MBPP": (
        [{"text": "Add.", "code": "def f(): pass", "test_list": []}],
        STOPS + "column 'code' stands beside 'text'",
    ),
    "Cosmopedia": ([{"prompt": "Teach 0.", "text": "0 is a number."}], STOPS + "column 'prompt' stands beside 'text'"),
    "an assistant who begins": (
        [{"messages": [turn("assistant", "Welcome."), *HI]}],
        "|<|im_start|>assistant|⟦Welcome.<|im_end|>↵⟧" + LEARNT,
    ),
    "an empty turn": ([{"messages": [ASK, turn("assistant", "")]}], BAD + "no response: messages[1] is a turn"),
    "a call that the template drops": (
        [{"messages": [ASK, turn("assistant", "") | {"tool_calls": [CALL]}]}],
        "unusable: no response token: turn 2 holds nothing once it is rendered",
    ),
    "weight 0": (
        [{"messages": [ASK, turn("assistant", "Bad.") | {"weight": 0}, *HI]}],
        "|<|im_start|>assistant|Bad.<|im_end|>" + LEARNT,
    ),
    "settings of the template": (
        [{"messages": HI, "chat_template_kwargs": {"enable_thinking": True}}],
        "|<think><|im_start|>user|Hi<|im_end|>|<|im_start|>assistant|⟦Hello<|im_end|>↵⟧",
    ),
    "text without BOS": ([{"text": "Once."}], "|<s>⟦Once.<|im_end|>⟧"),
    "text with its own BOS": ([{"text": "<s>Once."}], "|<s>⟦Once.<|im_end|>⟧"),
    "text beyond maxLength": ([{"messages": [ASK, turn("assistant", "a " * 200)]}], " more cut at maxLength 64|"),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_row_of_public_candidates_is_learnt_or_refused_as_its_authors_mean_it(
    job: Job, model: str, name: str
) -> None:
    rows, expected = CANDIDATES[name]
    path = job.folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert expected in seen(job, model, path)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"question": "Hi", "answer": "Hello"}, "user: question, assistant: answer", LEARNT),
        ({"text": "Hi", "code": "Hello"}, "user: text, assistant: code", LEARNT),
        ({"prompt": "Hi", "text": "Hello"}, "user: prompt, assistant: text", LEARNT),
        ({"instruction": "Hi", "context": "", "reply": "Hello"}, "user: [instruction, context], assistant: reply", LEARNT),
        ({"q": "2?", "answer": "2"}, '{prompt: "Q: {q}\\nA: ", completion: answer}', "|<s>Q: 2?|A: ⟦2<|im_end|>⟧"),
    ],
)  # fmt: skip
def test_columns_that_an_error_advises_read_the_row(
    job: Job, model: str, row: Row, columns: str, expected: str
) -> None:
    path = job.folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert expected in seen(job, model, path, "--columns", columns)


GOOD, WRONG = turn("assistant", "A gull."), turn("assistant", "A lark.")
SHARED = "|<|im_start|>user|Hi<|im_end|>|<|im_start|>assistant|⟦A ⟧"
SIDES = ("|⟦gull.<|im_end|>↵⟧", "|⟦lark.<|im_end|>↵⟧")
TEXTS = {"chosen": "A gull.", "rejected": "A lark."}
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, WRONG]}
LONG = "We look at it with care. " * 9

TARGETS: dict[str, tuple[Row, tuple[str, ...]]] = {
    "UltraFeedback": ({"prompt": "Hi", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.0}, (SHARED, *SIDES)),
    "whole conversations": ({"prompt": [ASK], **WHOLE}, (SHARED, *SIDES)),
    "a null in the shared turn": ({"chosen": [ASK | {"name": None}, GOOD], "rejected": [ASK, WRONG]}, (SHARED, *SIDES)),
    "Alpaca's pairs": ({"instruction": "Hi", "input": "", **TEXTS}, (SHARED, *SIDES)),
    "Orca": ({"system": "Be kind.", "question": "Hi", **TEXTS}, ("|Be kind.<|im_end|>" + SHARED, *SIDES)),
    "HH-RLHF": (
        {side: f"\n\nHuman: Hi\n\nAssistant: {text}" for side, text in TEXTS.items()},
        ("|<s>||Human: Hi||Assistant:⟦ A ⟧", "|⟦gull.<|im_end|>⟧", "|⟦lark.<|im_end|>⟧"),
    ),
    "chosen begins rejected": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, WRONG]},
        (STOPS + "chosen is the beginning of rejected",),
    ),
    "white space alone": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [turn("assistant", "   ")]},
        (STOPS + "no response: rejected[0] is a turn",),
    ),
    "equal once trimmed": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [turn("assistant", "A gull.  ")]},
        ("this row stops the run: chosen and rejected become the same",),
    ),
    "different beyond maxLength": (
        {"prompt": [ASK], "chosen": [turn("assistant", LONG + "A")], "rejected": [turn("assistant", LONG + "B")]},
        ("this row stops the run: chosen and rejected are identical up to maxLength 64",),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_public_pair_is_learnt_or_refused_as_its_authors_mean_it(job: Job, model: str, name: str) -> None:
    row, expected = TARGETS[name]
    path = job.folder / "pairs.jsonl"
    path.write_text(json.dumps(row))
    text = seen(job, model, path, "--targets")
    for part in expected:
        assert part in text


PLAIN = [{"prompt": f"say {number}", "completion": f" number {number}"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in PLAIN)


def write_files(folder: Path, name: str) -> Path:
    folder.mkdir()
    if name == "pandas columns":
        (folder / "a.json").write_text(json.dumps({"prompt": {"0": "a"}, "completion": {"0": "x"}}))
    if name == "UTF-16":
        (folder / "a.jsonl").write_bytes(LINES.encode("utf-16"))
    if name == "a column twice":
        table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"])
        pq.write_table(table, folder / "a.parquet")
    if name == "ndjson":
        (folder / "a.ndjson").write_text(LINES)
    if name == "a saved data set":
        pytest.importorskip("datasets").Dataset.from_list(PLAIN).save_to_disk(folder / "saved")
    if name == "a notebook's folder":
        (folder / "a.jsonl").write_text(LINES)
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_text(LINES)
        (folder / "dataset_infos.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("pandas columns", 65, "one object that holds columns, not rows"),
        ("UTF-16", 65, "the file is UTF-16; save as UTF-8"),
        ("a column twice", 65, "two columns have the name 'completion'"),
        ("ndjson", 0, "  3 rows read: 3 as prompt + completion"),
        ("a saved data set", 0, "  3 rows read: 3 as prompt + completion"),
        ("a notebook's folder", 0, "  3 rows read: 3 as prompt + completion"),
    ],
)
def test_files_as_tools_leave_them_are_read_once_or_refused_by_name(
    job: Job, model: str, name: str, code: int, expected: str
) -> None:
    folder = write_files(job.folder / "files", name)
    if code:
        job.refuses(("inspect", str(folder)), code, expected, str(folder))
        return
    text = seen(job, model, folder)
    assert text.count(expected) == text.count("rows read") == 1
    assert "|<s>say 1⟦ number 1<|im_end|>⟧" in text
