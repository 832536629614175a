"""Rows of hidden states by one forward pass: the mean of the last hidden states of a text, weighted by position (RDS+).

The last hidden states are what the output head sees: transformers' `hidden_states[-1]`, behind the final norm. The state of
token i of T has the weight i / (1 + 2 + … + T), whether the token is of the prompt or of the response: a later state has seen
more of the text (Muennighoff 2022, arXiv 2202.08904; Ivison et al. 2025, arXiv 2503.01807).

Shapes: B examples, T tokens, H hidden dims.
"""

from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_job.errors import RequestError
from prism_job.extract.capture.forward_backward import forward
from prism_job.extract.capture.gradients import GradientBatch, LossCapture
from prism_job.extract.capture.layers import shape_of
from prism_job.extract.capture.row_format import HIDDEN_STATES
from prism_job.extract.capture.sketches import FactorSums
from prism_job.extract.tokenise import Batch, Encoded, collate


class RepresentationCapture(LossCapture):
    """A frozen model that turns micro-batches into rows of hidden states and losses, forward only."""

    row_formats = (HIDDEN_STATES,)
    notes = MappingProxyType[str, Any]({"layers": []})

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.widths = (shape_of(cast(Any, model.get_output_embeddings()).weight)[1],)

    def gradients_of(self, batch: Batch, *, mean: bool, factors: FactorSums | None = None) -> list[GradientBatch]:
        """The rows of a micro-batch [B, H]. `mean` and `factors` change nothing: there is no gradient."""
        rows_BH, nll_B = representations_of(self.model, batch, self.dtype)
        return [GradientBatch(rows_BH, nll_B, batch.supervised_BT.sum(1), rows_BH.norm(dim=1))]


def representations_of(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The row of each example [B, H] and its loss [B], nats, both taken in `dtype`."""
    rows: list[Tensor] = []

    def on_head(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states_BTH = inputs[0].to(dtype)
        weight_BT = batch.real_BT.to(dtype).cumsum(1) * batch.real_BT
        weight_BT /= weight_BT.sum(1, keepdim=True)
        rows.append(torch.bmm(weight_BT[:, None], states_BTH)[:, 0])

    # Before `forward` registers its own hook, which leaves only the states that predict a supervised token.
    handle = cast(nn.Module, model.get_output_embeddings()).register_forward_pre_hook(on_head)
    try:
        nll_B = forward(model, batch, dtype)
    finally:
        handle.remove()
    (rows_BH,) = rows
    return rows_BH, nll_B


NOT_CAUSAL = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative change of a row by a later token from which it cannot be rounding; in 16 bits 1e-2."""


@torch.no_grad()
def refuse_looking_ahead(model: PreTrainedModel, device: torch.device) -> None:
    """Raises RequestError: tokens attend to later ones, so padding, and with it other texts of a batch, would change a row.

    With gradients every batch shows it (`forward_backward`). Here two tiny passes do, of texts that differ in their last token.
    """
    states: list[Tensor] = []

    def on_head(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0][0, :-1].double())

    handle = cast(nn.Module, model.get_output_embeddings()).register_forward_pre_hook(on_head)
    try:
        for last in (4, 5):
            text = Encoded([1, 2, 3, last], [False, True, True, True])
            forward(model, collate([text], device), torch.float32)
    finally:
        handle.remove()
    first, second = states
    parameter = next(model.parameters())
    if float((first - second).norm()) > NOT_CAUSAL.get(parameter.dtype, 1e-2) * float(first.norm()):
        what = "tokens of this model attend to later tokens, padding included: its attention is not causal"
        fix = "name a causal language model in model.uri: of type bert and the like only those trained as decoders are"
        raise RequestError(what, where=type(model).__name__, fix=fix)
