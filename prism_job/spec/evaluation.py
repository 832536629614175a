"""The sections `spec.evaluation` and `spec.audit`: how good the ranking is. They change no score."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from prism_job.spec.section import Section

Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class EvaluationSpec(Section):
    """Columns that say what is good, to compare the ranking with. They change no score and no choice."""

    label: Column = Field(
        description="Column of the candidates that says good or bad. Every row must have it, and the pool both kinds."
    )
    positive: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        None, description="Its value that means good, in any case; else 1, true and yes mean good, 0, false and no bad."
    )
    target_label: Column | None = Field(
        None,
        description="Column of the targets that says whether the pair itself is right, as 1/0, true/false or yes/no; "
        "without it every pair is taken as right.",
    )


class AuditSpec(Section):
    """How far the ranking can be trusted: some candidates are extracted and scored again, and the two rankings compared."""

    examples: int = Field(
        128,
        ge=0,
        le=65_536,
        description="Candidates, chosen by their ids, that are extracted again at twice the dims under another seed; passes "
        "over targets make both. 128 tell a Spearman of .95 to within .02; 0: no audit, and no cost.",
    )
