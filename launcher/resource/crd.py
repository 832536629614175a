"""The kind SelectionRun as a cluster learns it: `python -m launcher.resource.crd > k8s/crd.yaml`. Asks no cluster.

What one field may hold is read off the pydantic models; what ties fields together cannot be, and stands below as rules in
CEL, the language that an API server checks objects with. A document that is refused here is refused by `parse_for_cluster`
too. The other way round some pass: a part of a path that is too long, a secret within podOverlay. The operator tells those
in the condition Accepted.

**No defaults.** An API server writes the defaults of a definition into each object that it stores. The object would then say
forty things that nobody wrote, and keep them when the definition is upgraded, while a local run of the same text goes by the
defaults of the version that runs it: two places that decide what a document means. So the stored object is the person's own
text, as `kubectl get -o yaml` shows it; `parse_spec` is the one place that fills it in; and what replays a run is neither,
but the `spec.yaml` beside its manifest, in which every default is written out. Descriptions name the defaults instead, for
`kubectl explain`.
"""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic import BaseModel

from launcher.resource.record import GROUP, KIND, LONGEST_NAME, MAY_CHANGE, PLURAL, VERSION, Status
from prism_job.spec.cluster import MAX_PODS, NO_SECRET_NAME, SECRET_NAME
from prism_job.spec.document import RunSpec, SelectionRun

Schema = dict[str, Any]

NAME = f"{PLURAL}.{GROUP}"

ABOUT = "A request to select fine-tuning data by preference-aware influence functions, and how far it has come."

LONGEST_TEXT = 32_768
"""Characters of a text of the status that its model does not bound: what metav1.Condition allows a message."""

LONGEST_LIST = 1024
"""Entries of a list of the status that its model does not bound: a run has at most 256 groups and three stages."""

EXACT = 2**53
"""A bound is kept as a float64 by an API server. An integer past this one is not exact there, and format int64 must do."""

# One row a column of `kubectl get`; those of priority 1 stand in `-o wide` alone.
COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Groups", "string", ".status.groups", 0),
    ("Shards", "string", ".status.shards", 0),
    ("Restarts", "integer", ".status.restarts", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Message", "string", ".status.message", 1),
    ("Manifest", "string", ".status.manifest", 1),
)


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition, the same on every call."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME, "labels": {"app.kubernetes.io/name": "prism"}},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["sel"],
                # A category of our own. `kubectl get all` is left to what a cluster runs by itself.
                "categories": ["prism"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*row) for row in COLUMNS],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def to_yaml() -> str:
    """What k8s/crd.yaml holds."""
    head = "# Written by `python -m launcher.resource.crd > k8s/crd.yaml`. Change prism_job/spec or launcher/resource/crd.py.\n"
    return head + yaml.dump(crd(), Dumper=_NoAliases, sort_keys=False, allow_unicode=True, width=120)


class _NoAliases(yaml.SafeDumper):
    """kubectl reads anchors, people do not like to."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}


def _root() -> Schema:
    schema = _structural(SelectionRun)
    name = schema["properties"]["metadata"]["properties"]["name"]
    # The server brings the rest of ObjectMeta, and lets a definition restrict the name alone.
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": name | {"maxLength": LONGEST_NAME}}}
    spec = schema["properties"]["spec"]
    # A cluster runs nothing without an image.
    spec["properties"]["cluster"].pop("nullable")
    spec["required"] = [field for field in spec["properties"] if field in {*spec["required"], "cluster"}]
    schema["properties"]["status"] = _structural(Status, written_by_us=True)
    conditions = schema["properties"]["status"]["properties"]["conditions"]
    conditions |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    for path, rules in _rules().items():
        _at(spec, path)["x-kubernetes-validations"] = rules
    schema["description"] = ABOUT
    return schema


# From pydantic's JSON Schema to a structural one


def _structural(model: type[BaseModel], *, written_by_us: bool = False) -> Schema:
    schema = model.model_json_schema(by_alias=True)
    return _node(schema, schema.get("$defs", {}), written_by_us)


def _node(node: Schema, known: dict[str, Schema], written_by_us: bool) -> Schema:
    """One node of a structural schema. A keyword that is not named here is an error, not passed on or dropped."""
    if "anyOf" in node:
        (inner,) = (option for option in node["anyOf"] if option != {"type": "null"})
        about = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return _node(inner | about, known, written_by_us) | {"nullable": True}
    if "$ref" in node:
        # The section's own words say more than those of the field that holds it.
        return _node(known[node["$ref"].rpartition("/")[2]], known, written_by_us)
    made: Schema = {"type": node["type"]}
    if "description" in node:
        made["description"] = _sentence(node, written_by_us)
    for key, value in node.items():
        match key:
            case "const":
                made["enum"] = [value]
            case "pattern" | "enum" | "minLength" | "maxLength" | "minItems" | "maxItems" | "required":
                made[key] = value
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                made |= _bound(key, value, node["type"])
            case "properties":
                made[key] = {name: _node(field, known, written_by_us) for name, field in value.items()}
            case "items":
                made[key] = _node(value, known, written_by_us)
            case "additionalProperties" if value is True:
                made["x-kubernetes-preserve-unknown-fields"] = True
            case "additionalProperties" if isinstance(value, dict):
                made[key] = _node(value, known, written_by_us)
            case "type" | "description" | "title" | "default" | "$defs" | "additionalProperties":
                pass
            case _:
                raise AssertionError(f"{key}: say what a structural schema makes of it")
    if made["type"] == "integer" and "enum" not in made:
        made["format"] = "int64"
    if written_by_us:
        made |= _bounds_of_status(made)
    return made


def _bound(key: str, value: float, kind: str) -> Schema:
    """OpenAPI 3.0 writes an exclusive bound as a flag; of integers it is the next one."""
    end = key.removeprefix("exclusive").lower()
    if kind != "integer":
        return {end: value, **({key: True} if key != end else {})}
    exact = value if key == end else value + {"minimum": 1, "maximum": -1}[end]
    return {end: exact} if abs(exact) <= EXACT else {}


def _bounds_of_status(made: Schema) -> Schema:
    if made["type"] == "string" and not made.keys() & {"maxLength", "enum"}:
        return {"maxLength": LONGEST_TEXT}
    if made["type"] == "array" and "maxItems" not in made:
        return {"maxItems": LONGEST_LIST}
    return {}


def _sentence(node: Schema, written_by_us: bool) -> str:
    about = " ".join(str(node["description"]).split())
    if written_by_us or node.get("default") in (None, [], {}) or node["type"] == "object":
        return about
    return f"{about} Default: {json.dumps(node['default'], ensure_ascii=False)}."


# What ties fields together


ADDRESS = "must be s3://bucket/prefix, or an absolute path that podOverlay mounts"


def _rules() -> dict[str, list[dict[str, str]]]:
    """CEL rules by the path of their section within spec; `[]` is an item of a list.

    An API server refuses a definition one of whose rules could cost more than 10 million steps, or all together more than
    100 million, by its own estimate: a `matches` takes a tenth of the text's bytes (four a character) times a quarter of
    the expression's length, times the items of every list above it. The dearest here, the names of variables, comes to
    about 0.2 million; addresses are compared by their first letters.
    """
    powers = [2**bits for bits in range(8, 25)]
    pods = f"{_or_default('cluster', 'groups')} * {_or_default('cluster', 'nodesPerGroup')}"
    return {
        "": [
            *(_stays(name) for name in _names(RunSpec) if name not in MAY_CHANGE),
            _rule(
                "(has(self.retry) ? self.retry : 0) >= (has(oldSelf.retry) ? oldSelf.retry : 0)",
                "may only be raised: a number already used stands for a round that was run",
                ".retry",
            ),
            _rule(_is_address("self.store"), ADDRESS, ".store"),
            _rule(_is_address("self.output"), ADDRESS, ".output"),
        ],
        "model": [
            _rule(
                "!(self.uri.startsWith('.') || self.uri.startsWith('~') || self.uri.endsWith('.gguf')"
                f" || self.uri.contains('://')) || {_is_address('self.uri')}",
                "must be a hub id, s3://bucket/prefix, or an absolute path that podOverlay mounts",
                ".uri",
            ),
            _rule(f"!has(self.adapter) || {_is_address('self.adapter')}", ADDRESS, ".adapter"),
        ],
        "candidates": [_rule(f"self.uris.all(uri, {_is_address('uri')})", f"each {ADDRESS}", ".uris")],
        "targets": [
            _rule("has(self.uris) != has(self.sets)", "give exactly one of uris, sets"),
            _rule(f"!has(self.uris) || self.uris.all(uri, {_is_address('uri')})", f"each {ADDRESS}", ".uris"),
            _rule(
                "!has(self.sets) || self.sets.all(one, self.sets.exists_one(other, other.name == one.name))",
                "two sets have the same name; give each its own",
                ".sets",
                "FieldValueDuplicate",
            ),
        ],
        "targets.sets[]": [_rule(f"self.uris.all(uri, {_is_address('uri')})", f"each {ADDRESS}", ".uris")],
        "extraction.codec": [
            _rule(f"!has(self.dims) || self.dims in {powers}", "must be a power of two: 32768 or 65536, say", ".dims")
        ],
        "extraction.deepspeed": [
            _rule(
                "!has(self.offload) || self.offload == 'none' || (has(self.stage) && self.stage == 3)",
                "offload needs stage: 3",
                ".offload",
            )
        ],
        "selection": [_rule("has(self.keep) != has(self.drop)", "give exactly one of keep, drop")],
        "selection.budget": [
            _rule(
                "(has(self.count) ? 1 : 0) + (has(self.fraction) ? 1 : 0) + (has(self.tokens) ? 1 : 0) == 1",
                "give exactly one of count, fraction, tokens",
            )
        ],
        "cluster": [_rule(f"{pods} <= {MAX_PODS}", f"groups × nodesPerGroup: at most {MAX_PODS}", ".groups")],
        "cluster.env[]": [
            _rule("has(self.value) != has(self.valueFrom)", "give exactly one of value, valueFrom"),
            _rule(
                f"!has(self.value) || !self.name.matches('{SECRET_NAME}') || self.name.matches('{NO_SECRET_NAME}')",
                "a variable of this name is a secret: put it into a Secret and name that by valueFrom.secretKeyRef",
                ".value",
                "FieldValueForbidden",
            ),
        ],
    }


def _rule(rule: str, message: str, field: str = "", reason: str = "") -> dict[str, str]:
    """Without a reason it is FieldValueInvalid, without a field the section itself is named."""
    made = {"rule": rule, "message": message, "fieldPath": field, "reason": reason}
    return {key: value for key, value in made.items() if value}


def _stays(name: str) -> dict[str, str]:
    required = {field.alias for field in RunSpec.model_fields.values() if field.is_required()} | {"cluster"}
    same = f"self.{name} == oldSelf.{name}"
    if name not in required:
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    changing = ", ".join(MAY_CHANGE)
    message = f"cannot change while the run exists ({changing} can): submit it under another name, or delete this one"
    return _rule(same, message, f".{name}", "FieldValueForbidden")


def _is_address(it: str) -> str:
    return f"({it}.startsWith('/') || ({it}.startsWith('s3://') && {it}.size() > 5))"


def _or_default(section: str, name: str) -> str:
    (annotation,) = (field.annotation for field in RunSpec.model_fields.values() if field.alias == section)
    (model,) = (option for option in getattr(annotation, "__args__", ()) if option is not type(None))
    (default,) = (field.default for field in model.model_fields.values() if field.alias == name)
    return f"(has(self.{name}) ? self.{name} : {default})"


def _names(model: type[BaseModel]) -> list[str]:
    return [str(field.alias) for field in model.model_fields.values()]


def _at(schema: Schema, path: str) -> Schema:
    for name in path.split(".") if path else ():
        schema = schema["properties"][name.removesuffix("[]")]
        schema = schema["items"] if name.endswith("[]") else schema
    return schema


if __name__ == "__main__":
    print(to_yaml(), end="")
