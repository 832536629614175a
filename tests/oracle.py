"""The slow and obvious twin of extraction and scoring: one example at a time, no padding, the whole logits, autograd's own
weight gradients, projection, fold and curvature as explicit dense matrices, in float64.

Shapes: P = dim, M = P² numbers of one layer's sketch, D folded dims, L layers, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prism_job import projection
from prism_job.extract.capture.sketches import FactorSums
from prism_job.extract.tokenise import Encoded


def rademacher(seed: int, layer: str, side: str, dim_in: int, dim_out: int) -> np.ndarray:
    """The dense projection [dim_in, dim_out]: float32 ±1/√dim_out."""
    return projection.signs(seed, layer, side, dim_in, dim_out) * projection.scale(dim_out)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers but the head; of an adapted model, the adapter's. Said in another way than the code says it."""
    named = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    adapter = {name: module for name, module in named.items() if "lora_" in name}
    return adapter or {name: module for name, module in named.items() if name != "lm_head"}


def plain_loss(model: Any, example: Encoded, *, mean: bool) -> tuple[Tensor, Tensor, int]:
    """(loss, summed NLL, supervised tokens) of one example, from the logits of all its positions."""
    ids_T = torch.tensor(example.ids)
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
    log_probability_TV = torch.log_softmax(logits_TV, dim=-1)
    places = [place for place, carries_loss in enumerate(example.supervised) if carries_loss]
    nll = -torch.stack([log_probability_TV[place - 1, ids_T[place]] for place in places]).sum()
    return (nll / len(places) if mean else nll), nll, len(places)


@contextmanager
def thawed(layers: dict[str, nn.Module]) -> Iterator[list[Tensor]]:
    """The layers' weights, asking for gradients for a while."""
    weights = [module.weight.requires_grad_() for module in layers.values()]
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def weight_gradients(model: Any, example: Encoded, *, mean: bool) -> tuple[dict[str, Tensor], float, int]:
    """Gradient of each layer's weight, [outputs, inputs]; summed NLL; supervised tokens."""
    layers = linear_layers(model)
    with thawed(layers) as weights:
        loss, nll, tokens = plain_loss(model, example, mean=mean)
        gradients = torch.autograd.grad(loss, weights)
    upright = [
        gradient.T if isinstance(module, Conv1D) else gradient
        for gradient, module in zip(gradients, layers.values(), strict=True)
    ]
    return dict(zip(layers, upright, strict=True)), nll.item(), tokens


@cache
def kronecker(seed: int, dim: int, name: str, inputs: int, outputs: int) -> Tensor:
    """[outputs·inputs, M] with vec(P_bᵀ G P_a) = vec(G) @ it, in row-major order."""
    side_a = rademacher(seed, name, "a", inputs, dim).astype(np.float64)
    side_b = rademacher(seed, name, "b", outputs, dim).astype(np.float64)
    return torch.from_numpy(np.kron(side_b, side_a))


def sketches(gradients: dict[str, Tensor], seed: int, dim: int) -> dict[str, Tensor]:
    """The projection of each layer's weight gradient, [M]."""
    return {name: g.reshape(-1) @ kronecker(seed, dim, name, *g.T.shape) for name, g in gradients.items()}


@cache
def sketch_matrix(seed: int, dim: int, name: str, fold_dims: int) -> Tensor:
    """The fold of one layer as a dense [M, D] matrix with one ±1 in each row."""
    table = projection.fold_table(seed, name, dim, fold_dims)
    dense = np.zeros((dim * dim, fold_dims))
    for number, (bucket, sign) in enumerate(zip(table.bucket_M, table.sign_M, strict=True)):
        dense[number, bucket] = sign
    return torch.from_numpy(dense)


def factor_sums(model: Any, examples: list[Encoded], seed: int, dim: int) -> FactorSums:
    """Σ a aᵀ and Σ b bᵀ of the projected sides over all tokens of the examples, an outer product a token."""
    layers = linear_layers(model)
    sums = FactorSums(
        torch.zeros(len(layers), dim, dim, dtype=torch.float64), torch.zeros(len(layers), dim, dim, dtype=torch.float64)
    )
    for example in examples:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name: str, inputs: dict[str, Tensor] = inputs, outputs: dict[str, Tensor] = outputs) -> Any:
            def hook(module: nn.Module, given: Any, output: Tensor) -> None:
                inputs[name], outputs[name] = given[0].detach()[0], output

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
        with thawed(layers):
            loss, _, _ = plain_loss(model, example, mean=False)
            gradients = torch.autograd.grad(loss, [outputs[name] for name in layers])
        for handle in handles:
            handle.remove()
        for layer, (name, gradient) in enumerate(zip(layers, gradients, strict=True)):
            side_a = torch.from_numpy(rademacher(seed, name, "a", inputs[name].shape[-1], dim)).double()
            side_b = torch.from_numpy(rademacher(seed, name, "b", gradient.shape[-1], dim)).double()
            for a, b in zip(inputs[name], gradient[0], strict=True):
                sums.inputs_LPP[layer] += torch.outer(side_a.T @ a, side_a.T @ a)
                sums.outputs_LPP[layer] += torch.outer(side_b.T @ b, side_b.T @ b)
        sums.num_tokens += len(example.ids)
    return sums
