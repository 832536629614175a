"""Data files of every kind: which rows they hold, at which places, and that the kind of file changes no example."""

from __future__ import annotations

import csv
import datetime
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_job.errors import DataError
from prism_job.spec.digest import digest
from prism_job.storage.address import open_store
from prism_job.store import staged_rows
from tests.conftest import Job, Row, pair, table_of, turn, write_jsonl


def question(number: int, prompt: str | None = None) -> Row:
    """A row that every kind of file can hold."""
    return {"prompt": prompt or f"Say {number}:", "completion": f" number {number}, {'yes ' * (number % 3)}or so"}


def write_csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_parquet(rows: list[Row]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def unzstd(content: bytes) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
        return stream.read()


def pool_of(job: Job, files: dict[str, bytes]) -> None:
    """These files and no others."""
    for path in (job.folder / "pool").iterdir():
        path.unlink()
    for name, content in files.items():
        (job.folder / "pool" / name).write_bytes(content)


def unit_ids(job: Job) -> tuple[list[str], list[str]]:
    """Units of candidates and of targets, as planned: they cover the ids of their rows, in order."""
    job.plan()
    plan = job.planned()
    return [unit.id for unit in plan.candidates], [unit.id for unit in plan.targets]


# Places


TOO_LONG = "why " * 200


def test_every_row_and_every_bad_row_has_its_own_line_number(job: Job) -> None:
    """In jsonl and csv the line, in json and parquet the position from 1; blank lines count as lines and are no rows."""
    good, long = [question(number) for number in range(20)], question(99, TOO_LONG)
    lines = [json.dumps(row) for row in (*good[:4], long)]
    header, *csv_lines = write_csv([*good[4:7], long]).decode().splitlines()
    lines = [lines[0], "", lines[1], "{broken", lines[4], lines[2], "", lines[3], ""]
    csv_lines = [header, csv_lines[0], "", "one,two,three", csv_lines[1], csv_lines[3], csv_lines[2]]
    files = {
        "a.jsonl": "\n".join(lines).encode(),
        "b.csv": "\n".join(csv_lines).encode(),
        "c.json": json.dumps([good[7], 5, good[8], long, good[9]]).encode(),
        "d.parquet": write_parquet([good[10], good[11] | {"completion": None}, long, good[12], good[13]]),
    }
    pool_of(job, files)
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["extraction"]["examplesPerShard"] = 3  # runs of lines go on from unit to unit
    manifest = job.run()
    scores = table_of(manifest, "scores")
    names = [(Path(row["source"]).name, row["line"]) for row in scores]
    lines_of = {"a.jsonl": (1, 3, 5, 6, 8), "b.csv": (2, 5, 6, 7), "c.json": (1, 3, 4, 5), "d.parquet": (1, 3, 4, 5)}
    assert names == [(name, line) for name, numbers in lines_of.items() for line in numbers]
    too_long = [("a.jsonl", 5), ("b.csv", 6), ("c.json", 4), ("d.parquet", 3)]
    assert [name for name, row in zip(names, scores, strict=True) if row["score"] is None] == too_long
    quarantine = [json.loads(line) for line in (manifest.parent / "quarantine.jsonl").read_text().splitlines()]
    unreadable = [("a.jsonl", 4), ("b.csv", 4), ("c.json", 2), ("d.parquet", 2)]
    assert [(Path(entry["source"]).name, entry["line"]) for entry in quarantine] == unreadable + too_long
    reasons = [entry["reason"] for entry in quarantine]
    for reason, says in zip(reasons, ["not JSON", "more fields", "a JSON int", "no completion"], strict=False):
        assert says in reason
    assert all("no response token within maxLength" in reason for reason in reasons[4:])


def test_a_row_too_long_is_named_at_its_line_when_extraction_fails(job: Job) -> None:
    rows = [json.dumps(row) for row in (question(0), question(1, TOO_LONG), question(2))]
    pool_of(job, {"a.jsonl": "\n".join([rows[0], "", "", rows[1], rows[2]]).encode()})
    job.fails("extract", 65, "1 of 3", "a.jsonl line 4", "maxLength")


# Kinds


def test_the_kind_of_file_and_its_compression_change_no_example(job: Job) -> None:
    rows = [question(number) for number in range(10)]
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    kinds = {"jsonl": plain, "json": json.dumps(rows).encode(), "csv": write_csv(rows), "parquet": write_parquet(rows)}
    compressions = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
    files = {f"a.{kind}{end}": of(kinds[kind]) for kind in kinds for end, of in compressions.items()}
    files |= {
        "two-frames.jsonl.zst": zstd(plain[:100]) + zstd(plain[100:]),
        "two-members.jsonl.gz": gzip.compress(plain[:100]) + gzip.compress(plain[100:]),
        "lines.json": plain,
        "A.JSONL.GZ": gzip.compress(plain),
    }
    pool_of(job, {"a.jsonl": plain})
    job.run()
    wanted = unit_ids(job)
    for name, content in files.items():
        pool_of(job, {name: content})
        assert unit_ids(job) == wanted, name
        words = job.plan()
        assert (words["examples"], words["missing"]) == (10, 0), name


def test_a_compressed_export_reads_back_as_the_selected_rows(job: Job) -> None:
    rows = [question(number) for number in range(10)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    manifest = job.run()
    wanted = [rows[line - 1] for line in sorted(row["line"] for row in table_of(manifest, "selected"))]
    job.spec["selection"]["budget"] = {"count": 4}
    for ending in (".jsonl.gz", ".jsonl.zst"):
        path = job.folder / f"subset{ending}"
        assert job.passes("export", str(manifest), str(path))["rows"] == 4
        content = path.read_bytes()
        text = gzip.decompress(content) if ending == ".jsonl.gz" else unzstd(content)
        assert [json.loads(line) for line in text.splitlines()] == wanted
        pool_of(job, {f"subset{ending}": content})
        assert job.plan()["examples"] == 4, "what we export we read"


# One example said in several ways


def test_a_shared_beginning_of_several_messages_is_the_prompt(job: Job) -> None:
    before = [turn("system", "Be brief."), turn("user", "Hello"), turn("assistant", "Yes?")]
    said, implied = [], []
    for number in range(3):
        one = pair(number)
        prompt = [*before, *one["prompt"]]
        said.append(one | {"prompt": prompt})
        implied.append({side: [*prompt, *one[side]] for side in ("chosen", "rejected")})
    write_jsonl(job.folder / "targets.jsonl", said)
    wanted = unit_ids(job)
    write_jsonl(job.folder / "targets.jsonl", implied)
    assert unit_ids(job) == wanted
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(3)])
    assert unit_ids(job) != wanted


def test_nulls_that_parquet_adds_change_no_example(job: Job) -> None:
    """Parquet gives every struct of a column the keys of all, null where absent, however deep they lie."""

    def call(name: str, **arguments: Any) -> Row:
        function = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"role": "assistant", "tool_calls": [function]}

    rows = [
        {"messages": [turn("user", "Add"), call("add", first=1, second=2), turn("assistant", "Three")]},
        {"messages": [turn("user", "Find"), call("find", where={"city": "Oslo"}), turn("assistant", "Found")]},
        {"messages": [turn("user", "Find"), call("find", where={"land": "Norway"}), turn("assistant", "Found")]},
        {"messages": [turn("user", "Hi"), turn("assistant", "Hello")]},
    ]
    pool_of(job, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    wanted = unit_ids(job)
    content = write_parquet(rows)
    stored = pq.read_table(io.BytesIO(content)).to_pylist()
    filled = stored[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"first": None, "second": None, "where": {"city": "Oslo", "land": None}}, "nulls at two depths"
    pool_of(job, {"a.parquet": content})
    assert unit_ids(job) == wanted


def test_staged_rows_have_the_name_and_the_lines_of_plain_json(tmp_path: Path) -> None:
    """What a store of an earlier plan holds must be found, whatever makes it now: json.dumps, row by row and all at once."""
    nested: Any = [1.5, float("nan"), 10**40, None, True, {"ä": ["\u2028", {}, []]}]
    rows = [question(number) for number in range(3)]
    rows += [{"text": 'a "b" \\ \n\t\x00\x7f é 漢 😀 \ud800', "more": nested}, {"": datetime.date(2025, 1, 2)}, {}]
    store, known = open_store(str(tmp_path)), set[str]()
    name = staged_rows.stage_rows(store, rows, known)
    whole = json.dumps(rows, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    assert name == hashlib.sha256(whole).hexdigest()[:32]
    assert known == {name}
    lines = unzstd(store.get(staged_rows.rows_key(name))).decode("utf-8", "surrogatepass")
    assert lines == "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    found = staged_rows.read_rows(store, name)
    assert repr(found) == repr(json.loads(json.dumps(rows, default=str)))


@pytest.mark.parametrize("change", [("number", "nUmber"), ('": "', '":  "')])
def test_staged_rows_that_were_changed_are_refused(change: tuple[str, str], tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    name = staged_rows.stage_rows(store, [question(number) for number in range(3)], set())
    text = unzstd(store.get(staged_rows.rows_key(name))).decode()
    changed = text.replace(*change)
    assert changed != text
    store.put(staged_rows.rows_key(name), zstd(changed.encode()))
    with pytest.raises(DataError, match="digest"):
        staged_rows.read_rows(store, name)


def test_a_content_digest_is_that_of_canonical_json() -> None:
    content = {"prompt": "é \n", "completion": ["b", {"y": 1, "x": None}], "Ä": 1.0}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    assert digest(content) == hashlib.sha256(text.encode()).hexdigest()[:32]
    with pytest.raises(ValueError, match="JSON compliant"):
        digest({"text": float("inf")})
