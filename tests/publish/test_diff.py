"""Laws of `diff`: every count is that of plain sets, whatever the parts; what changed is named, and nothing else."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_job.publish.compare import rows
from prism_job.publish.compare.rows import compare_rows
from tests.conftest import Job, candidate, pair, read_json, table_of, write_jsonl

Row = dict[str, Any]
FILES = ("a.jsonl", "b.jsonl", "c.jsonl")


def random_table(random: np.random.Generator, pool: list[str], path: Path) -> list[Row]:
    """A scores.parquet with repeated ids, unusable rows and equal scores, in row groups of seven rows."""
    table = [
        {
            "example_id": example_id,
            "source": FILES[random.integers(3)],
            "line": line,
            "score": None if random.random() < 0.1 else float(random.integers(20)),
            "selected": bool(random.random() < 0.4),
        }
        for line, example_id in enumerate(random.choice(pool, 60).tolist(), 1)
    ]
    for row in table:
        row["selected"] &= row["score"] is not None
    columns = {name: [row[name] for row in table] for name in table[0]}
    columns["source"] = pa.array(columns["source"]).dictionary_encode()
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return table


def by_id(table: list[Row]) -> dict[str, Row]:
    """Of rows of one id the first selected one, else the first."""
    found: dict[str, Row] = {}
    for row in [*(row for row in table if row["selected"]), *table]:
        found.setdefault(row["example_id"], row)
    return found


def in_sets(old: list[Row], new: list[Row]) -> dict[str, list[Row]]:
    """What `compare_rows` counts, in plain loops over sets of ids."""
    before, after = by_id(old), by_id(new)
    chosen = [{name for name, row in each.items() if row["selected"]} for each in (before, after)]
    return {
        "before": [before[name] for name in chosen[0]],
        "after": [after[name] for name in chosen[1]],
        "kept": [after[name] for name in chosen[0] & chosen[1]],
        "added": [after[name] for name in chosen[1] - chosen[0]],
        "removed": [before[name] for name in chosen[0] - chosen[1]],
        "new_in_pool": [after[name] for name in chosen[1] - before.keys()],
        "gone_from_pool": [before[name] for name in chosen[0] - after.keys()],
        "common": [after[name] for name in before.keys() & after.keys()],
        "pool_before": list(before.values()),
        "pool_after": list(after.values()),
    }


def plain_spearman(pairs: list[tuple[float, float]]) -> float:
    """Pearson's correlation of ranks, where equal values share their mean rank."""
    ranks = [
        [np.mean([other <= one for other in side]) + np.mean([other < one for other in side]) for one in side]
        for side in zip(*pairs, strict=True)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("part_rows", [2**18, 50, 7])
def test_counts_are_those_of_plain_sets_however_the_ids_are_cut(
    tmp_path: Path, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PART_ROWS", part_rows)
    random = np.random.default_rng(0)
    # Ids that agree in their first or in their last half too: neither half alone is the id.
    halves = ["0" * 16, "f" * 16, *(random.bytes(8).hex() for _ in range(8))]
    pool = [left + right for left in halves for right in halves]
    old, new = (random_table(random, pool, tmp_path / name) for name in ("old", "new"))
    found, wanted = compare_rows(tmp_path / "old", tmp_path / "new", True), in_sets(old, new)
    assert {len(wanted[name]) for name in ("kept", "added", "removed", "new_in_pool")}.isdisjoint({0})
    for name, counted in found.counts_S.items():
        by_source = {source: sum(row["source"] == source for row in wanted[name]) for source in FILES}
        assert dict(zip(found.sources, counted.tolist(), strict=True)) == by_source, name
    for name, shown in (("added", found.added), ("removed", found.removed)):
        ranked = sorted(wanted[name], key=lambda row: (-row["score"], row["example_id"]))[: rows.NUM_SHOWN]
        assert shown == [{key: row[key] for key in ("example_id", "source", "line", "score")} for row in ranked]
    before = by_id(old)
    pairs = [(before[row["example_id"]]["score"], row["score"], row["source"]) for row in wanted["common"]]
    pairs = [each for each in pairs if None not in each]
    assert found.spearman_rows == len(pairs)
    assert found.spearman == pytest.approx(plain_spearman([each[:2] for each in pairs]))
    for number, source in enumerate(found.sources):
        of_source = [each[:2] for each in pairs if each[2] == source]
        assert found.spearman_S[number] == pytest.approx(plain_spearman(of_source))

    monkeypatch.setattr(rows, "MAX_CORRELATED", 5)
    sampled = compare_rows(tmp_path / "old", tmp_path / "new", True)
    assert (sampled.spearman_rows < len(pairs)) == (part_rows != 2**18)  # whole parts, until there are enough rows


def sentences(facts: Row) -> list[str]:
    return [f"{change['input']}: {change['sentence']}" for change in facts["changes"]]


def difference(job: Job, old: Path, new: Path) -> Row:
    return job.passes("diff", str(old), str(new))


def ids_selected(manifest: Path) -> set[str]:
    return {row["example_id"] for row in table_of(manifest, "selected")}


def test_each_changed_input_is_named_and_no_other(job: Job) -> None:
    first = job.run()
    assert sentences(difference(job, first, first)) == []

    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 24)])
    grown = job.run()
    facts = difference(job, first, grown)
    assert sentences(facts) == ["data: 4 candidates are new in the pool and 0 are gone; 10 are in both."]
    old, new = ids_selected(first), ids_selected(grown)
    counts = [facts[name] for name in ("before", "after", "kept", "added", "removed")]
    assert counts == [len(old), len(new), len(old & new), len(new - old), len(old - new)]
    assert facts["overlap"] == len(old & new) / len(old | new)
    assert facts["kept_share"] == len(old & new) / len(old)
    assert facts["churn"] == len(old ^ new) / (len(old) + len(new))

    (job.folder / "pool" / "a.jsonl").rename(job.folder / "pool" / "renamed.jsonl")
    moved = job.run()
    assert difference(job, grown, moved)["churn"] == 0
    assert sentences(difference(job, grown, moved)) == []
    (job.folder / "pool").rename(job.folder / "elsewhere")
    job.spec["candidates"]["uris"] = [str(job.folder / "elsewhere")]
    elsewhere = job.run()
    assert sentences(difference(job, moved, elsewhere)) == [
        "data: The candidates' addresses changed; their examples did not."
    ]

    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(1, 4)])
    job.spec["scoring"] = {"curvature": {"damping": 0.5}}
    changed = job.run()
    assert sentences(difference(job, elsewhere, changed)) == [
        "targets: 1 target pair is new and 1 is gone; 2 are in both.",
        "settings: scoring.curvature.damping changed from 0.1 to 0.5.",
    ]


def test_named_sets_another_model_and_another_version_are_named(job: Job) -> None:
    from prism_job.publish.compare.inputs import PoolCounts, find_changes
    from prism_job.publish.manifest import Manifest

    job.spec["targets"] = {"sets": [{"name": "math", "uris": [str(job.folder / "targets.jsonl")]}]}
    document = read_json(job.run())
    old = Manifest.model_validate(document)
    document["spec"]["spec"]["targets"]["sets"][0] |= {"weight": 0.5, "uris": ["s3://b/t.jsonl"]}
    document["spec"]["spec"]["model"] |= {"uri": "org/other", "dtype": "bfloat16"}
    document["spec"]["spec"] |= {"store": "s3://b/store", "suspend": True}
    document["extractor_parts"] |= {"model": {"hub": "org/other", "commit": "1"}, "dtype": "bfloat16", "mask": 3}
    document["code_version"] = "9.9"
    mask = old.extractor_parts["mask"]
    new = Manifest.model_validate(document)
    pairs = {"math": frozenset("a")}
    found = [change.sentence for change in find_changes(old, new, PoolCounts(0, 0, 10), pairs, pairs)]
    assert found == [
        "The targets' addresses changed; their pairs did not.",
        f"The model changed from {old.spec.spec.model.uri} (main) to org/other (main).",
        "model.dtype changed from float32 to bfloat16.",
        "targets.sets.math.weight changed from 1.0 to 0.5.",
        f"PRISM's version changed from {old.code_version} to 9.9.",
        f"How rows are made changed: mask was {mask} and is 3.",
    ]
    other = {"math": frozenset("b"), "new": frozenset("a")}
    found = [change.sentence for change in find_changes(old, old, PoolCounts(0, 0, 10), pairs, other)]
    assert found == [
        "1 target pair of set 'math' is new and 1 is gone; 0 are in both.",
        "1 target pair of set 'new' is new and 0 are gone; 0 are in both.",
    ]


def words_of(manifest: Path) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", (manifest.parent / "report.html").read_text())).split())


def test_a_run_reports_the_changes_since_its_newest_selection(job: Job) -> None:
    first = job.run()
    assert read_json(first)["previous"] is None
    assert "What changed since" not in words_of(first)
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 24)])
    second = job.run()
    assert read_json(second)["previous"] == read_json(first)["selection_id"]
    facts = difference(job, first, second)
    assert f"{facts['added']} examples added, {facts['removed']} removed, {facts['kept']} kept." in words_of(second)
    assert "4 candidates are new in the pool and 0 are gone; 10 are in both." in words_of(second)

    # The newest by the time of its manifest, which here is the first again; another run's do not count.
    os.utime(first, (2e9, 2e9))
    other = job.copy()
    other.document["metadata"]["name"] = "test-other"
    assert read_json(other.run())["previous"] is None
    job.spec["selection"]["budget"] = {"count": 3}
    third = job.run()
    assert read_json(third)["previous"] == read_json(first)["selection_id"]
    assert "selection.budget.count changed from 4 to 3." in words_of(third)


def test_a_damaged_earlier_selection_is_named_and_ends_no_run(job: Job) -> None:
    first = job.run()
    (first.parent / "scores.parquet").write_bytes(b"damaged")
    job.spec["selection"]["budget"] = {"count": 3}
    second = job.run()
    assert "Not known: checksum mismatch: scores.parquet" in words_of(second)
    job.refuses(("diff", str(first), str(second)), 65, "scores.parquet")
    job.refuses(("diff", str(first.parent), str(second)), 64, "/manifest.json")
    (first.parent / "scores.parquet").unlink()
    (first.parent / "scores.parquet").mkdir()  # as one that may not be read: root may read all
    job.spec["selection"]["budget"] = {"count": 1}
    os.utime(first, (2e9, 2e9))
    assert "Not known: cannot be read or written" in words_of(job.run())
    first.write_text(json.dumps(read_json(first) | {"format": "prism-selection/1"}))
    job.spec["selection"]["budget"] = {"count": 2}
    os.utime(first, (2e9, 2e9))
    assert "Not known: damaged manifest, or one of another version" in words_of(job.run())
