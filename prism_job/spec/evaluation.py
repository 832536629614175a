"""The sections `spec.evaluation` and `spec.audit`: how good the ranking is. They change no score."""

from typing import Annotated

from pydantic import Field, StringConstraints

from prism_job.spec.section import Section

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
