"""Exports as training data: types that are kept, formats of trainers, added columns, and the documents beside the file."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_job.errors import RequestError
from prism_job.publish.export.exported import SourceRows, hub_datasets, public_name
from prism_job.publish.export.fields import FieldType
from prism_job.publish.export.files import writer_of
from prism_job.publish.export.formats import FORMATS, UnfitError
from prism_job.publish.export.notes import Notes
from prism_job.spec.hub_address import HubAddress
from tests.conftest import Job, Row, candidate, table_of, turn
from tests.data.test_sources import unit_ids


def selected_all(job: Job, rows: list[Row]) -> Path:
    """The manifest of a run that keeps all of these rows."""
    (job.folder / "pool" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # escapes surrogates
    job.spec["selection"] = {"keep": "highest", "budget": {"fraction": 1.0}}
    return job.run()


def exported(job: Job, manifest: Path, name: str, *options: str) -> tuple[Path, Row]:
    path = job.folder / "exports" / name
    return path, job.passes("export", str(manifest), str(path), *options)


def lines_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Types


ODD: Row = {
    "large": 2**53 + 1,
    "huge": 2**70,
    "small": 1e-300,
    "flag": True,
    "nothing": None,
    "nested": {"null": None, "list": [1, None, "x"]},
    "half": "\ud800",
    "lookalike": "2024-01-02 03:04:05",
    "mixed": "7",
}


def test_json_lines_keep_the_type_of_every_value_and_their_bytes(job: Job) -> None:
    rows = [candidate(0) | ODD, candidate(1) | {"mixed": 7}]
    path, message = exported(job, selected_all(job, rows), "all.jsonl")
    wanted = [json.dumps(rows[0]), json.dumps(rows[1], ensure_ascii=False)]  # half a surrogate pair must be escaped
    assert path.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in wanted)
    assert message["notes"] == []


def test_a_number_that_json_lacks_is_written_and_named(job: Job) -> None:
    rows = [candidate(0) | {"a": float("nan"), "b": {"c": [float("-inf")]}, "d": 1.5}, candidate(1)]
    path, message = exported(job, selected_all(job, rows), "all.jsonl")
    assert [note.rpartition(": ")[2] for note in message["notes"]] == ["a, b"]
    assert '"a": NaN, "b": {"c": [-Infinity]}' in path.read_text()


def test_what_becomes_text_is_named_with_its_type(job: Job) -> None:
    (job.folder / "pool" / "a.jsonl").unlink()
    values = {
        "made": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "price": decimal.Decimal("1.50"),
        "raw": b"\x89PNG",
        "deep": {"day": [datetime.date(2024, 1, 2)]},
        "kept": 3,
    }
    table = pa.Table.from_pylist([candidate(number) | values for number in range(4)])
    pq.write_table(table, job.folder / "pool" / "a.parquet")
    path, message = exported(job, job.run(), "all.jsonl")
    wanted = {"made": str(values["made"]), "price": "1.50", "raw": "b'\\x89PNG'", "kept": 3}
    for row in lines_of(path):
        assert row | wanted == row
        assert row["deep"] == {"day": ["2024-01-02"]}
    (note,) = message["notes"]
    names = "made (datetime), price (Decimal), raw (bytes), deep (date)"
    assert note == f"written as text, because JSON has no such type: {names}"


@pytest.mark.parametrize(
    ("first", "second"), [("0", 0), (True, 1), (2**53 + 1, 0.5), (2**64, 0), ([1], {"a": 1}), ({}, {}), ("\ud800", "")]
)
def test_a_table_that_would_change_a_type_is_refused_by_column(tmp_path: Path, first: Any, second: Any) -> None:
    with pytest.raises(RequestError, match=r"column 'odd'[^\x00]*s3://b/all\.parquet[^\x00]*\.jsonl"):
        table_file(tmp_path, [{"odd": first}, {"odd": second}])
    assert not list(tmp_path.iterdir())


def test_a_table_that_cannot_hold_a_name_or_a_depth_is_refused_by_column(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(1000):
        deep = [deep]
    for row in ({"\ud800": 1}, {"odd": deep}):
        with pytest.raises(RequestError, match=r"does not fit a table"):
            table_file(tmp_path, [row])
    columns = FieldType()
    columns.add({"odd": deep})
    assert str(columns).endswith("list of more levels}")


def test_a_table_names_the_columns_that_it_fills_with_null(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"same": {"a": [None]}, "keys": [{"a": 1}], "nan": [float("nan")]},
        {"same": {"a": [2]}, "keys": [{"b": 2}], "nan": [1.0], "late": 1},
    ]
    path, notes = table_file(tmp_path, rows)
    assert notes == ["null where a row lacks the column, or a key within it: keys, late"]
    assert pq.read_table(path).to_pylist()[1] == rows[1] | {"keys": [{"a": None, "b": 2}]}


def table_file(folder: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    """A parquet file of these rows, and the notes on it."""
    path, notes = folder / "all.parquet", Notes()
    writer_of(path.name)(path, "s3://b/all.parquet", rows, notes)
    return path, notes.lines()


# Formats


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

CONVERSATIONS: list[Row] = [
    {"messages": [turn("user", "Hi | there"), turn("assistant", "Hello\nyou")]},
    {"messages": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Yes?")]},
    {"messages": [turn(role, f"{role} {n}") for n in range(3) for role in ("user", "assistant")]},
]
"""What every format holds."""

CALLS: list[Row] = [
    {
        "messages": [
            turn("user", "1 + 1?"),
            {"role": "assistant", "tool_calls": [CALL]},
            turn("tool", "2"),
            turn("assistant", "Two."),
        ],
        "tools": [TOOL],
    }
]

CALLS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}{% if message.tool_calls %}"
    "{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ALL_KINDS: list[Row] = [
    *CONVERSATIONS,
    *CALLS,
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": [turn("user", "2 + 2?")], "completion": [turn("assistant", "4")]},
    {"text": "Two and two make four."},
]


def ids_read_from(job: Job, path: Path) -> tuple[list[str], list[str]]:
    """Units of a pool that is this file alone: they cover the ids of its rows, in order."""
    other = job.copy(candidates={"uris": [str(path)], "maxBadFraction": 0})
    return unit_ids(other)


def test_trl_holds_every_example_under_its_id(job: Job) -> None:
    use_template_of_calls(job)
    rows = [row | {"label": number} for number, row in enumerate(ALL_KINDS)]
    manifest = selected_all(job, rows)
    wanted = unit_ids(job)
    path, message = exported(job, manifest, "all.jsonl", "--format", "trl")
    assert ids_read_from(job, path) == wanted
    assert any(note.endswith("alone: label") for note in message["notes"])
    assert any(note.endswith("take one: messages, prompt, text") for note in message["notes"])
    manifest = selected_all(job, [row for row in rows if not isinstance(row.get("prompt"), str)])
    wanted = unit_ids(job)
    path, _ = exported(job, manifest, "all.parquet", "--format", "trl")
    assert ids_read_from(job, path) == wanted, "a table holds them too, tools as JSON text"


@pytest.mark.parametrize(("name", "rows"), [("sharegpt", [*CONVERSATIONS, *CALLS]), ("alpaca", CONVERSATIONS)])
def test_a_conversation_keeps_its_id_in_sharegpt_and_alpaca(job: Job, name: str, rows: list[Row]) -> None:
    use_template_of_calls(job)
    manifest = selected_all(job, rows)
    wanted = unit_ids(job)
    for ending in ("jsonl", "parquet"):
        path, _ = exported(job, manifest, f"all.{ending}", "--format", name)
        assert ids_read_from(job, path) == wanted, ending
    as_prompt = {"prompt": CONVERSATIONS[1]["messages"][:2], "completion": CONVERSATIONS[1]["messages"][2:]}
    assert FORMATS[name](as_prompt) == FORMATS[name](CONVERSATIONS[1]), "the same tokens with the same loss"


def test_the_rows_of_each_format_are_those_of_its_trainer() -> None:
    assert FORMATS["alpaca"](CONVERSATIONS[2]) == {
        "instruction": "user 2",
        "input": "",
        "output": "assistant 2",
        "system": "",
        "history": [["user 0", "assistant 0"], ["user 1", "assistant 1"]],
    }
    assert FORMATS["sharegpt"](CALLS[0]) == {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
        "tools": json.dumps([TOOL]),
    }


def use_template_of_calls(job: Job) -> None:
    """From here on the model's template writes tool calls; the tiny model's own does not."""
    folder = job.folder / "model"
    shutil.copytree(job.spec["model"]["uri"], folder)
    (folder / "chat_template.jinja").write_text(CALLS_TEMPLATE)
    job.spec["model"]["uri"] = str(folder)


BOTH = ("sharegpt", "alpaca")
UNFIT: list[tuple[tuple[str, ...], str, Row]] = [
    (BOTH, "plain text", {"text": "Two."}),
    (BOTH, "plain text", {"prompt": "2", "completion": "4"}),
    (("alpaca",), "holds tool_calls", {"messages": CALLS[0]["messages"]}),
    (("alpaca",), "has tools", CONVERSATIONS[0] | {"tools": [TOOL]}),
    (BOTH, "holds weight", {"messages": [turn("user", "1"), turn("assistant", "2") | {"weight": 0}]}),
    (BOTH, "holds tool_calls", {"messages": [turn("user", "1"), turn("assistant", "2") | {"tool_calls": [CALL]}]}),
    (BOTH, "turn 1 is of role", {"messages": [turn("assistant", "1"), turn("user", "2"), turn("assistant", "3")]}),
    (BOTH, "turn 3 is of role", {"messages": [turn("system", "1"), turn("user", "1"), turn("user", "2")]}),
    (BOTH, "does not end", {"messages": [turn("user", "1"), turn("assistant", "2"), turn("user", "3")]}),
    (BOTH, "does not end", {"messages": [turn("system", "1")]}),
    (BOTH, "prompt holds assistant", {"prompt": [turn("assistant", "1")], "completion": [turn("assistant", "2")]}),
    (BOTH, "chat_template_kwargs", CONVERSATIONS[0] | {"chat_template_kwargs": {"enable_thinking": False}}),
]


@pytest.mark.parametrize(("names", "reason", "content"), UNFIT)
def test_what_a_conversation_format_cannot_hold_is_refused_with_the_reason(
    names: tuple[str, ...], reason: str, content: Row
) -> None:
    for name in names:
        with pytest.raises(UnfitError, match=reason):
            FORMATS[name](content)


def test_what_a_format_would_lose_is_refused_although_it_can_be_written(job: Job) -> None:
    """A tool's name, and the id of a call: ShareGPT has no key for them."""
    use_template_of_calls(job)
    messages = [*CALLS[0]["messages"]]
    messages[1] = {"role": "assistant", "tool_calls": [CALL | {"id": "call_1"}]}
    manifest = selected_all(job, [CALLS[0], {"messages": messages}])
    command = ("export", str(manifest), str(job.folder / "all.jsonl"), "--format", "sharegpt")
    job.refuses(command, 64, "a.jsonl line 2", "another one")


def test_an_example_that_does_not_fit_is_named_by_source_and_line_and_nothing_is_written(job: Job) -> None:
    manifest = selected_all(job, [CONVERSATIONS[0], {"text": "Two and two make four."}])
    path = job.folder / "all.jsonl"
    place = f"{job.folder / 'pool' / 'a.jsonl'} line 2"
    job.refuses(("export", str(manifest), str(path), "--format", "alpaca"), 64, place, "plain text", "--format trl")
    assert not path.exists()


# Columns on request


@pytest.mark.parametrize(
    ("rule", "sign"), [({"keep": "highest"}, 1), ({"drop": "highest"}, -1), ({"keep": "lowest"}, -1)]
)
def test_a_weight_is_the_share_of_selected_examples_that_rank_no_better(job: Job, rule: Row, sign: int) -> None:
    job.spec["selection"] = rule | {"budget": {"count": 4}}
    manifest = job.run()
    path, _ = exported(job, manifest, "w.jsonl", "--weight-column", "weight", "--score-column", "score")
    rows, selected = lines_of(path), sorted(table_of(manifest, "selected"), key=lambda row: row["line"])
    assert [row["score"] for row in rows] == [row["score"] for row in selected]
    for row in rows:
        no_better = sum(sign * other["score"] <= sign * row["score"] for other in rows)
        assert row["weight"] == no_better / len(rows)
    assert max(row["weight"] for row in rows) == 1


def test_an_added_column_never_replaces_one(job: Job) -> None:
    manifest = job.run()
    for option in ("--weight-column", "--score-column"):
        path = job.folder / "w.jsonl"
        job.refuses(("export", str(manifest), str(path), option, "label"), 64, "column 'label'", "a.jsonl line")
        assert not path.exists()


# Documents beside the file


def test_a_card_and_croissant_state_what_was_written_and_nothing_else(job: Job) -> None:
    from huggingface_hub import DatasetCard

    manifest = selected_all(
        job, [candidate(number) | {"meta": {"a": 1}, "mixed": [1, "a"][number % 2]} for number in range(4)]
    )
    path, _ = exported(job, manifest, "all.jsonl", "--card")
    content = path.read_bytes()
    card = DatasetCard.load(path.parent / "README.md")
    assert card.data.to_dict() == {
        "pretty_name": "test",
        "size_categories": ["n<1K"],
        "tags": ["prism", "data-selection"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "all.jsonl"}]}],
    }
    for word in (
        "4 of 4",
        "{keep: highest, budget: {fraction: 1.0}}",
        f"{len(content)}",
        hashlib.sha256(content).hexdigest(),
        "pool/a.jsonl",
        "targets.jsonl",
    ):
        assert word in card.text, word
    document = json.loads((path.parent / "croissant.json").read_text())
    (file,), (records,) = document["distribution"], document["recordSet"]
    assert (file["sha256"], file["contentUrl"]) == (hashlib.sha256(content).hexdigest(), "all.jsonl")
    types = {field["name"]: field.get("dataType") for field in records["field"]}
    assert types == {"messages": None, "label": "sc:Integer", "meta": None}
    assert [part["name"] for part in records["field"][0]["subField"]] == ["role", "content"]
    assert "not described: 'mixed'" in records["description"]
    for text in (card.content, json.dumps(document)):
        assert str(job.folder) not in text, "no paths of this machine"
        assert "license" not in text


def test_documents_name_the_data_sets_of_the_hub_at_their_commits() -> None:
    commit = "a" * 40
    uris = [f"hf://datasets/o/a@{commit}/x.jsonl", "/home/me/b.jsonl", f"hf://datasets/o/a@{commit}/y 1?.jsonl"]
    sources = [SourceRows(uri, public_name(uri, ["/home"]), 1) for uri in uris]
    assert hub_datasets(sources) == [HubAddress("o/a", commit)]
    assert [source.name for source in sources] == [uris[0], "home/me/b.jsonl", uris[2]]
    assert public_name("/home/me/b.jsonl", ["/home/me/b.jsonl"]) == "b.jsonl"


def test_a_column_name_is_no_markup_in_a_card(job: Job) -> None:
    odd = "a|b\n# c <i> [x](y) `\ud800`"
    path, _ = exported(job, selected_all(job, [candidate(0) | {odd: 1, "": 1}, candidate(1)]), "all.jsonl", "--card")
    line = r"| a\|b # c \<i> \[x\](y) \`?\` | integer |"
    assert line in (path.parent / "README.md").read_text(encoding="utf-8").splitlines()
    (records,) = json.loads((path.parent / "croissant.json").read_text(encoding="utf-8"))["recordSet"]
    assert [field["name"] for field in records["field"]] == ["messages", "label", odd], "a field needs a name"


def test_a_file_that_another_export_wrote_in_the_meantime_stays(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, path = job.run(), job.folder / "exports" / "all.jsonl"

    def write(*_: Any) -> None:
        path.parent.mkdir()
        path.write_text("theirs")

    monkeypatch.setattr("prism_job.publish.export.export.writer_of", lambda _: write)
    job.refuses(("export", str(manifest), str(path)), 64, "exists already")
    assert path.read_text() == "theirs"


def test_documents_are_never_overwritten_by_others(job: Job) -> None:
    manifest = job.run()
    path, _ = exported(job, manifest, "all.jsonl", "--card")
    path.unlink()
    _, message = exported(job, manifest, "all.jsonl", "--card")
    assert message["rows"] == 4, "the same documents may be there"
    path.unlink()
    (path.parent / "README.md").write_text("mine")
    job.refuses(("export", str(manifest), str(path), "--card"), 64, "README.md", "without --card")
    job.refuses(("export", str(manifest), str(path), "--public"), 64, "--public")
    assert not path.exists()
