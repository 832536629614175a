"""Rules in CEL: x-kubernetes-validations of a custom resource, and those of a ValidatingAdmissionPolicy."""

from __future__ import annotations

import functools
import re
from typing import Any

import celpy
from celpy.celtypes import BoolType

from tests.cluster.server.kinds.ownership import item_name
from tests.cluster.server.kinds.schemas import Cause, Json, Schema, child_schema, list_keys, shown


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    functions = {"_==_": _equal, "_!=_": lambda left, right: BoolType(not _equal(left, right))}
    return environment.program(environment.compile(rule), functions=functions)


def _equal(left: Any, right: Any) -> BoolType:
    """Equality as the server's CEL has it: values of two kinds are unequal, where celpy finds no overload."""
    try:
        return BoolType(left == right)
    except TypeError:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, BoolType) for value in (left, right))
        return BoolType(numbers and float(left) == float(right))


def _in_cel(schema: Schema, value: Json) -> Any:
    return celpy.json_to_cel(_typed(schema, value))


def _typed(schema: Schema, value: Json) -> Json:
    """`value` with each field that the schema calls a number as one, though JSON wrote it as an integer."""
    if isinstance(value, dict):
        return {name: _typed(child_schema(schema, name), child) for name, child in value.items()}
    if isinstance(value, list):
        return [_typed(schema.get("items", {}), item) for item in value]
    return float(value) if schema.get("type") == "number" and isinstance(value, int) else value


def rule_errors(schema: Schema, value: Json, old: Json = None, where: str = "") -> list[Cause]:
    """The rules that `value` breaks. `old` is None at creation: rules that speak of oldSelf are then left out.

    A part that did not change is not judged again: what was accepted once stays acceptable (ratcheting).
    """
    if value is None or (old is not None and value == old):
        return []
    bad, names = [], {}
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = re.search(r"\boldSelf\b", rule["rule"])
        if transition and old is None:
            continue
        names = names or {"self": _in_cel(schema, value), **({} if old is None else {"oldSelf": _in_cel(schema, old)})}
        try:
            holds, message = bool(_program(rule["rule"]).evaluate(names)), rule.get("message")
        except celpy.CELEvalError as err:
            why = str(err.args[0]).partition(" (in activation")[0]
            holds, message = False, f"{rule['rule']}: evaluation error: {why}"
        if not holds:
            place = (where + rule.get("fieldPath", "")).lstrip(".") or "<nil>"
            text = message or f"failed rule: {rule['rule']}"
            openings = {"FieldValueForbidden": "Forbidden", "FieldValueRequired": "Required value"}
            what = "" if isinstance(value, dict | list) else f": {shown(value)}"
            opening = openings.get(rule.get("reason", ""), f"Invalid value{what}")
            bad.append(Cause(rule.get("reason", "FieldValueInvalid"), place, f"{opening}: {text}"))
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, child in schema.get("properties", {}).items():
            if name in value:
                bad += rule_errors(child, value[name], before.get(name), f"{where}.{name}")
    elif isinstance(value, list):
        keys = list_keys(schema)
        olds = {item_name(keys, item): item for item in (old or ()) if keys}
        for place, item in enumerate(value):
            bad += rule_errors(schema.get("items", {}), item, olds.get(item_name(keys, item)), f"{where}[{place}]")
    return bad


def policy_holds(expression: str, value: Json) -> bool:
    """Whether an object passes a rule of a ValidatingAdmissionPolicy."""
    return bool(_program(expression).evaluate({"object": celpy.json_to_cel(value)}))
