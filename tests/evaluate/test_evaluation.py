"""Laws of evaluation: every figure against sorted lists and plain loops, by verb and by document, and labels checked early."""

from __future__ import annotations

import html
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_job.evaluate.metrics import preference_figures, ranking_figures, wilson, with_intervals
from tests.conftest import Job, candidate, pair, read_json, table_of, write_jsonl
from tests.publish.test_published import auroc_by_hand, precision_by_hand, rankings_of


def some_ranking(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values with many ties, and labels of both kinds."""
    chance = np.random.default_rng(seed)
    good = chance.random(size) < 0.4
    good[:2] = True, False
    return chance.integers(0, size // 2, size).astype(np.float64), good


def recall_by_hand(ranking: list[float], good: list[bool], taken: int, keeps: bool) -> float:
    """Share of all good ones that rank among the `taken` highest, or of all bad ones among the lowest."""
    ordered = sorted(zip(ranking, good, strict=True), key=lambda entry: entry[0], reverse=keeps)
    return sum(is_good == keeps for _, is_good in ordered[:taken]) / sum(is_good == keeps for is_good in good)


def right_by_hand(ranking: list[float], good: list[bool], taken: int, keeps: bool) -> float:
    """Right ones among the first `taken`; where these end among equal values, that group's mean in the places left."""
    left, right = taken, 0.0
    for value in sorted(set(ranking), reverse=keeps):
        group = [is_good == keeps for of, is_good in zip(ranking, good, strict=True) if of == value]
        fits = min(left, len(group))
        right, left = right + fits * sum(group) / len(group), left - fits
    return right


# Figures of a ranking


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_figures_of_a_ranking_are_those_of_a_sorted_list_however_often_each_row_is_counted(
    seed: int, keeps: bool
) -> None:
    ranking, good = some_ranking(23, seed)
    times = np.random.default_rng(seed).integers(0, 4, 23)
    times[:2] = 1
    for weights in (np.ones(23, int), times):
        # A row that is counted three times stands three times in the list.
        again, is_good = np.repeat(ranking, weights).tolist(), np.repeat(good, weights).tolist()
        budgets = list(range(1, len(again) + 1))
        found = ranking_figures(ranking, good, keeps, budgets)(weights.astype(np.float64))
        wanted = [auroc_by_hand(again, is_good)]
        right = [right_by_hand(again, is_good, taken, keeps) for taken in budgets]
        wanted += [of / taken for of, taken in zip(right, budgets, strict=True)]
        wanted += [of / is_good.count(keeps) for of in right]
        np.testing.assert_allclose(found, wanted, rtol=1e-14)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("ranking", [[2, 1, 1, 1, 0, 0], [3, 3, 3, 3, 3, 3], [1, 0, 1, 0, 1, 0]])
def test_among_equal_values_a_budget_takes_the_mean_of_all_their_orders(ranking: list[float], keeps: bool) -> None:
    good, budgets = [True, False, True, False, False, True], range(1, 7)
    found = ranking_figures(np.array(ranking, float), np.array(good), keeps, list(budgets))(np.ones(6))[1:]
    orders = list(itertools.permutations(zip(ranking, good, strict=True)))
    wanted = [
        np.mean([of([value for value, _ in order], [it for _, it in order], taken, keeps) for order in orders])
        for of in (precision_by_hand, recall_by_hand)
        for taken in budgets
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)  # 720 orders are summed


def test_one_kind_alone_has_no_auroc_and_where_none_is_right_no_recall() -> None:
    auroc, precision, recall = ranking_figures(np.arange(3.0), np.zeros(3, bool), True, [2])(np.ones(3))
    assert (math.isnan(auroc), precision, math.isnan(recall)) == (True, 0.0, True)


# Figures of π


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: the score interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_is_that_of_the_published_table(right: int, of: int, low: float, high: float) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=5e-5)
    assert wilson(of - right, of) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_perfect_figure_has_the_interval_of_its_trials_and_no_other_figure_has() -> None:
    good = np.arange(16) >= 10
    perfect, nearly = np.arange(16.0), np.arange(16.0)
    nearly[[9, 10]] = nearly[[10, 9]]
    for ranking, wanted in ((perfect, wilson(6, 6)), (-perfect, wilson(0, 6))):
        measures = {("auroc",): ranking_figures(ranking, good, keeps=True)}
        found = with_intervals(measures, 16, {"auroc": 6}, {})
        assert (found["auroc_low"], found["auroc_high"]) == wanted
    found = with_intervals({("auroc",): ranking_figures(nearly, good, keeps=True)}, 16, {"auroc": 6}, {})
    assert 0 < found["auroc_low"] < found["auroc"] < found["auroc_high"] <= 1
    without = with_intervals({("auroc",): ranking_figures(nearly, good, keeps=True)}, 16, {}, {})
    assert found == without


def test_reliability_bins_hold_every_pair_once_and_sums_are_those_of_plain_loops() -> None:
    preference = np.concatenate([np.array([0.0, 0.1, 0.3, 0.5, 1.0]), np.random.default_rng(3).random(40) ** 3])
    right = np.random.default_rng(4).random(45) < preference
    figures = preference_figures(preference, right)
    binned: dict[int, list[tuple[float, bool]]] = {}
    for value, is_right in zip(preference.tolist(), right.tolist(), strict=True):
        binned.setdefault(min(int(value * 10), 9), []).append((value, is_right))
    assert [round(row["from"] * 10) for row in figures["reliability"]] == sorted(binned)
    assert sum(row["pairs"] for row in figures["reliability"]) == 45
    error = 0.0
    for row in figures["reliability"]:
        entries = binned[round(row["from"] * 10)]
        mean, share = sum(value for value, _ in entries) / len(entries), sum(it for _, it in entries) / len(entries)
        assert row["pairs"] == len(entries)
        assert row["from"] <= row["mean"] <= row["to"]
        assert (row["mean"], row["right"]) == (pytest.approx(mean), pytest.approx(share))
        assert (row["right_low"], row["right_high"]) == wilson(sum(it for _, it in entries), len(entries))
        error += len(entries) / 45 * abs(mean - share)
    assert figures["preference_ece"] == pytest.approx(error)
    squares = [(value - is_right) ** 2 for value, is_right in zip(preference.tolist(), right.tolist(), strict=True)]
    assert figures["preference_brier"] == pytest.approx(sum(squares) / 45)
    assert figures["preference_auroc"] == pytest.approx(auroc_by_hand(preference.tolist(), right.tolist()))
    assert figures["preference_above_half"] == sum(value > 0.5 for value in preference) / 45
    assert figures["num_pairs_right"] == right.sum()


def test_pairs_without_a_label_are_taken_as_right() -> None:
    figures = preference_figures(np.array([0.25, 0.75, 1.0]), None)
    assert figures["preference_mean"] == pytest.approx(2 / 3)
    assert figures["preference_above_half"] == pytest.approx(2 / 3)
    assert figures["preference_brier"] == pytest.approx((0.75**2 + 0.25**2) / 3)
    assert (figures["num_pairs_right"], figures["preference_ece"], figures["preference_auroc"]) == (None, None, None)
    assert figures["reliability"] == []


@pytest.mark.parametrize("right", [None, np.zeros(0, bool)])
def test_no_pair_has_no_figure_and_one_kind_of_pair_no_auroc(right: Any) -> None:
    figures = preference_figures(np.zeros(0), right)
    assert (figures["num_pairs"], figures["preference_mean"], figures["preference_brier"]) == (0, None, None)
    assert (figures["preference_ece"], figures["preference_auroc"], figures["reliability"]) == (None, None, [])
    assert preference_figures(np.array([0.5]), np.array([True]))["preference_auroc"] is None


# A finished selection


def two_files(job: Job) -> None:
    """Thirty rows in two files, of which one repeats another; labels in a column of words; six pairs, four of them right."""
    rows = [candidate(number) | {"verdict": "Fine" if number % 3 else "poor"} for number in range(29)]
    write_jsonl(job.folder / "pool" / "a.jsonl", [*rows[:9], rows[4]])
    write_jsonl(job.folder / "pool" / "b.jsonl", rows[9:])
    write_jsonl(job.folder / "targets.jsonl", [pair(number) | {"right": number % 3 > 0} for number in range(6)])
    job.spec["selection"] = {"drop": "lowest", "budget": {"fraction": 0.2}}


ASKED = {"label": "verdict", "positive": "fine", "targetLabel": "right"}


def ranked_rows(manifest: Path) -> list[dict[str, Any]]:
    """Rows of scores.parquet that are ranked, each with the label of its source."""
    rows = []
    for row in table_of(manifest, "scores"):
        if row["score"] is not None and not row["duplicate"]:
            line = Path(row["source"]).read_text().splitlines()[row["line"] - 1]
            rows.append(row | {"good": json.loads(line)["verdict"] == "Fine"})
    return rows


def test_the_document_and_the_verb_give_the_same_figures(job: Job) -> None:
    two_files(job)
    job.spec["evaluation"] = ASKED
    manifest = job.run()
    figures = read_json(manifest)["evaluation"]
    page = (manifest.parent / "report.html").read_text()
    for name in ("auroc", "loss_auroc", "recall_at_budget", "preference_brier", "preference_ece"):
        assert f"{figures[name]:.3f}" in page, name
    named = ("--label", "verdict", "--positive", "fine", "--target-label", "right")
    for options in ((), named[:2], named[:4], named[4:], named):
        words = job.passes("evaluate", str(manifest), *options)
        assert {name: words[name] for name in figures} == figures, options
        assert set(words) - set(figures) == {"event", "time", "verb", "selection_id"}
    words = job.passes("evaluate", str(manifest), "--label", "label")
    assert (words["label"], words["target_label"]) == ("label", "right"), "`positive` is of the other column"


def test_an_evaluation_changes_no_unit_no_row_and_no_choice(job: Job) -> None:
    two_files(job)
    plain = job.run()
    assert read_json(plain)["evaluation"] is None
    asking = job.copy(evaluation=ASKED)
    assert asking.plan()["missing"] == 0
    asked = Path(asking.passes("reduce")["manifest"])
    assert asked != plain
    for name in ("selected.parquet", "scores.parquet", "targets.parquet"):
        assert (asked.parent / name).read_bytes() == (plain.parent / name).read_bytes(), name
    assert read_json(asked)["work"] == read_json(plain)["work"]


def test_a_ranking_that_is_the_reverse_of_its_label_is_warned_of(job: Job) -> None:
    """As a file of pairs that are all swapped would have it. π cannot tell: it is taken from the same pairs."""
    two_files(job)
    rows = ranked_rows(job.run())
    middle = sorted(row["score"] for row in rows)[len(rows) // 2]
    ends = {(row["source"], row["line"]): row["score"] < middle for row in rows}
    for path in (job.folder / "pool").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, [row | {"low": ends.get((str(path), n + 1), True)} for n, row in enumerate(lines)])
    job.spec["evaluation"] = {"label": "low"}
    manifest = job.run()
    (warning,) = [line for line in read_json(manifest)["warnings"] if "reverse" in line]
    assert warning.startswith("the ranking is the reverse of the label 'low': AUROC 0.0")
    assert warning in job.events[-1]["warnings"]
    assert "reverse of the label" in (manifest.parent / "report.html").read_text()
    job.spec["evaluation"]["positive"] = "false"
    job.run()
    assert not any("reverse" in line for line in job.events[-1].get("warnings", ()))


def test_budgets_are_shares_of_the_ranked_rows_and_the_runs_own_is_among_them(job: Job) -> None:
    two_files(job)
    manifest = job.run()
    words = job.passes("evaluate", str(manifest), "--label", "verdict", "--positive", "fine")
    rows = ranked_rows(manifest)
    assert words["num_examples"] == len(rows) == 29
    good = [row["good"] for row in rows]
    shares = {"2": 1, "5": 1, "10": 3, "20": 6, "50": 14}
    taken_at = {name.removeprefix("taken_at_"): words[name] for name in words if name.startswith("taken_at_")}
    assert taken_at == shares, "one per cent of 29 rows is none"
    assert words["taken_by_budget"] == 6
    for prefix, ranking in rankings_of(rows).items():
        assert f"{prefix}precision_at_1" not in words
        for name, taken in {**shares, "budget": 6}.items():
            precision, recall = f"{prefix}precision_at_{name}", f"{prefix}recall_at_{name}"
            assert words[precision] == pytest.approx(precision_by_hand(ranking, good, taken, keeps=False)), precision
            assert words[recall] == pytest.approx(recall_by_hand(ranking, good, taken, keeps=False)), recall
            for figure in (precision, recall):
                assert 0 <= words[f"{figure}_low"] <= words[figure] <= words[f"{figure}_high"] <= 1, figure
        for end in ("", "_low", "_high"):
            assert words[f"{prefix}recall_at_20{end}"] == words[f"{prefix}recall_at_budget{end}"]
    dropped = [row["good"] for row in rows if not row["selected"]]
    assert words["precision_at_budget"] == pytest.approx(dropped.count(False) / 6)
    assert words["recall_at_budget"] == pytest.approx(dropped.count(False) / good.count(False))


def test_a_budget_of_nothing_leaves_the_other_budgets(job: Job) -> None:
    job.spec["selection"] = {"drop": "lowest", "budget": {"fraction": 0.01}}
    words = job.passes("evaluate", str(job.run()))
    assert words["taken_by_budget"] == 0
    for ranking in ("", "loss_", "loss_sum_"):
        for end in ("", "_low", "_high"):
            assert words[f"{ranking}precision_at_budget{end}"] is words[f"{ranking}recall_at_budget{end}"] is None
        assert words[f"{ranking}recall_at_50"] is not None


@pytest.mark.parametrize("end", ["highest", "lowest"])
def test_to_keep_the_good_ones_is_to_drop_them_as_bad_ones(job: Job, end: str) -> None:
    two_files(job)
    job.spec["selection"] = {"keep": end, "budget": {"count": 7}}
    kept = job.run()
    job.spec["selection"] = {"drop": end, "budget": {"count": 7}}
    dropped = job.run()
    _, good = job.call("evaluate", str(kept), "--label", "verdict", "--positive", "fine")
    _, bad = job.call("evaluate", str(dropped), "--label", "verdict", "--positive", "poor")
    figures = [name for name in good if name.startswith(("auroc", "precision_at", "recall_at"))]
    figures = [name for name in figures if not name.startswith("auroc_over")]  # the loss calls the same ones good
    assert len(figures) == 3 * (1 + 2 * 6)
    assert {name: good[name] for name in figures} == {name: bad[name] for name in figures}


@pytest.mark.parametrize("verb", ["keep", "drop"])
def test_counts_of_the_sources_add_up_and_their_figures_are_of_their_own_rows(job: Job, verb: str) -> None:
    two_files(job)
    write_jsonl(job.folder / "pool" / "c.jsonl", [candidate(40) | {"verdict": "Fine"}])  # one kind alone
    job.spec["selection"] = {verb: "highest", "budget": {"count": 8}}
    manifest = job.run()
    _, words = job.call("evaluate", str(manifest), "--label", "verdict", "--positive", "fine")
    rows = ranked_rows(manifest)
    by_source = words["by_source"]
    assert [Path(row["source"]).name for row in by_source] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert sum(row["candidates"] for row in by_source) == words["num_examples"]
    assert sum(row["good"] for row in by_source) == words["num_positive"]
    assert sum(row["selected"] for row in by_source) == sum(row["selected"] for row in rows)
    sign = 1.0 if verb == "keep" else -1.0
    for found in by_source:
        own = [row for row in rows if row["source"] == found["source"]]
        good = [row["good"] for row in own]
        taken = [row["good"] == (verb == "keep") for row in own if row["selected"] == (verb == "keep")]
        assert (found["candidates"], found["good"]) == (len(own), good.count(True))
        assert found["precision"] == (pytest.approx(sum(taken) / len(taken)) if taken else None)
        auroc = auroc_by_hand([sign * row["score"] for row in own], good) if len(set(good)) == 2 else None
        assert found["auroc"] == (None if auroc is None else pytest.approx(auroc))


def test_pairs_that_have_no_preference_are_not_judged(job: Job) -> None:
    two_files(job)
    rows = [pair(0) | {"right": 1}, {key: pair(1)[key] for key in ("prompt", "chosen")}, pair(2) | {"right": "no"}]
    write_jsonl(job.folder / "targets.jsonl", rows)
    job.spec["scoring"] = {"weighting": "uniform"}
    manifest = job.run()
    words = job.passes("evaluate", str(manifest), "--target-label", "right")
    known = [row["preference"] for row in table_of(manifest, "targets") if row["preference"] is not None]
    assert (words["num_pairs"], words["num_pairs_right"]) == (2, 1)
    assert words["preference_brier"] == pytest.approx(((known[0] - 1) ** 2 + known[1] ** 2) / 2)


# What the plan refuses


def test_a_row_without_its_label_fails_in_the_plan_by_source_and_line(job: Job) -> None:
    job.spec["evaluation"] = {"label": "label"}
    rows = [candidate(number) for number in range(6)]
    for label, mention in ((None, "no 'label' in this row"), ("perhaps", "neither yes nor no"), ([1], "neither")):
        write_jsonl(job.folder / "pool" / "a.jsonl", [*rows, candidate(7) | {"label": label}])
        job.fails("plan", 64, "a.jsonl line 7", mention)
    assert not list((job.folder / "output").rglob("plan.json"))


def test_a_row_that_is_not_accepted_needs_no_label(job: Job) -> None:
    job.spec["evaluation"] = {"label": "label"}
    job.spec["candidates"]["maxBadFraction"] = 0.5
    write_jsonl(job.folder / "pool" / "a.jsonl", [{"nothing": "usable"}, *(candidate(number) for number in range(6))])
    assert read_json(job.run())["evaluation"]["num_examples"] == 6


def test_a_label_of_one_kind_fails_in_the_plan(job: Job) -> None:
    job.spec["evaluation"] = {"label": "label", "positive": "7"}
    job.fails("plan", 64, "column 'label' marks all 10 candidates bad", "positive")
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(1), candidate(3)])
    job.spec["evaluation"] = {"label": "label"}
    job.fails("plan", 64, "marks all 2 candidates good", "spec.evaluation.label")


@pytest.mark.parametrize("left_out", ["duplicate", "quarantined"])
def test_labels_that_turn_out_one_sided_are_reported_and_end_no_selection(job: Job, left_out: str) -> None:
    good = [candidate(number) for number in range(1, 12, 2)]
    too_long = {"prompt": "long " * 200, "completion": "x"}
    bad = good[0] if left_out == "duplicate" else too_long
    write_jsonl(job.folder / "pool" / "a.jsonl", [*good, bad | {"label": 0}])
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["evaluation"] = {"label": "label"}
    manifest = job.run()
    reason = "column 'label' marks all 6 candidates good"
    assert read_json(manifest)["evaluation"] == {"reason": reason}
    assert f"Not known: {reason}." in html.unescape((manifest.parent / "report.html").read_text())
    job.refuses(("evaluate", str(manifest)), 64, reason)


def test_a_target_without_its_label_fails_in_the_plan_by_source_and_line(job: Job) -> None:
    job.spec["evaluation"] = {"label": "label", "targetLabel": "right"}
    write_jsonl(job.folder / "targets.jsonl", [pair(0) | {"right": "yes"}, pair(1)])
    job.fails(
        "plan", 64, "targets.jsonl line 2", "no 'right' in this row, which evaluation.targetLabel (--target-label)"
    )


def test_a_column_that_no_row_has_is_named_with_the_option_and_the_nearest_column(job: Job) -> None:
    manifest = str(job.run())
    command = ("evaluate", manifest, "--label")
    job.refuses((*command, "labels"), 64, "evaluation.label (--label) names; did you mean 'label'?", "a.jsonl line 1")
    message = job.refuses((*command, "prompts"), 64, "no 'prompts' in this row")
    assert "did you mean" not in message["error"]
    job.refuses((*command, "label", "--target-label", "choosen"), 64, "did you mean 'chosen'?", "(--target-label)")
