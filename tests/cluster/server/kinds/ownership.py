"""Server-side apply: how an object merges with what is applied, and which manager owns which field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

from tests.cluster.server.kinds.schemas import Json, Schema, child_schema, list_keys

Path = tuple[str, ...]
"""A field's place, its elements spelled as in managedFields: `f:spec`, `k:{"name":"worker"}`, `v:"finalizer"`."""
_UNOWNED_METADATA = (
    "name namespace uid resourceVersion generation creationTimestamp deletionTimestamp selfLink"
    " deletionGracePeriodSeconds managedFields generateName"
)
NOT_OWNED = {
    *((f"f:{name}",) for name in ("apiVersion", "kind", "metadata")),
    *(("f:metadata", f"f:{name}") for name in _UNOWNED_METADATA.split()),
}
"""Fields that no manager owns."""
KEY_DEFAULTS = {"protocol": "TCP"}


def item_name(keys: tuple[str, ...], item: Json) -> str:
    values = {key: item.get(key, KEY_DEFAULTS.get(key)) for key in sorted(keys)} if isinstance(item, dict) else item
    return "k:" + json.dumps(values, separators=(",", ":"))


def _granular(schema: Schema) -> bool:
    return schema.get("x-kubernetes-map-type") != "atomic"


def field_values(schema: Schema, value: Json, path: Path = ()) -> dict[Path, Json]:
    """The places that `value` fills, with what stands there: leaves, and each item of a list that merges."""
    if isinstance(value, dict) and value and _granular(schema):
        out: dict[Path, Json] = {}
        for name, child in value.items():
            out.update(field_values(child_schema(schema, name), child, (*path, f"f:{name}")))
        return out
    if isinstance(value, list) and value and (keys := list_keys(schema)):
        out = {}
        for item in value:
            place = (*path, item_name(keys, item))
            out[place] = None
            out.update(field_values(schema.get("items", {}), item, place))
        return out
    if isinstance(value, list) and value and schema.get("x-kubernetes-list-type") == "set":
        return {(*path, "v:" + json.dumps(item)): item for item in value}
    return {path: value}


def owned(schema: Schema, value: Json) -> dict[Path, Json]:
    """`field_values` less what no manager owns."""
    return {
        path: found
        for path, found in field_values(schema, value).items()
        if path not in NOT_OWNED and path[:2] not in NOT_OWNED
    }


def without(schema: Schema, value: Json, path: Path) -> Json:
    """`value` without what stands at `path`. A map or list that becomes empty by it goes too."""
    element, rest = path[0], path[1:]
    if isinstance(value, dict):
        name = element[2:]
        if name not in value:
            return value
        child = without(child_schema(schema, name), value[name], rest) if rest else None
        left = {key: item for key, item in value.items() if key != name}
        return left if child in (None, {}, []) else {**left, name: child}
    if isinstance(value, list) and element.startswith("v:"):
        return [item for item in value if item != json.loads(element[2:])]
    if isinstance(value, list):
        keys, out = list_keys(schema), []
        for item in value:
            if item_name(keys, item) != element:
                out.append(item)
            elif rest:
                out.append(without(schema.get("items", {}), item, rest))
        return out
    return value


def merge(schema: Schema, live: Json, patch: Json) -> Json:
    """What is applied laid over `live`, lists by their keys. A null means nothing."""
    if isinstance(patch, dict):
        live = live if isinstance(live, dict) and _granular(schema) else {}
        given = {name: value for name, value in patch.items() if value is not None}
        return live | {name: merge(child_schema(schema, name), live.get(name), value) for name, value in given.items()}
    if isinstance(patch, list):
        keys = list_keys(schema)
        if keys and all(isinstance(item, dict) for item in patch):
            return _merge_items(schema, keys, live or [], patch)
        if schema.get("x-kubernetes-list-type") == "set":
            return [*(live or []), *(item for item in patch if item not in (live or []))]
        return copy.deepcopy(patch)
    return patch


def _merge_items(schema: Schema, keys: tuple[str, ...], live: list[Json], patch: list[Json]) -> list[Json]:
    wanted = {item_name(keys, item): item for item in patch}
    items = {item_name(keys, item): item for item in live}
    merged = {name: merge(schema.get("items", {}), items.get(name), item) for name, item in wanted.items()}
    shared = [name for name in items if name in wanted]
    if shared == [name for name in wanted if name in items]:
        return [merged.get(name, item) for name, item in items.items()] + [merged[n] for n in wanted if n not in items]
    return [*merged.values(), *(item for name, item in items.items() if name not in wanted)]


def to_fields_v1(paths: Iterable[Path]) -> dict[str, Any]:
    """Paths as a managedFields entry writes them."""
    out: dict[str, Any] = {}
    for path in sorted(paths):
        node = out
        for element in path:
            node = node.setdefault(element, {})
        if path and path[-1].startswith("k:"):
            node["."] = {}
    return out


def from_fields_v1(fields: dict[str, Any], path: Path = ()) -> set[Path]:
    """The paths of a managedFields entry."""
    if not fields:
        return {path} if path else set()
    return set().union(
        *({path} if name == "." else from_fields_v1(child, (*path, name)) for name, child in fields.items())
    )


def path_text(path: Path) -> str:
    """A path as messages show it: `.spec.containers[name="worker"].image`."""
    out = ""
    for element in path:
        if element.startswith("f:"):
            out += f".{element[2:]}"
        elif element.startswith("v:"):
            out += f"[={element[2:]}]"
        else:
            out += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(element[2:]).items()) + "]"
    return out
