"""Per-example projected gradients by hooks: no weight gradient is ever formed (docs/architecture.md, Method).

For a matrix with inputs a_t and output gradients b_t one example's gradient is Σ_t b_t a_tᵀ. A forward hook projects a_t, a
hook on the output's gradient projects b_t, and their product summed over t, and over all uses of the matrix, is its sketch.

Shapes: B examples, D stored dims, L layers, P projected dims a side.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prism_job.errors import DataError, RequestError
from prism_job.extract.capture import linear
from prism_job.extract.capture.experts import captured_experts
from prism_job.extract.capture.forward_backward import forward, forward_and_backward
from prism_job.extract.capture.layers import Layers
from prism_job.extract.capture.own_experts import own_forwards
from prism_job.extract.capture.row_format import NO_ROWS, Projections, RowFormat
from prism_job.extract.capture.sketches import FactorSums, PassSketches
from prism_job.extract.tokenise import Batch


@dataclass(frozen=True)
class GradientBatch:
    """The gradients of one micro-batch in one row format."""

    rows_BD: Tensor  # folded, or unfolded (D = L·P², layers in model order, each b-side by a-side)
    nll_B: Tensor  # summed negative log-likelihood of the supervised tokens, nats
    tokens_B: Tensor  # number of supervised tokens
    norm_B: Tensor  # norm of the unfolded projected gradient


class GradientCapture:
    """A frozen model that turns micro-batches into rows. Several row formats share one forward and one backward pass."""

    def __init__(self, model: PreTrainedModel, layers: Layers, row_formats: Sequence[RowFormat]) -> None:
        self.model, self.layers, self.row_formats = model, layers, tuple(row_formats)
        self.device, self.dtype = _device_and_dtype(model)
        self.projections = [Projections(each, layers, self.dtype, self.device) for each in self.row_formats]

    @property
    def widths(self) -> list[int]:
        """D of each row format."""
        return [each.width for each in self.projections]

    @property
    def notes(self) -> dict[str, Any]:
        """What shards of targets say about the layers."""
        return self.layers.notes

    def new_factors(self) -> FactorSums:
        """Zeros, to be passed to `gradients_of`. Only for a single row format."""
        (projections,) = self.projections
        return FactorSums.zeros(projections)

    def gradients_of(self, batch: Batch, *, mean: bool, factors: FactorSums | None = None) -> list[GradientBatch]:
        """The gradients of a micro-batch, by row format.

        Args:
            mean: of the token-mean loss (targets, equation 3), else of the token sum (candidates, equation 4).
            factors: sums to add this batch's factors to. Only for a single row format.

        Raises RequestError: a layer that cannot be captured, by name, or a model that is not causal.
        """
        assert factors is None or len(self.projections) == 1
        sketches = PassSketches(batch, self.projections, with_factors=factors is not None)
        with capturing(self.layers, sketches):
            nll_B = forward_and_backward(self.model, batch, self.dtype)
        missed = [name for name in self.layers.names if name not in sketches.finished]
        if missed:
            what = f"no gradient reached {len(missed)} captured layers, the first {missed[0]}"
            raise RequestError(what, where=missed[0], fix="leave these layers out with extraction.layers")
        tokens_B = batch.supervised_BT.sum(1)
        gradients = []
        for sums in sketches.sums:
            norm_B = sums.norm2_B.sqrt()
            if mean:
                # Afterwards, in float32: a loss divided by thousands of tokens has float16 gradients that underflow.
                sums.rows_BD /= tokens_B[:, None]
                norm_B /= tokens_B
            if factors is not None and sums.factors is not None:
                sums.factors.num_tokens = int(batch.real_BT.sum())
                factors.add(sums.factors)
            gradients.append(GradientBatch(sums.rows_BD, nll_B, tokens_B, norm_B))
        return gradients


class LossCapture:
    """A frozen model that turns micro-batches into losses, forward only: rows of no numbers."""

    row_formats: tuple[RowFormat, ...] = (NO_ROWS,)
    widths: Sequence[int] = (0,)
    notes: Mapping[str, Any] = MappingProxyType[str, Any]({})

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device, self.dtype = _device_and_dtype(model)

    def gradients_of(self, batch: Batch, *, mean: bool, factors: FactorSums | None = None) -> list[GradientBatch]:
        """The losses of a micro-batch. `mean` and `factors` change nothing: there is no gradient."""
        nll_B = forward(self.model, batch, self.dtype)
        return [
            GradientBatch(
                nll_B.new_zeros(batch.size, 0), nll_B, batch.supervised_BT.sum(1), nll_B.new_zeros(batch.size)
            )
        ]


def _device_and_dtype(model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """Of sketches and sums: float32 whatever the model's type, but float64 for a float64 model."""
    parameter = next(model.parameters())
    return parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32


@contextmanager
def capturing(layers: Layers, sketches: PassSketches) -> Iterator[None]:
    """The weights hand the projected sides of every use to `sketches` while this is entered."""
    handles: list[RemovableHandle] = []
    plain_linear = functional.linear  # torch does not call a hook's end after an interrupt
    try:
        for name, weight in layers.weights.items():
            if not weight.num_experts:
                for module in weight.modules:
                    handles += linear.register_hooks(name, module, sketches)
        with captured_experts(layers, sketches), own_forwards(layers):
            yield
    finally:
        functional.linear = plain_linear
        for handle in handles:
            handle.remove()


def refuse_non_finite(gradients: GradientBatch, names: list[str], where: str) -> None:
    """Raise DataError naming the first example whose row is not finite."""
    bad = (~torch.isfinite(gradients.norm_B) | ~torch.isfinite(gradients.nll_B)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"the loss or gradient of example {names[bad[0]]} is not finite ({len(bad)} in its micro-batch)",
            where=where,
            fix="use dtype bfloat16 or float32 rather than float16, or check the text of that example",
        )
