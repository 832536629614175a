"""The section `spec.scoring`: how rows and targets become scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism_job.spec.section import Section


class CurvatureSpec(Section):
    """The (H + λI)⁻¹ between a candidate and the direction."""

    kind: Literal["kfac", "none"] = Field("kfac", description="kfac: Kronecker factors of the projected space.")
    damping: float = Field(
        0.1, gt=0, description="λ in units of the mean eigenvalue of H over all layers; large means plain dot products."
    )


class ScoringSpec(Section):
    """How rows and targets become one number a candidate. Changing it extracts nothing again."""

    weighting: Literal["preference", "uniform"] = Field(
        "preference", description="preference: each pair by π, the model's own preference (PRISM). uniform: by 1."
    )
    score: Literal["influence", "cosine"] = Field(
        "influence", description="influence: g_zᵀ(H+λI)⁻¹g. cosine: the same over the norm of g_z (LESS)."
    )
    loss: Literal["sum", "mean"] = Field(
        "sum", description="A candidate's loss: summed over its response tokens, or their mean."
    )
    curvature: CurvatureSpec = Field(CurvatureSpec(), description="Curvature of the training objective.")
