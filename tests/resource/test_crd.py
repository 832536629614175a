"""The definition of SelectionRun is one that an API server accepts, and it refuses the documents that we refuse.

The checks are those of our fake API server, whose answers are compared with a real one's. The budget that a real server has
for rules is compared with an upper bound.
"""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import celpy
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from launcher.resource import crd
from launcher.resource.document import MAY_CHANGE, parse_for_cluster
from launcher.resource.names import KIND, PLURAL
from launcher.resource.status import Status
from prism_job.errors import SpecError
from prism_job.spec.cluster import is_secret_name
from prism_job.spec.document import SelectionRun
from tests.cluster.server.kinds.rules import rule_errors
from tests.cluster.server.kinds.schemas import prune, validate
from tests.run_document import run_document

ROOT = Path(__file__).parents[2]
VERSION = crd.crd()["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]

TYPES = {"object", "array", "string", "integer", "number", "boolean"}
KEYWORDS = {
    *("type", "description", "nullable", "format", "enum", "pattern", "properties", "required", "items"),
    *("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string"),
}
"""All that a node of ours may hold: no $ref, anyOf, const, default, title, additionalProperties, examples, uniqueItems."""

RULE_STEPS, ALL_STEPS = 10_000_000, 100_000_000
"""An API server's budget for one rule, and for all of a definition (docs/architecture.md, Kubernetes)."""


def nodes(schema: dict[str, Any], path: str = "", times: int = 1) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(path, node, how many of it an object can hold)."""
    yield path, schema, times
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}", times)
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]", times * schema["maxItems"])


def rules() -> Iterator[tuple[str, dict[str, Any], dict[str, str], int]]:
    for path, node, times in nodes(SCHEMA):
        for rule in node.get("x-kubernetes-validations", ()):
            yield path, node, rule, times


def refusals(document: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    """'field: message' of all that an API server refuses; it checks the rules where the schema has no objection."""
    # Fields of metadata are those of ObjectMeta.
    unknown = [field for field in prune(SCHEMA, document)[1] if not field.startswith("metadata.")]
    too_large = [number for number in re.findall(r"\d{19,}", json.dumps(document)) if int(number) >= 2**63]
    wrong = [f"{field}: unknown field" for field in unknown] + [f"{it}: not of format int64" for it in too_large]
    causes = validate(SCHEMA, document)
    if not wrong and not causes:
        causes = rule_errors(SCHEMA, without_nulls(document), without_nulls(old))
    return wrong + [f"{cause.field}: {re.sub('^(Invalid value|Forbidden): ', '', cause.message)}" for cause in causes]


def without_nulls(value: Any) -> Any:
    """A null in a nullable field is the same to CEL as no field."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# Documents


def changed(path: str, value: Any, document: dict[str, Any] | None = None) -> dict[str, Any]:
    """A document with another value at `path`; `...` removes what is there."""
    document = copy.deepcopy(document or run_document())
    *parents, last = path.split(".")
    section = document
    for name in parents:
        section = section.setdefault(name, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return document


def parses(document: dict[str, Any]) -> bool:
    text = yaml.safe_dump(json.loads(json.dumps(document)))  # one object twice would be a YAML alias
    try:
        parse_for_cluster(text, "here")
    except SpecError:
        return False
    return True


# The definition itself


def test_the_committed_definition_is_the_printed_one() -> None:
    command = [sys.executable, "-m", "launcher.resource.crd"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "k8s/crd.yaml").read_text() == printed == crd.to_yaml(), (
        f"run {' '.join(command[1:])} > k8s/crd.yaml"
    )
    assert yaml.safe_load(printed) == crd.crd()


def test_its_names_are_those_that_the_launcher_requests() -> None:
    spec, names = crd.crd()["spec"], crd.crd()["spec"]["names"]
    assert crd.crd()["metadata"]["name"] == "selectionruns.prism.dev"
    assert f"{spec['group']}/{VERSION['name']}" == SelectionRun.model_fields["api_version"].annotation.__args__[0]
    assert (names["kind"], names["plural"]) == (KIND, PLURAL)
    assert (spec["scope"], VERSION["served"], VERSION["storage"]) == ("Namespaced", True, True)
    assert VERSION["subresources"] == {"status": {}}


def test_every_column_shows_a_field_that_exists() -> None:
    columns = VERSION["additionalPrinterColumns"]
    types = {path: node.get("type") for path, node, _ in nodes(SCHEMA)}
    assert all(types[column["jsonPath"]] == column["type"] for column in columns if column["name"] != "Age")
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["Phase", "Groups", "Shards", "Restarts", "Age"]


@pytest.mark.parametrize(("path", "node"), [(path, node) for path, node, _ in nodes(SCHEMA)])
def test_every_node_is_structural_bounded_and_described(path: str, node: dict[str, Any]) -> None:
    assert not node.keys() - KEYWORDS
    assert isinstance(node.get("exclusiveMinimum", False), bool)
    if node.get("x-kubernetes-int-or-string"):
        assert "type" not in node
        assert {"minimum", "maximum", "pattern", "description"} <= node.keys()
        return
    if node.get("x-kubernetes-preserve-unknown-fields") and "type" not in node:  # text or a list
        assert node["description"]
        return
    assert node["type"] in TYPES
    match node["type"]:
        case "string":
            assert "maxLength" in node or "enum" in node
        case "array":
            assert "maxItems" in node
            assert "items" in node
        case "object":
            assert node.get("properties") or node["x-kubernetes-preserve-unknown-fields"] is True
        case "integer":
            assert node.get("format") == "int64" or "enum" in node
            # A bound is a float64 on the server.
            assert all(abs(node.get(end, 0)) <= 2**53 for end in ("minimum", "maximum"))
    assert set(node.get("required", ())) <= node.get("properties", {}).keys()
    # `kubectl explain` prints a sentence for each field. ObjectMeta has its own.
    assert node.get("description") or path == ".metadata" or path.endswith("[]")


def test_no_default_is_written_into_stored_objects() -> None:
    assert not [path for path, node, _ in nodes(SCHEMA) if "default" in node]
    explained = {path: node.get("description", "") for path, node, _ in nodes(SCHEMA)}
    assert explained[".spec.extraction.maxLength"].endswith("Default: 2048.")
    assert explained[".spec.scoring.weighting"].endswith('Default: "preference".')


def fields_of(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of a model's fields, by another way than its JSON Schema."""
    for field in model.model_fields.values():
        yield (place := f"{path}.{field.alias}")
        for option in (field.annotation, *get_args(field.annotation)):
            if get_origin(option) is Annotated:  # a list that may be left out
                option = get_args(option)[0]
            if get_origin(option) is tuple:
                option, place = get_args(option)[0], f"{place}[]"
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from fields_of(option, place)


def test_no_field_of_spec_or_status_is_lost() -> None:
    known = {path for path, _, _ in nodes(SCHEMA) if path and not path.endswith("[]")}
    metadata = {".metadata.namespace", ".metadata.labels", ".metadata.annotations"}
    assert known == {*fields_of(SelectionRun), ".status", *fields_of(Status, ".status")} - metadata


def test_the_definition_accepts_every_status_that_we_write() -> None:
    at = "2026-01-01T00:00:00Z"
    condition = {"type": "Complete", "status": "True", "reason": "Reduced", "lastTransitionTime": at}
    stages = [{"stage": "extract", "group": group} for group in range(256)]
    status = Status.model_validate(
        {"phase": "Complete", "manifest": "s3://a", "stages": stages, "conditions": [condition]}
    )
    for written in (status, Status()):
        assert not refusals({**run_document(), "status": written.to_document()})


def test_a_definition_accepts_the_status_of_a_later_version() -> None:
    # Two versions may share a cluster, and each must be able to write: the words of a status are described, not enumerated.
    assert not [path for path, node, _ in nodes(SCHEMA) if path.startswith(".status") and "enum" in node]
    later = {"phase": "Indexing", "driver": "scheduler", "stages": [{"stage": "index", "state": "Skipped"}]}
    assert not refusals({**run_document(), "status": later})


# The rules


@pytest.mark.parametrize("rule", [rule for _, _, rule, _ in rules()], ids=lambda rule: rule["rule"][:60])
def test_every_rule_compiles_and_has_a_short_message(rule: dict[str, str]) -> None:
    celpy.Environment().compile(rule["rule"])
    assert 0 < len(rule["message"]) < 256
    assert "\n" not in rule["rule"] + rule["message"]
    reasons = ("FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate")
    assert rule.get("reason", "FieldValueInvalid") in reasons


def test_every_rule_names_a_field_that_exists() -> None:
    for path, node, rule, _ in rules():
        for name in re.findall(r"(?:self|oldSelf)\.(\w+)", rule["rule"]):
            assert name in node["properties"] or name in ("size", "all", "exists_one"), (path, name)
        if "fieldPath" in rule:
            assert rule["fieldPath"].removeprefix(".") in node["properties"], path
        # An item of a list has no older version to be compared with.
        assert "[]" not in path or "oldSelf" not in rule["rule"]


def steps(rule: str, node: dict[str, Any], times: int) -> float:
    """An upper bound: one step an operator; a tenth of a step for each byte that is read, four bytes a character; for `matches`
    the product that cel-go takes (a tenth of the text, a quarter of the expression); for `all` and `exists_one` the length of
    their list, one within the other."""
    fields = node.get("properties", {})
    longest = max(4 * field.get("maxLength", 64) for _, field, _ in nodes(node))
    within = math.prod(fields[name]["maxItems"] for name in re.findall(r"self\.(\w+)\.(?:all|exists_one)\(", rule))
    reading = len(re.findall(r"startsWith|endsWith|contains|==", rule)) * (longest * 0.1 + 1)
    for name in re.findall(r"self\.(\w+) == oldSelf", rule):  # an equality of sections reads all that is in them
        reading += sum(field.get("maxLength", 64) * 4 * each * 0.1 for _, field, each in nodes(fields[name]))
    patterns = sum(
        (fields[name]["maxLength"] * 4 + 1) * 0.1 * math.ceil(len(pattern) * 0.25)
        for name, pattern in re.findall(r"self\.(\w+)\.matches\('([^']*)'\)", rule)
    )
    return times * within * (len(re.findall(r"\W+", rule)) + reading + patterns)


def test_every_rule_stays_far_below_the_servers_budget() -> None:
    costs = {(path, rule["rule"]): steps(rule["rule"], node, times) for path, node, rule, times in rules()}
    assert len([rule for _, rule in costs if "matches" in rule]) == 1
    for (path, rule), cost in costs.items():
        assert cost < RULE_STEPS / 5, (path, rule, cost)
    assert sum(costs.values()) < ALL_STEPS / 5


# Judging documents


def sets_of(*names: str) -> dict[str, Any]:
    return {"sets": [{"name": name, "uris": [f"s3://corpora/targets/{name}.jsonl"]} for name in names]}


ADDRESS = st.sampled_from(
    [
        "s3://bucket/a.jsonl",
        "/data/pool",
        "s3://b",
        "/",
        "s3:///odd",
        "relative/x",
        "s3://",
        "~/x",
        "hf://datasets/org/name@v1?split=train",
        "hf://datasets/",
        "hf://name",
    ]
)
TARGET_SET = st.fixed_dictionaries(
    {"name": st.sampled_from(["math", "code", "Code", "-", "x" * 64])},
    optional={
        "uris": st.lists(ADDRESS, max_size=2),
        "weight": st.sampled_from([0, 0.5, 1_000_000, 1_000_001]),
        "sign": st.sampled_from([1, -1, 0]),
    },
)
VARIABLE = st.fixed_dictionaries(
    {"name": st.sampled_from(["HF_TOKEN", "AWS_REGION", "TOKENIZERS_PARALLELISM", "SECRET_FILE", "9"])},
    optional={
        "value": st.sampled_from(["", "x", None]),
        "valueFrom": st.sampled_from([None, {"secretKeyRef": {"name": "s3", "key": "id"}}, {}]),
    },
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "metadata.name": st.sampled_from(["a", "demo", "x" * 40, "x" * 41, "Math", "a.b", "-a"]),
    "spec.model.uri": st.sampled_from(
        ["org/m", "s3://b/m", "/m", "./m", "m.gguf", "/m.gguf", "s3://b/m.gguf", "~/m", "gs://b"]
    ),
    "spec.model.adapter": st.none() | ADDRESS,
    "spec.model.dtype": st.sampled_from(["bfloat16", "float64"]),
    "spec.model.quantization": st.sampled_from([None, "nf4", "int8", "int4"]),
    "spec.candidates.uris": st.lists(ADDRESS, max_size=3),
    "spec.candidates.maxBadFraction": st.sampled_from([0, 0.5, 1, 1.01, -0.1]),
    "spec.targets.uris": st.none() | st.lists(ADDRESS, max_size=3),
    "spec.targets.sets": st.none() | st.lists(TARGET_SET, max_size=2),
    "spec.targets": st.sampled_from([sets_of("math"), sets_of("math", "code"), sets_of("math", "math")]),
    "spec.store": ADDRESS,
    "spec.extraction.maxLength": st.sampled_from([1, 2, 2048, 2**20, 2**20 + 1]),
    "spec.extraction.tokensPerBatch": st.sampled_from(
        ["auto", 0, 1, 2**24, 2**24 + 1, 2**70, "Auto", "512", "", "auto ", 512.5, 512.0, True, None]
    ),
    "spec.extraction.layers": st.lists(st.sampled_from(["*", "model.*", ""]), max_size=2),
    "spec.extraction.projection": st.sampled_from([{"seed": 2**63 - 1}, {"seed": 2**63}, {"dim": 513}, {"seed": -1}]),
    "spec.extraction.codec": st.sampled_from([{"dims": 256}, {"dims": 2**24}, {"dims": 300}, {"kind": "float16"}]),
    "spec.extraction.deepspeed": st.sampled_from(
        [{"stage": 3, "offload": "cpu"}, {"offload": "cpu"}, {"stage": 1}, {}]
    ),
    "spec.extraction.stepTimeoutSeconds": st.sampled_from([0, 0.5, 600]),
    "spec.scoring.score": st.sampled_from([None, "representation", "cosine", "embedding"]),
    "spec.scoring.similarity": st.sampled_from([None, "mean", "nearest"]),
    "spec.scoring.weighting": st.sampled_from([None, "uniform", "preference"]),
    "spec.scoring.loss": st.sampled_from([None, "sum", "mean"]),
    "spec.audit": st.sampled_from([{}, {"examples": 0}, {"examples": 8}]),
    "spec.scoring.preferenceModel": st.sampled_from(
        [None, {}, {"uri": "org/m"}, {"uri": "./m"}, {"uri": "m.gguf"}, {"uri": "s3://b/m", "adapter": "a/b"}]
    ),
    "spec.scoring.curvature": st.sampled_from([{"damping": 0}, {"damping": 1e-9}, {"kind": "none"}]),
    "spec.selection.keep": st.sampled_from([None, "highest", "best"]),
    "spec.selection.drop": st.sampled_from([None, "lowest"]),
    "spec.selection.budget": st.sampled_from(
        [{}, {"count": 1}, {"count": None, "tokens": 5}, {"count": 1, "tokens": 5}, {"fraction": 0}, {"count": 10**13}]
    ),
    "spec.selection.dedupe": st.sampled_from([None, "exact", "near", "nearly"]),
    "spec.selection.nearAgreement": st.sampled_from([None, 0.9, 0.7]),
    "spec.selection.perSource": st.sampled_from(
        [None, {}, {"max": 0.4}, {"max": 0.1, "min": 0.2}, {"max": 1, "min": 0}]
    ),
    "spec.selection.perGroup": st.sampled_from(
        [None, {"max": 1}, {"groupBy": "task", "min": 0.2}, {"groupBy": "", "max": 1}]
    ),
    "spec.cluster.groups": st.sampled_from([0, 1, 4, 5, 256]),
    "spec.cluster.nodesPerGroup": st.sampled_from([1, 256]),
    "spec.cluster.memory": st.sampled_from(["8Gi", "0.5", "lots", "1e3"]),
    "spec.cluster.queueName": st.sampled_from([None, "team-a", "Team"]),
    "spec.cluster.env": st.lists(VARIABLE, max_size=2),
    "spec.cluster.podOverlay": st.just({"spec": {"tolerations": [{"operator": "Exists"}], "priority": None}}),
    "spec.suspend": st.sampled_from([True, False, None]),
    "spec.retry": st.sampled_from([0, 1_000_000, 1_000_001]),
    "spec.ttlSecondsAfterFinished": st.sampled_from([None, 0, 2**31]),
    "spec.nonsense": st.just(1),
}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    document = run_document()
    for path in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True)):
        document = changed(path, draw(FIELDS[path]), document)
    return document


@settings(max_examples=150)
@given(documents())
def test_the_definition_accepts_exactly_the_documents_that_we_accept(document: dict[str, Any]) -> None:
    """None of these holds what only the operator can see."""
    assert parses(document) == (refusals(document) == []), refusals(document)
    if parses(document):
        text = yaml.safe_dump(json.loads(json.dumps(document)))  # one object twice would be a YAML alias
        assert refusals(parse_for_cluster(text, "here").to_document()) == []  # with all defaults


def test_the_definition_accepts_the_examples() -> None:
    example = yaml.safe_load((ROOT / "k8s/examples/selection.yaml").read_text())
    for document in (example, run_document(), changed("spec.cluster.podOverlay", {"spec": {"tolerations": []}})):
        assert parses(document)
        assert refusals(document) == []


REFUSED = [
    ("metadata.name", "x" * 41, "metadata.name: Too long"),
    ("metadata.name", "a.b", "should match"),
    ("spec.cluster", ..., "spec.cluster: Required value"),
    ("spec.cluster", None, "spec.cluster in body must be of type object"),
    ("spec.cluster.image", "", "should be at least 1 chars long"),
    ("spec.candidates.uris", [], "should have at least 1 items"),
    ("spec.candidates.uris", ["s3://a/b", "pool.jsonl"], "spec.candidates.uris: each must be s3://bucket/prefix"),
    ("spec.targets.uris", ["./wanted.jsonl"], "spec.targets.uris: each must be s3://bucket/prefix"),
    ("spec.targets.uris", None, "spec.targets: give exactly one of uris, sets"),
    ("spec.targets.sets", sets_of("math")["sets"], "spec.targets: give exactly one of uris, sets"),
    ("spec.targets", sets_of("math", "code", "math"), "spec.targets.sets: two sets have the same name"),
    ("spec.targets", {"sets": [{"name": "a", "uris": ["a.jsonl"]}]}, "spec.targets.sets[0].uris: each must be s3://"),
    ("spec.targets", sets_of("Math"), "spec.targets.sets[0].name in body should match"),
    ("spec.store", "gs://bucket", "spec.store: must be s3://bucket/prefix, or an absolute path that podOverlay"),
    ("spec.output", "s3://", "spec.output: must be s3://bucket/prefix"),
    ("spec.model.adapter", "adapters/math", "spec.model.adapter: must be s3://bucket/prefix"),
    ("spec.model.uri", "./model", "spec.model.uri: must be a hub id, s3://bucket/prefix"),
    ("spec.model.uri", "model.gguf", "spec.model.uri: must be a hub id"),
    ("spec.scoring.preferenceModel", {"uri": "./model"}, "spec.scoring.preferenceModel.uri: must be a hub id"),
    (
        "spec.scoring",
        {"weighting": "uniform", "preferenceModel": {"uri": "org/model"}},
        "spec.scoring: preferenceModel needs weighting: preference",
    ),
    ("spec.selection.budget", {"count": 1, "tokens": 2}, "spec.selection.budget: give exactly one of count, fraction"),
    ("spec.selection.drop", "lowest", "spec.selection: give exactly one of keep, drop"),
    ("spec.selection.keep", None, "spec.selection: give exactly one of keep, drop"),
    ("spec.selection.nearAgreement", 0.9, "spec.selection: nearAgreement needs dedupe: near"),
    ("spec.selection.perSource", {"max": 0.1, "min": 0.2}, "spec.selection.perSource: min must not be above max"),
    ("spec.selection.perGroup", {"groupBy": "task"}, "spec.selection.perGroup: give max, min, or both"),
    ("spec.extraction.deepspeed", {"offload": "cpu"}, "spec.extraction.deepspeed.offload: offload needs stage: 3"),
    ("spec.extraction.tokensPerBatch", "512", "spec.extraction.tokensPerBatch in body should match '^auto$'"),
    ("spec.extraction.codec.dims", 3000, "spec.extraction.codec.dims: must be a power of two"),
    ("spec.cluster.groups", 257, "257: spec.cluster.groups in body should be less than or equal to 256"),
    ("spec.cluster.env", [{"name": "A"}], "spec.cluster.env[0]: give exactly one of value, valueFrom"),
    ("spec.cluster.env", [{"name": "HF_TOKEN", "value": "hf_x"}], "spec.cluster.env[0].value: a variable of this name"),
    ("spec.budget", 1, "spec.budget: unknown field"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_a_wrong_document_is_refused_with_a_message_that_names_the_field(path: str, value: Any, message: str) -> None:
    document = changed(path, value)
    assert not parses(document)
    found = refusals(document)
    assert any(message in line for line in found), found


def test_too_many_pods_are_refused() -> None:
    document = changed("spec.cluster.nodesPerGroup", 8, changed("spec.cluster.groups", 129))
    assert refusals(document) == ["spec.cluster.groups: groups × nodesPerGroup: at most 1024"]
    assert refusals(changed("spec.cluster.groups", 128, document)) == []


WORDS = ["SECRET", "TOKEN", "TOKENIZER", "TOKENIZ", "TOKENI", "PASSWORD", "PASSWD", "ACCESS_KEY", "PRIVATE_KEY", "KEY"]
WORDS += ["MAX_", "PAD_", "_ID", "API_KEY", "TOKENS", "_LIMIT", "_FILE", "_PATH", "_URI", "_URL", "_", "A", "HF_", "S"]


NO_SECRETS = ["MAX_NEW_TOKENS", "TOKENS_PER_BATCH", "TOKENIZERS_PARALLELISM", "PAD_TOKEN_ID", "EOS_TOKEN"]
SECRETS = ["HF_TOKEN", "AWS_SESSION_TOKEN", "TOKEN_GITHUB", "API_TOKENS", "WANDB_API_KEY", "MAX_TOKEN_SECRET"]


def test_a_number_of_tokens_is_no_secret() -> None:
    assert [name for name in (*NO_SECRETS, *SECRETS) if is_secret_name(name)] == SECRETS


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), st.sampled_from([str.upper, str.lower, str.title]))
def test_the_definition_recognises_the_same_names_of_secrets(words: list[str], spelled: Any) -> None:
    (variable,) = (node for _, node, rule, _ in rules() if "matches" in rule["rule"])
    name = spelled("".join(words))
    assert bool(rule_errors(variable, {"name": name, "value": "x"})) == is_secret_name(name)
    assert not rule_errors(variable, {"name": name, "valueFrom": {}})


# What may change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.model.dtype", "float32"),
        ("spec.candidates.uris", ["s3://corpora/other/"]),
        ("spec.targets.uris", ["s3://corpora/targets/code.jsonl"]),
        ("spec.targets", sets_of("math")),
        ("spec.store", "s3://prism/other"),
        ("spec.output", "s3://prism/other"),
        ("spec.extraction", {"maxLength": 1024}),
        ("spec.scoring", {"loss": "mean"}),
        ("spec.selection.budget", {"fraction": 0.1}),
        ("spec.cluster.groups", 2),
        ("spec.cluster.podOverlay", {"spec": {"tolerations": []}}),
    ],
)
def test_the_request_cannot_change(path: str, value: Any) -> None:
    section = ".".join(path.split(".")[:2])
    before, after = run_document(), changed(path, value)
    for old, new in ((before, after), (after, before)):
        (found,) = refusals(new, old)
        assert found.startswith(f"{section}: cannot change while the run exists")
    assert refusals(after, after) == []


def test_every_field_of_spec_is_either_immutable_or_may_change() -> None:
    fixed = [rule["fieldPath"].removeprefix(".") for _, _, rule, _ in rules() if "cannot change" in rule["message"]]
    assert sorted([*fixed, *MAY_CHANGE]) == sorted(SCHEMA["properties"]["spec"]["properties"])


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("spec.suspend", False, True),
        ("spec.suspend", True, ...),
        ("spec.ttlSecondsAfterFinished", 60, None),
        ("spec.ttlSecondsAfterFinished", 60, 0),
        ("spec.retry", 0, 1),
        ("spec.retry", 3, 3),
    ],
)
def test_suspend_retry_and_ttl_may_change(path: str, old: Any, new: Any) -> None:
    before = changed(path, old)
    assert refusals(changed(path, new, before), before) == []


@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 0), (1, ...)])
def test_retry_cannot_decrease(old: int, new: Any) -> None:
    before = changed("spec.retry", old)
    assert refusals(changed("spec.retry", new, before), before) == [
        "spec.retry: may only be raised: a number already used stands for a round that was run"
    ]
