"""Experts outside transformers' interface: Llama-4's and LongCat's have a forward of their own, which is replaced.

Each function here computes what the model's own forward computes, with the products of `experts`, which capture.

Shapes: N = B·T tokens, K experts a token, E experts, S routed rows sorted by expert; H hidden dims, F dims of the up
product, I of the down product's input, P projected dims a side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prism_job.extract.capture.experts import experts_forward, on_use, product, watched
from prism_job.extract.capture.layers import OWN_EXPERTS, Layers, is_own_experts, shape_of


@contextmanager
def own_forwards(layers: Layers) -> Iterator[None]:
    """While this is entered, these modules look like those behind transformers' interface."""
    modules = {module for weight in layers.weights.values() for module in weight.modules if is_own_experts(module)}
    of_class: Any = {"Llama4TextExperts": llama4_forward, "LongcatFlashExperts": longcat_forward}
    added: list[tuple[nn.Module, str]] = []
    try:
        for module in modules:
            experts, class_name = cast(Any, module), type(module).__name__
            looks = {
                "has_gate": True,
                "has_bias": False,
                "is_transposed": OWN_EXPERTS[class_name],
                "num_experts": shape_of(experts.down_proj)[0],
                "_apply_gate": partial(_apply_gate, experts),
                "forward": partial(of_class[class_name], experts),
            }
            added += [(module, name) for name in looks if name not in vars(module)]
            vars(module).update(looks)
        yield
    finally:
        for module, name in added:
            del vars(module)[name]


def _apply_gate(experts: Any, up_SF: Tensor) -> Tensor:
    gate_SI, linear_SI = up_SF.chunk(2, dim=-1)
    return cast(Tensor, experts.act_fn(gate_SI) * linear_SI)


def longcat_forward(experts: Any, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """[N, H]. Experts past the last matrix return their input."""
    is_matrix_NK = expert_NK < experts.num_experts
    output_NH = experts_forward(experts, hidden_NH, expert_NK * is_matrix_NK, weight_NK * is_matrix_NK)
    return output_NH + hidden_NH * (weight_NK * ~is_matrix_NK).sum(1, keepdim=True)


def llama4_forward(experts: Any, routed_RH: Tensor) -> Tensor:
    """[E·N, H]: each expert has a row for each token, times the token's score, which is 0 where it was not chosen.

    Of a zero row the output and the gradient are zero, so only the others are computed.
    """
    num_experts = experts.num_experts
    chosen_EN = routed_RH.detach().view(num_experts, -1, routed_RH.shape[1]).any(2)
    num_chosen_N = chosen_EN.sum(0)
    top_k = int(num_chosen_N.max())
    if bool((num_chosen_N != top_k).any()):  # a score that rounds to zero
        chosen_EN, top_k = torch.ones_like(chosen_EN), num_experts
    row_S = chosen_EN.flatten().nonzero()[:, 0]
    expert_S, token_S = row_S // chosen_EN.shape[1], row_S % chosen_EN.shape[1]
    order_S = torch.argsort(token_S, stable=True)

    def by_token(side_SP: Tensor) -> Tensor:
        return side_SP[order_S].view(-1, top_k, side_SP.shape[1])

    def side_b_of(gradient_SO: Tensor, side_b: Tensor, sign_EP: Tensor) -> Tensor:
        return by_token((gradient_SO.to(side_b.dtype) @ side_b) * sign_EP[expert_S])

    ends_E = chosen_EN.sum(1).cumsum(0)
    values_SH = routed_RH[row_S]
    up_SF = product(values_SH, experts, "gate_up_proj", expert_S, ends_E)
    inner_SI = experts._apply_gate(up_SF)
    down_SH = product(inner_SI, experts, "down_proj", expert_S, ends_E)
    names, sketches = watched(experts)
    for attribute, values, output in (("gate_up_proj", values_SH, up_SF), ("down_proj", inner_SI, down_SH)):
        if sketches is not None and attribute in names:
            on_use(names[attribute], sketches, values, by_token, output, side_b_of)
    return torch.zeros_like(routed_RH).index_copy(0, row_S, down_SH)
