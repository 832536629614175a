"""The sections `spec.scoring`, `spec.selection`, `spec.evaluation` and `spec.audit`: how rows are ranked, which of them are
selected, and how good the ranking is.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

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


class BudgetSpec(Section):
    """How many examples are kept, or dropped: exactly one of the three fields."""

    count: int | None = Field(None, ge=1, le=10**12, description="Number of examples.")
    fraction: float | None = Field(
        None, gt=0, le=1, description="Share of the examples, 0 to 1; the number is rounded to nearest."
    )
    tokens: int | None = Field(
        None,
        ge=1,
        le=10**15,
        description="Response tokens; takes examples in ranking order as long as their sum is at most this.",
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        given = [name for name in ("count", "fraction", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of count, fraction, tokens; found {', '.join(given) or 'none'}")
        return self


class SelectionSpec(Section):
    """Which end of the ranking the budget takes, and whether these examples are kept or dropped."""

    keep: Literal["highest", "lowest"] | None = Field(
        None, description="Keep this end of the ranking (forward selection)."
    )
    drop: Literal["highest", "lowest"] | None = Field(
        None, description="Drop this end of the ranking, keep the rest (rectification)."
    )
    budget: BudgetSpec = Field(description="How many examples are kept, or dropped.")
    dedupe: Literal["exact", "none"] = Field(
        "exact",
        description="exact: of rows with the same training content only the first counts. none: all rows count.",
    )

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give exactly one of keep, drop")
        return self


Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class EvaluationSpec(Section):
    """Label columns to compare the ranking with. They change no score and no selection."""

    label: Column = Field(
        description="Column of the candidates that marks them good or bad. Every row needs it, and the pool needs both kinds."
    )
    positive: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        None,
        description="Its value that means good, in upper or lower case. Without it 1, true, yes mean good, 0, false, no bad.",
    )
    target_label: Column | None = Field(
        None,
        description="Column of the targets that marks a pair right or wrong, as 1/0, true/false or yes/no. Without it all "
        "pairs count as right.",
    )


class AuditSpec(Section):
    """Extracts and scores some candidates again, and compares the two rankings: how reliable is the ranking?"""

    examples: int = Field(
        128,
        ge=0,
        le=65_536,
        description="Number of candidates, chosen by their ids, that are extracted again with twice the dimensions and another "
        "seed. 128 give a Spearman correlation of .95 to within .02. 0: no audit, and no cost.",
    )
