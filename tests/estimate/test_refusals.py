"""Laws of what `estimate` refuses: what the run would refuse, and nothing that the run would take."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.follow.estimate_table import duration_text, estimate_table
from tests.conftest import Job, candidate, pair, turn, write_jsonl

LATE = {"prompt": "long " * 200, "completion": "x"}
"""Read by the plan; its response lies beyond maxLength."""

NO_RESPONSE = {"prompt": "What?"}
"""Refused by the plan."""


def estimated(job: Job, *options: str) -> dict[str, Any]:
    return job.passes("estimate", "--spec", str(job.spec_path()), *options)


def refused(job: Job, code: int, *mentions: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    return job.refuses(("estimate", "--spec", str(job.spec_path()), *options), code, *mentions)


def outcome_of_run(job: Job) -> tuple[int, dict[str, Any]]:
    """Exit code and message of the first stage that fails, or of the last."""
    for name in ("plan", "extract", "reduce"):
        code, message = job.stage(name)
        if code:
            break
    return code, message


@pytest.mark.parametrize(
    ("late", "unreadable", "repeated", "allowed"),
    [
        (0, 0, False, 0.0),
        (1, 0, False, 0.0),
        (1, 0, False, 0.09),  # 1 of 11
        (1, 0, False, 0.1),
        (1, 1, False, 0.16),  # 2 of 12
        (1, 1, False, 0.17),
        # The same unit twice is extracted once; the reduce stage counts its rows where they stand, 2 of 13.
        (1, 0, True, 0.15),
        (1, 0, True, 0.16),
        (13, 0, False, 1.0),
    ],
)
def test_estimate_refuses_exactly_where_the_run_would(
    job: Job, late: int, unreadable: int, repeated: bool, allowed: float
) -> None:
    rows = [candidate(number) for number in range(10 if late < 10 else 0)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows) if rows else (job.folder / "pool" / "a.jsonl").unlink()
    tail = [LATE] * late + [NO_RESPONSE] * unreadable
    if tail:
        write_jsonl(job.folder / "pool" / "b.jsonl", tail)
    if repeated:
        for name in ("b.jsonl", "c.jsonl"):
            write_jsonl(job.folder / "pool" / name, [candidate(77), LATE])
    job.spec["candidates"]["maxBadFraction"] = allowed
    code, message = outcome_of_run(job)
    found, estimate = job.call("estimate", "--spec", str(job.spec_path()))
    assert (found, code) in ((0, 0), (65, 65)), (estimate, message)
    if code:
        assert "b.jsonl line" in estimate["where"]


def test_too_many_rows_without_a_token_to_learn_are_named_by_file_line_and_reason(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(20), NO_RESPONSE, LATE, candidate(21), LATE])
    said = refused(
        job, 65, "3 of 15", "maxBadFraction 0.01", "2 × no response token within maxLength", "b.jsonl line 3"
    )
    assert said["where"].count("line") == 3
    job.spec["candidates"]["maxBadFraction"] = 0.2
    facts = estimated(job)
    assert (facts["bad_rows"], facts["bad_share"]) == (3, 0.2)
    assert "3 unusable rows\nunusable  the first: " in estimate_table(facts)
    assert "b.jsonl line 2: no response: there is a prompt but no completion" in estimate_table(facts)


def test_a_target_that_cannot_be_tokenised_is_named_by_line_and_side(job: Job) -> None:
    late = {"prompt": [turn("user", "Hi")], "chosen": [turn("assistant", "x")], "rejected": [turn("assistant", "y")]}
    late["prompt"][0]["content"] = "long " * 200
    write_jsonl(job.folder / "targets.jsonl", [pair(1), pair(2), late])
    said = refused(job, 65, "its chosen response: no response token within maxLength", "targets.jsonl line 3")
    code, message = outcome_of_run(job)
    assert (code, message["where"]) == (65, said["where"])


def test_a_sample_refuses_only_what_is_certain_and_warns_of_the_rest(job: Job) -> None:
    # One row in two is tokenised: the first, the third and so on.
    rows = [LATE if number % 4 == 0 else candidate(number) for number in range(40)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    job.spec["candidates"]["maxBadFraction"] = 0.2
    refused(job, 65, "10 of 40 candidate rows", "maxBadFraction 0.2")
    refused(job, 65, "10 of 40 candidate rows", options=("--sample", "2"))
    job.spec["candidates"]["maxBadFraction"] = 0.3
    shown = estimate_table(estimated(job))
    assert "warning" not in shown
    assert "memory per rank" not in shown, "one GPU holds all of it"
    facts = estimated(job, "--sample", "2")
    assert (facts["bad_rows"], facts["bad_share"]) == (20, 0.5)
    table = estimate_table(facts)
    assert "20 unusable rows (scaled: one row in 2 was tokenised)" in table
    assert "warning   by this sample 50.00% of the rows are unusable, more than maxBadFraction 0.3" in table


@pytest.mark.parametrize(
    ("change", "code", "mention"),
    [
        (lambda job: job.spec.update(evaluation={"label": "nowhere"}), 64, "no 'nowhere' in this row"),
        (
            lambda job: job.spec.update(evaluation={"label": "labl"}),
            64,
            "evaluation.label (--label) names; did you mean 'label'? columns found: ",
        ),
        (
            lambda job: job.spec["selection"].update(perGroup={"groupBy": "labels", "max": 0.5}),
            64,
            "no candidate has a value in 'labels'; did you mean 'label'? columns found: ",
        ),
        (
            lambda job: job.spec.update(evaluation={"label": "label", "positive": "7"}),
            64,
            "marks all 10 candidates bad",
        ),
        (
            lambda job: job.spec.update(evaluation={"label": "label", "targetLabel": "right"}),
            64,
            "no 'right' in this row",
        ),
        (lambda job: job.spec.update(store=str(job.folder / "pool" / "store")), 64, "lies inside the data"),
    ],
)
def test_estimate_refuses_the_labels_and_places_that_a_plan_refuses(
    job: Job, change: Any, code: int, mention: str
) -> None:
    change(job)
    assert refused(job, code, mention)["where"] == job.refuses("plan", code, mention)["where"]


KEEP, DROP = {"keep": "highest"}, {"drop": "lowest"}


@pytest.mark.parametrize(
    ("selection", "code"),
    [
        (KEEP | {"budget": {"count": 11}}, 0),
        (KEEP | {"budget": {"count": 12}}, 64),
        (KEEP | {"budget": {"count": 13}, "dedupe": "none"}, 0),
        (KEEP | {"budget": {"count": 14}, "dedupe": "none"}, 64),
        (KEEP | {"budget": {"fraction": 0.04}}, 64),
        (KEEP | {"budget": {"fraction": 0.05}}, 0),
        (DROP | {"budget": {"count": 11}}, 64),
        (DROP | {"budget": {"fraction": 0.96}}, 64),
        (DROP | {"budget": {"fraction": 0.9}}, 0),
        # 10 usable rows of a.jsonl, 1 of b.jsonl that none repeats; a max is rounded up to whole rows.
        (KEEP | {"budget": {"count": 9}, "perSource": {"max": 0.8}}, 0),
        (KEEP | {"budget": {"count": 10}, "perSource": {"max": 0.8}}, 64),
        (KEEP | {"budget": {"fraction": 0.8}, "perSource": {"max": 0.8}}, 0),
        (KEEP | {"budget": {"fraction": 0.9}, "perSource": {"max": 0.8}}, 64),
        # 8 rows of label 0, 5 of label 1.
        (KEEP | {"budget": {"count": 11}, "dedupe": "none", "perGroup": {"groupBy": "label", "max": 0.5}}, 0),
        (KEEP | {"budget": {"count": 12}, "dedupe": "none", "perGroup": {"groupBy": "label", "max": 0.5}}, 64),
    ],
)
def test_estimate_refuses_exactly_the_budgets_that_the_run_would(job: Job, selection: Any, code: int) -> None:
    # Of 14 rows one has no response token left, and two repeat others.
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(20), LATE, candidate(20), candidate(0)])
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["scoring"] = {"curvature": {"kind": "none"}}
    job.spec["selection"] = selection
    found, estimate = job.call("estimate", "--spec", str(job.spec_path()))
    expected, message = outcome_of_run(job)
    assert found == expected == code, (estimate, message)
    if code:
        assert (estimate["where"], estimate["fix"]) == (message["where"], message["fix"])


def test_a_budget_of_more_tokens_than_there_are_is_refused_to_the_token(job: Job) -> None:
    job.spec["selection"] = KEEP | {"budget": {"tokens": 10**6}}
    words = refused(job, 64, "the budget is 1000000 response tokens, and there are ")["error"]
    there = int(words.split("there are ")[1].split()[0])
    job.spec["selection"] = KEEP | {"budget": {"tokens": there}}
    assert estimated(job)["num_examples"] == 10
    assert job.run().exists()
    job.spec["selection"] = KEEP | {"budget": {"tokens": there + 1}}
    refused(job, 64, f"there are {there} to rank")
    job.fails("reduce", 64, f"there are {there} to rank")
    assert estimated(job, "--sample", "3"), "a sample cannot be certain"


def test_a_time_has_the_unit_that_a_person_reads() -> None:
    shown = [duration_text(hours) for hours in (9.35e-05, 0.0306, 0.2, 1.5, 12.34, 2290)]
    assert shown == ["0.34 seconds", "110 seconds", "12 minutes", "90 minutes", "12.3 hours", "2,290 hours"]
