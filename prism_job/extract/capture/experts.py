"""Fused experts: one parameter holds the matrices of all experts of a layer (docs/architecture.md, Fused experts).

The sketch of an example is Σ_e diag(σ_e) P_bᵀ G_e P_a: one pair of projections a parameter, and ±1 vectors σ_e that make
the experts' parts independent. So a row grows neither with the number of experts nor with how many run for a token.

Shapes: N = B·T tokens, K experts a token, S = N·K routed rows, sorted by expert; E experts; H hidden dims, F dims of the up
product, I of the down product's input; P projected dims a side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prism_job.extract.capture.layers import Layers, is_own_experts
from prism_job.extract.capture.sketches import PassSketches
from prism_job.extract.load.quantised import dequantised, is_quantised

IMPLEMENTATION = "prism"
"""The name in transformers' interface of experts under which `experts_forward` stands."""

_watched: dict[nn.Module, tuple[dict[str, str], PassSketches | None]] = {}
"""Experts modules of the pass that runs: the names of their captured weights by attribute, and where the sides go."""


@contextmanager
def captured_experts(layers: Layers, sketches: PassSketches) -> Iterator[None]:
    """The experts' parameters hand their projected sides to `sketches` while this is entered."""
    names: dict[nn.Module, dict[str, str]] = {}
    for name, weight in layers.weights.items():
        if weight.num_experts:
            for module in weight.modules:
                names.setdefault(module, {})[weight.attribute] = name
    configs = {id(module.config): cast(Any, module.config) for module in names if not is_own_experts(module)}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    try:
        _watched.update({module: (of_module, sketches) for module, of_module in names.items()})
        for config in configs.values():
            config._experts_implementation_internal = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        for module in names:
            del _watched[module]


def watched(experts: nn.Module) -> tuple[dict[str, str], PassSketches | None]:
    """The names of its captured weights by attribute, and where their sides go."""
    return _watched.get(experts, ({}, None))


def experts_forward(experts: Any, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """What transformers' grouped product computes, in the same order: [N, H]."""
    names, sketches = watched(experts)
    expert_S, order_S = torch.sort(expert_NK.flatten(), stable=True)
    routing = _Routing(order_S, expert_NK.shape[1])
    ends_E = torch.searchsorted(expert_S, torch.arange(experts.num_experts, device=expert_S.device), right=True)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    up_SF = product(_Routed.apply(hidden_NH, routing), experts, up, expert_S, ends_E)
    inner_SI = experts._apply_gate(up_SF) if experts.has_gate else experts.act_fn(up_SF)
    down_SH = product(inner_SI, experts, "down_proj", expert_S, ends_E)
    has_norm = getattr(experts, "has_post_expert_norm", False)
    out_SH = experts.post_expert_norm(down_SH) if has_norm else down_SH
    weighted_SH = out_SH * weight_NK.flatten()[order_S, None]
    output_NH = _Combined.apply(weighted_SH, routing).to(hidden_NH.dtype)

    if sketches is not None and up in names:
        # A token's input is the same for all its experts, so its K output gradients are summed first.
        def up_side_b(gradient_SF: Tensor, side_b: Tensor, sign_EP: Tensor) -> Tensor:
            return routing.by_token((gradient_SF.to(side_b.dtype) @ side_b) * sign_EP[expert_S]).sum(1)

        on_use(names[up], sketches, hidden_NH, None, up_SF, up_side_b)
    if sketches is not None and "down_proj" in names:
        # Without a norm in between, the gradient of a routed row is its token's times its routing weight.
        def down_side_b(gradient_NH: Tensor, side_b: Tensor, sign_EP: Tensor) -> Tensor:
            side_NP = gradient_NH.to(side_b.dtype) @ side_b
            return side_NP[:, None] * (weight_NK.detach()[..., None] * sign_EP[expert_NK])

        def down_side_b_before_norm(gradient_SH: Tensor, side_b: Tensor, sign_EP: Tensor) -> Tensor:
            return routing.by_token((gradient_SH.to(side_b.dtype) @ side_b) * sign_EP[expert_S])

        followed, side_b = (down_SH, down_side_b_before_norm) if has_norm else (output_NH, down_side_b)
        on_use(names["down_proj"], sketches, inner_SI, routing.by_token, followed, side_b)
    return output_NH


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


class _Routing:
    """Which rows belong to which token."""

    def __init__(self, order_S: Tensor, top_k: int) -> None:
        self.top_k, self.token_S = top_k, order_S // top_k
        self.place_S = torch.empty_like(order_S)  # of a token's rows, token by token
        self.place_S[order_S] = torch.arange(len(order_S), device=order_S.device)

    def rows(self, values_ND: Tensor) -> Tensor:
        """[S, D]: the values of each row's token."""
        return values_ND.index_select(0, self.token_S)

    def by_token(self, values_SD: Tensor) -> Tensor:
        """[N, K, D]"""
        return values_SD.index_select(0, self.place_S).view(-1, self.top_k, values_SD.shape[1])


class _Routed(torch.autograd.Function):
    """Tokens -> rows. Its gradient is `_Combined`, and the other way round: autograd would add row by row instead."""

    @staticmethod
    def forward(ctx: Any, values_ND: Tensor, routing: _Routing) -> Tensor:
        ctx.routing = routing
        return routing.rows(values_ND)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None]:
        return ctx.routing.by_token(gradient_SD).sum(1), None


class _Combined(torch.autograd.Function):
    """Rows -> the sum over those of each token."""

    @staticmethod
    def forward(ctx: Any, values_SD: Tensor, routing: _Routing) -> Tensor:
        ctx.routing = routing
        return routing.by_token(values_SD).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None]:
        return ctx.routing.rows(gradient_ND), None


def on_use(name: str, sketches: PassSketches, values: Tensor, by_token: Any, output: Tensor, side_b_of: Any) -> None:
    if not sketches.is_captured(name, output):
        return
    a_sides = []
    for projections in sketches.projections:
        side_a = projections.sides[name][0]
        projected = values.detach().to(side_a.dtype) @ side_a
        a_BRP = sketches.by_example(name, projected if by_token is None else by_token(projected))
        if a_BRP is None:
            return
        a_sides.append(a_BRP)
    sketches.expect_gradient(name)

    def on_gradient(gradient: Tensor) -> None:
        b_sides = []
        for projections in sketches.projections:
            side = side_b_of(gradient, projections.sides[name][1], projections.expert_signs[name])
            b_sides.append(cast(Tensor, sketches.by_example(name, side)))
        sketches.add(name, a_sides, b_sides)

    output.register_hook(on_gradient)


def product(rows_SI: Tensor, experts: Any, attribute: str, expert_S: Tensor, ends_E: Tensor) -> Tensor:
    product: Tensor = _ExpertsProduct.apply(rows_SI.to(getattr(experts, attribute).dtype), experts, attribute, ends_E)
    return product + getattr(experts, f"{attribute}_bias")[expert_S] if experts.has_bias else product


class _ExpertsProduct(torch.autograd.Function):
    """Each row times the frozen matrix of its expert.

    Keeps the module and not its weight, so that under ZeRO-3 the weight is released between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, rows_SI: Tensor, experts: Any, attribute: str, ends_E: Tensor) -> Tensor:
        ctx.experts, ctx.attribute, ctx.ends_E = experts, attribute, ends_E
        return _grouped(rows_SI, _matrices(experts, attribute), ends_E)

    @staticmethod
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor, None, None, None]:
        matrices_EIO = _matrices(ctx.experts, ctx.attribute)
        return _grouped(gradient_SO, matrices_EIO.transpose(1, 2), ctx.ends_E), None, None, None


def _matrices(experts: Any, attribute: str) -> Tensor:
    """[E, inputs, outputs]."""
    weight = getattr(experts, attribute)
    matrices: Tensor = dequantised(weight) if is_quantised(weight) else weight.detach()
    matrices = matrices[: experts.num_experts]  # LongCat holds more of the up product than run
    return matrices if experts.is_transposed else matrices.transpose(1, 2)


def _has_grouped_product(rows_SI: Tensor, matrices_EIO: Tensor) -> bool:
    """torch's needs compute capability 8.0, and rows of a multiple of 16 bytes."""
    if not rows_SI.is_cuda or rows_SI.dtype == torch.float64:
        return False
    is_aligned = all(size * rows_SI.element_size() % 16 == 0 for size in matrices_EIO.shape[1:])
    return is_aligned and torch.cuda.get_device_capability(rows_SI.device) >= (8, 0)


def _grouped(rows_SI: Tensor, matrices_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """[S, outputs]: the rows up to `ends_E[e]` times matrix e."""
    if _has_grouped_product(rows_SI, matrices_EIO):
        return functional.grouped_mm(rows_SI, matrices_EIO, offs=ends_E.int())
    product_SO = rows_SI.new_empty(len(rows_SI), matrices_EIO.shape[2])
    start = 0
    for matrix_IO, end in zip(matrices_EIO, ends_E.tolist(), strict=True):
        if end > start:
            torch.mm(rows_SI[start:end], matrix_IO, out=product_SO[start:end])
        start = end
    return product_SO
