"""The document `selection.yaml`: text -> frozen models, checked once. Knows no torch and no numpy, and reads no file.

The same document is the input of a local run and of `prism submit`, and an object in Kubernetes
(docs/architecture.md, Formats).
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from prism_job.errors import SpecError
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.data import CandidatesSpec, TargetsSpec
from prism_job.spec.evaluation import AuditSpec, EvaluationSpec
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec
from prism_job.spec.scoring import ScoringSpec
from prism_job.spec.section import DnsLabel, Section, Uri
from prism_job.spec.selection import SelectionSpec

API_VERSION = "prism.dev/v1alpha1"

LONGEST_DOCUMENT = 2**20
"""Characters. A cluster keeps no more of an object, and reading takes about 10 s a million."""


class Metadata(Section):
    """What Kubernetes calls ObjectMeta, as far as a person writes it."""

    name: DnsLabel = Field(description="Name of the run: a DNS label, because it becomes part of object names.")
    namespace: str | None = Field(None, description="Kubernetes namespace; a local run ignores it.")
    labels: dict[str, str] = Field({}, description="Kubernetes labels, carried along.")
    annotations: dict[str, str] = Field({}, description="Kubernetes annotations, carried along.")


class RunSpec(Section):
    """The whole request."""

    model: ModelSpec = Field(description="The reference model.")
    candidates: CandidatesSpec = Field(description="The pool.")
    targets: TargetsSpec = Field(description="The behaviour.")
    store: Uri = Field(description="Gradient store, shared by many runs.")
    output: Uri = Field(description="Where selections are published, under <output>/<name>/<selection id>/.")
    extraction: ExtractionSpec = Field(ExtractionSpec(), description="Rows from candidates.")
    scoring: ScoringSpec = Field(ScoringSpec(), description="Scores from rows.")
    selection: SelectionSpec = Field(description="The subset from scores.")
    evaluation: EvaluationSpec | None = Field(
        None, description="Compare the ranking with a label: figures in the manifest and in the report."
    )
    audit: AuditSpec = Field(AuditSpec(), description="The manifest's word on how far the ranking can be trusted.")
    cluster: ClusterSpec | None = Field(None, description="Kubernetes only.")
    suspend: bool = Field(
        False, description="Stop the pods and wait, on a cluster. May be changed while the run exists."
    )
    retry: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Raise it to run again on a cluster, after an end of any kind. May be changed.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Remove the run from the cluster so long after its end; none: keep it."
    )


class SelectionRun(Section):
    """The document."""

    api_version: Literal["prism.dev/v1alpha1"] = Field(description="Version of this format.")
    kind: Literal["SelectionRun"] = Field(description="Always SelectionRun.")
    metadata: Metadata = Field(description="Name of the run.")
    spec: RunSpec = Field(description="The request.")

    def to_document(self) -> dict[str, Any]:
        """Plain values, defaults written out: what replays this run whatever later defaults are."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def parse_spec(text: str, where: str) -> SelectionRun:
    """Read a document from YAML or JSON text.

    Args:
        text: the document.
        where: what to call it in errors, usually its path.

    Raises:
        SpecError: not YAML, or fields missing, unknown (with the nearest known name) or out of bounds; all at once.
    """
    return check_document(read_yaml(text, where), where)


def read_yaml(text: str, where: str) -> Any:
    """Plain values from YAML or JSON text. Raises SpecError."""
    if len(text) > LONGEST_DOCUMENT:
        what = f"the document has {len(text):,} characters; at most {LONGEST_DOCUMENT:,}"
        raise SpecError(what, where=where, fix="name folders or s3:// prefixes instead of their files")
    try:
        return yaml.load(text, Loader=_NoAliases)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise SpecError(f"not YAML: {error}", where=where, fix="correct the syntax at the place named") from error


class _NoAliases(yaml.SafeLoader):
    """Ten lines of aliases, each ten times the last, stand for more than a machine holds. A date stays the text that it is,
    as an API server reads it.
    """

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
    """A document that was read already, as plain values. Raises SpecError as parse_spec does."""
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
        # A list whose items are wrong is counted as empty too: that would be a second complaint about one mistake.
        deeper = {tuple(detail["loc"][:-1]) for detail in details}
        lines = [_explain(it) for it in details if it["type"] != "too_short" or tuple(it["loc"]) not in deeper]
        raise SpecError(
            "\n  ".join([f"{len(lines)} thing(s) wrong in the document:", *lines]),
            where=where,
            fix="correct the fields named; docs/selection.md lists every field with its unit",
        ) from None


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        # A whole section is not repeated: the value of a secret may stand in it.
        is_plain = detail["type"] != "missing" and not isinstance(detail["input"], dict | list)
        shown = f" (found {reprlib.repr(detail['input'])})" if is_plain else ""
        return f"{path}: {detail['msg'].removeprefix('Value error, ')}{shown}"
    known = known_fields(tuple(detail["loc"][:-1]))
    near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return f"{path}: unknown field; {hint}"


def known_fields(path: tuple[Any, ...]) -> list[str]:
    """Field names, as the document writes them, of the section at `path`; empty where there is no section."""
    section: Any = SelectionRun
    for part in path:
        if isinstance(part, int):  # a place in a list of sections
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
