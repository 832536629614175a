"""From pydantic's JSON Schema to the structural schema of a custom resource. Knows no field of ours."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

LONGEST_TEXT = 32_768
"""Characters of a text of the status that its model does not bound: what metav1.Condition allows a message."""

LONGEST_LIST = 1024
"""Entries of a list of the status that its model does not bound: a run has at most 256 groups and three stages."""

EXACT = 2**53
"""A bound is kept as a float64 by an API server. An integer past this one is not exact there, and format int64 must do."""


def structural_schema(model: type[BaseModel], *, written_by_us: bool = False) -> Schema:
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
