"""Per-example projected gradients of linear layers by hooks: no weight gradient is ever formed (DESIGN, section 3).

For a linear layer with inputs a_t and output gradients b_t one example's gradient is Σ_t b_t a_tᵀ. A forward hook projects
a_t, a hook on the output's gradient projects b_t, and their product summed over t is the layer's sketch.

Shapes: B examples, T tokens, P projected dims a side, L layers, D stored dims, K supervised tokens of the batch.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_job import projection
from prism_job.errors import DataError, RequestError
from prism_job.extract.model import Layers, layer_dims
from prism_job.extract.tokenise import Batch


@dataclass(frozen=True)
class GradientBatch:
    """What one micro-batch gives.

    Attributes:
        rows_BD: folded, or unfolded (D = L·P², layers in model order, each b-side by a-side).
        nll_B: summed negative log-likelihood of the supervised tokens, nats.
        tokens_B: their number.
        norm_B: norm of the unfolded projected gradient.
    """

    rows_BD: Tensor
    nll_B: Tensor
    tokens_B: Tensor
    norm_B: Tensor


@dataclass
class FactorSums:
    """Σ a aᵀ and Σ b bᵀ over real tokens of the projected sides, [L, P, P] each: K-FAC's factors, which merge by adding."""

    inputs_LPP: Tensor
    outputs_LPP: Tensor
    num_tokens: int = 0


@dataclass
class _Pass:
    """The state of one forward and backward pass.

    Attributes:
        calls: how often each layer ran forward and has not come back yet; a model may share one layer between places.
        waiting_BM: sketches of such layers from the calls that have come back so far.
    """

    batch: Batch
    rows_BD: Tensor
    norm2_B: Tensor
    factors: FactorSums | None
    calls: Counter[str] = field(default_factory=Counter)
    waiting_BM: dict[str, Tensor] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)


class GradientCapture:
    """Hooks on a frozen model that turn micro-batches into rows.

    Args:
        fold_dims: D of the signed count-sketch, or None for unfolded rows.

    Use as a context manager: the hooks are taken off at the end.
    """

    def __init__(self, model: PreTrainedModel, layers: Layers, dim: int, seed: int, fold_dims: int | None) -> None:
        self.model, self.layers, self.dim = model, layers, dim
        self.device = next(model.parameters()).device
        self.scale = float(projection.scale(dim))
        self.width = fold_dims or len(layers.modules) * dim * dim
        # Sketches and sums are float32 whatever the model's type, and float64 for a float64 model (the tests' oracle).
        self.dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self.sides = {name: self._projections(name, module, seed) for name, module in layers.modules.items()}
        self.folds = {name: self._fold(name, seed, fold_dims) for name in layers.modules} if fold_dims else None
        self.handles: list[Any] = []
        self.now: _Pass | None = None

    def unfolded(self) -> GradientCapture:
        """The same projections without the fold; both share their matrices, which are large."""
        other = copy.copy(self)
        other.width, other.folds = len(self.layers.modules) * self.dim * self.dim, None
        other.handles, other.now = [], None
        return other

    def __enter__(self) -> GradientCapture:
        for position, (name, module) in enumerate(self.layers.modules.items()):
            self.handles.append(module.register_forward_hook(self._on_forward(position, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.now = None
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def begin(self, batch: Batch, *, factors: bool) -> None:
        """From here to `end` the hooks collect this micro-batch's sketches."""
        zeros = torch.zeros(batch.size, self.width, device=self.device, dtype=self.dtype)
        norm2_B = torch.zeros(batch.size, device=self.device, dtype=self.dtype)
        # Factors of their own, added at the end: a pass that fails leaves no half of itself in the sums.
        self.now = _Pass(batch, zeros, norm2_B, self.new_factors() if factors else None)

    def end(self, nll_B: Tensor, *, mean: bool, factors: FactorSums | None) -> GradientBatch:
        """What `begin` began, after the backward pass."""
        assert self.now is not None
        done, self.now = self.now, None
        missed = [name for name in self.layers.modules if name not in done.done]
        if missed:
            what = f"no gradient reached {len(missed)} captured layers, the first {missed[0]}"
            raise RequestError(what, where=missed[0], fix="leave these layers out with extraction.layers")
        if factors is not None and done.factors is not None:
            factors.inputs_LPP += done.factors.inputs_LPP
            factors.outputs_LPP += done.factors.outputs_LPP
            factors.num_tokens += int(done.batch.real_BT.sum())
        tokens_B, norm_B = done.batch.supervised_BT.sum(1), done.norm2_B.sqrt()
        if mean:
            # Afterwards, in float32: a loss divided by thousands of tokens has float16 gradients that underflow.
            done.rows_BD /= tokens_B[:, None]
            norm_B /= tokens_B
        return GradientBatch(done.rows_BD, nll_B, tokens_B, norm_B)

    def new_factors(self) -> FactorSums:
        shape = (len(self.layers.modules), self.dim, self.dim)
        return FactorSums(
            torch.zeros(shape, device=self.device, dtype=self.dtype),
            torch.zeros(shape, device=self.device, dtype=self.dtype),
        )

    def _on_forward(self, position: int, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        side_a, side_b = self.sides[name]

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            state = self.now
            if state is None:
                return
            a_BTP = _by_example(inputs[0].detach(), state.batch, name).to(side_a.dtype) @ side_a
            state.calls[name] += 1

            def backward(gradient: Tensor) -> None:
                b_BTP = _by_example(gradient, state.batch, name).to(side_b.dtype) @ side_b
                self._add_sketch(state, position, name, a_BTP, b_BTP)

            output.register_hook(backward)

        return forward

    def _add_sketch(self, state: _Pass, position: int, name: str, a_BTP: Tensor, b_BTP: Tensor) -> None:
        a_BTP, b_BTP = (side_BTP.to(self.dtype) * self.scale for side_BTP in (a_BTP, b_BTP))
        if state.factors is not None:
            a_NP = a_BTP[state.batch.real_BT]
            b_NP = b_BTP[state.batch.real_BT]
            state.factors.inputs_LPP[position] += a_NP.T @ a_NP
            state.factors.outputs_LPP[position] += b_NP.T @ b_NP
        sketch_BM = torch.bmm(b_BTP.transpose(1, 2), a_BTP).flatten(1)
        if name in state.waiting_BM:
            sketch_BM += state.waiting_BM.pop(name)
        state.calls[name] -= 1
        if state.calls[name]:
            state.waiting_BM[name] = sketch_BM
            return
        state.done.add(name)
        state.norm2_B += sketch_BM.square().sum(1)
        size = self.dim * self.dim
        if self.folds is None:
            state.rows_BD[:, position * size : (position + 1) * size] = sketch_BM
        else:
            bucket_M, sign_M = self.folds[name]
            state.rows_BD.index_add_(1, bucket_M, sketch_BM * sign_M)

    def _projections(self, name: str, module: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
        """The signs of both sides' matrices; their scale comes into the sketch.

        bfloat16 holds them exactly and is multiplied at its own rate. float16 has too small a range for such sums.
        """
        (inputs, outputs), given = layer_dims(module), cast(Tensor, module.weight).dtype
        dtype = given if given == torch.bfloat16 else self.dtype
        side_a = projection.signs(seed, name, "a", inputs, self.dim)
        side_b = projection.signs(seed, name, "b", outputs, self.dim)
        return self._tensor(side_a, dtype), self._tensor(side_b, dtype)

    def _fold(self, name: str, seed: int, fold_dims: int) -> tuple[Tensor, Tensor]:
        table = projection.fold_table(seed, name, self.dim, fold_dims)
        return torch.from_numpy(table.bucket_M).to(self.device), self._tensor(table.sign_M, self.dtype)

    def _tensor(self, array: Any, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=self.device, dtype=dtype)


def rows_of(
    captures: Sequence[GradientCapture], batch: Batch, *, mean: bool, factors: FactorSums | None = None
) -> list[GradientBatch]:
    """One forward and one backward pass over a micro-batch, whose activations and gradients each capture projects.

    Args:
        captures: entered, of one model.
        mean: gradient of the token-mean loss (targets, equation 3), else of the token sum (candidates, equation 4).
        factors: sums to add this batch's factors to, of one capture alone.
    """
    assert factors is None or len(captures) == 1
    for capture in captures:
        capture.begin(batch, factors=factors is not None)
    nll_B = _forward_and_backward(captures[0].model, batch, captures[0].dtype)
    return [capture.end(nll_B, mean=mean, factors=factors) for capture in captures]


def _forward_and_backward(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Gradients of the summed loss reach every layer's output, and no weight. Returns the loss of each example, nats [B]."""
    # Position t predicts token t + 1. The head sees [1, K, E] in place of [B, T, E]; whatever the model does to its
    # logits afterwards (soft caps, scales) is elementwise and still happens.
    predicting_BT = torch.roll(batch.supervised_BT, -1, dims=1)
    embedded: list[Tensor] = []

    def on_embedding(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # All weights are frozen, so the graph begins here; asking for this tensor's gradient runs the whole backward.
        embedded[:] = [output.detach().requires_grad_()]
        return embedded[0]

    def on_head(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][predicting_BT][None], *inputs[1:])

    embedding, head = (cast(nn.Module, one) for one in (model.get_input_embeddings(), model.get_output_embeddings()))
    handles = [embedding.register_forward_hook(on_embedding), head.register_forward_pre_hook(on_head)]
    try:
        # No mask: padding stands on the right, where no real token of a causal model looks. So
        # attention may know itself plainly causal, which some kernels halve.
        logits_KV = model(input_ids=batch.ids_BT, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    nll_K, gradient_KV = _cross_entropy(logits_KV.detach().to(dtype), batch.ids_BT[batch.supervised_BT])
    (gradient_BTE,) = torch.autograd.grad(logits_KV, embedded[0], gradient_KV.to(logits_KV.dtype))
    _refuse_looking_ahead(model, batch, gradient_BTE)
    owner_K = batch.supervised_BT.nonzero()[:, 0]
    return torch.zeros(batch.size, device=nll_K.device, dtype=dtype).index_add_(0, owner_K, nll_K)


def _refuse_looking_ahead(model: PreTrainedModel, batch: Batch, gradient_BTE: Tensor) -> None:
    """Of a causal model no gradient reaches what follows an example's last predicting token: padding, for one."""
    predicts_BT = batch.supervised_BT.flip(1).cumsum(1).flip(1) > batch.supervised_BT.long()
    late_E = gradient_BTE[~predicts_BT]
    if bool((late_E.isfinite() & (late_E != 0)).any()):  # what is not finite is refused by its example's name
        what = "tokens of this model look at those behind them, padding included: its attention is not causal"
        raise RequestError(what, where=type(model).__name__, fix="use a causal language model")


def _cross_entropy(logits_KV: Tensor, labels_K: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and the gradient of their sum with respect to the logits, softmax less one-hot.

    Written out because autograd makes two more buffers of this size, the largest of a pass, and fills one with zeros.
    """
    log_KV = torch.log_softmax(logits_KV, 1)
    nll_K = -log_KV.gather(1, labels_K[:, None])[:, 0]
    gradient_KV = log_KV.exp_()
    gradient_KV[torch.arange(len(labels_K), device=labels_K.device), labels_K] -= 1
    return nll_K, gradient_KV


def _by_example(values: Tensor, batch: Batch, name: str) -> Tensor:
    """[B, T, dims], also where the model has flattened examples and tokens into one (OPT does)."""
    if values.ndim == 2 and values.shape[0] == batch.ids_BT.numel():
        return values.view(*batch.ids_BT.shape, -1)
    if values.shape[:2] != batch.ids_BT.shape:
        raise RequestError(
            f"layer {name} sees tensors of shape {tuple(values.shape)}, not one row a token",
            where=name,
            fix="leave this layer out with extraction.layers",
        )
    return values


def refuse_non_finite(rows: GradientBatch, names: list[str], where: str) -> None:
    """Raise DataError naming the first example whose row is not finite."""
    bad = (~torch.isfinite(rows.norm_B) | ~torch.isfinite(rows.nll_B)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"the gradient of example {names[bad[0]]} is not finite ({len(bad)} in its micro-batch)",
            where=where,
            fix="use dtype bfloat16 or float32 rather than float16, or look at that example's text",
        )
