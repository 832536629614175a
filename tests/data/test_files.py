"""Files as people have them: what is read in which order, what is ignored by name, and what is refused because it would be
misread. Rows are compared with those that `datasets` itself reads."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_job.data.data_files import list_files
from prism_job.data.readers import COMPRESSIONS, KINDS, Unreadable
from prism_job.errors import DataError, RequestError
from prism_job.spec.document import DATA_ENDINGS
from tests.conftest import Row, turn

ROWS: list[Row] = [{"prompt": f"Say {number}:", "completion": f" number {number}"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
MIXED: list[Row] = [
    {
        "messages": [turn("user", "Hi"), turn("assistant", "Hello")],
        "tools": [{"name": "add", "x": 1}],
        "meta": {"a": 1},
    },
    {"messages": [turn("user", "Hi")], "tools": [{"name": "find", "x": ["y"]}], "meta": "text"},
    {"messages": [turn("user", "Bye")], "tools": None, "meta": None},
]
"""Columns of mixed types: `datasets` keeps them as JSON text of the type `Json`."""


def read(path: Path | str) -> list[Any]:
    return [row for source in list_files(str(path))[0] for _, row in source.read()]


def test_what_data_may_be_called_no_document_may_be_called() -> None:
    assert {*DATA_ENDINGS} == {*KINDS, *COMPRESSIONS} - {".json"}, "a document may be JSON"


def names(path: Path) -> list[str]:
    return [source.uri.removeprefix(f"{path}/") for source in list_files(str(path))[0]]


def arrow(rows: list[Row], of: Any = pa.ipc.new_stream) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with of(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ.setdefault("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    import datasets

    datasets.disable_progress_bars()
    return datasets


# Endings


TSV = "prompt\tcompletion\n" + "".join(f'"{row["prompt"]}"\t{row["completion"]}\n' for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES.encode()),
        ("a.jsonlines", codecs.BOM_UTF8 + LINES.encode()),
        ("a.tsv", TSV.encode()),
        ("a.arrow", arrow(ROWS)),
        ("file.arrow", arrow(ROWS, pa.ipc.new_file)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.tsv.xz", lzma.compress(TSV.encode())),
        ("a.arrow.gz", gzip.compress(arrow(ROWS))),
        ("file.arrow.xz", lzma.compress(arrow(ROWS, pa.ipc.new_file))),
    ],
)
def test_every_ending_holds_the_same_rows_and_a_file_cut_short_is_an_error(
    name: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read(path) == ROWS
    if name.endswith(("bz2", "xz", "gz", "arrow")):
        # 8 bytes are the end mark of an Arrow stream: without it, the batches before are whole.
        for cut in (8, len(content) // 2):
            path.write_bytes(content[:-cut])
            with pytest.raises(DataError, match="cannot be read as"):
                read(path)


# Refused, because it would be misread


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["Dis 0", "Скажи 0", "说"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_utf16_and_utf32_are_an_error_of_the_whole_file(ending: str, text: str, encoding: str, tmp_path: Path) -> None:
    row = {"prompt": text, "completion": text}
    content = {
        "jsonl": json.dumps(row, ensure_ascii=False) + "\n",
        "json": json.dumps([row]),
        "csv": f"prompt,completion\n{text},{text}\n",
    }
    (tmp_path / f"a.{ending}").write_bytes(content[ending].encode(encoding))
    with pytest.raises(DataError, match=f"{encoding[:6].upper()}; save as UTF-8"):
        read(tmp_path)
    (tmp_path / f"a.{ending}").write_bytes(content[ending].encode("utf-8-sig"))
    assert read(tmp_path) == [row]


def dup_table() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "prompt"]), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", dup_table(), "two columns have the name 'prompt'"),
        ("a.csv", b"prompt,completion,prompt\na,b,c\n", "two columns have the name 'prompt'"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "the key 'text' twice"),
        ("a.json", b'{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "x", "1": "y"}}', "holds columns, not rows"),
        ("a.json", b'{"prompt": ["a", "b"], "completion": ["x", "y"]}', "holds columns, not rows"),
        ("a.json", b'{"prompt": "a",\n "completion": "b"}\n', "one object over several lines"),
        ("a.json", b'{\n "prompt": "a"\n}\n', "one object over several lines"),
        ("a.jsonl", bytes(Random(1).choices(range(256), [30] + [1] * 255, k=900)), "the file is binary, not text"),
        ("a.csv", b"\x7fELF" + bytes(900), "the file is binary, not text"),
        ("a.arrow", LINES.encode(), "holds JSON, not Arrow"),
        ("a.arrow", b"", "not an Arrow file"),
    ],
)
def test_a_file_that_would_be_misread_is_an_error(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as raised:
        read(tmp_path)
    assert raised.value.where == str(tmp_path / name)
    assert raised.value.fix


def damaged_arrow() -> bytes:
    """The end of the first text lies beyond the buffer: read without a check, it ends the process."""
    content = arrow([{"text": "hello world"}, {"text": "abc"}])
    return content.replace(struct.pack("<3i", 0, 11, 14), struct.pack("<3i", 0, 2**31 - 256, 14))


def far_date() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": ["a"], "made": pa.array([2**62], pa.timestamp("s"))})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.arrow", damaged_arrow()),
        ("a.arrow", far_date()),
        ("a.csv.xz", lzma.compress(b"text\n" + b"x" * 4000)),
        ("a.tsv", b"text\n" + b"x" * 4000),
        ("a.json.bz2", bz2.compress(b"[" + b" " * 4000 + b"]")),
        ("a.parquet.gz", gzip.compress(bytes(4000))),
        ("a.arrow.zst", pa.compress(b"ARROW1" + bytes(4000), "zstd", asbytes=True)),
    ],
    ids=("damaged offset", "far date", "csv.xz", "tsv", "json.bz2", "parquet.gz", "arrow.zst"),
)
def test_a_damaged_value_and_a_file_that_expands_without_end_are_errors(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("MAX_LINE_BYTES", "MAX_WHOLE_BYTES"):
        monkeypatch.setattr(f"prism_job.data.readers.{limit}", 2000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as" if name == "a.arrow" else "more than 0"):
        read(tmp_path)


def test_a_list_of_splits_that_is_none_names_no_splits(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": 5}')
    (tmp_path / "a.jsonl").write_text(LINES)
    assert read(tmp_path) == ROWS


def test_a_json_line_with_one_key_twice_is_a_bad_row(tmp_path: Path) -> None:
    bad = ['{"text": "a", "text": "b"}', '{"messages": [{"role": "user", "content": "a", "content": "b"}]}']
    (tmp_path / "a.jsonl").write_text("\n".join([LINES.splitlines()[0], *bad]))
    good, *others = read(tmp_path)
    assert good == ROWS[0]
    for row, key in zip(others, ("text", "content"), strict=True):
        assert isinstance(row, Unreadable)
        assert row.reason == f"an object has the key '{key}' twice"


def test_one_json_line_that_is_a_row_is_no_table_of_columns(tmp_path: Path) -> None:
    rows = [{"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]}, {"text": "a", "meta": {"0": 1}}]
    for row in rows:
        (tmp_path / "a.json").write_text(json.dumps(row))
        assert read(tmp_path) == [row]


# Ignored by name


def test_what_tools_leave_beside_data_is_ignored_by_name(tmp_path: Path) -> None:
    beside = [
        ".DS_Store", ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".cache/hub/a.json", ".gitattributes",
        "README.md", "dataset_info.json", "sub/dataset_infos.json", "sub/state.json", "sub/._b.jsonl",
    ]  # fmt: skip
    for name in (*beside, "a.jsonl", "sub/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert names(tmp_path) == ["a.jsonl", "sub/b.jsonl"]
    ignored = list_files(str(tmp_path))[1]
    assert set(ignored) == {str(tmp_path / name) for name in beside}
    assert ignored[str(tmp_path / "README.md")] == "not a kind of data file that PRISM reads"
    assert ignored[str(tmp_path / "._a.jsonl")] == "hidden"
    assert read(tmp_path / "._a.jsonl") == ROWS, "a file that is named itself is read"
    assert len(names(tmp_path / ".ipynb_checkpoints")) == 1, "so is a folder"


# Saved data sets


def test_a_saved_data_set_is_read_in_its_own_order_without_the_caches_of_map(datasets: Any, tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set", num_shards=3)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    (tmp_path / "set" / "cache-0123.arrow").write_bytes(arrow(ROWS))
    (tmp_path / "z.jsonl").write_text(LINES)
    expected = list(datasets.load_from_disk(str(tmp_path / "set")))
    assert expected != rows, "the order is that of state.json"
    assert read(tmp_path) == [*expected, *ROWS]
    assert list_files(str(tmp_path))[1][str(tmp_path / "set" / "cache-0123.arrow")].startswith("not among the files")
    (tmp_path / "set" / state["_data_files"][1]["filename"]).unlink()
    with pytest.raises(DataError, match="which is not there"):
        read(tmp_path)


def test_of_several_saved_splits_one_must_be_named(datasets: Any, tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "set")
    with pytest.raises(RequestError, match="the splits train, test") as raised:
        read(tmp_path / "set")
    assert f"{tmp_path}/set/train" in (raised.value.fix or "")
    assert read(tmp_path / "set" / "train") == ROWS
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "single")
    assert read(tmp_path / "single") == ROWS


@pytest.mark.parametrize("how", ["save_to_disk", "to_parquet"])
def test_columns_of_mixed_types_are_read_as_datasets_reads_them(how: str, datasets: Any, tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(MIXED, on_mixed_types="use_json")
    (tmp_path / "set").mkdir()
    made.save_to_disk(tmp_path / "set") if how == "save_to_disk" else made.to_parquet(tmp_path / "set" / "a.parquet")
    assert "Json" in str(made.features)
    assert read(tmp_path / "set") == list(made) == MIXED
