"""The tables of `prism evaluate`: one row per ranking, budget, source and bin of π."""

from __future__ import annotations

from typing import Any

from launcher.follow.metrics_table import metrics_table

METRICS: dict[str, Any] = {"label": "label", "num_examples": 40, "num_positive": 20, "action": "drop lowest"}
for number, ranking in enumerate(("", "loss_", "loss_sum_")):
    for measure in ("auroc", "precision_at_budget", "recall_at_budget", "precision_at_5", "recall_at_5"):
        name = f"{ranking}{measure}"
        METRICS |= {name: 0.9 - number / 10, f"{name}_low": 0.8 - number / 10, f"{name}_high": 0.95 - number / 10}
METRICS |= {
    "taken_by_budget": 10,
    "auroc_over_loss": 0.1,
    "auroc_over_loss_low": -0.02,
    "auroc_over_loss_high": 0.17,
    "auroc_over_loss_sum": 0.2,
    "auroc_over_loss_sum_low": 0.1,
    "auroc_over_loss_sum_high": 0.3,
    "rivals": [
        {"name": "own loss, token mean", "prefix": "loss_", "reason": None},
        {"name": "own loss, sum", "prefix": "loss_sum_", "reason": None},
        {"name": "BM25 to wanted responses", "prefix": "bm25_", "reason": "too many\x1b[2J words"},
    ],
    "taken_at_5": 2,
    "by_source": [
        {"source": "s3://pool/a.jsonl", "candidates": 30, "good": 20, "selected": 25, "precision": 0.8, "auroc": 0.75},
        {"source": "\x1b[2Jb.jsonl", "candidates": 10, "good": 0, "selected": 10, "precision": None, "auroc": None},
    ],
    "target_label": None,
    "num_pairs": 8,
    "num_pairs_right": None,
    "preference_mean": 0.625,
    "preference_above_half": 0.75,
    "preference_brier": 0.125,
    "preference_auroc": None,
    "preference_ece": None,
    "reliability": [],
}
JUDGED = {
    "target_label": "right",
    "num_pairs_right": 5,
    "preference_auroc": 0.875,
    "preference_ece": 0.0625,
    "reliability": [
        {"from": 0.3, "to": 0.4, "pairs": 3, "mean": 0.35, "right": 0.0, "right_low": 0.0, "right_high": 0.562},
        {"from": 0.9, "to": 1.0, "pairs": 5, "mean": 0.95, "right": 1.0, "right_low": 0.566, "right_high": 1.0},
    ],
}
"""What is known of the pairs besides, where a column says which of them are right."""


def cells(lines: str) -> list[str]:
    return [" ".join(line.split()) for line in lines.splitlines()]


def test_each_ranking_has_a_row_with_its_intervals() -> None:
    opening, rankings, *_ = metrics_table(METRICS).split("\n\n")
    header, *rows = cells(rankings)
    assert "bad of the dropped" in header
    assert opening == "40 examples, 20 of them good by 'label'; the budget took 10 (drop lowest)"
    assert rows == [
        "PRISM's score 0.900 0.800 to 0.950 0.900 0.800 to 0.950",
        "own loss, token mean 0.800 0.700 to 0.850 0.800 0.700 to 0.850",
        "own loss, sum 0.700 0.600 to 0.750 0.700 0.600 to 0.750",
        "BM25 to wanted responses not computed: too many\\x1b[2J words",
    ]


def test_a_ranking_whose_whole_interval_is_under_one_half_is_said_to_be_reversed() -> None:
    assert "reverse" not in metrics_table(METRICS)
    low = {"auroc": 0.1, "auroc_low": 0.0, "auroc_high": 0.499}
    reversed_ones = METRICS | low | {f"loss_sum_{name}": value for name, value in low.items()}
    found = cells(metrics_table(reversed_ones).split("\n\n")[1])[-2:]
    assert found[0].startswith("PRISM's score: the reverse of the label: are chosen and rejected swapped")
    assert found[1].endswith("own loss, sum: under 0.5 with its whole interval; read the other way round it is 0.900")
    unsure = reversed_ones | {"auroc_high": 0.5, "loss_sum_auroc_high": 0.5}
    shown = metrics_table(unsure)
    assert "reverse" not in shown
    assert "other way round" not in shown


def test_each_ranking_but_prism_has_a_row_with_the_difference_and_which_is_better() -> None:
    _, *rows = cells(metrics_table(METRICS).split("\n\n")[2])
    assert rows == [
        "own loss, token mean +0.100 -0.020 to +0.170 neither is better",
        "own loss, sum +0.200 +0.100 to +0.300 PRISM is better",
    ]
    worse = METRICS | {"auroc_over_loss_high": -0.01}
    assert cells(metrics_table(worse).split("\n\n")[2])[1].endswith("PRISM is worse")


def test_an_empty_budget_has_no_precision() -> None:
    nothing = {name: None if "at_budget" in name else value for name, value in METRICS.items()}
    _, rankings, _, budgets, *_ = metrics_table(nothing | {"taken_by_budget": 0}).split("\n\n")
    assert cells(rankings)[-2] == "own loss, sum 0.700 0.600 to 0.750 – –"
    assert cells(budgets)[-2] == f"the run 0 {' '.join('–' * 8)}"


def test_each_budget_has_a_row_with_precision_and_recall() -> None:
    first, _, *rows, _ = cells(metrics_table(METRICS).split("\n\n")[3])
    assert first == "budget rows bad of the dropped dropped of all bad"
    figures = "0.900 0.800 to 0.950 0.800 0.700"
    assert rows == [f"5 % 2 {figures} {figures}", f"the run 10 {figures} {figures}"]


def test_each_source_has_a_row_without_control_characters() -> None:
    _, *rows = cells(metrics_table(METRICS).split("\n\n")[4])
    assert rows == ["30 20 25 0.800 0.750 s3://pool/a.jsonl", "10 0 10 – – \\x1b[2Jb.jsonl"]


def test_without_labels_of_the_pairs_all_are_assumed_correct() -> None:
    assert metrics_table(METRICS).split("\n\n")[5] == (
        "π of 8 pairs, all assumed correct (no --target-label): mean 0.625, above one half 0.750, Brier score 0.125"
    )


def test_with_labels_of_the_pairs_each_bin_of_pi_has_a_row() -> None:
    opening, bins = metrics_table(METRICS | JUDGED).split("\n\n")[5:]
    assert opening.startswith("π of 8 pairs, 5 of them correct by 'right': mean 0.625")
    assert opening.endswith("Brier score 0.125, calibration error 0.062, AUROC 0.875")
    assert cells(bins)[1:] == ["0.3 to 0.4 3 0.350 0.000 0.000 to 0.562", "0.9 to 1.0 5 0.950 1.000 0.566 to 1.000"]
