"""Structural schemas: which fields an object may have, their defaults, and what is wrong with a value."""

from __future__ import annotations

import copy
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

Json = Any
Schema = dict[str, Any]

ANY: Schema = {"x-kubernetes-preserve-unknown-fields": True}
QUANTITY: Schema = {"x-kubernetes-int-or-string": True, "x-quantity": True}
TIMES = {
    "seconds": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"),
    "micro": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)"),
}


class Cause(NamedTuple):
    """One thing wrong with an object, as a Status lists it."""

    reason: str
    field: str
    message: str


def _keeps_unknown(schema: Schema) -> bool:
    return bool(schema.get("x-kubernetes-preserve-unknown-fields")) or not schema


def prune(schema: Schema, value: Json, where: str = "") -> tuple[Json, list[str]]:
    """`value` without the fields that `schema` does not know, and where those were."""
    if isinstance(value, dict) and schema.get("type") == "object":
        known, more, unknown, out = schema.get("properties", {}), schema.get("additionalProperties"), [], {}
        for name, child in value.items():
            place = f"{where}.{name}" if where else name
            if name in known or isinstance(more, dict):
                out[name], found = prune(known.get(name) or more or {}, child, place)
                unknown += found
            elif _keeps_unknown(schema) or more is True:
                out[name] = child
            else:
                unknown.append(place)
        return (out, unknown) if unknown else (value, [])
    if isinstance(value, list) and schema.get("type") == "array":
        pairs = [prune(schema.get("items", {}), item, f"{where}[{place}]") for place, item in enumerate(value)]
        unknown = [name for _, found in pairs for name in found]
        return ([item for item, _ in pairs] if unknown else value), unknown
    return value, []


def set_defaults(schema: Schema, value: Json) -> None:
    """Writes the defaults of a structural schema into `value`, in place. A null where none is allowed gives way to one."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            absent = name not in value or (value[name] is None and not child.get("nullable"))
            if absent and child.get("default") is not None:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                set_defaults(child, value[name])
    elif isinstance(value, list):
        for item in value:
            set_defaults(schema.get("items", {}), item)


def _type_of(value: Json) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def shown(value: Json) -> str:
    return json.dumps(value) if isinstance(value, (str, int, float, bool)) else json.dumps(_type_of(value))


def validate(schema: Schema, value: Json, where: str = "") -> list[Cause]:
    """What is wrong with `value`, in the API server's words."""
    bad: list[Cause] = []

    def invalid(text: str, reason: str = "FieldValueInvalid") -> None:
        bad.append(Cause(reason, where or "<nil>", text))

    if value is None:
        # A real server takes null for a number or a word, which have no type (1.36.2).
        if not schema.get("nullable") and schema.get("type"):
            invalid(
                f'Invalid value: "null": {where} in body must be of type {schema["type"]}: "null"',
                "FieldValueTypeInvalid",
            )
        return bad
    wanted, kind = schema.get("type"), _type_of(value)
    is_whole = kind == "integer" or (kind == "number" and float(value).is_integer())
    is_number = is_whole or (kind == "number" and bool(schema.get("x-quantity")))
    if schema.get("x-kubernetes-int-or-string") and kind != "string" and not is_number:
        invalid(
            f'Invalid value: "{kind}": {where} in body must be of type integer,string: "{kind}"',
            "FieldValueTypeInvalid",
        )
        return bad
    fits = kind == wanted or (wanted == "number" and kind == "integer") or (wanted == "integer" and is_whole)
    if wanted and not fits:
        invalid(f'Invalid value: "{kind}": {where} in body must be of type {wanted}: "{kind}"', "FieldValueTypeInvalid")
        return bad
    if "enum" in schema and value not in schema["enum"]:
        options = ", ".join(json.dumps(option) for option in schema["enum"])
        invalid(f"Unsupported value: {shown(value)}: supported values: {options}", "FieldValueNotSupported")
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
            text = "greater than" if schema.get("exclusiveMinimum") else "greater than or equal to"
            invalid(f"Invalid value: {value}: {where} in body should be {text} {low}")
        if high is not None and value > high:
            invalid(f"Invalid value: {value}: {where} in body should be less than or equal to {high}")
    elif kind == "string":
        if len(value) > schema.get("maxLength", len(value)):
            invalid(f"Too long: may not be more than {schema['maxLength']} bytes", "FieldValueTooLong")
        if len(value) < schema.get("minLength", 0):
            invalid(
                f"Invalid value: {shown(value)}: {where} in body should be at least {schema['minLength']} chars long"
            )
            return bad
        kind_of_time = schema.get("x-time") or ("seconds" if schema.get("format") == "date-time" else "")
        if kind_of_time and not TIMES[kind_of_time].fullmatch(value):
            reason = "FieldValueTypeInvalid" if "x-time" in schema else "FieldValueInvalid"
            invalid(f"Invalid value: {shown(value)}: {where} in body must be of type date-time", reason)
        if "pattern" in schema and not re.search(schema["pattern"], value):
            invalid(f"Invalid value: {shown(value)}: {where} in body should match '{schema['pattern']}'")
    elif kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            invalid(f"Too many: {len(value)}: must have at most {schema['maxItems']} items", "FieldValueTooMany")
        if len(value) < schema.get("minItems", 0):
            invalid(f"Invalid value: {len(value)}: {where} in body should have at least {schema['minItems']} items")
        for place, item in enumerate(value):
            bad += validate(schema.get("items", {}), item, f"{where}[{place}]")
        keys = list_keys(schema)
        names = (
            [json.dumps([item.get(key) for key in keys]) for item in value if isinstance(item, dict)] if keys else []
        )
        if schema.get("x-kubernetes-list-type") == "set":
            names = [json.dumps(item) for item in value]
        for name in sorted({name for name in names if names.count(name) > 1}):
            invalid(f"Duplicate value: {name}", "FieldValueDuplicate")
    elif kind == "object":
        for name in schema.get("required", ()):
            if name not in value:
                bad.append(Cause("FieldValueRequired", f"{where}.{name}" if where else name, "Required value"))
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, child in value.items():
            part = known.get(name) or (more if isinstance(more, dict) else {})
            if name in known:
                place = f"{where}.{name}" if where else name
            else:
                place = f"{where}[{name}]" if _keeps_unknown(schema) else f"{where}.{name}"
            bad += validate(part, child, place)
    return bad


def list_keys(schema: Schema) -> tuple[str, ...]:
    return tuple(schema.get("x-kubernetes-list-map-keys", ())) if schema.get("x-kubernetes-list-type") == "map" else ()


def child_schema(schema: Schema, name: str) -> Schema:
    more = schema.get("additionalProperties")
    return schema.get("properties", {}).get(name) or (more if isinstance(more, dict) else {})


_SUFFIXES = {"m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


def quantity(text: Json) -> Decimal:
    """A resource quantity as a number: `500m`, `2Gi`, `1e3`. Raises ValueError for what is none."""
    match = re.fullmatch(r"([+-]?[0-9.]+)(?:([kMGTPE])i|([mkMGTPE])|[eE]([+-]?\d+))?", str(text))
    if not match:
        raise ValueError(f"{text!r} is no quantity")
    number, binary, decimal, exponent = match.groups()
    if binary:
        return Decimal(number) * 1024 ** (_SUFFIXES[binary] // 3)
    return Decimal(number).scaleb(_SUFFIXES[decimal] if decimal else int(exponent or 0))


def tidied(schema: Schema, value: Json) -> Json:
    """`value` without nulls, quantities as text, times in UTC: how a typed server reads JSON."""
    if schema.get("x-quantity"):
        return value if value is None else str(value)
    if (kind := schema.get("x-time")) and isinstance(value, str) and TIMES[kind].fullmatch(value):
        form = "%Y-%m-%dT%H:%M:%SZ" if kind == "seconds" else "%Y-%m-%dT%H:%M:%S.%fZ"
        return datetime.fromisoformat(value).astimezone(UTC).strftime(form)
    if isinstance(value, dict):
        return {name: tidied(child_schema(schema, name), child) for name, child in value.items() if child is not None}
    if isinstance(value, list):
        return [tidied(schema.get("items", {}), item) for item in value]
    return value
