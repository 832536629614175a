"""`scoring.preferenceModel`: π from another model's losses, gradients from the reference; what a change of it costs."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.conftest import Job, Row, pair, read_json, table_of, write_jsonl
from tests.models import save_tiny_model


@pytest.fixture
def other(job: Job) -> Path:
    """Another model, of another architecture."""
    return save_tiny_model(job.folder / "other", "gpt2")


def use(job: Job, model: Path) -> None:
    job.spec["scoring"] = {"preferenceModel": {"uri": str(model), "dtype": "float32"}}


def loaded(job: Job) -> list[str]:
    """Names of the models that the last stage loaded, in order."""
    return [Path(event["model"]).name for event in job.events if event["event"] == "loading"]


def pi_by_hand(model: Path, rows: list[Row]) -> list[float]:
    """A plain forward pass of each response alone, with the whole logits."""
    import torch

    from prism_job.data import examples
    from prism_job.extract import tokenise
    from prism_job.extract.load.model import load_model, load_tokenizer
    from prism_job.spec.model import ModelSpec
    from tests.oracle import plain_loss

    spec = ModelSpec(uri=str(model), dtype="float32")
    tokenizer, loaded = load_tokenizer(spec), load_model(spec, torch.device("cpu"))
    found = []
    for row in rows:
        sides = tokenise.encode_target(examples.target_content(row, True), tokenizer, 128)
        losses = {side: float(plain_loss(loaded, text, mean=True)[0].detach()) for side, text in sides.items()}
        chosen, rejected = (np.exp(-losses[side]) for side in ("chosen", "rejected"))
        found.append(float(chosen / (chosen + rejected)))
    return found


def test_pi_is_that_of_a_plain_forward_pass_of_the_other_model(job: Job, other: Path, tiny_model: Path) -> None:
    pairs = [pair(number) for number in range(3)]
    use(job, other)
    manifest = job.run()
    table = table_of(manifest, "targets")
    # float32 passes of one text against a batch: a few units in the seventh digit.
    assert [row["preference"] for row in table] == pytest.approx(pi_by_hand(other, pairs), abs=1e-6)
    assert [row["weight"] for row in table] == [row["preference"] for row in table]
    assert [row["reference_preference"] for row in table] == pytest.approx(pi_by_hand(tiny_model, pairs), abs=1e-6)
    stated = read_json(manifest)
    assert stated["preference"]["mean"] == pytest.approx(np.mean([row["preference"] for row in table]))
    means = stated["preference_model"]["reference"]["mean"]
    assert means == pytest.approx(np.mean([row["reference_preference"] for row in table]))
    assert str(other) in (manifest.parent / "report.html").read_text()


@pytest.mark.parametrize("audited", [0, 8])
def test_the_reference_as_its_own_preference_model_changes_no_bit(job: Job, tiny_model: Path, audited: int) -> None:
    job.spec["audit"] = {"examples": audited}
    before = job.run()
    use(job, tiny_model)
    after = job.run()
    assert after != before
    names = ("selected", "scores")
    assert [table_of(after, name) for name in names] == [table_of(before, name) for name in names]
    if audited:  # its rows are kept in float16 now, which moves no digit that is read
        figures = [read_json(manifest)["audit"] for manifest in (before, after)]
        assert figures[1]["usable"] == figures[0]["usable"]


def test_a_run_without_it_has_no_trace_of_it(job: Job) -> None:
    """So ids, plans and documents stay as they were."""
    manifest = job.run()
    plan = (job.folder / "output" / "test" / "plan.json").read_text()
    assert '"preference"' not in plan
    assert "preference_model" not in manifest.read_text()
    assert "preferenceModel" not in (manifest.parent / "spec.yaml").read_text()
    assert "preference_model" not in str(job.parsed().spec.model_dump(mode="json"))


def test_changing_it_extracts_no_gradient_again(job: Job, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prism_job.extract.capture import gradients

    passes: list[int] = []
    backward = gradients.forward_and_backward
    monkeypatch.setattr(gradients, "forward_and_backward", lambda *given: passes.append(1) or backward(*given))
    job.run()
    first = len(passes)
    use(job, other)
    assert job.plan()["missing"] == 1, "one unit of pairs"
    assert job.passes("extract")["units"] == 1
    assert (loaded(job), len(passes)) == (["other"], first), "the reference is not loaded at all"
    job.spec["audit"] = {"examples": 8}
    job.run()
    before = len(passes)
    use(job, save_tiny_model(job.folder / "third", "gpt2", seed=7))
    assert job.plan()["missing"] == 1
    job.passes("extract")
    assert (loaded(job), len(passes)) == (["third"], before), "nor for the audit"
    assert job.passes("reduce")["audit"]
    use(job, other)
    assert job.plan()["missing"] == 0, "what was once read is kept"


def test_the_audit_weighs_the_pairs_as_the_run_does(job: Job, other: Path) -> None:
    """Its direction from stored rows of pairs: the same as from sums that were weighted while they were made."""
    from prism_job.plan.extractor import audit_spec
    from prism_job.score.targets import sum_targets
    from prism_job.store import shards

    job.spec["audit"] = {"examples": 8}
    use(job, other)
    job.run()
    run, plan = job.parsed(), job.planned()
    found = sum_targets(audit_spec(run.spec), plan, plan.audit, job.store()).directions_KLPP
    (unit,) = plan.targets
    arrays = shards.read_shard(job.store(), plan.audit.extractor, "targets", unit.id).arrays
    rows_ND = arrays["values"].astype(np.float64) * arrays["unit"][:, None]
    weights = pi_by_hand(other, [pair(number) for number in range(3)])
    np.testing.assert_allclose(found.reshape(-1), np.array(weights) @ rows_ND / 3, atol=1e-6 * np.abs(rows_ND).max())


def test_the_rows_to_extract_that_the_plan_reports_are_those_that_extract_counts(job: Job, other: Path) -> None:
    job.spec["audit"] = {"examples": 8}
    use(job, other)
    job.plan()
    (missing,) = [event for event in job.events if event["event"] == "missing"]
    assert {name: missing[name] for name in ("candidates", "pairs", "preferenceModel", "audit")} == {
        "candidates": 10, "pairs": 3, "preferenceModel": 3, "audit": 8,
    }  # fmt: skip
    job.passes("extract")
    last = [event for event in job.events if event["event"] == "progress"][-1]
    assert last["done"] == last["total"] == 10 + 3 + 3 + 8
    job.plan()
    assert all(event["event"] != "missing" for event in job.events), "the store holds all"


def test_other_targets_cost_their_own_pairs_only(job: Job, other: Path) -> None:
    use(job, other)
    job.run()
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(50, 53)])
    assert job.plan()["missing"] == 2, "their gradients, and their losses"


@pytest.mark.parametrize("written_before", [1, 2])
def test_a_killed_run_resumes_at_the_first_missing_shard(
    job: Job, other: Path, monkeypatch: pytest.MonkeyPatch, written_before: int
) -> None:
    """Killed among the preference model's units, and between the models."""
    from prism_job.errors import TransientError
    from prism_job.storage.folder import LocalFolder

    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(20)])
    use(job, other)
    whole = job.copy(store=str(job.folder / "whole")).run()
    job.plan()
    put, written = LocalFolder.put, []

    def fails_later(self: Any, key: str, content: bytes) -> None:
        if len(written) == written_before:
            raise TransientError("the disk is gone", where=key, fix="none")
        put(self, key, content)
        written.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "put", fails_later)
        assert job.stage("extract")[0] == 75
    assert sum(".nll." in key for key in written) == min(2, written_before)
    job.plan()
    job.passes("extract")
    assert loaded(job) == (["other", "model0"] if written_before < 2 else ["model0"])
    assert table_of(job.run(), "scores") == table_of(whole, "scores")


@pytest.mark.parametrize("stage", [0, 3])
def test_two_models_are_never_in_memory_together(
    job: Job, other: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    from prism_job.extract import rank

    load, models, alive = rank.load_model, [], []

    def held(model: Any) -> int:
        """Numbers of its weights in memory: DeepSpeed keeps emptied modules."""
        parts = [part for weight in model.parameters() for part in (weight, getattr(weight, "ds_tensor", None))]
        return sum(part.numel() for part in parts if part is not None)

    def watched(*given: Any) -> Any:
        alive.append(sum(held(kept) for model in models if (kept := model()) is not None))
        models.append(weakref.ref(model := load(*given)))
        return model

    monkeypatch.setattr(rank, "load_model", watched)
    use(job, other)
    job.spec["extraction"]["deepspeed"] = {"stage": stage}
    with mock.patch.dict(os.environ):  # a world in this process sets RANK and the like
        job.run()
    assert (len(models), alive) == (2, [0, 0])


def test_a_store_keeps_the_losses_that_a_manifest_needs(job: Job, other: Path) -> None:
    use(job, other)
    job.run()
    code, facts = job.call("store", "list", job.spec["store"], "--keep", job.spec["output"])
    assert code == 0
    of_pairs = [it for it in facts["extractors"] if not it["rows"]]
    assert [(it["pairs"], it["target_units"], it["needed_by"]) for it in of_pairs] == [(3, 1, 1)]
    code, facts = job.call("store", "prune", job.spec["store"], "--keep", job.spec["output"], "--older-than", "0")
    assert (code, facts["objects"]) == (0, 0)


def test_a_changed_preference_model_is_refused_by_name(job: Job, other: Path) -> None:
    use(job, other)
    job.plan()
    save_tiny_model(other, "gpt2", seed=9)
    job.refuses("extract", 65, str(other))


def test_errors_about_it_name_its_field(job: Job) -> None:
    use(job, job.folder / "nothing.gguf")
    job.refuses("plan", 64, "scoring.preferenceModel.uri")
    job.spec["scoring"]["weighting"] = "uniform"
    job.refuses("plan", 64, "preferenceModel needs weighting: preference")


def test_a_mean_pi_near_one_half_is_warned_of(job: Job, other: Path) -> None:
    """Of pairs and the same pairs swapped it is one half."""
    pairs = [pair(number) for number in range(2)]
    swapped = [each | {"chosen": each["rejected"], "rejected": each["chosen"]} for each in pairs]
    write_jsonl(job.folder / "targets.jsonl", pairs + swapped)
    manifest = job.run()
    words = job.passes("reduce")
    (warning,) = words["warnings"]
    assert warning.startswith("mean π is 0.50 over 4 pairs: the model does not clearly prefer")
    assert "or set scoring.preferenceModel to a model that prefers the chosen ones" in warning
    assert warning[1:] in (manifest.parent / "report.html").read_text()
    use(job, other)
    job.run()
    assert "Check that chosen and rejected are not swapped" in read_json(job.run())["warnings"][0]
    job.spec["scoring"] = {"weighting": "uniform"}
    job.run()
    assert "warnings" not in job.events[-1]


def test_near_one_half_is_what_the_pairs_cannot_tell_from_it() -> None:
    from prism_job.publish.warnings import is_near_half

    generator = np.random.default_rng(0)
    assert is_near_half(np.array([0.45]))
    assert not is_near_half(np.array([0.9]))
    few, many = (0.56 + 0.2 * generator.standard_normal(size) for size in (20, 2000))
    assert is_near_half(few)
    assert not is_near_half(many)
    assert is_near_half(1 - many)
