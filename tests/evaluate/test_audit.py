"""Laws of the audit: what is extracted again, what follows from two rankings, and that it costs and changes nothing else.

Shapes: N rows of the sample, P projected dims a side, Q pairs.
"""

from __future__ import annotations

import html
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from launcher.follow.event_text import outcome_text
from prism_job.data import examples
from prism_job.evaluate import audit
from prism_job.plan.sample import Sample
from prism_job.publish.audit_sentence import audit_sentence, is_low, is_noise
from prism_job.publish.published import load
from prism_job.publish.report.page import render
from prism_job.score.preference import preference
from prism_job.storage.address import open_store
from prism_job.store import shards, staged_rows
from tests.conftest import Job, Row, candidate, pair, read_json, table_of, write_jsonl
from tests.publish.test_report import Page, report_of

Float64 = NDArray[np.float64]
RANDOM = np.random.default_rng


# The figures, from two arrays of scores.


@pytest.mark.parametrize("noise", [1e-6, 0.02, 0.09, 0.5, 2.0, 50.0])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_the_closed_form_inverts(noise: float, ratio: float) -> None:
    between = 1 / np.sqrt((1 + noise) * (1 + noise * ratio))
    assert audit.noise_ratio(between, ratio) == pytest.approx(noise, rel=1e-6, abs=1e-9)
    assert audit.with_exact(between, ratio) == pytest.approx(1 / np.sqrt(1 + noise), rel=1e-9)


def test_the_less_noise_the_audit_has_the_lower_is_the_estimated_agreement() -> None:
    _, job, other = drawn("normal", 128, 0.5, RANDOM(3))
    found = {kind: audit.agreement(job, other, 0.1, "highest", kind) for kind in ("none", "kfac")}
    assert found["none"]["spearman_between"] == found["kfac"]["spearman_between"]
    assert found["kfac"]["spearman_between"] < found["kfac"]["spearman"] < found["none"]["spearman"]


def ranks(values: Float64) -> Float64:
    """1 to N, equal values sharing the mean of theirs, by counting."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def drawn(shape: str, num_rows: int, noise: float, random: np.random.Generator) -> tuple[Float64, Float64, Float64]:
    """Exact scores of variance 1, the job's and the audit's; noise of 1 is of the exact scores' variance."""
    size = np.exp(0.5 * random.standard_normal(num_rows) - 0.25) if shape == "noise grows with the score" else 1.0
    exact = random.standard_normal(num_rows) * size
    if shape == "lognormal":
        exact = np.exp(random.standard_normal(num_rows) - 1) * random.choice([-1.0, 1.0], num_rows)
    job, other = (exact + size * np.sqrt(part) * random.standard_normal(num_rows) for part in (noise, noise / 2))
    return exact, job, other


@pytest.mark.parametrize("steps", [3, 10_000])
def test_spearman_is_the_correlation_of_ranks(steps: int) -> None:
    random = RANDOM(0)
    left, right = random.integers(0, steps, 60).astype(float), random.integers(0, steps, 60).astype(float)
    assert audit.spearman(left, right) == pytest.approx(np.corrcoef(ranks(left), ranks(right))[0, 1], abs=1e-12)


@pytest.mark.parametrize("digits", [1, 9])
def test_the_linearised_error_is_that_of_leaving_each_row_out(digits: int) -> None:
    _, job, other = drawn("noise grows with the score", 400, 0.3, RANDOM(1))
    job, other = job.round(digits), other.round(digits)
    left_out = np.array([audit.spearman(np.delete(job, row), np.delete(other, row)) for row in range(400)])
    jackknife = np.sqrt(399 / 400 * np.square(left_out - left_out.mean()).sum())
    # They differ by terms of order 1/N.
    assert audit._standard_error(job, other) == pytest.approx(jackknife, rel=0.03)


@pytest.fixture
def without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of the simulated overlap."""
    for name in ("NUM_DRAWS", "NUM_RESAMPLINGS", "DRAWS_A_RESAMPLING"):
        monkeypatch.setattr(audit, name, 1)


SHAPES = ["normal", "lognormal", "noise grows with the score"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.02, 0.09, 0.5])
@pytest.mark.usefixtures("without_overlap")
def test_the_interval_covers_the_true_agreement(shape: str, noise: float) -> None:
    random, trials = RANDOM(2), 300
    exact, job, _ = drawn(shape, 400_000, noise, random)
    true = audit.spearman(exact, job)
    covered, values = 0, []
    for _ in range(trials):
        _, job, other = drawn(shape, 128, noise, random)
        found = audit.agreement(job, other, 0.05, "highest")
        covered += found["spearman_low"] <= true <= found["spearman_high"]
        values.append(found["spearman"])
    # 95 % less three standard errors of a share of 300 trials.
    assert covered / trials >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)
    # The bias, three standard errors of the mean allowed, is a small part of an interval.
    assert abs(np.mean(values) - true) < 0.006 + 3 * np.std(values) / np.sqrt(trials)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_overlap_is_that_with_exact_scores(shape: str) -> None:
    random, trials, num_rows = RANDOM(3), 40, 128
    exact, job, _ = drawn(shape, 400_000, 0.09, random)
    first = 400_000 // 20
    true = len(set(np.argsort(-exact)[:first].tolist()) & set(np.argsort(-job)[:first].tolist())) / first
    found = [audit.agreement(*drawn(shape, num_rows, 0.09, random)[1:], 0.05, "highest") for _ in range(trials)]
    covered = sum(one["overlap_low"] <= true <= one["overlap_high"] for one in found)
    assert covered / trials >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)
    assert np.mean([one["overlap"] for one in found]) == pytest.approx(true, abs=0.06)
    assert np.mean([one["overlap_between"] for one in found]) < np.mean([one["overlap"] for one in found])


def test_a_ranking_agrees_with_itself() -> None:
    scores = RANDOM(4).standard_normal(64)
    # Whatever the scale: it is the order that agrees.
    found = audit.agreement(scores, 3 * scores + 7, 0.1, "lowest")
    for name in ("spearman", "overlap", "spearman_between", "overlap_between"):
        assert (found[name], found[f"{name}_high"]) == (pytest.approx(1), pytest.approx(1)), name
    assert found["spearman_low"] > 0.98
    assert (found["taken"], found["noise"], found["reason"]) == (6, pytest.approx(0, abs=1e-6), None)


def test_the_lowest_end_is_the_highest_of_the_negated_scores() -> None:
    _, job, other = drawn("lognormal", 50, 0.5, RANDOM(5))
    assert audit.agreement(job, other, 0.2, "lowest") == audit.agreement(-job, -other, 0.2, "highest")


@pytest.mark.parametrize(
    ("job", "other", "reason"),
    [
        (np.arange(9.0), np.arange(9.0), "9 usable rows"),
        (np.zeros(0), np.zeros(0), "0 usable rows"),
        (np.ones(20), np.arange(20.0), "all scores are equal"),
        (np.arange(20.0), np.ones(20), "all scores are equal"),
        (np.arange(20.0), -np.arange(20.0), "nothing in common"),
    ],
)
def test_unknown_figures_are_none_with_a_reason(job: Float64, other: Float64, reason: str) -> None:
    found = audit.agreement(job, other, 0.5, "highest")
    assert found["spearman"] is found["overlap"] is None
    assert reason in found["reason"]
    sentence = "cannot be distinguished from noise" if reason == "nothing in common" else found["reason"]
    assert sentence in audit_sentence(found)
    json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("without_overlap")
def test_an_agreement_that_noise_alone_explains_is_reported_as_unknown() -> None:
    random, trials = RANDOM(8), 200
    for slope, least, most in ((0.0, 0.95, 1.0), (2.0, 0.0, 0.0)):
        times = 0
        for _ in range(trials):
            job = random.standard_normal(60)
            found = audit.agreement(job, slope * job + random.standard_normal(60), 0.1, "highest")
            value, low, high = (found[f"spearman_between{end}"] for end in ("", "_low", "_high"))
            no_finding = f"{value:.3f} ({low:.3f} to {high:.3f}), cannot be distinguished from noise."
            sentence = audit_sentence(found)
            assert (low <= 0) == (no_finding in sentence) == ("agrees with exact scores at" not in sentence)
            times += no_finding in sentence
        # One side of a 95 % interval lies above 0 in 2.5 of 100 rankings of noise.
        assert least <= times / trials <= most


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.2, 0.4, 1.0])
def test_more_dims_are_advised_where_the_lower_bound_is_low(noise: float) -> None:
    _, job, other = drawn("normal", 128, noise, RANDOM(9))
    found = audit.agreement(job, other, 0.1, "highest")
    assert ("Raise extraction.projection.dim" in audit_sentence(found)) == (found["spearman_low"] < audit.LOW_AGREEMENT)
    assert is_low(found) == (noise >= 0.2)
    assert (found["spearman"] > audit.LOW_AGREEMENT) == (noise <= 0.2), "at .2 the bound alone is low"


@pytest.mark.parametrize("num_rows", [50, 128])
@pytest.mark.parametrize("fraction", [0.0, 1e-6, 0.003, 0.02, 0.03, 0.0351, 0.0352, 0.04, 0.089, 0.091, 0.5, 1.0])
def test_an_overlap_needs_five_rows(num_rows: int, fraction: float) -> None:
    _, job, other = drawn("normal", num_rows, 0.09, RANDOM(10))
    found = audit.agreement(job, other, fraction, "highest")
    sentence = audit_sentence(found)
    assert found["spearman"] is not None
    assert found["noise"] == audit.noise_ratio(found["spearman_between"], 0.5)
    if round(fraction * num_rows) >= 5:
        assert found["overlap_low"] <= found["overlap"] <= found["overlap_high"]
        assert (found["reason"], "exact scores would take" in sentence) == (None, True)
        return
    assert found["overlap"] is found["overlap_low"] is found["overlap_high"] is None
    assert f"Spearman {found['spearman']:.3f}" in sentence
    assert f"is not known: {found['reason']}." in sentence
    if not fraction:
        assert found["reason"] == "the budget takes nothing"
        return
    wanted = int(found["reason"].split("at least ")[1].split(",")[0])
    assert 5 <= fraction * wanted < 5 + fraction, "as many rows as are needed"
    json.dumps(found, allow_nan=False)


# What is extracted again.


def audited(job: Job, num_examples: int = 10, codec: str = "sign") -> Job:
    job.spec["audit"] = {"examples": num_examples}
    job.use_codec(codec)
    return job


def store_keys(job: Job) -> set[str]:
    return {listed.key for listed in job.store().list()}


def figures(manifest_path: Path) -> Any:
    return read_json(manifest_path)["audit"]


def shard_bits(job: Job, extractor: str, kind: shards.Kind, unit_id: str) -> Any:
    """All that a shard holds. Not its bytes: the order of its header is no one's."""
    shard = shards.read_shard(job.store(), extractor, kind, unit_id)
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in shard.arrays.items()}, shard.notes


def sampled_rows(job: Job) -> list[Row]:
    plan, store = job.planned(), job.store()
    return [row for unit in plan.audit.units for row in staged_rows.read_rows(store, unit.rows)]


def again(job: Job) -> Job:
    """A plain run over the sample alone in the audit's form: twice the dims, the next seed; a store of its own."""
    other = job.copy(store=str(job.folder / "again"), output=str(job.folder / "again-output"), audit={"examples": 0})
    write_jsonl(job.folder / "sample.jsonl", sampled_rows(job))
    other.spec["candidates"] = {"uris": [str(job.folder / "sample.jsonl")]}
    other.spec["selection"]["budget"] = {"count": 1}
    other.spec["extraction"]["projection"] = {"dim": 16, "seed": 1}
    if other.spec["extraction"]["codec"]["kind"] == "sign":
        other.spec["extraction"]["codec"]["dims"] = 1024
    return other


def test_the_sample_is_the_rows_of_smallest_ids_each_once() -> None:
    rows = [{"text": f"row {number % 40}"} for number in range(100)]
    ids = [examples.example_id(row) for row in rows]
    sample = Sample(12)
    for example_id, row in zip(ids, rows, strict=True):
        sample.add(example_id, row)
    wanted = sorted(set(ids))[:12]
    assert sample.positions == [ids.index(example_id) for example_id in wanted]
    assert [row for _, _, row in sorted(sample.kept.values(), key=lambda kept: kept[1])] == [
        rows[place] for place in sample.positions
    ]


def test_the_plan_points_at_the_samples_rows_in_plan_order(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(5, 15)])
    audited(job, 7).plan()
    plan, store = job.planned(), job.store()
    pool = [row for unit in plan.candidates for row in staged_rows.read_rows(store, unit.rows)]
    assert [pool[place] for place in plan.audit.positions] == sampled_rows(job)
    ids = [examples.example_id(examples.candidate_content(row)) for row in pool]
    assert [ids[place] for place in plan.audit.positions] == sorted(set(ids))[:7]
    assert [unit.num_rows for unit in plan.audit.units] == [4, 3]


@pytest.mark.parametrize("codec", ["sign", "float16"])
def test_the_audits_shards_are_those_of_a_plain_extraction_in_its_form(job: Job, codec: str) -> None:
    audited(job, 6, codec).run()
    other = again(job)
    other.run()
    plan, plain = job.planned(), other.planned()
    assert plan.audit.extractor == plain.extractor
    assert [unit.id for unit in plan.audit.units] == [unit.id for unit in plain.candidates]
    assert plan.audit.factors == [unit.id for unit in plain.candidates]
    for unit in plain.candidates:
        for kind in ("candidates", "factors"):
            bits = [shard_bits(one, plain.extractor, kind, unit.id) for one in (job, other)]
            assert bits[0] == bits[1], (kind, unit.id)


def test_sums_are_the_weighted_rows_of_a_plain_extraction(job: Job) -> None:
    audited(job).run()
    other = again(job)
    other.run()
    plan = job.planned()
    for unit in plan.targets:
        sums = shards.read_shard(job.store(), plan.audit.extractor, "sums", unit.id)
        plain = shards.read_shard(open_store(other.spec["store"]), plan.audit.extractor, "targets", unit.id)
        assert sums.notes == plain.notes
        arrays = plain.arrays
        means = [arrays[f"{side}_nll"] / arrays[f"{side}_tokens"] for side in ("chosen", "rejected")]
        for name, weight_Q in (("preference", preference(*means)), ("uniform", np.ones(unit.num_rows))):
            wanted = weight_Q @ arrays["rows"].astype(np.float64)
            # Rounded to float32 once.
            np.testing.assert_allclose(sums.arrays[name], wanted, rtol=1e-6, atol=1e-7 * np.abs(wanted).max())


@pytest.mark.parametrize("codec", ["sign", "float16"])
@pytest.mark.parametrize(
    ("scoring", "sets"),
    [
        ({"curvature": {"kind": "none"}, "weighting": "uniform", "loss": "mean"}, False),
        ({"curvature": {"kind": "none"}, "score": "cosine"}, False),
        ({"curvature": {"kind": "kfac", "damping": 0.3}}, False),
        ({"curvature": {"kind": "kfac", "damping": 0.3}}, True),
    ],
)
def test_the_figures_are_those_of_two_plain_runs(job: Job, codec: str, scoring: dict[str, Any], sets: bool) -> None:
    if sets:
        few = str(job.folder / "targets.jsonl")
        more = str(write_jsonl(job.folder / "more.jsonl", [pair(number) for number in (8, 9)]))
        away = {"name": "away", "uris": [more, few], "weight": 0.5, "sign": -1}
        job.spec["targets"] = {"sets": [{"name": "toward", "uris": [few]}, away]}
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 40)])
    job.spec["scoring"] = scoring
    job.spec["selection"] = {"drop": "lowest", "budget": {"count": 6}}
    published = audited(job, 15, codec).run()
    other = again(job)
    if scoring["curvature"]["kind"] == "kfac":
        # The same λ, not the same share of the mean eigenvalue, which is another in another space.
        wanted, found = (read_json(manifest)["curvature"]["lambda"] for manifest in (published, other.run()))
        other.spec["scoring"] = {"curvature": {"kind": "kfac", "damping": 0.3 * wanted / found}}
    first, second = table_of(published, "scores"), table_of(other.run(), "scores")
    plan = job.planned()
    ours, theirs = (np.array([row["score"] for row in rows]) for rows in (first, second))
    ours = ours[plan.audit.positions]
    wanted_figures = audit.agreement(ours, theirs, 6 / 30, "lowest", scoring["curvature"]["kind"])
    found_figures = figures(published)
    for name, value in wanted_figures.items():
        assert found_figures[name] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), name
    assert [found_figures[name] for name in ("examples", "usable", "dim", "seed")] == [15, 15, 16, 1]
    tokens = [sum(row["num_tokens"] for row in rows) for rows in (first, second)]
    pairs = [shards.read_shard(job.store(), plan.extractor, "targets", unit.id).arrays for unit in plan.targets]
    pair_tokens = sum(int(arrays[f"{side}_tokens"].sum()) for arrays in pairs for side in ("chosen", "rejected"))
    assert found_figures["token_share"] == pytest.approx(tokens[1] / (sum(tokens) + pair_tokens))


# What it costs, and what it leaves alone.


def test_switched_off_it_stores_nothing_more_and_changes_no_score(job: Job) -> None:
    plain = job.run()
    keys = store_keys(job)
    assert figures(plain) is None
    other = audited(job.copy(store=str(job.folder / "other")), 6)
    published = other.run()
    plan = other.planned()
    assert keys < store_keys(other)
    extra = {shards.shard_key(*shard) for shard in other.shards() if shard[0] == plan.audit.extractor}
    extra |= {staged_rows.rows_key(unit.rows) for unit in plan.audit.units}
    assert store_keys(other) - keys == extra
    for name in ("scores.parquet", "selected.parquet", "targets.parquet"):
        assert (plain.parent / name).read_bytes() == (published.parent / name).read_bytes()


def test_scoring_or_a_second_run_extracts_nothing_again(job: Job) -> None:
    first = audited(job).run()
    assert job.plan()["missing"] == 0
    assert job.run() == first
    for scoring in ({"weighting": "uniform"}, {"score": "cosine"}, {"loss": "mean", "curvature": {"damping": 7.0}}):
        job.spec["scoring"] = scoring
        assert job.plan()["missing"] == 0, scoring
        assert figures(Path(job.passes("reduce")["manifest"]))["usable"] == 10


def test_new_data_cost_the_audit_only_what_changes_in_its_sample(job: Job) -> None:
    audited(job, 4).run()
    ids = sorted(examples.example_id(examples.candidate_content(row)) for row in sampled_rows(job))
    rows = [candidate(number) for number in range(50, 90)]
    is_sampled = [examples.example_id(examples.candidate_content(row)) < ids[-1] for row in rows]
    late = [row for row, sampled in zip(rows, is_sampled, strict=True) if not sampled]
    write_jsonl(job.folder / "pool" / "b.jsonl", late[:4])
    assert job.plan()["missing"] == 1
    early = rows[is_sampled.index(True)]
    write_jsonl(job.folder / "pool" / "c.jsonl", [early])
    assert job.plan()["missing"] == 3  # two files of data, and the sample's one unit


def test_a_lost_shard_of_the_audit_or_of_the_targets_costs_itself_alone(job: Job) -> None:
    published = audited(job, 6).run()
    own = job.planned().extractor
    for extractor, kind, unit in [shard for shard in job.shards() if shard[0] != own or shard[1] == "targets"]:
        content = shard_bits(job, extractor, kind, unit)
        job.store().delete([shards.shard_key(extractor, kind, unit)])
        assert job.plan()["missing"] == 1
        words = job.passes("extract")
        assert words["units"] == 1
        assert words["seconds"] > 0
        assert words["auditSeconds"] == (0 if kind == "targets" else words["seconds"])
        assert shard_bits(job, extractor, kind, unit) == content
    assert job.run() == published


def test_the_termination_message_has_the_audits_share_of_the_time(job: Job) -> None:
    audited(job).plan()
    words = job.passes("extract")
    assert 0 < words["auditSeconds"] < words["seconds"]
    share = round(words["auditSeconds"] / words["seconds"], 4)
    assert f"{share:.0%} of the time for the audit's sample" in outcome_text(words)
    assert "audit" not in outcome_text({**words, "auditSeconds": 0.0})


def test_rows_that_cannot_be_used_are_left_out_of_the_figures(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 40)])
    # Read by the plan, refused by the tokenisation: the response lies beyond maxLength.
    write_jsonl(job.folder / "pool" / "late.jsonl", [{"prompt": "long " * 200, "completion": "x"}])
    job.spec["candidates"]["maxBadFraction"] = 0.1
    published = audited(job, 1000).run()
    found = figures(published)
    assert (found["examples"], found["usable"]) == (31, 30)
    assert found["spearman"] is not None
    assert read_json(published)["counts"]["quarantined"] == 1


def test_the_audit_is_part_of_the_selection_id(job: Job) -> None:
    # The pool has ten rows, so these three have the same sample.
    names = {audited(job, size).run().parent.name for size in (10, 11, 0)}
    assert len(names) == 3


@pytest.mark.parametrize("budget", [4, 8])
def test_the_report_and_the_termination_message_hold_the_sentence(job: Job, budget: int) -> None:
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(number) for number in range(20, 40)])
    job.spec["selection"]["budget"] = {"count": budget}
    job.spec["extraction"]["projection"] = {"dim": 32}  # the sample is small: of dims 8 its agreement is lost in noise
    published = audited(job, 20, "float16").run()
    found = figures(published)
    assert (found["taken"], found["overlap"] is None) == {4: (3, True), 8: (5, False)}[budget]
    sentence = audit_sentence(found)
    assert f"Spearman {found['spearman']:.3f} ({found['spearman_low']:.3f} to {found['spearman_high']:.3f})" in sentence
    if budget == 8:
        value, low, high = (f"{found[f'overlap{end}']:.0%}" for end in ("", "_low", "_high"))
        assert f"would take {value} ({low} to {high}) of" in sentence
    else:
        assert "raise audit.examples to at least 38," in sentence
    page = html.unescape((published.parent / "report.html").read_text())
    assert "How far the ranking can be trusted" in page
    assert sentence in page
    assert job.stage("reduce")[1]["audit"] == sentence
    assert load(str(published)).check().manifest.audit == found


def test_a_page_whose_ranking_may_be_noise_claims_no_agreement() -> None:
    random = RANDOM(11)
    found = audit.agreement(random.standard_normal(20), random.standard_normal(20), 0.5, "highest")
    assert is_noise(found)
    about = {"examples": 20, "usable": 20, "dim": 16, "seed": 1, "token_share": 0.1}
    page = Page(render(report_of([1.0, 2.0], audit=about | found))).words()
    assert audit_sentence(found) in page
    assert "better with the exact ranking" not in page


def test_prune_keeps_what_a_kept_audit_needs_and_store_lists_it(job: Job) -> None:
    audited(job).run()
    keys = store_keys(job)
    plan = job.planned()
    time.sleep(0.01)  # an object of this very instant is not older
    keep = [job.spec["store"], "--keep", job.spec["output"]]
    assert job.passes("store", "prune", *keep, "--older-than", "0", "--yes")["objects"] == 0
    assert store_keys(job) == keys
    listed = job.passes("store", "list", *keep)
    by_extractor = {one["extractor"]: one for one in listed["extractors"]}
    names = ("rows", "pairs", "needed_by", "units", "target_units", "factor_units")
    for extractor in (plan.extractor, plan.audit.extractor):
        assert [by_extractor[extractor][name] for name in names] == [10, 3, 1, 3, 1, 3]
    used = job.passes("store", "du", *keep)
    assert used["needed_bytes"] == used["bytes"]


def test_a_sample_too_small_for_figures_is_published_with_the_reason(job: Job) -> None:
    found = figures(audited(job, 9).run())
    assert found["spearman"] is None
    assert "9 usable rows" in found["reason"]
