"""The sections `spec.scoring`, `spec.selection`, `spec.evaluation` and `spec.audit`: how rows are ranked, which of them are
selected, and how good the ranking is.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from prism_job.spec.model import ModelSpec
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
    preference_model: ModelSpec | None = Field(
        None,
        exclude_if=lambda model: model is None,  # ids and documents without it stay as they were
        description="The model that π comes from, if it is not the reference: such as the reference before it was tuned. The "
        "pairs alone pass through it, forward only, before the reference is loaded. Changing it changes no gradient.",
    )
    score: Literal["influence", "cosine", "representation"] = Field(
        "influence",
        description="influence: g_zᵀ(H+λI)⁻¹g. cosine: the same divided by the norm of g_z (LESS). representation: cosine of "
        "hidden states to the chosen responses, by a forward pass alone (RDS+). Without weighting, loss, curvature and audit; "
        "extraction.layers, projection and codec change nothing.",
    )
    similarity: Literal["nearest", "mean"] | None = Field(
        None,
        exclude_if=lambda similarity: similarity is None,  # ids and documents without it stay as they were
        description="With score: representation, the default nearest: cosine to the nearest chosen response of a target set. "
        "mean: the mean of the cosines to all of them.",
    )
    loss: Literal["sum", "mean"] = Field(
        "sum", description="The loss of a candidate: sum or mean over its response tokens."
    )
    curvature: CurvatureSpec = Field(CurvatureSpec(), description="Curvature of the training objective.")

    @property
    def is_forward_only(self) -> bool:
        """Whether rows are hidden states, so that no pass goes backward."""
        return self.score == "representation"

    @model_validator(mode="before")
    @classmethod
    def _write_out_what_representation_means(cls, document: Any) -> Any:
        # So that all that reads these fields, the document beside a manifest included, finds what the run does.
        if isinstance(document, dict) and document.get("score") == "representation":
            without = {"weighting": "uniform", "curvature": {"kind": "none"}}
            return {**without, **document, "similarity": document.get("similarity") or "nearest"}
        return document

    @model_validator(mode="after")
    def _representation_has_no_gradients(self) -> Self:
        if not self.is_forward_only:
            if self.similarity is not None:
                raise ValueError("similarity needs score: representation")
            return self
        for name, value, allowed in (
            ("weighting", self.weighting, "uniform"),
            ("loss", self.loss, "sum"),
            ("curvature.kind", self.curvature.kind, "none"),
        ):
            if value != allowed:
                raise ValueError(f"{name}: {value} needs gradients, and score: representation has none; leave it out")
        return self

    @model_validator(mode="after")
    def _preference_is_used(self) -> Self:
        if self.preference_model is not None and self.weighting != "preference":
            raise ValueError("preferenceModel needs weighting: preference; uniform weights do not use π")
        return self


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

    def num_taken(self, num_ranked: int) -> int:
        """Examples that a budget of a count or a fraction takes of so many."""
        return round(self.fraction * num_ranked) if self.fraction is not None else self.count or 0


Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]

NEAR_AGREEMENT = 0.9
"""Default of `selection.nearAgreement`: docs/method.md, Near-duplicates, has what it was chosen from."""


class SharesSpec(Section):
    """Limits of the share of the budget that each source, or each group, may have.

    The budget is what is kept, or what is dropped. Shares are of examples, or of response tokens where the budget is in
    tokens. max is rounded up to whole examples and min down; a number of tokens is never exceeded. A group that has fewer
    examples than its min gives all of them, and the manifest states it (below_min). Where max leaves no way to fill the
    budget, the run fails. Limits are shares and not numbers, so they keep their meaning when the budget changes.
    """

    max: float | None = Field(None, gt=0, le=1, description="Largest share of the budget, 0 to 1. None may exceed it.")
    min: float | None = Field(
        None, gt=0, le=1, description="Smallest share of the budget, 0 to 1, taken from its own best-ranked examples."
    )

    @model_validator(mode="after")
    def _one_or_both(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("give max, min, or both")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError("min must not be above max")
        return self


class GroupSharesSpec(SharesSpec):
    """The same limits for the groups that a column of the candidates makes."""

    group_by: Column = Field(
        description="Column of the candidates. Its values (text, numbers, true, false) are the groups, at most 10,000; "
        "examples without a value are a group too."
    )


class SelectionSpec(Section):
    """Which end of the ranking the budget takes, and whether these examples are kept or dropped."""

    keep: Literal["highest", "lowest"] | None = Field(
        None, description="Keep this end of the ranking (forward selection)."
    )
    drop: Literal["highest", "lowest"] | None = Field(
        None, description="Drop this end of the ranking, keep the rest (rectification)."
    )
    budget: BudgetSpec = Field(description="How many examples are kept, or dropped.")
    per_source: SharesSpec | None = Field(
        None, description="Limits each source's share of the budget. A source is a data file, as in the tables."
    )
    per_group: GroupSharesSpec | None = Field(
        None, description="Limits each group's share of the budget, by a column. Not together with perSource."
    )
    dedupe: Literal["exact", "near", "none"] = Field(
        "exact",
        description="exact: of rows with the same training content only the first counts. near: besides, a row is left out "
        "that nearly repeats, in its stored signs, one that ranks better and is kept. none: all rows count.",
    )
    near_agreement: float | None = Field(
        None,
        ge=0.8,
        le=1,
        description="With dedupe: near, the share of signs from which two rows are near-duplicates: .5 for unrelated rows, 1 "
        f"for copies. Default {NEAR_AGREEMENT:g}. It is measured on 4,096 signs of each row, to within .01.",
    )

    @model_validator(mode="before")
    @classmethod
    def _write_out_the_default(cls, document: Any) -> Any:
        # So that the document beside a manifest holds the number, and a selection without `near` keeps its id.
        if isinstance(document, dict) and document.get("dedupe") == "near" and document.get("nearAgreement") is None:
            return {**document, "nearAgreement": NEAR_AGREEMENT}
        return document

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give exactly one of keep, drop")
        if self.per_source and self.per_group:
            raise ValueError("give at most one of perSource, perGroup")
        if self.near_agreement is not None and self.dedupe != "near":
            raise ValueError("nearAgreement needs dedupe: near")
        return self

    @property
    def shares(self) -> SharesSpec | None:
        return self.per_source or self.per_group

    @property
    def where_shares(self) -> str:
        return "spec.selection.perGroup" if self.per_group else "spec.selection.perSource"

    def settings(self) -> dict[str, Any]:
        """Plain values that decide the selection. A field that came later and is unset is left out: ids stay as they were."""
        later = ("per_source", "per_group", "near_agreement")
        return self.model_dump(mode="json", exclude={name for name in later if getattr(self, name) is None})


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
