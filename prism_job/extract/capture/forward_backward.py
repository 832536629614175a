"""One pass of a frozen model: forward and backward, where gradients reach every layer's output and no weight; or forward alone.

Shapes: B examples, T tokens, E hidden dims, K supervised tokens of the batch, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_job.errors import RequestError
from prism_job.extract.capture.layers import shape_of
from prism_job.extract.tokenise import Batch


def forward_and_backward(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Backpropagate the summed loss of all examples, taken in `dtype`. Returns the loss of each, nats [B]."""
    embedded: list[Tensor] = []

    def on_embedding(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # All weights are frozen, so the graph begins here; asking for this tensor's gradient runs the whole backward pass.
        embedded[:] = [output.detach().requires_grad_()]
        return embedded[0].clone()  # some models scale it in place, which autograd forbids of the tensor itself

    handle = cast(nn.Module, model.get_input_embeddings()).register_forward_hook(on_embedding)
    try:
        logits_KV = _logits(model, batch)
    finally:
        handle.remove()
    nll_K, gradient_KV = _cross_entropy(logits_KV.detach().to(dtype), batch.ids_BT[batch.supervised_BT])
    (gradient_BTE,) = torch.autograd.grad(logits_KV, embedded[0], gradient_KV.to(logits_KV.dtype))
    _refuse_looking_ahead(model, batch, gradient_BTE)
    return _sum_by_example(nll_K, batch)


@torch.no_grad()
def forward(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The loss of each example, taken in `dtype`, nats [B]: the same numbers as `forward_and_backward`."""
    log_KV = torch.log_softmax(_logits(model, batch).to(dtype), 1)
    return _sum_by_example(-log_KV.gather(1, batch.ids_BT[batch.supervised_BT][:, None])[:, 0], batch)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of the positions that predict a supervised token, [K, V]."""
    # Position t predicts token t + 1. The head sees [1, K, E] in place of [B, T, E]; whatever the model does to its
    # logits afterwards (soft caps, scales) is elementwise and still happens.
    predicting_BT = torch.roll(batch.supervised_BT, -1, dims=1)
    _refuse_unknown_tokens(model, batch)

    def on_head(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][predicting_BT][None], *inputs[1:])

    handle = cast(nn.Module, model.get_output_embeddings()).register_forward_pre_hook(on_head)
    try:
        # No attention mask: padding stands on the right, where no real token of a causal model looks. Without one,
        # attention knows that it is plainly causal, which halves the work of some kernels.
        logits_KV: Tensor = model(input_ids=batch.ids_BT, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits_KV


def _sum_by_example(nll_K: Tensor, batch: Batch) -> Tensor:
    owner_K = batch.supervised_BT.nonzero()[:, 0]
    return torch.zeros(batch.size, device=nll_K.device, dtype=nll_K.dtype).index_add_(0, owner_K, nll_K)


def _refuse_unknown_tokens(model: PreTrainedModel, batch: Batch) -> None:
    """On a GPU such a token would stop the process with an error of the device, which names nothing."""
    num_embeddings = shape_of(cast(Any, model.get_input_embeddings()).weight)[0]
    if (largest := int(batch.ids_BT.max())) >= num_embeddings:
        what = f"the tokenizer makes token {largest}, but the model has only {num_embeddings} token embeddings"
        fix = "put the tokenizer that the model was trained with beside its weights"
        raise RequestError(what, where="spec.model.uri", fix=fix)


def _refuse_looking_ahead(model: PreTrainedModel, batch: Batch, gradient_BTE: Tensor) -> None:
    """Of a causal model no gradient reaches what follows an example's last predicting token, such as padding."""
    predicts_BT = batch.supervised_BT.flip(1).cumsum(1).flip(1) > batch.supervised_BT.long()
    late_E = gradient_BTE[~predicts_BT]
    if bool((late_E.isfinite() & (late_E != 0)).any()):  # one that is not finite is refused by its example's name
        what = "tokens of this model attend to later tokens, padding included: its attention is not causal"
        fix = "name a causal language model in model.uri: of type bert and the like only those trained as decoders are"
        raise RequestError(what, where=type(model).__name__, fix=fix)


def _cross_entropy(logits_KV: Tensor, labels_K: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and the gradient of their sum with respect to the logits, softmax less one-hot.

    Written out because autograd makes two more buffers of this size, the largest of a pass, and fills one with zeros.
    """
    log_KV = torch.log_softmax(logits_KV, 1)
    nll_K = -log_KV.gather(1, labels_K[:, None])[:, 0]
    gradient_KV = log_KV.exp_()
    gradient_KV[torch.arange(len(labels_K), device=labels_K.device), labels_K] -= 1
    return nll_K, gradient_KV
