"""Which objects a label or field selector chooses, and what a merge patch makes of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.kinds.tables import json_path
from tests.cluster.server.refusals import ApiError
from tests.cluster.server.store import Object


def label_test(selector: str) -> Callable[[Object], bool]:
    tests: list[Callable[[dict[str, str]], bool]] = []
    for term in re.findall(r"[^,(]+(?:\([^)]*\))?", selector):
        term = term.strip()
        if match := re.fullmatch(r"(\S+)\s+(in|notin)\s*\(([^)]*)\)", term):
            name, operator, listed = match.groups()
            values = {value.strip() for value in listed.split(",")}
            tests.append(lambda labels, n=name, v=values, o=operator: (labels.get(n) in v) == (o == "in"))
        elif match := re.fullmatch(r"(.+?)\s*(!=|==|=)\s*(.*)", term):
            name, operator, value = match.groups()
            tests.append(lambda labels, n=name, v=value, o=operator: (labels.get(n) == v) == (o != "!="))
        elif term.startswith("!"):
            absent = term.lstrip("! ")
            tests.append(lambda labels, n=absent: n not in labels)
        elif term:
            tests.append(lambda labels, n=term: n in labels)
    return lambda item: all(test(item["metadata"].get("labels", {})) for test in tests)


SELECTABLE = {
    "pods": ("spec.", "status.phase", "status.podIP", "status.nominatedNodeName"),
    "events": ("involvedObject.", "reason", "type", "source", "reportingComponent", "regarding."),
    "jobs": ("status.successful",),
    "namespaces": ("status.phase",),
    "secrets": ("type",),
    "nodes": ("spec.unschedulable",),
}


def _unselectable(resource: Resource, field: str) -> str:
    if resource.plural == "jobs":
        return f'field label "{field}" not supported for Job'
    if resource.custom or resource.plural in SELECTABLE:
        return f"field label not supported: {field}"
    return f'"{field}" is not a known field selector: only "metadata.name", "metadata.namespace"'


def field_test(resource: Resource, selector: str) -> Callable[[Object], bool]:
    terms = []
    for term in filter(None, selector.split(",")):
        match = re.fullmatch(r"\s*(.+?)\s*(!=|==|=)\s*(.*?)\s*", term)
        known = (
            "metadata.name",
            "metadata.namespace",
            *(SELECTABLE.get(resource.plural, ()) if not resource.custom else ()),
        )
        if not match or not any(match[1] == name or (name[-1] == "." and match[1].startswith(name)) for name in known):
            raise ApiError(400, _unselectable(resource, match[1] if match else term))
        terms.append(match.groups())

    def test(item: Object) -> bool:
        for path, operator, value in terms:
            found = json_path(item, f".{path}")
            text = str(found).lower() if isinstance(found, bool) else "" if found is None else str(found)
            if (text == value) != (operator != "!="):
                return False
        return True

    return test


def merge_patch(live: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    out = dict(live) if isinstance(live, dict) else {}
    for name, value in patch.items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = merge_patch(out.get(name), value)
    return out
