"""The sections `spec.candidates` and `spec.targets`: where the rows come from."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prism_job.spec.section import DnsLabel, Section, Uri


class CandidatesSpec(Section):
    """The pool to choose from."""

    uris: Annotated[tuple[Uri, ...], Field(min_length=1, max_length=256)] = Field(
        description="Files, folders or s3:// prefixes of .jsonl, .json, .parquet, .csv, also .gz and .zst."
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of rows (0 to 1) that may be unusable before the run fails."
    )


class TargetSet(Section):
    """One of several behaviours. Weight and sign are scoring: changing them extracts nothing again."""

    name: DnsLabel = Field(description="Names the column score_<name> of scores.parquet; unique within the run.")
    uris: Annotated[tuple[Uri, ...], Field(min_length=1, max_length=16)] = Field(
        description="Files, folders or s3:// prefixes, read like the candidates. A file may stand in several sets."
    )
    weight: float = Field(1.0, gt=0, le=1_000_000, description="How much the set's score counts in the combined one.")
    sign: Literal[1, -1] = Field(1, description="1: toward the behaviour. -1: away from it.")

    @property
    def signed_weight(self) -> float:
        return self.sign * self.weight


class TargetsSpec(Section):
    """Examples of the behaviour wanted: prompt, chosen, rejected. Every row must be good: they are few and weigh much.

    Exactly one of uris (one behaviour) and sets (several: each is scored by itself, and the combined score is the sum
    of sign × weight × its score).
    """

    uris: Annotated[tuple[Uri, ...], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Files, folders or s3:// prefixes, read like the candidates."
    )
    sets: Annotated[tuple[TargetSet, ...], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Named sets of targets, in place of uris; one extraction serves all."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> TargetsSpec:
        if (self.uris is None) == (self.sets is None):
            raise ValueError("give exactly one of uris, sets")
        twice = [name for name, count in Counter(one.name for one in self.as_sets()).items() if count > 1]
        if twice:
            raise ValueError(f"two sets have the name {', '.join(twice)}; give each its own")
        return self

    def as_sets(self) -> tuple[TargetSet, ...]:
        """The sets in order; plain uris are one set without a name ("")."""
        return self.sets or (TargetSet.model_construct(name="", uris=self.uris or ()),)

    def all_uris(self) -> list[str]:
        """Of all sets, in order."""
        return [uri for one in self.as_sets() for uri in one.uris]
