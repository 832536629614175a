"""The sketches of one forward and backward pass, summed into rows and factors. Does not know where they come from.

Shapes: B examples, T tokens, P projected dims a side, L layers, D stored dims, M = P·P numbers of one layer's sketch,
N real tokens of the batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

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
        shape = (len(projections.layers.modules), projections.row_format.dim, projections.row_format.dim)
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
        # Calls of each layer that still wait for their gradient; a model may call one layer several times.
        self.num_pending: Counter[str] = Counter()
        self.finished: set[str] = set()  # layers whose gradients have all come

    def expect_gradient(self, name: str) -> None:
        """This layer has run forward."""
        self.num_pending[name] += 1

    def add(self, name: str, a_sides: Sequence[Tensor], b_sides: Sequence[Tensor]) -> None:
        """Add one call of a layer: its projected inputs and output gradients, [B, T, P] in each row format."""
        self.num_pending[name] -= 1
        is_last = not self.num_pending[name]
        for sums, a_BTP, b_BTP in zip(self.sums, a_sides, b_sides, strict=True):
            sums.add(name, a_BTP, b_BTP, is_last=is_last)
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
        self.earlier_BM: dict[str, Tensor] = {}  # of layers called several times, the sketches of the calls so far

    def add(self, name: str, a_BTP: Tensor, b_BTP: Tensor, *, is_last: bool) -> None:
        """Add one call of a layer; its row needs the sum over all calls, so it waits for the last."""
        projections = self.projections
        a_BTP, b_BTP = (side_BTP.to(projections.dtype) * projections.scale for side_BTP in (a_BTP, b_BTP))
        position = projections.positions[name]
        if self.factors is not None:
            a_NP, b_NP = a_BTP[self.batch.real_BT], b_BTP[self.batch.real_BT]
            self.factors.inputs_LPP[position] += a_NP.T @ a_NP
            self.factors.outputs_LPP[position] += b_NP.T @ b_NP
        sketch_BM = torch.bmm(b_BTP.transpose(1, 2), a_BTP).flatten(1)
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
