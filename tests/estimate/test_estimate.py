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
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.follow import estimate_table as tables
from prism_job.estimate import costs
from prism_job.estimate.meta_pass import Growth, count_text, equal_blocks
from prism_job.estimate.model_shape import ModelShape, Sides, model_shape
from prism_job.estimate.workload import Load, Workload
from prism_job.extract import rank
from prism_job.extract.capture.experts import IMPLEMENTATION
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.probe import used_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.load.model import load_model
from prism_job.extract.tokenise import Encoded, collate
from prism_job.spec.model import ModelSpec
from tests.conftest import Job, candidate, pair, turn, write_jsonl
from tests.models import build_tokenizer, save_tiny_adapter, save_tiny_model


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


def test_a_preference_model_costs_a_forward_pass_of_the_pairs_and_their_losses(job: Job) -> None:
    """In its own tokens; the audit then keeps a row of each pair."""
    job.spec["audit"] = {"examples": 7}
    without = estimated(job)
    other = save_tiny_model(job.folder / "other", "gpt2")
    job.spec["scoring"] = {"preferenceModel": {"uri": str(other), "dtype": "float32"}}
    predicted = estimated(job)
    of_pairs = predicted["preference_model"]
    plan, extracted = job.plan(), job.passes("extract")
    assert predicted["units"] == plan["units"] == without["units"] + 1
    assert predicted["tokens"] == without["tokens"]
    assert predicted["tokens"] + of_pairs["tokens"] == extracted["tokens"]
    assert predicted["gpu_hours"] == pytest.approx(without["gpu_hours"] + of_pairs["gpu_hours"])
    assert predicted["store_bytes"] == pytest.approx(written_bytes(job), rel=0.02)
    assert (of_pairs["model"], of_pairs["fits"], of_pairs["flops"] > 0) == (str(other), True, True)
    job.spec["scoring"]["preferenceModel"]["uri"] = str(job.folder / "nothing.gguf")
    job.refuses(("estimate", "--spec", str(job.spec_path())), 64, "scoring.preferenceModel.uri")


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


def test_a_tower_that_a_text_does_not_pass_through_costs_nothing(job: Job) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "model_type": "gemma3",
        "text_config": TINY | {"model_type": "gemma3_text", "head_dim": 8},
        "vision_config": vision | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    }
    folder = job.folder / "multimodal"
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    job.spec["model"]["uri"] = str(folder)
    shape = model_shape(spec_of(job))
    assert shape.matrices == shape.covered == 3 * (4 * 32 * 32 + 3 * 32 * 48)
    assert shape.parameters > shape.matrices + shape.head + 2 * (4 * 32 * 32 + 2 * 32 * 48)


class _Counting(TorchDispatchMode):
    """torch's own FLOP formulas summed over all operations; FlopCounterMode's module hooks do not bear autograd.grad."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        self.flops += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MIXTURES = {
    # Latent attention, of which keys and values differ in size; one dense layer, then routed experts beside a shared one.
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "topk_group": 1,
        "v_head_dim": 16,
    },
    # Experts stored transposed, with biases.
    "gpt_oss": {"head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4},
    # Linear attention in two layers of three.
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 24,
    },
}


def save_mixture(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY | MIXTURES[kind])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MIXTURES)
def test_equal_blocks_count_as_if_each_was_computed(kind: str) -> None:
    layers = {"num_hidden_layers": 6, "layer_types": 2 * MIXTURES["qwen3_next"]["layer_types"]}  # type: ignore[operator]
    config = AutoConfig.for_model(kind, **TINY | MIXTURES[kind] | (layers if kind == "qwen3_next" else {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval().requires_grad_(False)
    groups = equal_blocks(model)
    assert sum(map(len, groups)) >= 2
    once, each = (count_text(model, 64, True, some) for some in (groups, []))
    assert once.rows == each.rows
    assert once.num_experts == each.num_experts
    assert once.called == each.called
    assert once.product_flops == each.product_flops
    # What a stack's first block keeps for all, such as RoPE's angles, is counted for each.
    assert once.kept_bytes == pytest.approx(each.kept_bytes, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "with_factors", "tolerance"),
    [
        # RoPE's angles are a small product, counted three times here and once by torch.
        ("llama", False, 2e-3),
        ("llama", True, 2e-3),
        ("gpt2", True, 2e-3),
        ("tied", False, 2e-3),
        ("mixtral", True, 2e-3),
        ("deepseek_v3", True, 2e-3),
        ("gpt_oss", False, 2e-3),
        # Forward exact; the backward pass of its linear attention takes 2.3 times its products, not twice.
        ("qwen3_next", True, 0.05),
    ],
)
def test_flops_are_those_that_torch_counts(job: Job, kind: str, with_factors: bool, tolerance: float) -> None:
    save = save_mixture if kind in MIXTURES else save_tiny_model
    job.spec["model"] |= {"uri": str(save(job.folder / "model", kind)), "attention": "eager"}
    spec = spec_of(job)
    model = load_model(spec.model, torch.device("cpu"))
    layers = used_layers(model, captured_layers(model, ("*",)))
    capture = GradientCapture(model, layers, [RowFormat(8, 0, None)])
    texts = [Encoded(list(range(3, 67)), [False] * 54 + [True] * 10) for _ in range(5)]
    with _Counting() as counter:
        factors = capture.new_factors() if with_factors else None
        capture.gradients_of(collate(texts, capture.device), mean=False, factors=factors)
    load = Load(texts=5, tokens=320, padded=320, squares=5 * 64**2, supervised=50)
    shape = model_shape(spec)
    assert list(shape.sides) == layers.names
    assert shape.coverage == layers.coverage
    predicted = costs.forward_flops(shape, load) + costs.backward_flops(shape, load)
    predicted += costs.projection_flops(shape, 8, load)
    predicted += costs.sketch_flops(shape, 8, load, load if with_factors else Load())
    assert predicted == pytest.approx(counter.flops, rel=tolerance)


@pytest.mark.parametrize("audited", [0, 7])
def test_flops_of_a_whole_run_are_those_that_torch_counts(
    job: Job, audited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its two passes of 21 tokens are not counted: nothing beside a real run, a fiftieth of this one.
    monkeypatch.setattr(rank, "used_layers", lambda model, layers, any_rank: layers)
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
@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3", "gpt_oss"])
def test_activations_are_what_autograd_keeps(job: Job, kind: str, dtype: str) -> None:
    save = save_mixture if kind in MIXTURES else save_tiny_model
    job.spec["model"] |= {"uri": str(save(job.folder / "model", kind)), "dtype": dtype}
    if kind == "deepseek_v3":  # the CPU has no fused kernel where keys and values differ in size
        job.spec["model"]["attention"] = "eager"
    spec = spec_of(job)
    model: Any = load_model(spec.model, torch.device("cpu"))
    model.config._experts_implementation_internal = IMPLEMENTATION
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
    predicted = costs.activation_bytes(model_shape(spec), 256, 256)
    # Kept beside: places of routed rows, copies of weights in float32, statistics of softmax. Small beside a real width.
    assert measured == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_bytes_of_quantised_weights_are_those_that_are_loaded(job: Job, kind: str, quantization: str) -> None:
    folder = save_tiny_model(job.folder / "model", kind)
    job.spec["model"] |= {"uri": str(folder), "quantization": quantization, "dtype": "bfloat16"}
    spec = spec_of(job)
    held = 0
    for parameter in load_model(spec.model, torch.device("cpu")).parameters():
        held += parameter.nbytes
        held += sum(each.nbytes for each in _scales(parameter))
    # The scales of nf4's scales come in blocks of 256, which these small weights do not fill.
    assert model_shape(spec).weight_bytes == pytest.approx(held, rel=0.02)


def _scales(parameter: Any) -> list[torch.Tensor]:
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return [state.absmax, state.state2.absmax]
    return [parameter.SCB] if parameter.dtype == torch.int8 else []


SHAPE = ModelShape(
    parameters=10**9,
    active=10**9,
    covered=9 * 10**8,
    coverage=1.0,
    share_of_model=1.0,
    matrices=9 * 10**8,
    head=10**8,
    vocabulary=50_000,
    largest_block=4 * 10**7,
    largest_tensor=10**8,
    products=Growth(0, 4 * 2048 * 22),
    kept=Growth(150 * 4096 * 2, 0),
    sides={f"layer{number}": Sides(2048, 2048, 1, 1, 1) for number in range(150)},
    widest_side=8192,
    weight_bytes=2 * 10**9,
    dequantised=0,
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
    shape = replace(SHAPE, weight_bytes=2 * parameters)
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
    shape = replace(SHAPE, weight_bytes=140 * 10**9, kept=Growth(16 * 10**6, 0))
    chosen = costs.choose_topology(shape, spec_of(job), WORK, costs.GPUS["H100"])
    assert chosen is not None
    assert (chosen.nodes, chosen.tokens_per_batch) == (1, 2048)
    endless = replace(WORK, longest=8192)
    assert costs.choose_topology(shape, spec_of(job), endless, costs.GPUS["H100"]) is None


def test_an_automatic_budget_grows_while_there_is_room_and_a_number_does_not(job: Job) -> None:
    budgets = {}
    for asked in ("auto", 4096):
        job.spec["extraction"]["tokensPerBatch"] = asked
        chosen = costs.choose_topology(SHAPE, spec_of(job), WORK, costs.GPUS["H100"])
        assert chosen is not None
        budgets[asked] = chosen.tokens_per_batch
    assert budgets == {"auto": 32768, 4096: 4096}


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
