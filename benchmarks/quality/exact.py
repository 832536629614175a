"""Exact, unprojected scores, fast: the inner product of each example's full weight gradient with one direction.

For a linear layer with inputs a_t and output gradients b_t the gradient is Σ_t b_t a_tᵀ, so its inner product with G is
Σ_t b_t · (G a_t): no weight gradient is formed. The direction itself is plain autograd, an example at a time.

Shapes: B examples, T tokens, N examples in all.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_job.extract import tokenise
from prism_job.extract.capture.layers import Layers
from prism_job.extract.tokenise import Encoded

Direction = dict[str, Tensor]


def weight_gradient(model: PreTrainedModel, layers: Layers, example: Encoded) -> tuple[Direction, float]:
    """Gradient of the token-mean loss for the weight of every layer, and that loss."""
    weights = {name: weight.parameter.requires_grad_() for name, weight in layers.weights.items()}
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    places = torch.tensor(example.supervised[1:])
    loss = nn.functional.cross_entropy(logits[places], ids[0, 1:][places])
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, gradients, strict=True)), loss.item()


def scores(
    model: PreTrainedModel,
    layers: Layers,
    direction: Direction,
    encoded: Sequence[Encoded],
    tokens_per_batch: int = 2048,
) -> NDArray[np.float64]:
    """⟨gradient of the token-sum loss, direction⟩ of each example: float64 [N]."""
    found_N = np.zeros(len(encoded))

    def add(name: str, inputs_BTI: Tensor, gradient_BTO: Tensor, batch: tokenise.Batch, places: list[int]) -> None:
        found_N[places] += (gradient_BTO * (inputs_BTI @ direction[name].T)).sum((1, 2)).double().numpy()

    _passes(model, layers, encoded, tokens_per_batch, add)
    return found_N


def factors(
    model: PreTrainedModel, layers: Layers, encoded: Sequence[Encoded], tokens_per_batch: int = 2048
) -> dict[str, tuple[Tensor, Tensor]]:
    """K-FAC's factors of each layer, unprojected: E[a aᵀ] and E[b bᵀ] over real tokens, as extraction sums them."""
    sums = {name: [torch.zeros(()), torch.zeros(())] for name in layers.weights}

    def add(name: str, inputs_BTI: Tensor, gradient_BTO: Tensor, batch: tokenise.Batch, places: list[int]) -> None:
        for side, values in enumerate((inputs_BTI, gradient_BTO)):
            real_RX = values[batch.real_BT]
            sums[name][side] = sums[name][side] + real_RX.T @ real_RX

    _passes(model, layers, encoded, tokens_per_batch, add)
    num_tokens = sum(len(example.ids) for example in encoded)
    return {name: (of_inputs / num_tokens, of_outputs / num_tokens) for name, (of_inputs, of_outputs) in sums.items()}


def solve(direction: Direction, of_layers: dict[str, tuple[Tensor, Tensor]], lam: float) -> Direction:
    """(H + λI)⁻¹ of a direction under K-FAC in the full space, layer by layer: `curvature.solve` without a projection."""
    solved = {}
    for name, gradient in direction.items():
        (alpha, basis_a), (beta, basis_b) = (torch.linalg.eigh(side.double()) for side in of_layers[name])
        rotated = basis_b.T @ gradient.double() @ basis_a
        damped = torch.outer(beta.clamp(min=0), alpha.clamp(min=0)) + lam
        solved[name] = (basis_b @ (rotated / damped) @ basis_a.T).to(gradient.dtype)
    return solved


def _passes(
    model: PreTrainedModel,
    layers: Layers,
    encoded: Sequence[Encoded],
    tokens_per_batch: int,
    add: Callable[[str, Tensor, Tensor, tokenise.Batch, list[int]], None],
) -> None:
    """Forward and backward over all examples; `add` sees each layer's inputs and output gradients of each batch."""
    state: dict[str, Any] = {}

    def on_forward(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            inputs_BTI = inputs[0].detach()
            output.register_hook(lambda gradient: add(name, inputs_BTI, gradient, state["batch"], state["places"]))

        return forward

    def on_embedding(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        state["embedded_BTE"] = output.detach().requires_grad_()
        return cast(Tensor, state["embedded_BTE"])

    handles = [weight.modules[0].register_forward_hook(on_forward(name)) for name, weight in layers.weights.items()]
    handles.append(cast(nn.Module, model.get_input_embeddings()).register_forward_hook(on_embedding))
    try:
        for places in tokenise.micro_batches([len(example.ids) for example in encoded], tokens_per_batch):
            batch = tokenise.collate([encoded[place] for place in places], torch.device("cpu"))
            state.update(batch=batch, places=places)
            logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.real_BT.long(), use_cache=False).logits
            logits_KV = logits_BTV[torch.roll(batch.supervised_BT, -1, dims=1)]
            loss = nn.functional.cross_entropy(logits_KV, batch.ids_BT[batch.supervised_BT], reduction="sum")
            torch.autograd.grad(loss, state["embedded_BTE"])
    finally:
        for handle in handles:
            handle.remove()
