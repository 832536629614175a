"""The document `selection.yaml`: frozen models, checked once at the door, and the digest of any plain value.

Knows no torch, no numpy, and reads no file: `parse_spec` takes the text. The same document is the input of a local run,
of `prism submit`, and a Kubernetes object (DESIGN, section 4).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from prism_job.errors import SpecError
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.section import Section, Uri, check_uri

API_VERSION = "prism.dev/v1alpha1"

LONGEST_DOCUMENT = 2**20
"""Characters. A cluster keeps no more of an object, and reading takes about 10 s a million."""


Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A DNS label: lower case letters, digits and '-'."""


class Metadata(Section):
    """What Kubernetes calls ObjectMeta, as far as a person writes it."""

    name: Label = Field(description="Name of the run: a DNS label, because it becomes part of object names.")
    namespace: str | None = Field(None, description="Kubernetes namespace; a local run ignores it.")
    labels: dict[str, str] = Field({}, description="Kubernetes labels, carried along.")
    annotations: dict[str, str] = Field({}, description="Kubernetes annotations, carried along.")


class ModelSpec(Section):
    """The reference model: the one whose gradients and preferences are taken."""

    uri: Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(check_uri)] = Field(
        description="Hub id, folder, s3:// prefix, or a .gguf file. No remote code is run and no pickle is read."
    )
    revision: Annotated[str, StringConstraints(max_length=256)] = Field(
        "main", description="Branch, tag or commit of a hub model; other kinds of uri have none."
    )
    adapter: Uri | None = Field(
        None, description="Folder or s3:// prefix of a PEFT adapter; its layers are then the trainable space."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Type of the weights in the forward and backward pass. In bfloat16 projected inputs and gradients are "
        "rounded to it as well, else they are float32; sketches and sums are float32.",
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention backend; part of the extractor digest because it changes last bits."
    )

    @property
    def product_dtype(self) -> Literal["bfloat16", "float32"]:
        """Type in which layers' inputs and output gradients are multiplied by the projections' signs."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"


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

    name: Label = Field(description="Names the column score_<name> of scores.parquet; unique within the run.")
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


class ProjectionSpec(Section):
    """Two-sided Rademacher projection of each layer's gradient to dim × dim numbers."""

    dim: int = Field(64, ge=2, le=512, description="Dims a side; 64 keeps K-FAC useful and costs 9 % of the FLOPs.")
    seed: int = Field(0, ge=0, lt=2**63, description="Another seed is another projection and reads no old shard.")


class CodecSpec(Section):
    """How a projected gradient becomes bytes."""

    kind: Literal["sign", "float16"] = Field(
        "sign", description="sign: folded, one bit a dim, a scale for each 256. float16: unfolded, the plain twin."
    )
    dims: int = Field(
        65_536, ge=256, le=2**24, description="Dims after folding, a power of two; used by codec sign only."
    )

    @model_validator(mode="after")
    def _power_of_two(self) -> CodecSpec:
        if self.dims & (self.dims - 1):
            raise ValueError(f"dims is {self.dims}; folding needs a power of two, e.g. 32768 or 65536")
        return self


class DeepSpeedSpec(Section):
    """How the weights are spread over the ranks of a world."""

    stage: Literal[0, 3] = Field(
        0, description="0: each rank holds the model. 3: ZeRO-3, each rank of a world holds a share."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where ZeRO-3 keeps weights not in use: on the device, in the node's memory, or on its disk.",
    )

    @model_validator(mode="after")
    def _offload_needs_shares(self) -> DeepSpeedSpec:
        if self.offload != "none" and self.stage != 3:
            raise ValueError(f"offload: {self.offload} needs stage: 3")
        return self


class ExtractionSpec(Section):
    """Everything about how a candidate becomes a row."""

    max_length: int = Field(2048, ge=2, le=2**20, description="Tokens an example is cut to, from its end.")
    tokens_per_batch: int = Field(
        4096,
        ge=1,
        le=2**24,
        description="Tokens, padding counted, of a micro-batch. Speed and memory only (135M parameters in float32 take "
        "1 to 2 MB a token); it changes no row. On a CPU 512 is faster, on a large GPU more.",
    )
    examples_per_shard: int = Field(
        1024, ge=1, le=65_536, description="Rows of a work unit: what a kill can cost, and what one object holds."
    )
    layers: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(min_length=1, max_length=64)
    ] = Field(("*",), description="Globs over names of linear layers; '*' is every one but the head, or the adapter's.")
    projection: ProjectionSpec = Field(ProjectionSpec(), description="The random projection.")
    codec: CodecSpec = Field(CodecSpec(), description="The form of a stored row.")
    deepspeed: DeepSpeedSpec = Field(DeepSpeedSpec(), description="Sharding of the weights.")
    step_timeout_seconds: float = Field(
        600, gt=0, description="A micro-batch that takes longer is taken for a hang: its rank ends with exit code 75."
    )


class CurvatureSpec(Section):
    """The (H + λI)⁻¹ between a candidate and the direction."""

    kind: Literal["kfac", "none"] = Field("kfac", description="kfac: Kronecker factors of the projected space.")
    damping: float = Field(
        0.1, gt=0, description="λ in units of the mean eigenvalue of H over all layers; large means plain dot products."
    )


class ScoringSpec(Section):
    """How rows and targets become one number a candidate. Changing it extracts nothing again."""

    weighting: Literal["preference", "uniform"] = Field(
        "preference", description="preference: each pair by π, the model's own preference (PRISM). uniform: by 1."
    )
    score: Literal["influence", "cosine"] = Field(
        "influence", description="influence: g_zᵀ(H+λI)⁻¹g. cosine: the same over the norm of g_z (LESS)."
    )
    loss: Literal["sum", "mean"] = Field(
        "sum", description="A candidate's loss: summed over its response tokens, or their mean."
    )
    curvature: CurvatureSpec = Field(CurvatureSpec(), description="Curvature of the training objective.")


class BudgetSpec(Section):
    """How much is kept, or dropped: exactly one of the three."""

    count: int | None = Field(None, ge=1, le=10**12, description="Number of examples.")
    fraction: float | None = Field(None, gt=0, le=1, description="Share of the examples, 0 to 1, rounded to nearest.")
    tokens: int | None = Field(
        None, ge=1, le=10**15, description="Response tokens; the ranking is cut before it would pass this."
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> BudgetSpec:
        given = [name for name in ("count", "fraction", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of count, fraction, tokens; found {', '.join(given) or 'none'}")
        return self


class SelectionSpec(Section):
    """Which end of the ranking the budget takes, and whether those are kept or dropped."""

    keep: Literal["highest", "lowest"] | None = Field(None, description="Keep this end (forward selection).")
    drop: Literal["highest", "lowest"] | None = Field(None, description="Drop this end, keep the rest (rectification).")
    budget: BudgetSpec = Field(description="How many are kept, or dropped.")
    dedupe: Literal["exact", "none"] = Field(
        "exact", description="exact: rows with the same training content count once, the first in plan order stands."
    )

    @model_validator(mode="after")
    def _one_direction(self) -> SelectionSpec:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give exactly one of keep, drop")
        return self


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


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
"""Made once: it costs as much as a short example."""


def digest(value: Any) -> str:
    """32 hex digits (128 bits of SHA-256) of a plain value's canonical JSON: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]
