"""A run whose candidates are another run's manifest: the same as over its export, and nothing else than what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import STAGES, Job, candidate, table_of, write_jsonl


@pytest.fixture
def first(job: Job) -> Path:
    """The manifest of a run that selects 6 of 12 rows, which lie in two files; one row is bad."""
    rows: list[Any] = [candidate(number) for number in range(12)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows[:7])
    write_jsonl(job.folder / "pool" / "b.jsonl", [{"nothing": 1}, *rows[7:]])
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["selection"]["budget"] = {"count": 6}
    return job.run()


def chain(job: Job, uri: Path) -> Job:
    other = job.copy(candidates={"uris": [str(uri)]}, selection={"keep": "lowest", "budget": {"count": 3}})
    other.document["metadata"]["name"] = "second"
    return other


def test_a_run_over_a_manifest_selects_what_a_run_over_its_export_selects(job: Job, first: Path) -> None:
    export = job.folder / "export.jsonl"
    job.passes("export", str(first), str(export))
    over_export = chain(job, export).run()
    over_manifest = chain(job, first).run()
    for name in ("selected", "scores"):
        rows = [[row | {"source": None} for row in table_of(path, name)] for path in (over_manifest, over_export)]
        assert rows[0] == rows[1], "ids, scores and line numbers"
    assert {row["source"] for row in table_of(over_manifest, "scores")} == {str(first)}
    again = job.folder / "again.jsonl"
    job.passes("export", str(over_manifest), str(again))
    chosen = [json.loads(line) for line in again.read_text().splitlines()]
    assert len(chosen) == 3
    assert all(row in map(json.loads, export.read_text().splitlines()) for row in chosen), "all columns"


def test_a_manifest_that_was_changed_is_refused(job: Job, first: Path) -> None:
    second = chain(job, first)
    scores = (first.parent / "scores.parquet").read_bytes()
    (first.parent / "scores.parquet").write_bytes(scores + b" ")
    second.refuses("plan", 65, "checksum mismatch", "scores.parquet")
    (first.parent / "scores.parquet").write_bytes(scores)
    for path in (job.folder / "store" / "rows").iterdir():
        path.unlink()
    second.refuses("plan", 65, "rows/", "no such file")
    chain(job, job.folder / "nowhere" / "manifest.json").refuses("plan", 64, "no manifest there")
    (job.folder / "manifest.json").write_text('{"a": 1}')
    chain(job, job.folder / "manifest.json").refuses("plan", 65, "not the manifest of a selection")
    chain(job, first.parent).refuses("plan", 64, "published selection", "manifest.json")


def test_on_s3_a_manifest_a_saved_data_set_and_json_lines_give_the_same_ids(job: Job, s3: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [candidate(number) for number in range(6)]
    datasets.Dataset.from_list(rows).save_to_disk(job.folder / "saved")
    for path in (job.folder / "saved").iterdir():
        s3.upload_file(str(path), "corpora", f"saved/{path.name}")
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    job.spec["selection"]["budget"] = {"fraction": 1.0}
    remote = job.copy(store="s3://prism/gradients", output="s3://prism/selections")
    *_, words = [remote.passes(stage) for stage in STAGES]
    ids = []
    for uri in (str(job.folder / "pool"), "s3://corpora/saved/", words["manifest"]):
        job.copy(candidates={"uris": [uri]}).plan()
        ids.append([unit.id for unit in job.copy(candidates={"uris": [uri]}).planned().candidates])
    assert ids[0] == ids[1] == ids[2]
