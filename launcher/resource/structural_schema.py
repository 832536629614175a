"""A pydantic model's JSON Schema as the structural schema of a custom resource. Knows no model."""

import json
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

LONGEST_TEXT = 32_768
"""Characters of a text that its model does not bound: what metav1.Condition allows a message."""

LONGEST_LIST = 1024
"""Entries of a list that its model does not bound: a run has at most 256 groups and three stages."""

EXACT = 2**53
"""An API server keeps a bound as a float64. Above this an integer is not exact: its bound is left to the format int64."""


def structural_schema(model: type[BaseModel], *, written_by_us: bool = False) -> Schema:
    """The schema of a model.

    Args:
        written_by_us: a status, not a person's document: defaults are not described, and every text and list is bounded.
    """
    schema = model.model_json_schema(by_alias=True)
    return _node(schema, schema.get("$defs", {}), written_by_us)


def _node(node: Schema, known: dict[str, Schema], written_by_us: bool) -> Schema:
    """One node of a structural schema. A keyword that is not handled here is an error."""
    if "anyOf" in node:
        inner, *others = (option for option in node["anyOf"] if option != {"type": "null"})
        about = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        if any(option["type"] == "array" for option in others):
            # A structural schema has no type for "text or list": the operator's own check refuses what is neither.
            return {"x-kubernetes-preserve-unknown-fields": True, "description": _sentence(about, written_by_us)}
        if others:
            return _number_or_word(inner, *others) | {"description": _sentence(node | inner, written_by_us)}
        return _node(inner | about, known, written_by_us) | {"nullable": True}
    if "$ref" in node:
        # The description of the section explains more than that of the field that holds it.
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
                raise AssertionError(f"{key}: not handled in a structural schema yet")
    if made["type"] == "integer" and "enum" not in made:
        made["format"] = "int64"
    if written_by_us:
        made |= _bounds_of_status(made)
    return made


def _number_or_word(number: Schema, word: Schema) -> Schema:
    """A whole number within bounds, or one word. Bounds apply to a number alone, a pattern to a text alone."""
    bounds = {key: number[key] for key in ("minimum", "maximum")}
    return {"x-kubernetes-int-or-string": True, **bounds, "pattern": f"^{word['const']}$"}


def _bound(key: str, value: float, kind: str) -> Schema:
    """OpenAPI 3.0 marks an exclusive bound by a flag; for integers the next one is the bound."""
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
