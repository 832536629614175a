"""From plain directions in the space of the sketches to those that stored rows are scored along: curvature, then folding.

Shapes: K directions, L layers, P projected dims a side, M = P² numbers of a layer's sketch, D stored dims.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job import projection
from prism_job.plan.plan import Plan
from prism_job.score import curvature
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Folding:
    """(H + λI)⁻¹ of a direction in the unfolded space, then the form the rows are stored in. Linear in the direction."""

    spec: RunSpec
    layers: list[str]
    inverse: curvature.Inverse | None  # None: curvature `none`
    facts: dict[str, Any]  # of the curvature, for the manifest

    def __call__(self, directions_KLPP: Float64) -> Float64:
        """Float64 [K, D]."""
        if self.inverse:
            directions_KLPP = self.inverse(directions_KLPP)
        if self.spec.extraction.codec.kind == "float16":
            return directions_KLPP.reshape(len(directions_KLPP), -1)
        flat_KLM = directions_KLPP.reshape(*directions_KLPP.shape[:2], -1)
        return projection.fold_each(
            flat_KLM, self.layers, self.spec.extraction.projection.seed, self.spec.extraction.codec.dims
        )


def read_folding(spec: RunSpec, plan: Plan, store: Store, layers: list[str], lam: float | None = None) -> Folding:
    """The folding of a run; merges the curvature factors that its plan names.

    Args:
        lam: λ where it is given, in place of `damping` times the mean eigenvalue.
    """
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind != "kfac":
        return Folding(spec, layers, None, facts)
    factors = curvature.merge_factors(plan, store, layers, spec.extraction.projection.dim)
    damping = spec.scoring.curvature.damping
    if lam is not None:
        damping = lam / curvature.damping_value(factors, 1.0)
    lam = curvature.damping_value(factors, damping)
    facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
    return Folding(spec, layers, curvature.Inverse.of(factors, lam), facts)


def fold_directions(
    spec: RunSpec, plan: Plan, store: Store, layers: list[str], directions_KLPP: Float64, lam: float | None = None
) -> tuple[Float64, dict[str, Any]]:
    """The folding of a run, applied once: float64 [K, D], and the curvature's facts for the manifest."""
    folding = read_folding(spec, plan, store, layers, lam)
    return folding(directions_KLPP), folding.facts
