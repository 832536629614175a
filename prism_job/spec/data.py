"""The sections `spec.candidates` and `spec.targets`: where the rows come from."""

import re
from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from prism_job.spec.section import DataUri, DnsLabel, Section

HOW_TO_WRITE_PAIRS = """\
a pair is a prompt, the response you want (chosen) and one you do not want (rejected). Write thirty or more:
    {"prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4.", "rejected": "2 + 2 = 5."}
    {"prompt": "What is 9 - 3?", "chosen": "9 - 3 = 6.", "rejected": "9 - 3 = 7."}
    Prompts that are not in the pool or your evaluation; responses that differ in what you look for, and in nothing else:
    docs/choosing-targets.md"""
"""For a hint: what targets are, where a document or its files have none."""

ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

ColumnSource = ColumnName | Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=16)]
"""A column, a template such as "{question}\\n{hint}", or several columns, which are joined by line breaks."""


WHOLE_COLUMNS = frozenset({"messages", "prompt", "completion", "chosen", "rejected", "tools"})
"""Parts whose column may hold a list of messages or schemas; the others are text."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[^{}]+")


def template_parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as pieces: text, and the column that follows it, None at the end. `{{` and `}}` are braces in the text.

    Raises ValueError: a brace without its other half, or no column at all.
    """
    pieces: list[tuple[str, str | None]] = []
    text, position = "", 0
    while match := _PIECE.match(template, position):
        position = match.end()
        if match[1] is None:
            text += match[0][0] if match[0] in ("{{", "}}") else match[0]
        else:
            pieces.append((text, match[1]))
            text = ""
    if position < len(template):
        raise ValueError(
            f"a brace without its other half at {template[position:][:20]!r}; write {{{{ or }}}} for a brace"
        )
    if not pieces:
        raise ValueError("a template without a column; name one in braces")
    return (*pieces, (text, None))


class ColumnsSpec(Section):
    """Which columns hold which part of an example, for data in a layout that PRISM does not know (docs/data.md).

    Each part is one column, a list of columns that are joined by line breaks (empty ones are left out), or a template with
    column names in braces, such as `"{question}\\n"`. Rows that hold nothing in any of these columns are read by their own
    layout; a row that lacks some of them cannot be used.
    """

    messages: ColumnSource | None = Field(None, description="A whole conversation.")
    text: ColumnSource | None = Field(None, description="Plain text, all of which is learnt.")
    prompt: ColumnSource | None = Field(None, description="What stands before the response.")
    completion: ColumnSource | None = Field(None, description="The response to a prompt.")
    system: ColumnSource | None = Field(None, description="Text of a system turn.")
    user: ColumnSource | None = Field(None, description="Text of a user turn: makes the example a conversation.")
    assistant: ColumnSource | None = Field(
        None, description="Text of an assistant turn, the response to user or to messages."
    )
    chosen: ColumnSource | None = Field(None, description="The wanted response of a target.")
    rejected: ColumnSource | None = Field(None, description="The unwanted response of a target.")
    tools: ColumnSource | None = Field(None, description="Tools that the conversation may call, as JSON schemas.")

    @model_validator(mode="after")
    def _sources(self) -> Self:
        for part, source in self.given().items():
            if part in ("messages", "tools") and (isinstance(source, tuple) or "{" in source):
                raise ValueError(f"{part} must be one column")
            for each in source if isinstance(source, tuple) else (source,):
                if "{" in each or "}" in each:
                    if isinstance(source, tuple):
                        raise ValueError(f"{part}: a list holds columns; write one template instead")
                    template_parts(each)
        return self

    def given(self) -> dict[str, str | tuple[str, ...]]:
        """Part of an example -> its column, columns or template."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


_CONVERSATION = frozenset({"system", "tools"})
"""Parts that a conversation may have besides."""

CANDIDATE_PARTS = {
    frozenset({"messages"}): _CONVERSATION | {"assistant"},
    frozenset({"user", "assistant"}): _CONVERSATION,
    frozenset({"prompt", "completion"}): frozenset({"tools"}),
    frozenset({"text"}): frozenset[str](),
}
"""Parts that make a candidate -> what may stand beside them."""

TARGET_PARTS = {
    frozenset({"user", "chosen"}): _CONVERSATION | {"rejected"},
    frozenset({"messages", "chosen"}): _CONVERSATION | {"rejected"},
    frozenset({"prompt", "chosen"}): frozenset({"rejected", "tools"}),
    frozenset({"chosen", "rejected"}): frozenset({"tools"}),
}
"""Parts that make a target; without a prompt it is the common beginning of both sides."""


def _check_parts(known: dict[frozenset[str], frozenset[str]]) -> AfterValidator:
    def check(columns: ColumnsSpec | None) -> ColumnsSpec | None:
        given = set(columns.given()) if columns else set()
        if columns is None or any(needed <= given <= needed | beside for needed, beside in known.items()):
            return columns
        order = list(ColumnsSpec.model_fields)
        valid = [
            " + ".join([*sorted(needed, key=order.index), *(f"[{part}]" for part in order if part in beside)])
            for needed, beside in known.items()
        ]
        found = " + ".join(part for part in order if part in given) or "nothing"
        raise ValueError(f"{found} makes no example; give {'; or '.join(valid)}")

    return AfterValidator(check)


CandidateColumns = Annotated[ColumnsSpec | None, _check_parts(CANDIDATE_PARTS)]
TargetColumns = Annotated[ColumnsSpec | None, _check_parts(TARGET_PARTS)]


class CandidatesSpec(Section):
    """The pool of training examples to select from."""

    uris: Annotated[tuple[DataUri, ...], Field(min_length=1, max_length=256)] = Field(
        description="Files, folders or s3:// prefixes with JSON lines, .json, .csv, .tsv, .parquet or .arrow files, plain or "
        "compressed; folders of `save_to_disk`; data sets of the hub, hf://datasets/ORG/NAME[@REVISION][?config=…&split=…]; "
        "the manifest.json of another run, for its selected rows."
    )
    columns: CandidateColumns = Field(None, description="Columns of a layout that PRISM does not know.")
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
    uris: Annotated[tuple[DataUri, ...], Field(min_length=1, max_length=16)] = Field(
        description="Files, folders or s3:// prefixes, in the formats of the candidates. A file may be in several sets."
    )
    columns: TargetColumns = Field(None, description="Columns of a layout that PRISM does not know.")
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

    uris: Annotated[tuple[DataUri, ...], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Files, folders or s3:// prefixes, in the formats of the candidates."
    )
    columns: TargetColumns = Field(
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
