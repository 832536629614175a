"""`scoring.score: representation`: candidates by the cosine of their hidden states to those of the wanted responses.

The oracle is transformers' own `output_hidden_states`, one text at a time, in float64.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prism_job.extract import tokenise
from prism_job.extract.capture.representations import refuse_looking_ahead, representations_of
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.spec.document import check_document
from prism_job.store import codec, shards
from tests.conftest import Job, candidate, pair, read_json, table_of, turn, write_jsonl
from tests.models import KINDS, build_model

Float64 = NDArray[np.float64]

FLOAT16 = 2**-11
"""Of a row's largest number: half a step of float16, which stored rows are rounded to."""


@pytest.fixture
def representation(job: Job) -> Job:
    job.spec["scoring"] = {"score": "representation"}
    del job.spec["audit"]
    return job


def plain_row(model: Any, ids: list[int]) -> Float64:
    """Σ_i i·h_i / Σ_i i of the last hidden states, by a loop."""
    with torch.no_grad():
        states_TH = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    total_H = np.zeros(states_TH.shape[1])
    for place, state_H in enumerate(states_TH.double().numpy(), start=1):
        total_H += place * state_H
    return total_H / (len(ids) * (len(ids) + 1) / 2)


def made_up_texts() -> list[tokenise.Encoded]:
    texts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30 + place for place in range(25)], [40, 41]]
    return [tokenise.Encoded(ids, [False] * (len(ids) - 1) + [True]) for ids in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_mean_of_the_hidden_states_weighted_by_position(kind: str) -> None:
    model, texts = build_model(kind).double(), made_up_texts()
    rows_BH, _ = representations_of(model, tokenise.collate(texts, torch.device("cpu")), torch.float64)
    for row_H, text in zip(rows_BH.numpy(), texts, strict=True):
        expected_H = plain_row(model, text.ids)
        # Float64 rounding; RoPE's and GPT-2's constants are float32 in both.
        np.testing.assert_allclose(row_H, expected_H, rtol=0, atol=1e-12 * np.abs(expected_H).max())


def test_batch_mates_do_not_change_a_row() -> None:
    model, texts = build_model("llama"), made_up_texts()
    together_BH, _ = representations_of(model, tokenise.collate(texts, torch.device("cpu")), torch.float32)
    for row_H, text in zip(together_BH, texts, strict=True):
        alone_H = representations_of(model, tokenise.collate([text], torch.device("cpu")), torch.float32)[0][0]
        assert float((row_H - alone_H).norm()) <= 1e-6 * float(alone_H.norm()), "float32 sums in another order"


def stored_rows(job: Job, kind: shards.Kind) -> Float64:
    plan = job.planned()
    units = plan.candidates if kind == "candidates" else plan.targets
    arrays = [shards.read_shard(job.store(), plan.extractor, kind, unit.id).arrays for unit in units]
    return np.concatenate([codec.decode_float16(each) if kind == "candidates" else each["rows"] for each in arrays])


def oracle(job: Job, rows: list[Any]) -> Float64:
    spec = job.parsed().spec
    tokenizer, model = load_tokenizer(spec.model), load_model(spec.model, torch.device("cpu"), None)
    encoded = [tokenise.encode_candidate(row, tokenizer, spec.extraction.max_length) for row in rows]
    return np.stack([plain_row(model, each.ids) for each in encoded])


def cosines(rows_NH: Float64, wanted_QH: Float64) -> Float64:
    return np.array([[row @ one / np.linalg.norm(row) / np.linalg.norm(one) for one in wanted_QH] for row in rows_NH])


CANDIDATES = [candidate(number) for number in range(10)]
WANTED = [{"messages": [*pair(number)["prompt"], *pair(number)["chosen"]]} for number in range(3)]


@pytest.mark.parametrize("similarity", ["nearest", "mean"])
def test_a_score_is_the_cosine_to_the_nearest_or_the_mean_over_the_wanted_responses(
    representation: Job, similarity: str
) -> None:
    representation.spec["scoring"]["similarity"] = similarity
    manifest = representation.run()
    rows_NH, wanted_QH = oracle(representation, CANDIDATES), oracle(representation, WANTED)
    for found, expected, tolerance in (
        (stored_rows(representation, "candidates"), rows_NH, FLOAT16),
        (stored_rows(representation, "targets"), wanted_QH, 1e-6),
    ):
        largest_N1 = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(found - expected) <= (tolerance + 1e-6) * largest_N1).all()
    expected_NQ = cosines(rows_NH, wanted_QH)
    expected_N = expected_NQ.max(axis=1) if similarity == "nearest" else expected_NQ.mean(axis=1)
    scores = [row["score"] for row in table_of(manifest, "scores")]
    np.testing.assert_allclose(scores, expected_N, rtol=0, atol=2 * FLOAT16)
    shares = [row["contribution"] for row in table_of(manifest, "targets")]
    assert shares == [None] * 3 if similarity == "nearest" else sum(shares) == pytest.approx(1, abs=1e-12)


def test_sets_are_scored_apart_and_their_scores_are_added_with_weight_and_sign(representation: Job) -> None:
    job = representation
    sets = []
    for name, numbers, more in (("one", (0, 1), {"weight": 2.0}), ("two", (2,), {"sign": -1})):
        path = write_jsonl(job.folder / f"{name}.jsonl", [pair(number) for number in numbers])
        sets.append({"name": name, "uris": [str(path)], **more})
    job.spec["targets"] = {"sets": sets}
    table = table_of(job.run(), "scores")
    expected_NQ = cosines(oracle(job, CANDIDATES), oracle(job, WANTED))
    for row, one_Q in zip(table, expected_NQ, strict=True):
        assert row["score_one"] == pytest.approx(one_Q[:2].max(), abs=2 * FLOAT16)
        assert row["score_two"] == pytest.approx(one_Q[2], abs=2 * FLOAT16)
        assert row["score"] == pytest.approx(2 * row["score_one"] - row["score_two"], abs=1e-12)


def test_no_pass_goes_backward_and_rejected_responses_do_not_pass(
    representation: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    representation.plan()
    done = representation.passes("extract")
    texts = [*CANDIDATES, *WANTED]
    spec = representation.parsed().spec
    tokenizer = load_tokenizer(spec.model)
    assert done["tokens"] == sum(len(tokenise.encode_candidate(row, tokenizer, 128).ids) for row in texts)


def test_a_target_needs_no_rejected_response(representation: Job) -> None:
    with_rejected = representation.run()
    rows = [{name: value for name, value in pair(number).items() if name != "rejected"} for number in range(3)]
    write_jsonl(representation.folder / "targets.jsonl", rows)
    without = representation.run()
    assert [row["score"] for row in table_of(without, "scores")] == [
        row["score"] for row in table_of(with_rejected, "scores")
    ]


def test_rows_depend_on_no_setting_of_gradients_and_do_not_mix_with_gradients(representation: Job) -> None:
    manifest = representation.run()
    other = representation.copy()
    other.spec["extraction"] |= {"projection": {"dim": 4}, "codec": {"kind": "float16"}, "layers": ["*mlp*"]}
    again = other.run()
    assert other.planned().missing_candidates == other.planned().missing_targets == []
    assert table_of(again, "scores") == table_of(manifest, "scores")
    gradients = representation.copy(scoring={}, audit={"examples": 0})
    assert gradients.plan()["missing"] == gradients.planned().num_units
    longer = representation.copy()
    longer.spec["extraction"] |= {"maxLength": 100}
    assert longer.plan()["missing"] == longer.planned().num_units


def test_a_stopped_run_resumes_and_the_report_states_why_there_is_no_audit(representation: Job) -> None:
    job = representation
    manifest = job.run()
    plan, store = job.planned(), job.store()
    lost = plan.candidates[0].id
    before = shards.read_shard(store, plan.extractor, "candidates", lost).arrays
    store.delete([shards.shard_key(plan.extractor, "candidates", lost)])
    assert job.plan()["missing"] == 1
    assert job.passes("extract")["units"] == 1
    after = shards.read_shard(store, plan.extractor, "candidates", lost).arrays
    assert all((after[name] == array).all() for name, array in before.items()), "the same bits"
    assert "not projected" in job.passes("reduce")["audit"]
    assert "there is no noise of a projection to measure" in (manifest.parent / "report.html").read_text()


def test_store_verbs_count_the_rows_and_labels_can_be_compared(representation: Job) -> None:
    representation.spec["evaluation"] = {"label": "label"}
    manifest = representation.run()
    assert 0 <= read_json(manifest)["evaluation"]["auroc"] <= 1
    listed = representation.passes("store", "list", representation.spec["store"], "--keep", str(manifest.parents[2]))
    (rows,) = listed["extractors"]
    assert (rows["rows"], rows["pairs"], rows["needed_by"]) == (10, 3, 1)


def test_prism_ranks_what_a_representation_run_has_selected(representation: Job) -> None:
    first = representation.run()
    second = representation.copy(candidates={"uris": [str(first)]}, scoring={}, audit={"examples": 0})
    second.document["metadata"]["name"] = "second"
    ranked = {row["example_id"] for row in table_of(second.run(), "scores")}
    assert ranked == {row["example_id"] for row in table_of(first, "selected")}


def test_explain_refuses_what_has_no_contributions(representation: Job) -> None:
    manifest = representation.run()
    representation.refuses(("explain", str(manifest), "--top", "1"), 64, "cosines of hidden states")


def test_what_is_replayed_has_every_setting_written_out(representation: Job) -> None:
    manifest = representation.run()
    replay = manifest.parent / "spec.yaml"
    for stage in ("plan", "extract", "reduce"):
        code, message = representation.call(stage, "--spec", str(replay))
        assert code == 0, message
    assert message["unchanged"], "the same selection id"


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"scoring": {"weighting": "preference"}}, "weighting: preference needs gradients"),
        ({"scoring": {"loss": "mean"}}, "loss: mean needs gradients"),
        ({"scoring": {"curvature": {"damping": 0.1}}}, "curvature.kind: kfac needs gradients"),
        ({"audit": {"examples": 8}}, "audit"),
        ({"selection": {"dedupe": "near"}}, "dedupe: near"),
        ({"scoring": {"score": "cosine", "similarity": "mean"}}, "similarity needs score: representation"),
    ],
)
def test_settings_of_gradients_are_refused(representation: Job, changes: dict[str, Any], mentions: str) -> None:
    document = copy.deepcopy(representation.document)
    for section, fields in changes.items():
        document["spec"][section] = document["spec"].get(section, {}) | fields
    with pytest.raises(Exception, match="error") as refused:
        check_document(document, "selection.yaml")
    assert mentions in str(refused.value)


def test_estimate_predicts_tokens_and_bytes_and_no_backward_pass(representation: Job) -> None:
    job = representation
    facts = job.passes("estimate", "--spec", str(job.spec_path()))
    job.plan()
    done = job.passes("extract")
    assert facts["tokens"] == done["tokens"]
    assert (facts["flops"]["backward"], facts["flops"]["projection"], facts["flops"]["sketches"]) == (0, 0, 0)
    written = sum(path.stat().st_size for path in Path(job.spec["store"]).rglob("*") if path.is_file())
    assert facts["store_bytes"] == pytest.approx(written, rel=0.02)
    gradients = job.copy(scoring={"weighting": "uniform"}, audit={"examples": 0})
    of_gradients = gradients.passes("estimate", "--spec", str(gradients.spec_path()))
    assert facts["flops"]["total"] < of_gradients["flops"]["total"] / 2
    for own, other in zip(facts["memory"], of_gradients["memory"], strict=True):
        assert own["device_bytes"] < other["device_bytes"]


def test_a_model_that_looks_ahead_is_refused(representation: Job) -> None:
    causal = build_model("llama")
    refuse_looking_ahead(causal, torch.device("cpu"))
    for module in causal.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    causal.config._attn_implementation = "sdpa"
    with pytest.raises(Exception, match="not causal"):
        refuse_looking_ahead(causal, torch.device("cpu"))


def test_a_row_without_a_response_token_is_quarantined(representation: Job) -> None:
    job = representation
    job.spec["candidates"]["maxBadFraction"] = 0.5
    job.spec["extraction"]["maxLength"] = 40
    rows = [*CANDIDATES, {"messages": [turn("user", "long " * 50), turn("assistant", "late")]}]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    table = table_of(job.run(), "scores")
    assert table[-1]["score"] is None
    assert all(row["score"] is not None for row in table[:-1])
