"""Laws of `estimate`: it predicts what a run then writes and computes, reads no weights and writes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from launcher.follow import estimate_table as tables
from prism_job.estimate import costs
from prism_job.estimate.model_shape import ModelShape, model_shape
from prism_job.estimate.workload import Load, Workload
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.model import load_model
from prism_job.extract.tokenise import Encoded, collate
from prism_job.spec.model import ModelSpec
from prism_job.stages import extract
from tests.conftest import Job, candidate, pair, turn, write_jsonl
from tests.models import build_tokenizer, save_tiny_adapter, save_tiny_model

LLAMA_3_70B = {
    # As published with meta-llama/Meta-Llama-3-70B, what decides shapes.
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def estimated(job: Job, *options: str) -> dict[str, Any]:
    return job.passes("estimate", "--spec", str(job.spec_path()), *options)


def written_bytes(job: Job) -> int:
    return sum(path.stat().st_size for path in Path(job.spec["store"]).rglob("*") if path.is_file())


def spec_of(job: Job) -> Any:
    return job.parsed().spec


@pytest.mark.parametrize(
    ("curvature", "codec", "weighting", "audited"),  # every two settings meet
    [
        ("kfac", "sign", "preference", 7),
        ("kfac", "float16", "preference", 0),
        ("kfac", "sign", "uniform", 0),
        ("none", "float16", "uniform", 7),
        ("none", "sign", "preference", 0),
    ],
)
def test_tokens_are_predicted_exactly_and_bytes_within_two_per_cent(
    job: Job, curvature: str, codec: str, weighting: str, audited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_of, padded = GradientCapture.gradients_of, 0

    def counted(capture: GradientCapture, batch: Any, **named: Any) -> Any:
        nonlocal padded
        padded += batch.ids_BT.numel()
        return gradients_of(capture, batch, **named)

    monkeypatch.setattr(GradientCapture, "gradients_of", counted)
    rows = [candidate(number) for number in range(30)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    write_jsonl(job.folder / "pool" / "same.jsonl", rows[:8])
    write_jsonl(job.folder / "pool" / "text.jsonl", [{"text": "word " * (1 + number)} for number in range(11)])
    # Read by the plan, refused by the tokenisation: the response lies beyond maxLength.
    write_jsonl(job.folder / "pool" / "late.jsonl", [{"prompt": "long " * 200, "completion": "x"}, candidate(77)])
    pairs = [pair(number) | {"rejected": [turn("assistant", "Rome or " * (1 + number % 7))]} for number in range(18)]
    if weighting == "uniform":
        del pairs[3]["rejected"]
    write_jsonl(job.folder / "targets.jsonl", pairs)
    job.spec["candidates"]["maxBadFraction"] = 0.1
    job.spec["scoring"] = {"curvature": {"kind": curvature}, "weighting": weighting}
    job.use_codec(codec)
    job.spec["audit"] = {"examples": audited}
    predicted = estimated(job)
    assert not Path(job.spec["store"]).exists()
    assert not Path(job.spec["output"]).exists()
    plan = job.plan()
    extracted = job.passes("extract")
    assert (predicted["tokens"], predicted["tokens_padded"]) == (extracted["tokens"], padded)
    assert (predicted["tokens_of_audit"] > 0) == (predicted["store"]["audit"] > 0) == bool(audited)
    assert predicted["tokens_are_exact"]
    assert (predicted["num_examples"], predicted["num_pairs"]) == (plan["examples"], plan["pairs"])
    assert predicted["bad_rows"] == 1
    # The estimate leaves out the reasons of quarantined rows, and digits of counts in the headers.
    assert predicted["store_bytes"] == pytest.approx(written_bytes(job), rel=0.02)
    assert predicted["store_bytes"] == sum(predicted["store"].values())


@pytest.mark.parametrize("audited", [0, 7])
def test_a_file_that_stands_in_two_sets_is_counted_once_by_estimate_plan_and_extraction(job: Job, audited: int) -> None:
    first_unit = [candidate(number) for number in range(4)]
    write_jsonl(job.folder / "pool" / "same.jsonl", first_unit)
    shared, own = str(job.folder / "targets.jsonl"), str(write_jsonl(job.folder / "own.jsonl", [pair(30)]))
    job.spec["targets"] = {"sets": [{"name": "a", "uris": [shared]}, {"name": "b", "uris": [shared, own], "sign": -1}]}
    job.spec["audit"] = {"examples": audited}
    predicted, plan = estimated(job), job.plan()
    extracted = job.passes("extract")
    units = 3 + 2 + (2 + 2 if audited else 0)  # of the pool, of the targets, and of both again
    assert predicted["units"] == plan["units"] == plan["missing"] == extracted["units"] == units
    assert predicted["tokens"] == extracted["tokens"]
    assert predicted["store_bytes"] == pytest.approx(written_bytes(job), rel=0.02)


def test_a_sample_is_scaled_and_reported_as_one(job: Job) -> None:
    # All texts have one length, so the scaled figure must be the whole one.
    write_jsonl(job.folder / "pool" / "a.jsonl", [{"text": f"number {100 + number}"} for number in range(40)])
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(1, 7)])
    job.spec["audit"] = {"examples": 7}
    exact, sampled = estimated(job), estimated(job, "--sample", "3")
    assert not sampled["tokens_are_exact"]
    assert "scaled: one row in 3" in tables.estimate_table(sampled)
    assert sampled["tokens"] == exact["tokens"]
    assert sampled["store_bytes"] == exact["store_bytes"]


def test_llama_3_70b_gets_a_topology_from_its_config_alone(job: Job) -> None:
    folder = job.folder / "llama-3-70b"
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_70B))
    job.spec["model"] = {"uri": str(folder), "dtype": "bfloat16"}
    job.spec["extraction"] |= {"projection": {"dim": 64}, "codec": {"kind": "sign", "dims": 65536}}
    predicted = estimated(job)
    assert predicted["parameters"] == 70_553_706_496
    assert predicted["parameters_covered"] == predicted["parameters"] - 2 * 128256 * 8192 - (2 * 80 + 1) * 8192
    assert (predicted["topology"]["stage"], predicted["topology"]["offload"]) == (3, "none")
    assert "ZeRO stage 3, tokensPerBatch" in tables.estimate_table(predicted)
    assert "none fits" in tables.estimate_table(predicted | {"topology": None})
    assert predicted["topology"]["device_bytes"] <= 0.85 * predicted["gpu_memory_bytes"]
    by_setting = {(row["stage"], row["offload"]): row for row in predicted["memory"][:4]}
    assert set(by_setting) == {(0, "none"), (3, "none"), (3, "cpu"), (3, "nvme")}
    assert not by_setting[0, "none"]["fits"]
    assert by_setting[0, "none"]["weights_bytes"] == 2 * predicted["parameters"]
    world = by_setting[3, "none"]
    assert world["weights_bytes"] == 2 * predicted["parameters"] // world["ranks"]
    for row in predicted["memory"]:
        terms = [value for name, value in row.items() if name.endswith("_bytes")]
        outside = row["device_bytes"] + row["host_bytes"] + row["nvme_bytes"]
        assert sum(terms) - outside == pytest.approx(row["device_bytes"], abs=len(terms))  # each term is rounded


def test_a_model_on_s3_needs_no_weights(job: Job, s3: Any) -> None:
    at_home = estimated(job)
    for path in Path(job.spec["model"]["uri"]).iterdir():
        if path.suffix != ".safetensors":
            s3.upload_file(str(path), "corpora", f"model/{path.name}")
    job.spec["model"]["uri"] = "s3://corpora/model"
    assert estimated(job)["tokens"] == at_home["tokens"]
    assert not list((job.folder / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "tied", "adapter"])
def test_the_shape_is_that_of_the_model_that_is_loaded(job: Job, kind: str) -> None:
    job.spec["model"]["uri"] = str(save_tiny_model(job.folder / "model", "llama" if kind == "adapter" else kind))
    if kind == "adapter":
        job.spec["model"]["adapter"] = str(save_tiny_adapter(job.folder / "adapter"))
    spec = spec_of(job)
    shape = model_shape(spec)
    model = load_model(spec.model, torch.device("cpu"))
    layers = captured_layers(model, spec.extraction.layers)
    assert list(shape.sides) == layers.names
    assert shape.covered == sum(weight.parameter.numel() for weight in layers.weights.values())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


class _Counting(TorchDispatchMode):
    """torch's own FLOP formulas summed over all operations; FlopCounterMode's module hooks do not bear autograd.grad."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        self.flops += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


@pytest.mark.parametrize(("kind", "with_factors"), [("llama", False), ("llama", True), ("gpt2", True), ("tied", False)])
def test_flops_are_those_that_torch_counts(job: Job, kind: str, with_factors: bool) -> None:
    job.spec["model"] |= {"uri": str(save_tiny_model(job.folder / "model", kind)), "attention": "eager"}
    spec = spec_of(job)
    model = load_model(spec.model, torch.device("cpu"))
    capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(8, 0, None)])
    texts = [Encoded(list(range(3, 43)), [False] * 30 + [True] * 10) for _ in range(5)]
    with _Counting() as counter:
        factors = capture.new_factors() if with_factors else None
        capture.gradients_of(collate(texts, capture.device), mean=False, factors=factors)
    load = Load(texts=5, tokens=200, padded=200, squares=5 * 40**2, supervised=50)
    shape = model_shape(spec)
    predicted = costs.forward_flops(shape, load) + costs.backward_flops(shape, load)
    predicted += costs.projection_flops(shape, 8, load)
    predicted += costs.sketch_flops(shape, 8, load, load if with_factors else Load())
    # RoPE's angles are a small product that the formula leaves out.
    assert predicted == pytest.approx(counter.flops, rel=2e-3)


@pytest.mark.parametrize("audited", [0, 7])
def test_flops_of_a_whole_run_are_those_that_torch_counts(
    job: Job, audited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its two passes of 21 tokens are not counted: nothing beside a real run, a fiftieth of this one.
    monkeypatch.setattr(extract, "used_layers", lambda model, layers: layers)
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(18)])
    job.spec["model"]["attention"] = "eager"
    job.spec["audit"] = {"examples": audited}
    predicted = estimated(job)
    job.plan()
    with _Counting() as counter:
        job.passes("extract")
    # RoPE's angles, as above.
    assert predicted["flops"]["total"] == pytest.approx(counter.flops, rel=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_bounded_by_what_autograd_keeps(job: Job, dtype: str) -> None:
    job.spec["model"]["dtype"] = dtype
    spec = spec_of(job)
    model: Any = load_model(spec.model, torch.device("cpu"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embedded = torch.randn(1, 256, 32, dtype=getattr(torch, dtype)).requires_grad_()
        model.model(inputs_embeds=embedded, use_cache=False)
    measured = sum(size for _, size in kept.values())
    predicted = costs.activation_bytes(model_shape(spec), 256)
    # Norms and softmax statistics weigh more in a model 32 wide than in a real one, whence up to 1.25; see the formula.
    assert 0.6 * predicted < measured < 1.25 * predicted


SHAPE = ModelShape(
    parameters=10**9,
    covered=9 * 10**8,
    coverage=1.0,
    matrices=9 * 10**8,
    head=10**8,
    vocabulary=50_000,
    largest_block=4 * 10**7,
    largest_tensor=10**8,
    attention_width=2048 * 22,
    sides={f"layer{number}": (2048, 2048) for number in range(150)},
    linear_sides=150 * 4096,
    widest_side=8192,
    dtype_bytes=2,
    buffer_bytes=256,
)
WORK = Workload([], [], [], 1000, 10, 0, 0, Load(1000, 10**6), Load(), Load(), 512, 8, 0.5, True)


@pytest.mark.parametrize(
    ("parameters", "card", "gpus_per_node", "expected"),
    [
        (10**9, "H100", 8, (0, "none", 1, 1)),
        (40 * 10**9, "H100", 8, (3, "none", 1, 2)),
        (70 * 10**9, "H100", 8, (3, "none", 1, 4)),
        (70 * 10**9, "H200", 8, (3, "none", 1, 2)),
        (500 * 10**9, "H100", 8, (3, "none", 3, 8)),
        (500 * 10**9, "H100", 1, (3, "cpu", 1, 1)),
    ],
)
def test_the_topology_is_the_smallest_that_fits(
    job: Job, parameters: int, card: str, gpus_per_node: int, expected: tuple[int, str, int, int]
) -> None:
    shape = replace(SHAPE, parameters=parameters)
    chosen = costs.choose_topology(shape, spec_of(job), WORK, costs.GPUS[card], gpus_per_node)
    assert chosen is not None
    assert (chosen.stage, chosen.offload, chosen.nodes, chosen.gpus_per_node) == expected


def test_passes_over_pairs_hold_the_audits_sketches_beside_their_own(job: Job) -> None:
    terms = []
    for audited in (0, 7):
        job.spec["audit"] = {"examples": audited}
        job.spec["extraction"] |= {"projection": {"dim": 64}, "codec": {"kind": "sign", "dims": 65536}}
        work = replace(WORK, largest_batch=100)
        terms.append(costs.memory_of_rank(SHAPE, spec_of(job), work, 0, "none", 1, 4096))
    alone, beside = terms
    assert (alone.captured, beside.captured) == (4096 * 150 * 64 * 4, 4096 * 150 * (64 + 128) * 4)
    assert beside.rows - alone.rows > 4 * 32 * 150 * 128**2, "16 pairs, both sides"


def test_a_budget_is_halved_before_more_nodes_are_taken_and_never_under_the_longest_text(job: Job) -> None:
    shape = replace(SHAPE, parameters=70 * 10**9, linear_sides=8 * 10**6)
    chosen = costs.choose_topology(shape, spec_of(job), WORK, costs.GPUS["H100"])
    assert chosen is not None
    assert (chosen.nodes, chosen.tokens_per_batch) == (1, 2048)
    endless = replace(WORK, longest=8192)
    assert costs.choose_topology(shape, spec_of(job), endless, costs.GPUS["H100"]) is None


def test_float32_work_is_counted_at_the_float32_peak() -> None:
    flops = costs.Flops(forward=1e18, backward=1e18, projection=1e17, sketches=1e16)
    card, fast, slow = costs.GPUS["H100"], 989.5e12, 67e12
    wanted = {
        "bfloat16": 2.1e18 / fast + 1e16 / slow,
        "float16": 2e18 / fast + 1.1e17 / slow,
        "float32": 2.11e18 / slow,
    }
    for dtype, seconds in wanted.items():
        model = ModelSpec.model_validate({"uri": "/model", "dtype": dtype})
        assert costs.gpu_hours(flops, card, model, 0.5) == pytest.approx(seconds / 0.5 / 3600)


@pytest.mark.parametrize(
    ("dtype", "size", "gradients", "copied"), [("float32", 4, 8, 0), ("float16", 4, 4, 4), ("bfloat16", 2, 4, 0)]
)
def test_projections_of_a_bfloat16_model_are_counted_in_bfloat16(
    job: Job, dtype: str, size: int, gradients: int, copied: int
) -> None:
    job.spec["model"]["dtype"] = dtype
    job.spec["extraction"] |= {"projection": {"dim": 64}, "codec": {"kind": "float16"}}
    shape = replace(SHAPE, dtype_bytes=gradients // 2)
    predicted = costs.memory_of_rank(shape, spec_of(job), WORK, 0, "none", 1, 4096)
    assert (predicted.projections, predicted.captured) == (150 * 4096 * 64 * size, 4096 * 150 * 64 * size)
    assert predicted.workspace == 4096 * (8192 * (gradients + copied) + 24 * 64)


@pytest.mark.parametrize(
    ("case", "options", "exit_code", "mention"),
    [
        ("gpu", ["--gpu", "abacus"], 64, "H100"),
        ("utilisation", ["--utilisation", "1.5"], 64, "out of bounds"),
        ("sample", ["--sample", "0"], 64, "out of bounds"),
        ("target", [], 65, "no response token within maxLength"),
        ("model", [], 64, "no such model"),
        ("config", [], 64, "config.json"),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(
    job: Job, case: str, options: list[str], exit_code: int, mention: str
) -> None:
    if case == "target":
        write_jsonl(job.folder / "targets.jsonl", [{"prompt": "long " * 200, "chosen": "x", "rejected": "y"}])
    if case == "model":
        job.spec["model"]["uri"] = str(job.folder / "nothing-here")
    if case == "config":
        build_tokenizer().save_pretrained(job.folder / "no-config")
        job.spec["model"]["uri"] = str(job.folder / "no-config")
    job.refuses(("estimate", "--spec", str(job.spec_path()), *options), exit_code, mention)
