"""From the plain directions of the target sets to those that stored rows are scored along: curvature, then folding.

Shapes: K target sets, L layers, P projected dims a side, M = P² numbers of a layer's sketch, D stored dims.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job import projection
from prism_job.plan.plan import Plan
from prism_job.score import curvature
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store


def fold_directions(
    spec: RunSpec,
    plan: Plan,
    store: Store,
    layers: list[str],
    directions_KLPP: NDArray[np.float64],
    lam: float | None = None,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(H + λI)⁻¹ g of each in the unfolded space, then in the form the rows are stored in.

    Float64 [K, D], and the curvature's facts for the manifest.

    Args:
        lam: λ where it is given, in place of `damping` times the mean eigenvalue.
    """
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind == "kfac":
        factors = curvature.merge_factors(plan, store, layers, spec.extraction.projection.dim)
        damping = spec.scoring.curvature.damping
        if lam is not None:
            damping = lam / curvature.damping_value(factors, 1.0)
        lam = curvature.damping_value(factors, damping)
        facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
        directions_KLPP = curvature.solve(directions_KLPP, factors, damping)
    if spec.extraction.codec.kind == "float16":
        return directions_KLPP.reshape(len(directions_KLPP), -1), facts
    flat_KLM = directions_KLPP.reshape(*directions_KLPP.shape[:2], -1)
    seed, dims = spec.extraction.projection.seed, spec.extraction.codec.dims
    return np.stack([projection.fold(flat_LM, layers, seed, dims) for flat_LM in flat_KLM]), facts
