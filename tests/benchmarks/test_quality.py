"""Laws of the quality experiments: what they share gives the job's own numbers, and each shortcut equals its slow twin.

Shapes: N candidates, Q pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.quality import (
    ablations,
    dishonesty,
    exact,
    facts,
    forward,
    generated,
    harness,
    rectification,
    representation,
    tuning,
    upcycled,
)
from benchmarks.quality.harness import Extracted
from prism_job.__main__ import main
from prism_job.extract import tokenise
from prism_job.extract.capture.layers import captured_layers
from prism_job.score import curvature
from prism_job.storage.address import open_store
from tests.conftest import candidate, pair
from tests.models import build_model
from tests.oracle import weight_gradients

TINY: dict[str, Any] = {"projection": {"dim": 8}, "codec": {"kind": "float16"}}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Extracted:
    rows, pairs = [candidate(n) for n in range(12)], [pair(n) for n in range(5)]
    return harness.extract(tmp_path_factory.mktemp("work"), "tiny", rows, pairs, model=str(tiny_model), extraction=TINY)


def test_scores_under_preference_weights_are_those_that_the_job_publishes(
    extracted: Extracted, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Path(extracted.run.spec.store).parent
    assert main(["reduce", "--spec", str(work / "data" / "tiny" / "selection.yaml")]) == 0
    message = json.loads(capsys.readouterr().out.splitlines()[-1])
    published = pq.read_table(Path(message["manifest"]).parent / "scores.parquet")
    found_N = extracted.scores(extracted.targets.preference_Q)
    np.testing.assert_allclose(found_N, published["score"].to_numpy(), rtol=1e-9)
    np.testing.assert_array_equal(extracted.column("nll"), published["nll"].to_numpy())
    np.testing.assert_array_equal(extracted.norm_N, published["norm"].to_numpy())


def test_a_weighting_is_a_sum_over_the_scores_by_pair(extracted: Extracted) -> None:
    weight_Q = np.array([0.5, -1.0, 2.0, 0.0, 0.25])
    by_pair = extracted.scores_by_pair() @ weight_Q / len(weight_Q)
    np.testing.assert_allclose(extracted.scores(weight_Q), by_pair, rtol=1e-9, atol=1e-9 * np.abs(by_pair).max())


def test_a_swapped_pair_has_the_negated_row_and_the_rest_of_the_preference(tmp_path: Path, tiny_model: Path) -> None:
    pairs = [pair(n) for n in range(3)]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    rows = [candidate(n) for n in range(4)]
    first, second = (
        harness.extract(tmp_path, name, rows, targets, model=str(tiny_model), extraction=TINY)
        for name, targets in (("pairs", pairs), ("swapped", swapped))
    )
    sign_Q, pi_Q = harness.flipped(first.targets.preference_Q, np.ones(3, np.bool_))
    np.testing.assert_array_equal(second.pair_rows_QM, sign_Q[:, None].astype(np.float32) * first.pair_rows_QM)
    np.testing.assert_allclose(second.targets.preference_Q, pi_Q, rtol=1e-12)


def test_the_share_of_swapped_pairs_is_exact() -> None:
    generator = np.random.default_rng(0)
    assert [int(harness.draw_swapped(generator, 60, share).sum()) for share in (0, 0.1, 0.5, 1)] == [0, 6, 30, 60]


def test_the_interval_is_students() -> None:
    # Mean 3, standard deviation √2.5; t(4) = 2.776.
    found = harness.interval([1, 2, 3, 4, 5])
    assert (found.mean, found.high - found.mean) == (3, pytest.approx(2.776 * (2.5 / 5) ** 0.5))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert np.isnan(harness.interval([0.5]).low)


def test_what_was_finished_is_not_computed_again_unless_its_settings_change(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"figure": float(len(calls))}

    found = [harness.once(tmp_path / "one.json", settings, compute) for settings in ([1], [1], [2], [2])]
    assert [one["figure"] for one in found] == [1, 1, 2, 2]


def test_settings_of_every_experiment_are_plain_values() -> None:
    for script in (ablations, dishonesty, facts, forward, rectification, representation, upcycled):
        harness.constants(script.__name__)
    with pytest.raises(ValueError, match="TASKS holds functions"):
        harness.constants(generated.__name__)


def test_curvature_on_pairs_is_the_reducers(extracted: Extracted) -> None:
    rows_QM = extracted.pair_rows_QM
    factors = curvature.merge_factors(extracted.plan, open_store(extracted.run.spec.store), extracted.targets.layers, 8)
    wanted = curvature.solve(rows_QM.reshape(len(rows_QM), -1, 8, 8).astype(np.float64), factors, 0.3)
    found = ablations.solved(extracted, rows_QM, 0.3)
    np.testing.assert_allclose(found, wanted.reshape(len(rows_QM), -1), rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_corrected_eigenvalues_are_the_second_moments_along_each_eigenvector(extracted: Extracted) -> None:
    rows_NM, pairs_QM = ablations.candidate_rows(extracted), extracted.pair_rows_QM
    factors = curvature.merge_factors(extracted.plan, open_store(extracted.run.spec.store), extracted.targets.layers, 8)
    moments, bases = [], []
    for layer in range(len(factors.inputs_LPP)):
        _, basis_a = np.linalg.eigh(factors.inputs_LPP[layer] / factors.num_tokens)
        _, basis_b = np.linalg.eigh(factors.outputs_LPP[layer] / factors.num_tokens)
        basis = np.kron(basis_b, basis_a)
        along = rows_NM[:, layer * 64 : (layer + 1) * 64].astype(np.float64) @ basis
        moments.append((along**2).sum(0) / factors.num_tokens)
        bases.append(basis)
    lam = 0.3 * float(np.mean(moments))
    wanted = np.empty(pairs_QM.shape)
    for layer, (basis, moment) in enumerate(zip(bases, moments, strict=True)):
        part = slice(layer * 64, (layer + 1) * 64)
        dense = basis @ np.diag(moment) @ basis.T + lam * np.eye(64)
        wanted[:, part] = np.linalg.solve(dense, pairs_QM[:, part].T.astype(np.float64)).T
    found = ablations.solved_ekfac(extracted, pairs_QM, rows_NM, 0.3)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def encoded(generator: np.random.Generator, length: int) -> tokenise.Encoded:
    ids = generator.integers(3, 300, length).tolist()
    return tokenise.Encoded(ids, [place > length // 2 for place in range(length)])


def test_exact_scores_in_batches_are_inner_products_of_plain_weight_gradients() -> None:
    model = build_model("llama")
    layers = captured_layers(model, ("*",))
    generator = np.random.default_rng(0)
    rows, target = [encoded(generator, length) for length in (5, 9, 9, 14)], encoded(generator, 11)
    direction, loss = exact.weight_gradient(model, layers, target)
    wanted, nll, num_tokens = weight_gradients(model, target, mean=True)
    assert loss == pytest.approx(nll / num_tokens, rel=1e-6)
    for name, gradient in direction.items():
        torch.testing.assert_close(gradient, wanted[name].to(gradient.dtype), rtol=1e-5, atol=1e-7)
    found_N = exact.scores(model, layers, direction, rows, tokens_per_batch=30)
    for row, found in zip(rows, found_N, strict=True):
        plain, _, _ = weight_gradients(model, row, mean=False)
        assert found == pytest.approx(sum(float((plain[name] * direction[name]).sum()) for name in plain), rel=1e-6)


def test_losses_asked_in_batches_are_those_of_each_alone_and_tuning_lowers_them() -> None:
    model = build_model("llama", torch.float32)
    generator = np.random.default_rng(1)
    rows = [encoded(generator, length) for length in (6, 12, 7, 9)]
    before_N = tuning.mean_nll(model, rows)
    for row, found in zip(rows, before_N, strict=True):
        assert found == pytest.approx(exact.weight_gradient(model, captured_layers(model, ("*",)), row)[1], rel=1e-5)
    tuning.tune(model, rows, epochs=5, rate=1e-3, seed=0, batch_size=2)
    assert (tuning.mean_nll(model, rows) < before_N).all()
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_tuned_model_saved_is_the_model_that_the_job_loads(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer, model = tuning.load(str(tiny_model))
    generator = np.random.default_rng(2)
    rows = [encoded(generator, length) for length in (6, 9)]
    tuning.tune(model, rows, epochs=1, rate=1e-3, seed=0)
    tuning.save(model, tokenizer, tmp_path / "tuned")
    np.testing.assert_array_equal(
        tuning.mean_nll(tuning.load(str(tmp_path / "tuned"))[1], rows), tuning.mean_nll(model, rows)
    )


def test_copied_experts_without_noise_compute_what_the_dense_model_does_and_tuning_in_bfloat16_lowers_their_loss() -> (
    None
):
    dense, generator = build_model("tied", torch.float32), np.random.default_rng(3)
    rows = [encoded(generator, length) for length in (6, 9, 12)]
    model = upcycled.upcycled(dense, noise=0.0)
    found_N = tuning.mean_nll(model, rows)
    # Two equal experts with weights that sum to 1, up to float32's rounding.
    np.testing.assert_allclose(found_N, tuning.mean_nll(dense, rows), rtol=1e-5)
    tuning.tune_in_bfloat16(model, rows * 5, rate=1e-3, batch_size=3)
    assert (tuning.mean_nll(model, rows) < found_N).all()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in model.parameters())


def test_more_pairs_are_about_other_facts_than_the_demos() -> None:
    candidates, targets = facts.make_data(3)
    asked = {row["messages"][0]["content"] for row in candidates} | {row["prompt"][0]["content"] for row in targets}
    more = facts.more_pairs(3, 68)
    questions = {row["prompt"][0]["content"] for row in more}
    assert len(questions) == 68
    assert not questions & asked
    assert all(row["chosen"] != row["rejected"] for row in more)
