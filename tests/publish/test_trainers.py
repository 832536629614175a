"""The entries with which LLaMA-Factory and axolotl take an export, checked against what the trainers document.

DATASET_INFO and AXOLOTL_KEYS are the keys that the two name at the commits in prism_job/publish/export/trainers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from prism_job.publish.export.trainers import TRAINERS, Contents, Place, entries_of
from tests.conftest import Job, Row, turn
from tests.publish.test_export import CALLS, CONVERSATIONS, exported, lines_of, selected_all, use_template_of_calls

DATASET_INFO = {
    "columns": {"prompt", "query", "response", "history", "messages", "system", "tools"},
    "tags": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}
"""The keys of data/README.md that a supervised data set needs; of tags also the defaults."""

AXOLOTL_KEYS = {
    "path",
    "split",
    "type",
    "ds_type",
    "field",
    "field_messages",
    "field_tools",
    "message_property_mappings",
}
AXOLOTL_TYPES = {"chat_template", "alpaca", "completion"}
AXOLOTL_ROLES = {"human", "user", "gpt", "assistant", "system", "tool"}
"""Those it knows by default; any other goes to the chat template as it is."""


def entries_beside(path: Path) -> tuple[Row | None, Row | None]:
    """LLaMA-Factory's entry of this file, and axolotl's; None where there is none."""
    info, config = (path.parent / name for name in TRAINERS)
    found = json.loads(info.read_text())[path.name.partition(".")[0]] if info.exists() else None
    return found, yaml.safe_load(config.read_text())["datasets"][0] if config.exists() else None


def check_dataset_info(entry: Row, path: Path, rows: list[Row]) -> None:
    """Each column that it names is in the rows; each conversation is one that LLaMA-Factory's converter does not skip."""
    assert entry.keys() <= {"file_name", "formatting", "columns", "tags"}
    assert (path.parent / entry["file_name"]).samefile(path)
    assert path.suffix in (".jsonl", ".parquet")
    assert entry["columns"].keys() <= DATASET_INFO["columns"]
    columns = {name for row in rows for name in row}
    assert set(entry["columns"].values()) <= columns
    if entry.get("formatting", "alpaca") == "alpaca":
        assert {"system", "history"} & columns == {"system", "history"} & set(entry["columns"].values())
        return
    tags: Any = entry.get("tags", DATASET_INFO["tags"])
    for row in rows:
        turns = row[entry["columns"]["messages"]]
        roles = [message[tags["role_tag"]] for message in turns]
        roles = roles[1:] if roles[0] == tags["system_tag"] else roles
        assert set(roles[0::2]) <= {tags["user_tag"], tags.get("observation_tag")}
        assert set(roles[1::2]) <= {tags["assistant_tag"], tags.get("function_tag")}
        assert len(roles) % 2 == 0
        assert all(isinstance(message[tags["content_tag"]], str) for message in turns)
        assert "tools" not in row or entry["columns"]["tools"] == "tools"


def check_axolotl(entry: Row, path: Path, rows: list[Row]) -> None:
    """Each column that it names is in the rows, and each role is one that it knows."""
    assert entry.keys() <= AXOLOTL_KEYS
    assert Path(entry["path"]).samefile(path)
    assert entry["ds_type"] == {".parquet": "parquet"}.get(path.suffix, "json")
    if isinstance(entry["type"], dict):  # user-defined: what it names are columns, and the text has no template
        fields = {entry["type"][key] for key in ("field_instruction", "field_output")}
        assert entry["type"]["format"] == entry["type"]["no_input_format"] == "{instruction}"
        assert all(fields <= row.keys() and not {"system", "input"} & row.keys() for row in rows)
        return
    assert entry["type"] in AXOLOTL_TYPES
    for row in rows:
        if entry["type"] == "chat_template":
            names = entry.get("message_property_mappings", {"role": "role", "content": "content"})
            assert {message[names["role"]] for message in row[entry["field_messages"]]} <= AXOLOTL_ROLES
        elif entry["type"] == "alpaca":
            assert {"instruction", "input", "output"} <= row.keys()
            assert not row["system"]
            assert not row["history"]
        else:
            assert isinstance(row[entry["field"]], str)


TEXT: Row = {"text": "Two and two make four."}
COMPLETION: Row = {"prompt": "2 + 2 =", "completion": " 4"}
OF_MESSAGES: Row = {"prompt": [turn("user", "2 + 2?")], "completion": [turn("assistant", "4")]}

# Format, candidates, and whether LLaMA-Factory and axolotl take what is exported.
TAKEN: list[tuple[str, list[Row], bool, bool]] = [
    ("trl", CONVERSATIONS, True, True),
    ("trl", CALLS, False, True),
    ("trl", [COMPLETION], False, True),
    ("trl", [OF_MESSAGES], False, False),
    ("trl", [TEXT], True, True),
    ("trl", [*CONVERSATIONS, TEXT], False, False),
    ("sharegpt", CONVERSATIONS, True, True),
    ("sharegpt", [OF_MESSAGES], True, True),
    ("sharegpt", [*CONVERSATIONS, *CALLS], True, False),
    ("alpaca", CONVERSATIONS[:1], True, True),
    ("alpaca", CONVERSATIONS, True, False),
]


@pytest.mark.parametrize(("name", "rows", "in_llama_factory", "in_axolotl"), TAKEN)
def test_an_entry_names_columns_and_roles_of_the_exported_file_or_there_is_none(
    job: Job, name: str, rows: list[Row], in_llama_factory: bool, in_axolotl: bool
) -> None:
    if CALLS[0] in rows:
        use_template_of_calls(job)
    manifest = selected_all(job, rows)
    for ending in ("jsonl", "parquet"):
        if ending == "parquet" and len(rows) > 1 and TEXT in rows:
            continue  # a table of several layouts is full of nulls
        path, message = exported(job, manifest, f"{ending}/subset.{ending}", "--format", name)
        written = lines_of(path) if ending == "jsonl" else pq.read_table(path).to_pylist()
        info, config = entries_beside(path)
        assert (info is not None, config is not None) == (in_llama_factory, in_axolotl)
        if info:
            check_dataset_info(info, path, written)
        if config:
            check_axolotl(config, path, written)
        for trainer, is_taken in (("LLaMA-Factory", in_llama_factory), ("axolotl", in_axolotl)):
            assert any(note.startswith(f"no entry for {trainer}: ") for note in message["notes"]) != is_taken


def contents_of(*rows: Row) -> Contents:
    contents = Contents()
    assert list(contents.seen(rows)) == list(rows)
    return contents


@pytest.mark.parametrize(
    ("messages", "trait"),
    [
        ([turn("user", "1"), turn("assistant", "2") | {"weight": 0}], "weights of turns"),
        ([turn("user", "1"), turn("assistant", "2") | {"reasoning_content": "3"}], "reasoning"),
        ([turn("user", "1"), turn("user", "2"), turn("assistant", "3")], "by turns"),
        ([turn("assistant", "2")], "by turns"),
        ([turn("system", "2")], "by turns"),
    ],
)
def test_messages_that_llama_factory_would_skip_or_change_have_no_entry(messages: list[Row], trait: str) -> None:
    files, notes = entries_of(Place("/data/a.jsonl"), contents_of({"messages": messages}))
    assert "dataset_info.json" not in files
    assert trait in notes[0]
    assert "--format" in notes[0]


def test_a_compressed_file_has_an_entry_for_axolotl_alone() -> None:
    files, notes = entries_of(Place("/data/a.jsonl.gz"), contents_of(CONVERSATIONS[0]))
    assert list(files) == ["axolotl.yaml"]
    assert notes == ["no entry for LLaMA-Factory: it reads .jsonl and .parquet"]


def test_on_the_hub_both_name_the_data_set() -> None:
    files, notes = entries_of(Place("hf://datasets/org/my,set/x/train.jsonl.gz", "org/my,set"), contents_of(TEXT))
    assert notes == []
    assert json.loads(files["dataset_info.json"]) == {
        "my_set": {"hf_hub_url": "org/my,set", "columns": {"prompt": "text"}}
    }
    (entry,) = yaml.safe_load(files["axolotl.yaml"])["datasets"]
    assert entry == {"path": "org/my,set", "split": "train", "type": "completion", "field": "text"}


def test_an_entry_of_another_file_is_never_overwritten_and_the_new_one_is_printed(job: Job) -> None:
    manifest = selected_all(job, CONVERSATIONS)
    first, _ = exported(job, manifest, "first.jsonl", "--format", "trl")
    before = [(first.parent / name).read_bytes() for name in TRAINERS]
    second, message = exported(job, manifest, "second.jsonl", "--format", "trl")
    assert [(first.parent / name).read_bytes() for name in TRAINERS] == before
    for note, name in zip(message["notes"], TRAINERS, strict=True):
        assert note.startswith(f"not changed: {second.parent / name}")
        assert second.name in note.partition(" is ")[2]
        assert yaml.safe_load(note.partition(" is ")[2])


def test_the_candidates_own_rows_may_have_any_value_in_a_column_of_a_trainers_name(job: Job) -> None:
    rows = [{"prompt": f"{n} + 2 =", "completion": f" {n + 2}", "messages": None, "history": n} for n in range(3)]
    path, _ = exported(job, selected_all(job, rows), "own.jsonl")
    assert lines_of(path) == rows
    assert entries_beside(path) == (None, None)


def test_entries_are_for_a_format_and_no_card_leaves_them_out(job: Job) -> None:
    manifest = selected_all(job, CONVERSATIONS)
    for options in ((), ("--format", "trl", "--no-card")):
        path, _ = exported(job, manifest, f"{len(options)}/all.jsonl", *options)
        assert [file.name for file in path.parent.iterdir()] == ["all.jsonl"]
