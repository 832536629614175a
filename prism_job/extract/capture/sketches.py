"""The sketches of one forward and backward pass, summed into rows and factors. Does not know where they come from.

Shapes: B examples, T tokens, R rows an example (a multiple of T: a weight may be used several times for a token), P
projected dims a side, L layers, D stored dims, M = P·P numbers of one layer's sketch, N rows of real tokens of the batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from prism_job.errors import RequestError
from prism_job.extract.capture.row_format import Projections
from prism_job.extract.tokenise import Batch


@dataclass
class FactorSums:
    """Σ a aᵀ and Σ b bᵀ over real tokens of the projected sides, [L, P, P] each: K-FAC's factors, which merge by adding."""

    inputs_LPP: Tensor
    outputs_LPP: Tensor
    num_tokens: int = 0

    @classmethod
    def zeros(cls, projections: Projections) -> Self:
        shape = (len(projections.layers.weights), projections.row_format.dim, projections.row_format.dim)
        return cls(projections.zeros(*shape), projections.zeros(*shape))

    def add(self, other: Self) -> None:
        self.inputs_LPP += other.inputs_LPP
        self.outputs_LPP += other.outputs_LPP
        self.num_tokens += other.num_tokens


class PassSketches:
    """What one pass has given so far, in each row format."""

    def __init__(self, batch: Batch, projections: Sequence[Projections], *, with_factors: bool) -> None:
        self.batch, self.projections = batch, projections
        self.sums = [RowSums(batch, each, with_factors=with_factors) for each in projections]
        # Uses of each weight that still wait for their gradient; a model may use one several times.
        self.num_pending: Counter[str] = Counter()
        self.finished: set[str] = set()  # layers whose gradients have all come

    def by_example(self, name: str, values: Tensor) -> Tensor | None:
        """[B, R, dims], whether the model keeps examples and tokens on two axes or on one. Refuses any other shape."""
        (num_examples, num_tokens), sizes = self.batch.ids_BT.shape, [size for size in values.shape[:-1] if size != 1]
        apart = [size for size in (num_examples, num_tokens) if size != 1]
        if sizes[: len(apart)] == apart or sizes[:1] == [num_examples * num_tokens]:
            return values.reshape(num_examples, -1, values.shape[-1])
        self.refuse(name, f"it sees tensors of shape {tuple(values.shape)}, not one row a token")
        return None

    def refuse(self, name: str, reason: str) -> None:
        """Raises RequestError: this layer cannot be captured."""
        what = f"layer {name} cannot be captured: {reason}"
        raise RequestError(what, where=name, fix=f"leave this layer out: add '!{name}' to extraction.layers")

    def is_captured(self, name: str, output: Tensor) -> bool:
        """Whether this use of a weight gets a gradient. Refuses one that cannot, unless the model computes without any."""
        if not torch.is_grad_enabled():
            return False  # a cycle of a recurrent model that is trained without a gradient through it
        if not output.requires_grad:
            self.refuse(name, "no gradient can reach it: its inputs do not depend on the embeddings")
        return output.requires_grad

    def expect_gradient(self, name: str) -> None:
        """This layer has run forward."""
        self.num_pending[name] += 1

    def add(self, name: str, a_sides: Sequence[Tensor], b_sides: Sequence[Tensor]) -> None:
        """Add one use of a weight: its projected inputs and output gradients, [B, R, P] in each row format."""
        self.num_pending[name] -= 1
        is_last = not self.num_pending[name]
        for sums, a_BRP, b_BRP in zip(self.sums, a_sides, b_sides, strict=True):
            sums.add(name, a_BRP, b_BRP, is_last=is_last)
        if is_last:
            self.finished.add(name)


class RowSums:
    """Rows, squared norms and factors of a pass in one row format."""

    def __init__(self, batch: Batch, projections: Projections, *, with_factors: bool) -> None:
        self.batch, self.projections = batch, projections
        self.rows_BD = projections.zeros(batch.size, projections.width)
        self.norm2_B = projections.zeros(batch.size)
        # Of this pass alone: a pass that fails leaves no part of itself in the sums of its unit.
        self.factors = FactorSums.zeros(projections) if with_factors else None
        self.rows_a_token: Counter[str] = Counter()
        self.earlier_BM: dict[str, Tensor] = {}  # of weights used several times, the sketches of the uses so far

    def add(self, name: str, a_BRP: Tensor, b_BRP: Tensor, *, is_last: bool) -> None:
        """Add one use of a weight; its row needs the sum over all uses, so it waits for the last."""
        projections = self.projections
        a_BRP, b_BRP = (side_BRP.to(projections.dtype) * projections.scale for side_BRP in (a_BRP, b_BRP))
        position = projections.positions[name]
        if self.factors is not None:
            rows_a_token = a_BRP.shape[1] // self.batch.real_BT.shape[1]
            real_BR = self.batch.real_BT
            if rows_a_token > 1:
                real_BR = real_BR.repeat_interleave(rows_a_token, dim=1)
            a_NP, b_NP = a_BRP[real_BR], b_BRP[real_BR]
            # Of A the mean over a token's rows in all uses, of B their sum: together the token's Fisher block (equation 4).
            self.factors.inputs_LPP[position] += a_NP.T @ a_NP
            self.factors.outputs_LPP[position] += b_NP.T @ b_NP
            self.rows_a_token[name] += rows_a_token
            if is_last and self.rows_a_token[name] > 1:
                self.factors.inputs_LPP[position] /= self.rows_a_token[name]
        sketch_BM = torch.bmm(b_BRP.transpose(1, 2), a_BRP).flatten(1)
        if name in self.earlier_BM:
            sketch_BM += self.earlier_BM.pop(name)
        if not is_last:
            self.earlier_BM[name] = sketch_BM
            return
        self.norm2_B += sketch_BM.square().sum(1)
        if projections.folds is None:
            size = sketch_BM.shape[1]
            self.rows_BD[:, position * size : (position + 1) * size] = sketch_BM
        else:
            bucket_M, sign_M = projections.folds[name]
            self.rows_BD.index_add_(1, bucket_M, sketch_BM * sign_M)
