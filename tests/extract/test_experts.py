"""Laws of fused experts and of weights that several modules use: a row is the projected gradient of each parameter.

The oracle multiplies one token by one expert at a time and asks autograd for the gradient of every single product. It takes
the place of transformers' products, so it knows nothing of sorting, groups or hooks.

Shapes: E experts, K experts a token, P projected dims a side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    PhimoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prism_job.errors import RequestError
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import Layers, captured_layers
from prism_job.extract.capture.probe import used_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.tokenise import Encoded, collate
from tests.extract.test_gradients import CPU, DIM, EXAMPLES, FLOAT32, FLOAT64, SEED, TOLERANCE, deviation_B
from tests.models import HIDDEN, VOCAB, build_model, fill, norms_in_float64
from tests.oracle import plain_loss, rademacher, thawed

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SHARED),
    # Transposed weights, biases, gate and up interleaved.
    "gpt-oss": GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=8, **SHARED),
    # Latent attention, a shared expert, groups of experts, a router cast to float32.
    "deepseek-v3": DeepseekV3Config(
        n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=3, moe_intermediate_size=16, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        **{**SHARED, "num_key_value_heads": 4},
    ),
    # Experts without a gate, between layers of state space and attention.
    "nemotron-h": NemotronHConfig(
        head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        **{name: value for name, value in SHARED.items() if name != "num_hidden_layers"},
    ),
    # A router that is a linear layer and returns a tuple.
    "phimoe": PhimoeConfig(num_local_experts=4, num_experts_per_tok=2, **SHARED),
}  # fmt: skip
ROUTER_TOLERANCE = 1e-6
"""Of a float64 model whose router or whose state space computes in float32, whatever the type: 1e-7 seen."""

FEW = EXAMPLES[:6]
FORMAT = RowFormat(DIM, SEED, None)


@cache
def model_of(kind: str, dtype: torch.dtype) -> Any:
    attention = "eager" if kind == "gpt-oss" else "sdpa"
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention, dtype=FLOAT32)
    model = model.to(dtype).eval().requires_grad_(False)
    fill(model, seed=1)
    if dtype == FLOAT64:
        norms_in_float64(model)
    model.config.use_cache = False
    return model


class Loop:
    """The experts of a model, one token and one expert at a time; keeps the two sides of every product."""

    def __init__(self) -> None:
        self.products: list[tuple[nn.Module, str, int, int, Tensor, Tensor]] = []

    def __call__(self, experts: Any, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        outputs = []
        for token, hidden_H in enumerate(hidden_NH):
            parts = []
            for expert, weight in zip(expert_NK[token].tolist(), weight_NK[token], strict=True):
                up = self.product(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, token, hidden_H)
                inner = experts._apply_gate(up[None])[0] if experts.has_gate else experts.act_fn(up)
                parts.append(weight * self.product(experts, "down_proj", expert, token, inner))
            outputs.append(torch.stack(parts).sum(0))
        return torch.stack(outputs).to(hidden_NH.dtype)

    def product(self, experts: Any, attribute: str, expert: int, token: int, values: Tensor) -> Tensor:
        matrix = getattr(experts, attribute)[expert]
        output: Tensor = values @ matrix if experts.is_transposed else matrix @ values
        self.products.append((experts, attribute, expert, token, values.detach(), output))
        return output + getattr(experts, f"{attribute}_bias")[expert] if experts.has_bias else output


@contextmanager
def looping(model: Any) -> Iterator[Loop]:
    """The model's experts are a loop while this is entered."""
    loop = Loop()
    ALL_EXPERTS_FUNCTIONS.register("loop", loop)
    before = model.config._experts_implementation
    model.config._experts_implementation = "loop"
    try:
        yield loop
    finally:
        model.config._experts_implementation = before


def experts_loop(model: Any, example: Encoded) -> tuple[Loop, tuple[Tensor, ...]]:
    """Every product of an example's pass, and the gradient of its output."""
    with looping(model) as loop, thawed({"embedding": model.get_input_embeddings()}):
        loss = plain_loss(model, example, mean=False)[0]
        return loop, torch.autograd.grad(loss, [product[-1] for product in loop.products])


def sides_of(layers: Layers, model: Any, example: Encoded) -> dict[str, list[list[tuple[Tensor, Tensor]]]]:
    """By weight of experts, for each token, the projected sides (a [P], signed b [P]) of its K products."""
    if not any(weight.num_experts for weight in layers.weights.values()):
        return {}
    loop, gradients = experts_loop(model, example)
    names = {(id(w.modules[0]), w.attribute): name for name, w in layers.weights.items() if w.num_experts}
    found: dict[str, list[list[tuple[Tensor, Tensor]]]] = {name: [[] for _ in example.ids] for name in names.values()}
    for (experts, attribute, expert, token, values, _), gradient in zip(loop.products, gradients, strict=True):
        name = names[id(experts), attribute]
        weight = layers.weights[name]
        side_a, side_b, sign_EP = (
            torch.from_numpy(rademacher(SEED, name, side, size, DIM)).double()
            for side, size in (("a", weight.inputs), ("b", weight.outputs), ("e", weight.num_experts))
        )
        found[name][token].append((values.double() @ side_a, (gradient.double() @ side_b) * sign_EP[expert].sign()))
    return found


def rows_of(model: Any, layers: Layers, batches: list[list[Encoded]]) -> Tensor:
    capture = GradientCapture(model, layers, [FORMAT])
    return torch.cat([capture.gradients_of(collate(batch, CPU), mean=False)[0].rows_BD for batch in batches])


def oracle_rows(model: Any, layers: Layers) -> Tensor:
    rows = []
    for example in FEW:
        experts = sides_of(layers, model, example)
        plain = {name: weight for name, weight in layers.weights.items() if not weight.num_experts}
        with looping(model), thawed({name: weight.modules[0] for name, weight in plain.items()}) as parameters:
            gradients = torch.autograd.grad(plain_loss(model, example, mean=False)[0], parameters)
        sketches = dict.fromkeys(layers.names, torch.zeros(()))
        for (name, weight), gradient in zip(plain.items(), gradients, strict=True):
            side_a, side_b = (
                torch.from_numpy(rademacher(SEED, name, side, size, DIM)).double()
                for side, size in (("a", weight.inputs), ("b", weight.outputs))
            )
            sketches[name] = side_b.T @ gradient.double() @ side_a
        for name, tokens in experts.items():
            sketches[name] = torch.stack([torch.outer(b, a) for products in tokens for a, b in products]).sum(0)
        rows.append(torch.cat([sketch.flatten() for sketch in sketches.values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_experts_are_the_projected_gradients_of_their_parameters(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype)
    layers = used_layers(model, captured_layers(model, ("*",)))
    assert layers.coverage > 0.98, "all but short convolutions"
    wanted = oracle_rows(model, layers)
    tolerance = max(TOLERANCE[dtype], ROUTER_TOLERANCE)
    for size in (1, 6):
        batches = [FEW[start : start + size] for start in range(0, len(FEW), size)]
        assert bool((deviation_B(rows_of(model, layers, batches), wanted) < tolerance).all())


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_factors_of_experts_weigh_tokens_as_they_were_routed(kind: str) -> None:
    """The up projections of a token's experts share an input; of the down projections each counts as a row of 1/K."""
    model = model_of(kind, FLOAT64)
    layers = captured_layers(model, ("*.experts.*",))
    capture = GradientCapture(model, layers, [FORMAT])
    factors = capture.new_factors()
    capture.gradients_of(collate(FEW, CPU), mean=False, factors=factors)
    sums = {name: (torch.zeros(DIM, DIM).double(), torch.zeros(DIM, DIM).double()) for name in layers.names}
    for example in FEW:
        for name, tokens in sides_of(layers, model, example).items():
            for products in tokens:
                if name.endswith("up_proj"):
                    products = [(products[0][0], torch.stack([b for _, b in products]).sum(0))]
                for a, b in products:
                    sums[name][0].add_(torch.outer(a, a) / len(products))
                    sums[name][1].add_(torch.outer(b, b))
    assert factors.num_tokens == sum(len(example.ids) for example in FEW)
    for found_LPP, side in ((factors.inputs_LPP, 0), (factors.outputs_LPP, 1)):
        wanted = torch.stack([sums[name][side] for name in layers.names])
        assert bool((deviation_B(found_LPP.flatten(1), wanted.flatten(1)) < ROUTER_TOLERANCE).all())


def test_capture_changes_no_logits_and_leaves_the_implementation_as_it_was() -> None:
    model = model_of("mixtral", FLOAT32)
    ids = torch.tensor([FEW[3].ids])
    before = model.config._experts_implementation
    wanted = model(input_ids=ids).logits
    rows_of(model, captured_layers(model, ("*",)), [FEW])
    assert model.config._experts_implementation == before
    assert torch.equal(model(input_ids=ids).logits, wanted)


def test_the_expected_sketch_is_that_of_independent_projections() -> None:
    """⟨sketch of x, sketch of y⟩ is unbiased over seeds: the mean over 400 seeds is within 4 standard errors of ⟨x, y⟩."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 8, 6, generator=generator).double() for _ in range(2))
    y = y + 0.5 * x
    products = []
    for seed in range(400):
        side_a, side_b = (torch.from_numpy(rademacher(seed, "w", side, size, 4)) for side, size in (("a", 6), ("b", 8)))
        sign_EP = torch.from_numpy(rademacher(seed, "w", "e", 3, 4)).sign()
        first, second = (torch.einsum("ep,op,eoi,iq->pq", sign_EP, side_b, each.float(), side_a) for each in (x, y))
        products.append((first * second).sum())
    found = torch.stack(products)
    assert abs(found.mean() - (x * y).sum()) < 4 * found.std() / 20


# One parameter, several modules


def with_shared_mlps() -> Any:
    """Two modules hold one Parameter each pair, as Zamba's blocks and tied layers do."""
    model = build_model("llama", FLOAT64, seed=1)
    first, second = (layer.mlp for layer in model.model.layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    return model


def test_a_weight_of_two_modules_is_one_layer_with_the_gradient_of_the_parameter() -> None:
    model = with_shared_mlps()
    layers = captured_layers(model, ("*",))
    assert not [name for name in layers.names if name.startswith("model.layers.1.mlp")]
    assert layers.coverage == layers.share_of_model == 1
    found = rows_of(model, used_layers(model, layers), [FEW])
    assert bool((deviation_B(found, oracle_rows(model, layers)) < TOLERANCE[FLOAT64]).all())


def test_factors_do_not_depend_on_how_the_rows_of_a_token_come() -> None:
    """Two rows a token in one use of a weight, or in two uses, are the same layer."""
    found = []
    for in_one_use in (True, False):
        model = build_model("llama", FLOAT64, seed=1)
        for layer in model.model.layers:
            plain = layer.mlp.forward
            layer.mlp.forward = (
                (lambda x, plain=plain: plain(torch.stack([x, 2 * x], 2)).sum(2))
                if in_one_use
                else (lambda x, plain=plain: plain(x) + plain(2 * x))
            )
        capture = GradientCapture(model, captured_layers(model, ("*",)), [FORMAT])
        factors = capture.new_factors()
        capture.gradients_of(collate(FEW, CPU), mean=False, factors=factors)
        found.append(factors)
    for name in ("inputs_LPP", "outputs_LPP"):
        first, second = (getattr(each, name).flatten(1) for each in found)
        assert bool((deviation_B(first, second) < TOLERANCE[FLOAT64]).all())


# The probe


@pytest.mark.parametrize("reserved", [0, 100, 290], ids=["none", "a third", "nearly all"])
def test_reserved_ids_of_one_embedding_do_not_deceive_the_probe(reserved: int) -> None:
    model = build_model("llama", FLOAT64, seed=1)
    model.get_input_embeddings().weight.data[:reserved] = 0.1
    assert used_layers(model, captured_layers(model, ("*",))).coverage == 1


@pytest.mark.parametrize("ends", [2, [2, 5], None])
def test_ids_that_the_config_names_are_a_number_a_list_or_something_else(ends: Any) -> None:
    model = build_model("llama", FLOAT64, seed=1)
    model.config.eos_token_id = ends
    model.config.image_token_id = 0
    model.config.audio_token_id = {"a": 2}
    assert used_layers(model, captured_layers(model, ("*",))).coverage == 1


def test_what_one_rank_cannot_capture_no_rank_captures() -> None:
    model = build_model("llama", FLOAT64, seed=1)
    layers = captured_layers(model, ("*",))
    refused = layers.names[0]
    found = used_layers(model, layers, lambda *flags: [name == refused for name in layers.names])
    assert found.names == layers.names[1:]
    assert list(found.unseen) == [refused]


def reshaped(model: Any, there: Any, back: Any) -> Any:
    for layer in model.model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda given, plain=plain: back(plain(there(given)))
    return model


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (lambda x: x[:, None], lambda x: x[:, 0]),
        (lambda x: x.flatten(0, 1), lambda x: x),
        (lambda x: x.flatten(0, 1)[:, None], lambda x: x[:, 0]),
        (lambda x: torch.stack([x, x], 2), lambda x: x.mean(2)),
    ],
    ids=["B1T", "BT", "BT1", "two uses a token"],
)
def test_any_shape_of_one_or_more_rows_a_token_gives_the_gradient(there: Any, back: Any) -> None:
    model = build_model("llama", FLOAT64, seed=1)
    shape: list[Any] = []
    reshaped(model, lambda x: (shape.append(x.shape), there(x))[1], lambda x: back(x).reshape(shape[-1]))
    layers = used_layers(model, captured_layers(model, ("*",)))
    found = rows_of(model, layers, [FEW])
    assert bool((deviation_B(found, oracle_rows(model, layers)) < TOLERANCE[FLOAT64]).all())


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
        (lambda x: x.transpose(0, 1).flatten(0, 1), lambda x: x.view(-1, 3, HIDDEN).transpose(0, 1)),
    ],
    ids=["TB", "tokens first on one axis"],
)
def test_tokens_before_examples_are_found_by_the_probe_even_where_the_sizes_agree(there: Any, back: Any) -> None:
    model = reshaped(build_model("llama", FLOAT64, seed=1), there, back)
    with pytest.raises(
        RequestError, match=r"capture covers .*not captured: model\.layers\.\d\.mlp\.\w+ \(it"
    ) as refusal:
        used_layers(model, captured_layers(model, ("*",)))
    assert "!GLOB" in refusal.value.fix
    layers = used_layers(model, captured_layers(model, ("!*.mlp.*",)))
    assert len(layers.weights) == 8


def test_a_weight_that_no_text_passes_through_is_left_out_and_counted() -> None:
    model = build_model("llama", FLOAT64, seed=1)
    model.beside = nn.Linear(4, HIDDEN, dtype=FLOAT64).requires_grad_(False)
    model.unused = nn.Linear(4, 4, dtype=FLOAT64).requires_grad_(False)
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda given: plain(given) + model.beside(torch.ones(*given.shape[:2], 4, dtype=FLOAT64))
    layers = used_layers(model, captured_layers(model, ("*",)))
    assert layers.unseen == {"beside": 4 * HIDDEN, "unused": 16}
    assert layers.coverage == pytest.approx(1 - (4 * HIDDEN + 16) / layers.num_requested)
    rows_of(model, layers, [FEW])
