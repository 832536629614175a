"""How a gradient becomes a row: which random projection, and whether its numbers are folded. Holds the matrices.

Shapes: P projected dims a side, D stored dims, M = P·P numbers of one layer's sketch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_job import projection
from prism_job.extract.capture.layers import Layers
from prism_job.extract.load.quantised import compute_dtype


@dataclass(frozen=True)
class RowFormat:
    """What rows of one kind have in common. `fold_dims`: D of the signed count-sketch, or None for unfolded rows."""

    dim: int
    seed: int
    fold_dims: int | None

    def width(self, num_layers: int) -> int:
        """D."""
        return self.fold_dims or num_layers * self.dim**2


NO_ROWS = RowFormat(0, 0, None)
"""Of a pass that is made for its losses alone."""

HIDDEN_STATES = RowFormat(0, 1, None)
"""Of a pass for hidden states, which are not projected."""


class Projections:
    """The matrices of one row format for the layers of one model; gigabytes for a large one.

    `sides`: for each layer the ±1 matrices of its inputs and of the gradients of its outputs. `expert_signs`: for each
    layer of E experts ±1 [E, P]. `folds`: for each layer the bucket and the sign of its M numbers; None for unfolded rows.
    """

    def __init__(self, row_format: RowFormat, layers: Layers, dtype: torch.dtype, device: torch.device) -> None:
        self.row_format, self.layers, self.dtype, self.device = row_format, layers, dtype, device
        self.width = row_format.width(len(layers.weights))  # D
        self.positions = {name: position for position, name in enumerate(layers.names)}
        self.scale = float(projection.scale(row_format.dim))
        self.sides = {name: self._signs_of(name) for name in layers.weights}
        self.expert_signs = {
            name: self._tensor(projection.signs(row_format.seed, name, "e", weight.num_experts, row_format.dim), dtype)
            for name, weight in layers.weights.items()
            if weight.num_experts
        }
        self.folds = {name: self._fold_of(name) for name in layers.weights} if row_format.fold_dims else None

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def _signs_of(self, name: str) -> tuple[Tensor, Tensor]:
        seed, dim = self.row_format.seed, self.row_format.dim
        weight = self.layers.weights[name]
        # bfloat16 holds the signs exactly and is multiplied at its own rate; float16 has too small a range for such sums.
        of_products = compute_dtype(weight.parameter)
        dtype = of_products if of_products == torch.bfloat16 else self.dtype
        side_a = projection.signs(seed, name, "a", weight.inputs, dim)
        side_b = projection.signs(seed, name, "b", weight.outputs, dim)
        return self._tensor(side_a, dtype), self._tensor(side_b, dtype)

    def _fold_of(self, name: str) -> tuple[Tensor, Tensor]:
        assert self.row_format.fold_dims is not None
        table = projection.fold_table(self.row_format.seed, name, self.row_format.dim, self.row_format.fold_dims)
        return torch.from_numpy(table.bucket_M).to(self.device), self._tensor(table.sign_M, self.dtype)

    def _tensor(self, array: Any, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=self.device, dtype=dtype)
