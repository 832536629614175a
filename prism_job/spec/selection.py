"""The section `spec.selection`: how scores become a subset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prism_job.spec.section import Section


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
    def _one_of_three(self) -> BudgetSpec:
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
    def _one_direction(self) -> SelectionSpec:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give exactly one of keep, drop")
        return self
