"""Laws of targets in named sets: each is scored as if alone, the combined score is their signed sum, one extraction serves all.

Shapes: K sets, Q pairs, N candidates, M numbers of a pair's unfolded row.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from launcher.resource.record import parse_for_cluster
from prism_job.errors import SpecError
from prism_job.score import column
from prism_job.score.candidates import score_candidates
from prism_job.score.direction import fold_directions
from prism_job.score.targets import weigh_targets
from prism_job.store import shards
from tests.conftest import Job, candidate, pair, read_json, table_of, write_jsonl

SIGNED = {"math": 1.0, "toxic": -0.5, "law": 2.0}
"""sign × weight of the sets of `three_sets`."""
PAIRS = {"math": range(3), "toxic": range(10, 15), "law": range(20, 21)}


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of several units, the last of them not full: a mean over units is another number than one over pairs."""
    monkeypatch.setattr("prism_job.plan.pool.PAIRS_PER_UNIT", 2)


def sets_of(job: Job, signed: dict[str, float]) -> dict[str, Any]:
    sets = []
    for name, weight in signed.items():
        path = write_jsonl(job.folder / "sets" / f"{name}.jsonl", [pair(number) for number in PAIRS[name]])
        sets.append({"name": name, "uris": [str(path)], "weight": abs(weight), "sign": 1 if weight > 0 else -1})
    return {"sets": sets}


def three_sets(job: Job) -> Job:
    return job.copy(targets=sets_of(job, SIGNED))


def scores_of(manifest: Path) -> pa.Table:
    return pq.read_table(manifest.parent / "scores.parquet")


def bits(table: pa.Table, name: str = "score") -> bytes:
    return table[name].to_numpy().tobytes()


# Scores


def test_one_named_set_of_weight_one_gives_the_bytes_of_plain_uris(job: Job) -> None:
    named = job.copy(targets=sets_of(job, {"math": 1.0}))
    plain = job.copy(targets={"uris": [str(job.folder / "sets" / "math.jsonl")]})
    first, second = plain.run(), named.run()
    assert first != second
    selected = [(manifest.parent / "selected.parquet").read_bytes() for manifest in (first, second)]
    assert selected[0] == selected[1]
    assert bits(scores_of(first)) == bits(scores_of(second)) == bits(scores_of(second), "score_math")
    assert scores_of(first).equals(scores_of(second).drop_columns(["score_math"]))
    targets = [pq.read_table(manifest.parent / "targets.parquet") for manifest in (first, second)]
    assert targets[1]["set"].to_pylist() == ["math"] * 3
    assert targets[0].equals(targets[1].drop_columns(["set"]))
    assert read_json(first)["target_sets"] == []


FORMS: list[dict[str, Any]] = [
    {"scoring": {}},
    {"scoring": {"score": "cosine", "weighting": "uniform"}},
    {"scoring": {"loss": "mean", "curvature": {"kind": "none"}}, "codec": {"kind": "float16"}},
]


@pytest.mark.parametrize("form", FORMS, ids=["influence", "cosine", "mean, unfolded"])
def test_each_set_is_scored_as_in_a_run_of_its_own(job: Job, form: dict[str, Any]) -> None:
    job.spec["scoring"] = form["scoring"]
    job.spec["extraction"] |= {"codec": form["codec"]} if "codec" in form else {}
    found = scores_of(three_sets(job).run())
    for name in SIGNED:
        alone = job.copy(targets={"uris": [str(job.folder / "sets" / f"{name}.jsonl")]})
        assert alone.plan()["missing"] == 0, "the sets' extraction serves each alone"
        assert bits(scores_of(alone.run())) == bits(found, f"score_{name}")
    assert len({bits(found, f"score_{name}") for name in SIGNED}) == 3


@pytest.mark.parametrize("part_rows", [1, 3, 2**16])
def test_the_combined_score_is_the_signed_sum_of_the_sets(
    job: Job, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column, "PART_ROWS", part_rows)
    manifest = three_sets(job).run()
    rows = scores_of(manifest).to_pylist()
    for row in rows:
        # In the order of the sets, one rounding a step: no tolerance.
        assert row["score"] == row["score_math"] - 0.5 * row["score_toxic"] + 2 * row["score_law"]
    ranked = sorted(rows, key=lambda row: (-row["score"], row["example_id"]))[:4]
    assert [row["example_id"] for row in table_of(manifest, "selected")] == [row["example_id"] for row in ranked]


def test_the_combined_score_is_the_score_along_the_combined_direction(job: Job) -> None:
    sets = three_sets(job)
    found = scores_of(sets.run())["score"].to_numpy()
    run, plan, store = sets.parsed(), sets.planned(), sets.store()
    targets = weigh_targets(run.spec, plan, store)
    combined = sum(
        weight * direction for weight, direction in zip(SIGNED.values(), targets.directions_KLPP, strict=True)
    )
    directions_KD, _ = fold_directions(run.spec, plan, store, targets.layers, combined[None])
    (alone,) = score_candidates(run.spec, plan, store, targets.layers, directions_KD).scores
    wanted = alone.part(slice(0, len(found)))
    # A direction has 24 bits a dim, an error of 6e-8 of its largest in each block; the sets' scores partly cancel.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_sign_minus_one_reverses_the_ranking(job: Job) -> None:
    toward = job.copy(targets=sets_of(job, {"math": 1.0})).run()
    away = job.copy(targets=sets_of(job, {"math": -1.0}), selection={"keep": "lowest", "budget": {"count": 4}}).run()
    towards, aways = scores_of(toward), scores_of(away)
    assert aways["score"].to_pylist() == [-score for score in towards["score"].to_pylist()]
    assert bits(aways, "score_math") == bits(towards, "score_math")
    chosen = [{row["example_id"] for row in table.to_pylist() if row["selected"]} for table in (towards, aways)]
    assert chosen[0] == chosen[1]


def test_rows_without_a_response_have_no_score_of_any_set(job: Job) -> None:
    rows = [candidate(0), {"prompt": "x " * 200, "completion": "y"}, candidate(2)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["selection"]["budget"] = {"count": 1}
    found = scores_of(three_sets(job).run())
    for name in ("score", *(f"score_{name}" for name in SIGNED)):
        assert [value is None for value in found[name].to_pylist()] == [False, True, False], name


# Work


def test_another_weight_or_sign_extracts_nothing_and_is_another_selection(job: Job) -> None:
    folders = {three_sets(job).run().parent}
    for changed in ({**SIGNED, "law": 3.0}, {**SIGNED, "toxic": 0.5}, dict(reversed(SIGNED.items()))):
        again = job.copy(targets=sets_of(job, changed))
        assert again.plan()["missing"] == 0
        folders.add(again.run().parent)
    assert len(folders) == 4
    renamed = three_sets(job)
    renamed.spec["targets"]["sets"][0]["name"] = "algebra"
    assert renamed.plan()["missing"] == 0
    manifest = renamed.run()
    assert manifest.parent not in folders
    assert "score_algebra" in scores_of(manifest).column_names
    assert three_sets(job).run().parent in folders


def test_a_file_in_two_sets_is_extracted_once(job: Job) -> None:
    sets = sets_of(job, {"math": 1.0, "law": 1.0})
    for one in sets["sets"]:
        one["uris"].append(str(job.folder / "targets.jsonl"))  # three pairs, two units; those of math.jsonl
    both = job.copy(targets=sets)
    estimate = both.passes("estimate", "--spec", str(both.spec_path()))
    planned = both.plan()
    assert planned["pairs"] == 3 + 3 + 1 + 3
    assert planned["missing"] == 3 + 2 + 1, "units of candidates, of the file, of law.jsonl"
    words = both.passes("extract")
    written = [event["unit"] for event in both.events if event["event"] == "shard" and event["kind"] == "targets"]
    assert len(written) == len(set(written)) == 3
    progress = [event for event in both.events if event["event"] == "progress"][-1]
    assert progress["done"] == progress["total"] == 10 + 3 + 1
    assert estimate["tokens"] == words["tokens"]
    words = both.passes("reduce")
    assert [row["set"] for row in table_of(Path(words["manifest"]), "targets")] == ["math"] * 6 + ["law"] * 4


def test_two_sets_of_the_same_pairs_and_opposite_signs_leave_no_direction(job: Job) -> None:
    sets = sets_of(job, {"math": 1.0, "law": -1.0})
    sets["sets"][1]["uris"] = list(sets["sets"][0]["uris"])
    manifest = job.copy(targets=sets).run()
    assert set(scores_of(manifest)["score"].to_pylist()) == {0.0}
    assert {row["contribution"] for row in table_of(manifest, "targets")} == {0.0}
    assert [one["share"] for one in read_json(manifest)["target_sets"]] == [0.0, 0.0]


def test_the_published_spec_replays_the_selection_from_any_folder(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = three_sets(job)
    for one in sets.spec["targets"]["sets"]:
        one["uris"] = [str(Path(uri).relative_to(job.folder)) for uri in one["uris"]]
    monkeypatch.chdir(job.folder)
    manifest = sets.run()
    monkeypatch.chdir("/")
    again = job.copy()
    again.document = yaml.safe_load((manifest.parent / "spec.yaml").read_text())
    assert [one["sign"] for one in again.spec["targets"]["sets"]] == [1, -1, 1]
    replayed = again.run()
    assert again.run() == replayed
    for name in ("selected.parquet", "scores.parquet", "targets.parquet"):
        assert (replayed.parent / name).read_bytes() == (manifest.parent / name).read_bytes()


def test_other_verbs_read_a_selection_of_sets(job: Job) -> None:
    manifest = three_sets(job).run()
    assert job.passes("evaluate", str(manifest), "--label", "label")["num_examples"] == 10
    assert job.passes("export", str(manifest), str(job.folder / "subset.jsonl"))["rows"] == 4
    keep = ["--keep", str(job.folder / "output"), "--yes", "--older-than", "0"]
    job.passes("store", "prune", str(job.folder / "store"), *keep)
    assert three_sets(job).plan()["missing"] == 0, "nothing that it needs is gone"


# What is reported of the sets


def test_contributions_and_shares_are_those_of_the_combined_direction(job: Job) -> None:
    """Against plain sums over the stored pairs."""
    sets = three_sets(job)
    manifest = sets.run()
    plan, store = sets.planned(), sets.store()
    rows = [
        (plan.target_sets[unit.source], row_M.astype(np.float64))
        for unit in plan.targets
        for row_M in shards.read_shard(store, plan.extractor, "targets", unit.id).arrays["rows"]
    ]
    table = table_of(manifest, "targets")
    assert [row["set"] for row in table] == [name for name, _ in rows]
    g = {
        name: sum(it["weight"] * row_M for it, (of, row_M) in zip(table, rows, strict=True) if of == name) / len(pairs)
        for name, pairs in PAIRS.items()
    }
    combined_M = sum(weight * g[name] for name, weight in SIGNED.items())
    square = float(combined_M @ combined_M)
    for it, (name, row_M) in zip(table, rows, strict=True):
        wanted = SIGNED[name] / len(PAIRS[name]) * it["weight"] * float(row_M @ combined_M) / square
        # float64 sums of a few thousand products.
        assert it["contribution"] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert sum(it["contribution"] for it in table) == pytest.approx(1, rel=1e-12)

    stated = read_json(manifest)["target_sets"]
    wanted_sets = [("math", 3, 1.0, 1), ("toxic", 5, 0.5, -1), ("law", 1, 2.0, 1)]
    assert [(one["name"], one["pairs"], one["weight"], one["sign"]) for one in stated] == wanted_sets
    for one in stated:
        name = one["name"]
        assert one["norm"] == pytest.approx(float(np.linalg.norm(g[name])), rel=1e-12)
        assert one["share"] == pytest.approx(float(SIGNED[name] * g[name] @ combined_M) / square, rel=1e-9)
        preferences = [it["preference"] for it in table if it["set"] == name]
        assert one["preference"]["mean"] == pytest.approx(np.mean(preferences))
        assert one["preference"]["max"] == max(preferences)
    assert sum(one["share"] for one in stated) == pytest.approx(1, rel=1e-12)
    assert read_json(manifest)["counts"]["target_pairs"] == 9


@pytest.mark.parametrize(("weight", "drowned"), [(1.0, False), (1000.0, True)])
def test_the_report_shows_the_sets_and_warns_when_one_dominates(job: Job, weight: float, drowned: bool) -> None:
    manifest = job.copy(targets=sets_of(job, {"math": weight, "law": 1.0})).run()
    stated = read_json(manifest)["target_sets"]
    page = html.unescape(re.sub(r"<[^>]*>", " ", (manifest.parent / "report.html").read_text()))
    words = " ".join(page.split())
    for one in stated:
        mean = one["preference"]["mean"]
        assert f"{one['name']} {one['pairs']} {one['weight']:.4g} {mean:.2f} {one['norm']:.4g}" in words
    assert (max(one["share"] for one in stated) > 0.8) == drowned
    assert ("The set math holds" in words) == drowned
    assert "Targets: sets" not in (job.run().parent / "report.html").read_text()


# The document


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "give exactly one of uris, sets"),
        ({"uris": ["a"], "sets": [{"name": "a", "uris": ["a"]}]}, "give exactly one of uris, sets"),
        ({"sets": []}, "at least 1"),
        ({"sets": [{"name": "a", "uris": ["x"]}, {"name": "a", "uris": ["y"]}]}, "two sets have the name a"),
        ({"sets": [{"name": "Math", "uris": ["x"]}]}, "sets.0.name"),
        ({"sets": [{"name": "x" * 64, "uris": ["x"]}]}, "sets.0.name"),
        ({"sets": [{"name": "a.b", "uris": ["x"]}]}, "sets.0.name"),
        ({"sets": [{"uris": ["x"]}]}, "sets.0.name"),
        ({"sets": [{"name": "a", "uris": []}]}, "sets.0.uris"),
        ({"sets": [{"name": "a", "uris": ["x"], "weight": 0}]}, "sets.0.weight"),
        ({"sets": [{"name": "a", "uris": ["x"], "weight": -1}]}, "sets.0.weight"),
        ({"sets": [{"name": "a", "uris": ["x"], "sign": 0}]}, "sets.0.sign"),
        ({"sets": [{"name": "a", "uris": ["x"], "wieght": 2}]}, "did you mean 'weight'?"),
        ({"sets": [{"name": f"s{number}", "uris": ["x"]} for number in range(65)]}, "at most 64"),
    ],
)
def test_wrong_sets_are_refused(job: Job, targets: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        job.copy(targets=targets).parsed()
    assert message in str(caught.value)


def test_a_set_without_pairs_is_refused_by_name(job: Job) -> None:
    sets = three_sets(job)
    write_jsonl(job.folder / "sets" / "toxic.jsonl", [])
    sets.fails("plan", 64, "no targets in the set toxic", "toxic.jsonl", "targets.sets")


def test_store_and_output_may_not_lie_in_the_folder_of_a_set(job: Job) -> None:
    sets = three_sets(job)
    sets.spec["targets"]["sets"][1]["uris"] = [str(job.folder / "sets")]
    sets.copy(store=str(job.folder / "sets" / "store")).fails("plan", 64, "spec.store", "lies inside the data")


def test_a_set_with_a_path_of_one_machine_is_refused_for_a_cluster_by_its_field(job: Job) -> None:
    document = three_sets(job).document
    document["spec"]["cluster"] = {"image": "registry/prism"}
    document["spec"]["targets"]["sets"][1]["uris"] = ["s3://corpora/toxic.jsonl", "toxic.jsonl"]
    with pytest.raises(SpecError, match=re.escape("spec.targets.sets[1].uris[1] is 'toxic.jsonl'")):
        parse_for_cluster(yaml.safe_dump(document), "here")


# All at once


def test_sets_audit_and_evaluation_stand_in_one_manifest_and_a_second_run_extracts_nothing(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 40)])
    sets = job.copy(
        targets=sets_of(job, SIGNED),
        audit={"examples": 16},
        evaluation={"label": "label"},
        selection={"keep": "highest", "budget": {"fraction": 0.5}},
    )
    manifest = sets.run()
    found = read_json(manifest)
    assert [(one["name"], one["sign"] * one["weight"]) for one in found["target_sets"]] == list(SIGNED.items())
    assert (found["audit"]["usable"], found["audit"]["taken"]) == (16, 8)
    assert -1 <= found["audit"]["spearman_between"] <= 1
    assert (found["evaluation"]["num_examples"], found["evaluation"]["num_positive"]) == (30, 15)
    page = (manifest.parent / "report.html").read_text()
    for title in ("Targets: sets", "How far the ranking can be trusted", "Agreement with a label"):
        assert f"<h2>{title}</h2>" in page
    words = sets.passes("reduce")
    assert (words["manifest"], words["unchanged"]) == (str(manifest), True)
    # Reduced again elsewhere: nothing is extracted for it, and every byte is the same.
    again = sets.copy(output=str(job.folder / "again"))
    assert again.plan()["missing"] == 0
    copied = again.run()
    for name in ("scores.parquet", "selected.parquet", "targets.parquet"):
        assert (copied.parent / name).read_bytes() == (manifest.parent / name).read_bytes(), name
    assert all(read_json(copied)[key] == found[key] for key in ("audit", "evaluation", "target_sets"))
