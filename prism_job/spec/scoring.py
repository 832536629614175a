"""The section `spec.scoring`: how rows and targets become scores."""

from typing import Literal

from pydantic import Field

from prism_job.spec.section import Section


class CurvatureSpec(Section):
    """The curvature term (H + λI)⁻¹ of the influence function."""

    kind: Literal["kfac", "none"] = Field(
        "kfac", description="kfac: Kronecker-factored curvature in the projected space. none: plain inner products."
    )
    damping: float = Field(
        0.1,
        gt=0,
        description="λ as a multiple of the mean eigenvalue of H over all layers. Large values approach plain inner products.",
    )


class ScoringSpec(Section):
    """How rows and targets become a score for each candidate. Changing it extracts nothing again."""

    weighting: Literal["preference", "uniform"] = Field(
        "preference", description="Weight of each pair. preference: π, the model's own preference (PRISM). uniform: 1."
    )
    score: Literal["influence", "cosine"] = Field(
        "influence", description="influence: g_zᵀ(H+λI)⁻¹g. cosine: the same divided by the norm of g_z (LESS)."
    )
    loss: Literal["sum", "mean"] = Field(
        "sum", description="The loss of a candidate: sum or mean over its response tokens."
    )
    curvature: CurvatureSpec = Field(CurvatureSpec(), description="Curvature of the training objective.")
