"""Tables, which kubectl asks for when it prints a list."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.kinds.schemas import Json


def _age(timestamp: str | None) -> str:
    if not timestamp:
        return "<unknown>"
    then = datetime.fromisoformat(timestamp)
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    if seconds < 120:
        return f"{seconds}s"
    return f"{seconds // 60}m"


def json_path(value: Json, path: str) -> Json:
    """What stands at a printer column's jsonPath, which names fields only; None if nothing does."""
    for name in path.strip(".").split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def table(resource: Resource, items: list[dict[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    """The Table of `items`, with the metadata of each."""
    age = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
    listed = resource.columns or (age,)
    columns = [{"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}]
    for column in listed:
        entry = {"name": column["name"], "type": column["type"], "format": column.get("format", "")}
        columns.append({**entry, "description": column.get("description", ""), "priority": column.get("priority", 0)})
    rows = []
    for item in items:
        found = [json_path(item, column["jsonPath"]) for column in listed]
        cells = [
            _age(value) if column["type"] == "date" else value for column, value in zip(listed, found, strict=True)
        ]
        part = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
        rows.append({"cells": [item["metadata"]["name"], *cells], "object": part})
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": columns,
        "rows": rows,
    }
