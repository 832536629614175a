"""The curvature of the training objective in the projected space, and (H + λI)⁻¹ applied to the directions.

K-FAC (Martens and Grosse 2015): layer l has H_l = A_l ⊗ B_l with A = E[a aᵀ], B = E[b bᵀ] over tokens, of the projected
sides. One λ serves all layers, so that λ → ∞ leaves the plain inner product.

Shapes: K directions, L layers, P projected dims a side; a sketch is [P, P], b side by a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import DataError
from prism_job.plan.plan import Plan
from prism_job.storage.objects import Store
from prism_job.store import shards

Float64 = NDArray[np.float64]


@dataclass
class Factors:
    """Sums over tokens, merged by addition: Σ a aᵀ and Σ b bᵀ [L, P, P], and how many tokens they hold."""

    inputs_LPP: Float64
    outputs_LPP: Float64
    num_tokens: int

    def merge(self, other: Self) -> None:
        self.inputs_LPP += other.inputs_LPP
        self.outputs_LPP += other.outputs_LPP
        self.num_tokens += other.num_tokens


def unpack(upper_LU: NDArray[np.float32], dim: int) -> Float64:
    """Symmetric matrices [L, P, P] from their upper halves [L, P(P+1)/2]."""
    rows, columns = np.triu_indices(dim)
    full = np.zeros((upper_LU.shape[0], dim, dim))
    full[:, rows, columns] = upper_LU
    full[:, columns, rows] = upper_LU
    return full


def damping_value(factors: Factors, damping: float) -> float:
    """λ: `damping` times the mean eigenvalue of H over all layers. mean eig(A ⊗ B) = tr(A) tr(B) / P²."""
    dim = factors.inputs_LPP.shape[1]
    trace_a_L = np.trace(factors.inputs_LPP, axis1=1, axis2=2) / factors.num_tokens
    trace_b_L = np.trace(factors.outputs_LPP, axis1=1, axis2=2) / factors.num_tokens
    return damping * float((trace_a_L * trace_b_L).mean()) / dim**2


@dataclass(frozen=True)
class Inverse:
    """(H + λI)⁻¹, exactly: in the eigenbases of A and B, H is diagonal with entries α_i β_j."""

    bases_a_LPP: Float64
    bases_b_LPP: Float64
    damped_LPP: Float64  # eigenvalues of H + λI, b side by a side

    @classmethod
    def of(cls, factors: Factors, lam: float) -> Self:
        alpha_LP, bases_a_LPP = np.linalg.eigh(factors.inputs_LPP / factors.num_tokens)
        beta_LP, bases_b_LPP = np.linalg.eigh(factors.outputs_LPP / factors.num_tokens)
        # Sums of outer products have no negative eigenvalues; rounding may make a zero negative.
        eigenvalues_LPP = np.clip(beta_LP, 0, None)[:, :, None] * np.clip(alpha_LP, 0, None)[:, None, :]
        return cls(bases_a_LPP, bases_b_LPP, eigenvalues_LPP + lam)

    def __call__(self, directions_KLPP: Float64) -> Float64:
        """(H + λI)⁻¹ g of each direction, layer by layer."""
        solved_KLPP = np.empty_like(directions_KLPP)
        for layer, (basis_a, basis_b) in enumerate(zip(self.bases_a_LPP, self.bases_b_LPP, strict=True)):
            for number, sketch in enumerate(directions_KLPP[:, layer]):
                rotated = basis_b.T @ sketch @ basis_a
                solved_KLPP[number, layer] = basis_b @ (rotated / self.damped_LPP[layer]) @ basis_a.T
        return solved_KLPP


def solve(directions_KLPP: Float64, factors: Factors, damping: float) -> Float64:
    """(H + λI)⁻¹ g of each direction, with λ from `damping_value`."""
    return Inverse.of(factors, damping_value(factors, damping))(directions_KLPP)


def merge_factors(plan: Plan, store: Store, layers: Sequence[str], dim: int) -> Factors:
    """Sum the factor shards that the plan names, in its order.

    Raises DataError: a shard is missing, damaged or of other layers, or they hold no tokens.
    """
    merged: Factors | None = None
    for unit_id in plan.factors:
        shard = shards.read_shard(store, plan.extractor, "factors", unit_id)
        where = store.uri(shards.shard_key(plan.extractor, "factors", unit_id))
        shards.refuse_other_layers(shard, layers, where)
        inputs = unpack(shard.arrays["inputs"], dim)
        outputs = unpack(shard.arrays["outputs"], dim)
        part = Factors(inputs, outputs, int(shard.notes["num_tokens"]))
        if merged is None:
            merged = part
        else:
            merged.merge(part)
    if merged is None or not merged.num_tokens:
        where = ", ".join(store.uri(shards.shard_key(plan.extractor, "factors", unit)) for unit in plan.factors[:3])
        fix = "repair the quarantined rows, or set scoring.curvature.kind: none"
        raise DataError(
            "the curvature factors hold no tokens: every row of their units is quarantined", where=where, fix=fix
        )
    return merged
