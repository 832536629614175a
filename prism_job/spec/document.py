"""The document `selection.yaml`: text -> frozen models, checked once. Knows no torch and no numpy, and reads no file.

The same document is the input of a local run and of `prism submit`, and an object in Kubernetes
(docs/architecture.md, Formats).
"""

import difflib
import json
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from prism_job.errors import SpecError
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.data import HOW_TO_WRITE_PAIRS, CandidatesSpec, TargetsSpec
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec
from prism_job.spec.ranking import AuditSpec, EvaluationSpec, ScoringSpec, SelectionSpec
from prism_job.spec.section import DnsLabel, Section, Uri

API_VERSION = "prism.dev/v1alpha1"

LONGEST_DOCUMENT = 2**20
"""Characters: the limit of an object in a cluster. Parsing takes about 10 s a million."""


DATA_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz")
"""Endings of names that data have and no document has. Of .json the content decides."""


class Metadata(Section):
    """Name of the run, and Kubernetes metadata."""

    name: DnsLabel = Field(description="Name of the run. A DNS label, because object names are built from it.")
    namespace: str | None = Field(None, description="Kubernetes namespace; ignored by local runs.")
    labels: dict[str, str] = Field({}, description="Kubernetes labels.")
    annotations: dict[str, str] = Field({}, description="Kubernetes annotations.")


class RunSpec(Section):
    """What to select from which data, with which model, and where to publish it."""

    model: ModelSpec = Field(description="The reference model.")
    candidates: CandidatesSpec = Field(description="The pool of training examples.")
    targets: TargetsSpec = Field(description="Examples of the behaviour to select for.")
    store: Uri = Field(description="Gradient store: a path or s3:// prefix. Many runs can share it.")
    output: Uri = Field(description="Path or s3:// prefix of published selections: <output>/<name>/<selection id>/.")
    extraction: ExtractionSpec = Field(ExtractionSpec(), description="How examples become rows.")
    scoring: ScoringSpec = Field(ScoringSpec(), description="How rows become scores.")
    selection: SelectionSpec = Field(description="How scores become a subset.")
    evaluation: EvaluationSpec | None = Field(
        None, description="Compares the ranking with a label; the figures are in the manifest and in the report."
    )
    audit: AuditSpec = Field(
        AuditSpec(),
        description="Measures how reliable the ranking is; the figures are in the manifest and in the report.",
    )
    cluster: ClusterSpec | None = Field(None, description="Pods of a submitted run; ignored by local runs.")
    gpu_hour_price: float | None = Field(
        None,
        ge=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="Price of one GPU-hour, in your currency. `prism estimate`, `prism status`, the manifest and the report "
        "then state the run's price. May be changed while the run exists.",
    )
    suspend: bool = Field(
        False,
        description="On a cluster: stop the pods and wait until it is false again. May be changed while the run exists.",
    )
    retry: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="On a cluster: raise it to run a finished or failed run again. May be changed while the run exists.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Seconds after its end at which the run is removed from the cluster; without it the run stays.",
    )

    def price_of(self, gpu_hours: float) -> float | None:
        """To cents; None without `gpuHourPrice`."""
        return None if self.gpu_hour_price is None else round(gpu_hours * self.gpu_hour_price, 2)

    @property
    def codec_kind(self) -> Literal["sign", "float16"]:
        """How rows of candidates are stored. Hidden states are few numbers, of which signs alone would lose much."""
        return "float16" if self.scoring.is_forward_only else self.extraction.codec.kind

    @model_validator(mode="before")
    @classmethod
    def _no_audit_of_hidden_states(cls, document: Any) -> Any:
        scoring = document.get("scoring") if isinstance(document, dict) else None
        if isinstance(scoring, dict) and scoring.get("score") == "representation" and "audit" not in document:
            return {**document, "audit": {"examples": 0}}
        return document

    @model_validator(mode="after")
    def _representation_fits(self) -> Self:
        if self.scoring.is_forward_only and self.audit.examples:
            raise ValueError(
                "audit: with score: representation there is nothing to measure, since rows are not projected; leave it out"
            )
        if self.scoring.is_forward_only and self.selection.dedupe == "near":
            raise ValueError("selection.dedupe: near compares signs of gradients, and score: representation has none")
        return self


class SelectionRun(Section):
    """A selection run: the document that `prism run` and `prism submit` read."""

    api_version: Literal["prism.dev/v1alpha1"] = Field(description="Version of the document's format.")
    kind: Literal["SelectionRun"] = Field(description="Always SelectionRun.")
    metadata: Metadata = Field(description="Name and labels.")
    spec: RunSpec = Field(description="The run.")

    def to_document(self) -> dict[str, Any]:
        """Plain values with all defaults written out: replays this run even if a later version changes a default."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def parse_spec(text: str, where: str) -> SelectionRun:
    """Read a document from YAML or JSON text. `where`: its name in errors, usually its path.

    Raises SpecError: data in the place of the document, not YAML, or fields missing, unknown (with the nearest known name)
    or out of bounds; all at once.
    """
    refuse_data(text, where)
    return check_document(read_yaml(text, where), where)


def refuse_data(text: str, where: str) -> None:
    """Raises SpecError: data by the ending of the name, or by the first line of the text."""
    if where.lower().endswith(DATA_ENDINGS) or _begins_with_a_row(text):
        fix = (
            "`prism inspect FILE` shows rows of data; give the selection.yaml that names them (`prism init` writes one)"
        )
        raise SpecError("this looks like data, not like a document", where=where, fix=fix)


def _begins_with_a_row(text: str) -> bool:
    """Whether the first line is a whole object of JSON, or the beginning of a list of them, and no document."""
    if text.lstrip().startswith("["):
        return text.lstrip()[1:].lstrip().startswith("{")
    try:
        first = json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not {"apiVersion", "kind", "spec"} & first.keys()


def read_yaml(text: str, where: str) -> Any:
    """Plain values from YAML or JSON text. Raises SpecError."""
    if len(text) > LONGEST_DOCUMENT:
        what = f"the document has {len(text):,} characters; at most {LONGEST_DOCUMENT:,}"
        raise SpecError(what, where=where, fix="name folders or s3:// prefixes instead of their files")
    try:
        return yaml.load(text, Loader=_NoAliases)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise SpecError(f"not YAML: {error}", where=where, fix="correct the syntax at that line") from error


class _NoAliases(yaml.SafeLoader):
    """Refuses aliases, because ten lines of them can expand to more than fits in memory. Keeps a date as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class has it)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            what = f"'*{alias.anchor}': YAML aliases are not supported; write out what it stands for"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=alias.start_mark)
        return super().compose_node(parent, index)


def check_document(document: Any, where: str) -> SelectionRun:
    """Check plain values. Raises SpecError as parse_spec does."""
    if not isinstance(document, dict):
        raise SpecError(
            f"the document is a {type(document).__name__}, not a mapping",
            where=where,
            fix=f"begin it with 'apiVersion: {API_VERSION}' and 'kind: SelectionRun'",
        )
    try:
        return SelectionRun.model_validate(document)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # pydantic reports a list with wrong items as too short as well: that would be one mistake twice.
        deeper = {tuple(detail["loc"][:-1]) for detail in details}
        lines = [_explain(it) for it in details if it["type"] != "too_short" or tuple(it["loc"]) not in deeper]
        raise SpecError(
            "\n  ".join([f"the document has {len(lines)} error(s):", *lines]),
            where=where,
            fix="correct the fields named; docs/selection.md lists every field with its unit"
            + (f". spec.targets.uris names files of pairs: {HOW_TO_WRITE_PAIRS}" if _lacks_targets(details) else ""),
        ) from None


def _lacks_targets(details: Sequence[Any]) -> bool:
    places = [("spec", "targets"), ("spec", "targets", "uris")]
    empty = [it["type"] == "missing" or not it["input"] or it["input"] == {"sets": None} for it in details]
    return any(it["loc"] in places and is_empty for it, is_empty in zip(details, empty, strict=True))


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        # A section's value is not printed: it may contain a secret.
        is_plain = detail["type"] != "missing" and not isinstance(detail["input"], dict | list)
        found = f" (found {reprlib.repr(detail['input'])})" if is_plain else ""
        return f"{path}: {detail['msg'].removeprefix('Value error, ')}{found}"
    known = known_fields(tuple(detail["loc"][:-1]))
    near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return f"{path}: unknown field; {hint}"


def known_fields(path: tuple[Any, ...]) -> list[str]:
    """Field names, as the document writes them, of the section at `path`; empty where there is no section."""
    section: Any = SelectionRun
    for part in path:
        if isinstance(part, int):  # an index in a list of sections
            continue
        by_alias = {field.alias: field.annotation for field in section.model_fields.values()}
        section = next(_sections_in(by_alias.get(part)), None)
        if section is None:
            return []
    return [str(field.alias) for field in section.model_fields.values()]


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a field's annotation names, within lists and options too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for option in getattr(annotation, "__args__", ()):
        yield from _sections_in(option)
