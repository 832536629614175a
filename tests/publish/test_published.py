"""What a run publishes, number by number: tables, manifest, report and evaluation against plain recomputation.

The shards' own truth is the matter of test_end_to_end; here its oracle meets the tables that people read.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prism_job.errors import TransientError
from prism_job.spec.document import parse_spec
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store
from prism_job.store import shards
from tests.conftest import Job, Row, candidate, pair, read_json, table_of, turn, write_jsonl
from tests.stages.test_end_to_end import FLOAT32, direction, job_over_all_conventions, oracle, wanted_scores


def content_id(row: Row) -> str:
    """An example's id, computed independently: 128 bits of SHA-256 of the content's canonical JSON."""
    content = {"messages": row["messages"]}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


FOLDER = type(open_store("."))
"""The class of a store in a folder, wherever it is defined."""

TOO_LONG: Row = {"messages": [turn("user", "why " * 200), turn("assistant", "because")], "label": 0}


# Tables


def test_every_number_of_scores_and_targets_is_that_of_the_text(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs in units of three and one: a mean over units, or of the last unit alone, is another number."""
    monkeypatch.setattr("prism_job.plan.pool.PAIRS_PER_UNIT", 3)
    known = oracle()
    manifest = job_over_all_conventions(job, "float16").run()
    scores = pq.read_table(manifest.parent / "scores.parquet")
    scoring = {"weighting": "preference", "score": "influence", "curvature": {"kind": "kfac"}}
    wanted, slack = wanted_scores("float16", scoring)
    assert (np.abs(scores["score"].to_numpy() - wanted) <= slack).all()
    assert scores["num_tokens"].to_pylist() == [one.tokens for one in known.candidates]
    np.testing.assert_allclose(scores["nll"], [one.nll for one in known.candidates], rtol=FLOAT32)
    np.testing.assert_allclose(scores["norm"], [np.linalg.norm(one.row_LM) for one in known.candidates], rtol=FLOAT32)

    targets = pq.read_table(manifest.parent / "targets.parquet")
    chosen = np.array([one.nll / one.tokens for one in known.chosen])
    rejected = np.array([one.nll / one.tokens for one in known.rejected])
    preference = np.exp(-chosen) / (np.exp(-chosen) + np.exp(-rejected))
    np.testing.assert_allclose(targets["chosen_mean_nll"], chosen, rtol=FLOAT32)
    np.testing.assert_allclose(targets["rejected_mean_nll"], rejected, rtol=FLOAT32)
    np.testing.assert_allclose(targets["preference"], preference, rtol=FLOAT32)
    np.testing.assert_allclose(targets["weight"], preference, rtol=FLOAT32)
    g_LM = direction("preference", "none")
    shares = [
        weight * ((good.row_LM - bad.row_LM) * g_LM).sum()
        for weight, good, bad in zip(preference, known.chosen, known.rejected, strict=True)
    ]
    # A share is a sum of products of two rows, so it carries the rounding of both, and of the total.
    np.testing.assert_allclose(targets["contribution"], np.array(shares) / sum(shares), atol=4 * FLOAT32)


def test_a_pair_without_a_rejected_response_has_no_preference_and_a_whole_weight(job: Job) -> None:
    write_jsonl(job.folder / "targets.jsonl", [pair(0), {key: pair(1)[key] for key in ("prompt", "chosen")}, pair(2)])
    job.spec["scoring"] = {"weighting": "uniform"}
    manifest = job.run()
    rows = table_of(manifest, "targets")
    assert [row["preference"] is None for row in rows] == [False, True, False]
    assert [row["rejected_mean_nll"] is None for row in rows] == [False, True, False]
    assert [row["weight"] for row in rows] == [1.0, 1.0, 1.0]
    assert all(row["chosen_mean_nll"] > 0 for row in rows)
    known = [row["preference"] for row in rows if row["preference"] is not None]
    assert read_json(manifest)["preference"]["mean"] == pytest.approx(np.mean(known))


def test_a_row_without_a_response_within_reach_has_no_score_and_is_never_selected(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(0), TOO_LONG, candidate(2), candidate(3)])
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["selection"] = {"keep": "lowest", "budget": {"fraction": 1.0}}
    manifest = job.run()
    rows = table_of(manifest, "scores")
    for column in ("score", "nll", "norm"):
        assert [row[column] is None for row in rows] == [False, True, False, False], column
    assert [row["num_tokens"] > 0 for row in rows] == [True, False, True, True]
    assert [row["selected"] for row in rows] == [True, False, True, True]
    assert len(table_of(manifest, "selected")) == 3
    assert read_json(manifest)["counts"]["selected"] == 3


def test_a_selected_row_is_the_scored_row_at_its_place_in_the_data(job: Job) -> None:
    files = {"a.jsonl": [candidate(number) for number in range(6)], "b.jsonl": [candidate(20 + n) for n in range(5)]}
    for name, rows in files.items():
        write_jsonl(job.folder / "pool" / name, rows)
    job.spec["selection"]["budget"] = {"count": 8}
    manifest = job.run()
    scores = table_of(manifest, "scores")
    places = [
        (str(job.folder / "pool" / name), line) for name, rows in files.items() for line in range(1, len(rows) + 1)
    ]
    assert [(row["source"], row["line"]) for row in scores] == places
    assert [row["example_id"] for row in scores] == [content_id(row) for rows in files.values() for row in rows]
    by_id = {row["example_id"]: row for row in scores}
    selected = table_of(manifest, "selected")
    assert {row["source"] for row in selected} == {source for source, _ in places}, "rows of both files are compared"
    for row in selected:
        assert row == {key: by_id[row["example_id"]][key] for key in row}
    assert [row["score"] for row in selected] == sorted((row["score"] for row in scores), reverse=True)[:8]
    assert {row["example_id"] for row in selected} == {row["example_id"] for row in scores if row["selected"]}


def test_reordered_rows_are_another_unit_and_keep_their_own_ids(job: Job) -> None:
    job.run()
    rows = [candidate(number) for number in range(10)]
    rows[:4] = rows[:4][::-1]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    assert job.plan()["missing"] == 1
    found = table_of(job.run(), "scores")
    assert [row["example_id"] for row in found] == [content_id(row) for row in rows]
    assert [row["line"] for row in found] == list(range(1, 11))


# Manifest and report


def five_numbers(values: list[float]) -> dict[str, float]:
    """Quartiles by linear interpolation between sorted values, and the mean."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    names = {"min": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "max": 1.0}
    return {name: at(share) for name, share in names.items()} | {"mean": sum(values) / len(values)}


def mixed_run(job: Job) -> Path:
    """12 lines: one that is no row, one too long, one a duplicate, 9 that are ranked. Five pairs."""
    rows = [candidate(number) for number in range(9)]
    path = write_jsonl(job.folder / "pool" / "a.jsonl", [*rows[:5], TOO_LONG, *rows[5:], candidate(3)])
    path.write_text(path.read_text() + "{broken\n")
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(5)])
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["selection"] = {"drop": "lowest", "budget": {"count": 3}}
    return job.run()


def test_the_manifest_counts_and_sums_up_what_the_tables_hold(job: Job) -> None:
    manifest = mixed_run(job)
    stated = read_json(manifest)
    scores, selected = table_of(manifest, "scores"), table_of(manifest, "selected")
    targets = table_of(manifest, "targets")
    assert [row["line"] for row in scores if row["duplicate"]] == [11]
    plan, store = job.planned(), job.store()
    assert stated["counts"] == {
        "candidates": 12,
        "quarantined": 2,
        "duplicates": 1,
        "taken_by_budget": 3,
        "selected": 6,
        "selected_tokens": sum(row["num_tokens"] for row in selected),
        "tokens": sum(row["num_tokens"] for row in scores),
        "target_pairs": 5,
        "units": len(plan.candidates),
        "cut": 0,
        "cut_pairs": 0,
    }
    assert stated["layers"] == {"captured": 14, "coverage": 1.0, "share_of_model": 1.0}
    assert len(selected) == 6
    assert len((manifest.parent / "quarantine.jsonl").read_text().splitlines()) == 2
    ranked = sorted(row["score"] for row in scores if row["score"] is not None and not row["duplicate"])
    assert stated["threshold"] == ranked[2]
    usable = [row["score"] for row in scores if row["score"] is not None]
    assert stated["scores"] == pytest.approx(five_numbers(usable))
    assert stated["preference"] == pytest.approx(five_numbers([row["preference"] for row in targets]))

    factors = [shards.read_shard(store, plan.extractor, "factors", unit) for unit in plan.factors]
    num_tokens = sum(shard.notes["num_tokens"] for shard in factors)
    rows, columns = np.triu_indices(8)

    def trace_L(name: str) -> Any:
        return sum(shard.arrays[name][:, rows == columns].sum(axis=1, dtype=np.float64) for shard in factors)

    mean_eigenvalue = (trace_L("inputs") / num_tokens * (trace_L("outputs") / num_tokens)).mean() / 8**2
    assert stated["curvature"] == {
        "kind": "kfac",
        "damping": 0.1,
        "lambda": pytest.approx(0.1 * mean_eigenvalue),
        "tokens": num_tokens,
        "units": len(plan.factors),
    }


def test_the_report_shows_the_largest_pairs_and_both_ends_of_the_ranking_in_order(job: Job) -> None:
    manifest = mixed_run(job)
    page = (manifest.parent / "report.html").read_text()
    lines = (job.folder / "pool" / "a.jsonl").read_text().splitlines()
    targets = table_of(manifest, "targets")
    ranked = [row for row in table_of(manifest, "scores") if row["score"] is not None and not row["duplicate"]]
    lowest = sorted(ranked, key=lambda row: row["score"])
    largest = sorted(range(len(targets)), key=lambda place: -targets[place]["contribution"])[:3]

    shown = [html.unescape(text) for text in re.findall(r"<pre>\n?(.*?)</pre>", page, re.DOTALL)]
    pairs, cards = shown[:3], shown[3:]
    assert len(cards) == 2 * len(ranked)
    assert [f"Capital of {place}?" in text for place, text in zip(largest, pairs, strict=True)] == [True] * 3
    assert [int(number) for number in re.findall(r"<span>pair (\d+)</span>", page)] == [place + 1 for place in largest]
    badges = re.findall(r'<span class="badge[ on]*">(\w+)</span>', page)
    places = [int(line) for line in re.findall(r'class="place"><bdi>[^<]*</bdi>:(\d+)<', page)]
    for row, text, badge, place in zip([*lowest[::-1], *lowest], cards, badges, places, strict=True):
        assert place == row["line"]
        assert badge == ("selected" if row["selected"] else "dropped")
        assert json.loads(lines[place - 1])["messages"][1]["content"] in text

    words = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
    for tile in (
        "Candidates 12 10 usable",
        "Selected 6 60.0 % of the usable",
        "Quarantined 2 ",
        "Duplicates 1 ",
        "Target pairs 5 mean π",
    ):
        assert tile in words, tile
    assert f"mean π {np.mean([row['preference'] for row in targets]):.2f}" in words


# Which selection it is, and when it is one


def test_another_budget_or_another_end_is_another_selection(job: Job) -> None:
    manifests = set()
    for verb, end, count, selected in (
        ("keep", "highest", 4, 4),
        ("keep", "highest", 2, 2),
        ("drop", "highest", 4, 6),
        ("drop", "lowest", 4, 6),
    ):
        job.spec["selection"] = {verb: end, "budget": {"count": count}}
        manifest = job.run()
        assert read_json(manifest)["counts"]["selected"] == selected
        assert len(table_of(manifest, "selected")) == selected
        manifests.add(manifest)
    assert len(manifests) == 4


def test_the_manifest_is_written_last_and_not_at_all_where_a_file_before_it_fails(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.plan()
    job.passes("extract")

    def watch_puts(before_put: Callable[[str], None]) -> None:
        for method in ("put", "put_file"):
            plain = getattr(FOLDER, method)

            def watched(store: Store, key: str, given: Any, plain: Any = plain) -> None:
                before_put(key.rpartition("/")[2])
                plain(store, key, given)

            monkeypatch.setattr(FOLDER, method, watched)

    def fail_at_the_report(name: str) -> None:
        if name == "report.html":
            raise TransientError("no more puts", where=name, fix="try again")

    watch_puts(fail_at_the_report)
    job.refuses("reduce", 75)
    written = [path.name for path in (job.folder / "output").rglob("*") if path.is_file()]
    assert "scores.parquet" in written
    assert "manifest.json" not in written
    monkeypatch.undo()

    order: list[str] = []
    watch_puts(order.append)
    words = job.passes("reduce")
    assert order.index("manifest.json") == len(order) - 1
    assert set(json.loads(Path(words["manifest"]).read_text())["files"]) <= set(order[:-1])


def test_the_published_plan_does_not_depend_on_what_the_store_lacked(job: Job) -> None:
    manifest = job.run()
    fresh = (manifest.parent / "plan.json").read_bytes()
    for path in manifest.parent.iterdir():
        path.unlink()
    assert job.run() == manifest
    assert (manifest.parent / "plan.json").read_bytes() == fresh


def test_the_published_spec_pins_a_hub_model_to_its_commit(
    job: Job, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub's cache as its own library lays it out; `main` points at the commit.
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = job.folder / "hub" / "models--some-org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / commit).symlink_to(tiny_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(job.folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    job.spec["model"]["uri"] = "some-org/tiny"
    manifest = job.run()
    for document in (
        parse_spec((manifest.parent / "spec.yaml").read_text(), "spec.yaml").spec,
        parse_spec(json.dumps({**job.document, "spec": read_json(manifest)["spec"]["spec"]}), "m").spec,
    ):
        assert (document.model.uri, document.model.revision) == ("some-org/tiny", commit)


# Evaluation


def auroc_by_hand(ranking: list[float], good: list[bool]) -> float:
    """Share of (good, bad) pairs in which the good one ranks higher, ties counting half."""
    wins = [
        (g > b) + 0.5 * (g == b)
        for g in (value for value, is_good in zip(ranking, good, strict=True) if is_good)
        for b in (value for value, is_good in zip(ranking, good, strict=True) if not is_good)
    ]
    return sum(wins) / len(wins) if wins else float("nan")


def precision_by_hand(ranking: list[float], good: list[bool], taken: int, keeps: bool) -> float:
    """Share of good ones among the `taken` that rank highest, or of bad ones among those that rank lowest."""
    ordered = sorted(zip(ranking, good, strict=True), key=lambda entry: entry[0], reverse=keeps)
    return sum(is_good == keeps for _, is_good in ordered[:taken]) / taken


def rankings_of(rows: list[Row], sign: float = 1.0) -> dict[str, list[float]]:
    """What is compared: the scores, the mean and the summed loss. By the prefix of their figures."""
    return {
        "": [sign * row["score"] for row in rows],
        "loss_": [-row["nll"] / row["num_tokens"] for row in rows],
        "loss_sum_": [-row["nll"] for row in rows],
    }


@pytest.mark.parametrize("end", ["highest", "lowest"])
@pytest.mark.parametrize("verb", ["keep", "drop"])
def test_every_figure_of_an_evaluation_is_that_of_plain_loops(job: Job, verb: str, end: str) -> None:
    # Three of ten: no precision is one half, so the good and the bad cannot be mistaken for each other.
    job.spec["selection"] = {verb: end, "budget": {"count": 3}}
    manifest = job.run()
    words = job.passes("evaluate", str(manifest))
    table = table_of(manifest, "scores")
    good = [bool(candidate(number)["label"]) for number in range(10)]
    keeps = verb == "keep"
    sign = 1.0 if (verb, end) in (("keep", "highest"), ("drop", "lowest")) else -1.0
    rankings = rankings_of(table, sign)
    assert (words["num_examples"], words["num_positive"], words["taken_by_budget"]) == (10, 5, 3)
    assert words["action"] == f"{verb} {end}"
    drawn_aurocs: dict[str, list[float]] = {}
    for prefix, ranking in rankings.items():
        generator = np.random.default_rng(0)
        drawn = []
        for _ in range(1000):
            places = generator.integers(10, size=10).tolist()
            again, is_good = [ranking[place] for place in places], [good[place] for place in places]
            drawn.append((auroc_by_hand(again, is_good), precision_by_hand(again, is_good, 3, keeps)))
        drawn_aurocs[prefix] = [auroc for auroc, _ in drawn]
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
        wanted = (auroc_by_hand(ranking, good), precision_by_hand(ranking, good, 3, keeps))
        for column, name in enumerate((f"{prefix}auroc", f"{prefix}precision_at_budget")):
            assert words[name] == pytest.approx(wanted[column]), name
            assert words[f"{name}_low"] == pytest.approx(low[column]), name
            assert words[f"{name}_high"] == pytest.approx(high[column]), name
    paired = [score - loss for score, loss in zip(drawn_aurocs[""], drawn_aurocs["loss_"], strict=True)]
    assert words["auroc_over_loss"] == pytest.approx(words["auroc"] - words["loss_auroc"])
    bounds = [words["auroc_over_loss_low"], words["auroc_over_loss_high"]]
    assert bounds == pytest.approx(np.nanquantile(paired, [0.025, 0.975]).tolist())
    taken = [row["selected"] == keeps for row in table]
    right = [is_good == keeps for is_good, is_taken in zip(good, taken, strict=True) if is_taken]
    assert words["precision_at_budget"] == pytest.approx(sum(right) / 3), "those that the run itself took"
