"""The sections `spec.candidates` and `spec.targets`: where the rows come from."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from prism_job.spec.section import DnsLabel, Section, Uri

ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

ColumnSource = ColumnName | Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=16)]
"""A column, a template such as "{question}\\n{hint}", or several columns, which are joined by line breaks."""


class ColumnsSpec(Section):
    """Which columns hold which part of an example, for data in a layout that PRISM does not know.

    Each part is one column, a list of columns that are joined by line breaks (empty ones are left out), or a template with
    column names in braces. Rows that have none of these columns are read by their own layout.
    """

    messages: ColumnSource | None = Field(None, description="A whole conversation.")
    text: ColumnSource | None = Field(None, description="Plain text, all of which is learnt.")
    prompt: ColumnSource | None = Field(None, description="What stands before the response.")
    completion: ColumnSource | None = Field(None, description="The response to a prompt.")
    chosen: ColumnSource | None = Field(None, description="The wanted response of a target.")
    rejected: ColumnSource | None = Field(None, description="The unwanted response of a target.")
    system: ColumnSource | None = Field(None, description="Text of a system turn.")
    user: ColumnSource | None = Field(None, description="Text of a user turn: makes the example a conversation.")
    assistant: ColumnSource | None = Field(None, description="Text of an assistant turn, the response to user.")
    tools: ColumnSource | None = Field(None, description="Tools that the conversation may call, as JSON schemas.")

    def given(self) -> dict[str, str | tuple[str, ...]]:
        """Part of an example -> its column, columns or template."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class CandidatesSpec(Section):
    """The pool of training examples to select from."""

    uris: Annotated[tuple[Uri, ...], Field(min_length=1, max_length=256)] = Field(
        description="Files, folders or s3:// prefixes with .jsonl, .json, .parquet or .csv files, also as .gz or .zst."
    )
    columns: ColumnsSpec | None = Field(None, description="Columns of a layout that PRISM does not know.")
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of rows (0 to 1) that may be unusable; more fail the run, before it selects from the wrong data.",
    )


class TargetSet(Section):
    """One of several behaviours. Weight and sign affect only the scores: changing them extracts nothing again."""

    name: DnsLabel = Field(
        description="Unique name of the set; its scores are the column score_<name> of scores.parquet."
    )
    uris: Annotated[tuple[Uri, ...], Field(min_length=1, max_length=16)] = Field(
        description="Files, folders or s3:// prefixes, in the formats of the candidates. A file may be in several sets."
    )
    columns: ColumnsSpec | None = Field(None, description="Columns of a layout that PRISM does not know.")
    weight: float = Field(1.0, gt=0, le=1_000_000, description="Factor of the set's score in the combined score.")
    sign: Literal[1, -1] = Field(1, description="1: select for the behaviour. -1: select against it.")

    @property
    def signed_weight(self) -> float:
        return self.sign * self.weight


class TargetsSpec(Section):
    """Examples of the behaviour to select for: prompt, chosen, rejected. One unusable row fails the run.

    Give exactly one of uris (one behaviour) and sets (several: each is scored by itself, and the combined score is the
    sum of sign × weight × its score).
    """

    uris: Annotated[tuple[Uri, ...], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Files, folders or s3:// prefixes, in the formats of the candidates."
    )
    columns: ColumnsSpec | None = Field(
        None, description="Columns of a layout that PRISM does not know. Beside uris; each of the sets has its own."
    )
    sets: Annotated[tuple[TargetSet, ...], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Named sets of targets, instead of uris. One extraction serves all sets."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.uris is None) == (self.sets is None):
            raise ValueError("give exactly one of uris, sets")
        if self.sets is not None and self.columns is not None:
            raise ValueError("columns stands beside uris; give each of the sets its own")
        counts = Counter(target_set.name for target_set in self.as_sets())
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"two sets have the name {', '.join(twice)}; give each its own")
        return self

    def as_sets(self) -> tuple[TargetSet, ...]:
        """The sets in order; plain uris are one set with the name ""."""
        return self.sets or (TargetSet.model_construct(name="", uris=self.uris or (), columns=self.columns),)

    def columns_by_set(self) -> dict[str, ColumnsSpec | None]:
        """Name of each set -> its columns."""
        return {target_set.name: target_set.columns for target_set in self.as_sets()}

    def all_uris(self) -> list[str]:
        """The uris of all sets, in order."""
        return [uri for target_set in self.as_sets() for uri in target_set.uris]
