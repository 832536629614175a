"""A pod template with an overlay merged onto it, as `kubectl patch` merges a strategic merge patch. Pure: dicts in, dict out.

Does not know what our template holds. Differs from `kubectl patch` on purpose where that breaks the pod, or where its result
is not determined:

- An item of a list in RETAIN_KEYS (a volume, a resource claim) keeps only the fields that the overlay's item gives, as if it
  listed them under `$retainKeys`. `kubectl apply` adds that directive by itself. Without it a claim in place of an emptyDir
  gives a volume with two sources, which an API server refuses.
- A directive within something new is obeyed and removed: `$patch: replace` on a map that does not exist yet gives that map.
  kubectl drops the map, or leaves the directive in the pod.
- Where a list loses an item, gains another and has a `$setElementOrder`, the new item stands where two patches would put it,
  the deletion first. In kubectl its place depends on how Go lays out the list in memory.
- A directive that has no useful effect is refused; see overlay_refusals.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.resource.object import Object

CONTAINERS = ("spec.containers", "spec.ephemeralContainers", "spec.initContainers")
CLAIM_TEMPLATE = "spec.volumes.ephemeral.volumeClaimTemplate.metadata"

MERGE_KEYS: Mapping[str, str] = {
    "metadata.ownerReferences": "uid",
    **dict.fromkeys(CONTAINERS, "name"),
    **{f"{containers}.env": "name" for containers in CONTAINERS},
    **{f"{containers}.ports": "containerPort" for containers in CONTAINERS},
    **{f"{containers}.volumeDevices": "devicePath" for containers in CONTAINERS},
    **{f"{containers}.volumeMounts": "mountPath" for containers in CONTAINERS},
    "spec.evictionResponders": "name",
    "spec.hostAliases": "ip",
    "spec.imagePullSecrets": "name",
    "spec.resourceClaims": "name",
    "spec.schedulingGates": "name",
    "spec.topologySpreadConstraints": "topologyKey",
    "spec.volumes": "name",
    f"{CLAIM_TEMPLATE}.ownerReferences": "uid",
}
"""Path of a list -> the field that distinguishes its items (x-kubernetes-patch-merge-key in the API's schema)."""

MERGED_STRINGS = ("metadata.finalizers", f"{CLAIM_TEMPLATE}.finalizers")
"""Lists of strings that are merged. Every list that is neither here nor in MERGE_KEYS is replaced as a whole."""

RETAIN_KEYS = ("spec.resourceClaims", "spec.volumes")
"""Lists of the strategy retainKeys: an item has one of several fields, as a volume has one source."""

PATCH, RETAIN = "$patch", "$retainKeys"
ORDER, REMOVE = "$setElementOrder/", "$deleteFromPrimitiveList/"


def merge(template: Mapping[str, Any], overlay: Mapping[str, Any]) -> Object:
    """The template with the overlay merged onto it; neither is changed, and nothing mutable of the overlay is shared.

    Args:
        overlay: one without `refusals`, as every parsed document has it.
    """
    return _merge_map(template, overlay, "")


def _merge_map(base: Mapping[str, Any], overlay: Mapping[str, Any], path: str) -> Object:
    if overlay.get(PATCH) == "delete":
        return {}
    if overlay.get(PATCH) == "replace":
        base = {}
    retained = overlay.get(RETAIN, base)
    merged = {key: value for key, value in base.items() if key in retained}
    for name, removed in _of_lists(overlay, REMOVE):
        if isinstance(merged.get(name), list):
            merged[name] = [item for item in merged[name] if item not in removed]
    for key, value in overlay.items():
        if is_directive(key):
            continue
        if value is None or (key not in merged and isinstance(value, dict) and value.get(PATCH) == "delete"):
            merged.pop(key, None)
        else:
            merged[key] = _merge_value(merged.get(key), value, inner_path(path, key))
    for name, order in _of_lists(overlay, ORDER):
        if isinstance(merged.get(name), list):
            merge_key = MERGE_KEYS.get(inner_path(path, name))
            merged[name] = _in_order(merged[name], order, as_list(base.get(name)), merge_key)
    return merged


def _merge_value(base: Any, overlay: Any, path: str) -> Any:
    if isinstance(overlay, dict):
        return _merge_map(base if isinstance(base, dict) else {}, overlay, path)
    if not isinstance(overlay, list):
        return overlay
    if path in MERGE_KEYS:
        return _merge_items(as_list(base), overlay, path, MERGE_KEYS[path])
    if path in MERGED_STRINGS and base:
        return _in_order(list(dict.fromkeys([*as_list(base), *overlay])), overlay, as_list(base), None)
    return [_merge_value(None, item, path) for item in overlay]


def _merge_items(base: list[Any], overlay: list[Any], path: str, key: str) -> list[Any]:
    """Items are matched by their merge key. Onto an empty list the overlay's items are taken as written: a port that is open
    for TCP and UDP is there twice."""
    if any(item.get(PATCH) == "replace" for item in overlay):
        base = []
    deleted = [item[key] for item in overlay if item.get(PATCH) == "delete"]
    given = [item for item in overlay if PATCH not in item]
    if not base:
        return [_merge_map({}, item, path) for item in given]
    before = [item for item in base if item.get(key) not in deleted]
    merged = list(before)
    for item in given:
        index = next((index for index, known in enumerate(merged) if known.get(key) == item[key]), None)
        if index is None:
            merged.append(_merge_map({}, item, path))
        else:
            merged[index] = _merge_map(merged[index], _with_retain_keys(item, path), path)
    return _in_order(merged, given, before, key)


def _with_retain_keys(item: Object, path: str) -> Object:
    """The item as `kubectl apply` sends it. An item that gives only its merge key, or only nulls, retains the other fields."""
    fields = given_fields(item)
    return {**item, RETAIN: fields} if path in RETAIN_KEYS and RETAIN not in item and len(fields) > 1 else item


def _in_order(items: list[Any], order: list[Any], before: list[Any], key: str | None) -> list[Any]:
    """The items that `order` names, in that order; every other item stays ahead of those that it preceded in `before`.

    So a new item comes first, unless a `$setElementOrder` gives its place.
    """
    wanted, known = ([identity(item, key) for item in listed] for listed in (order, before))
    ordered = [item for item in items if identity(item, key) in wanted]
    ordered.sort(key=lambda item: wanted.index(identity(item, key)))
    others = [item for item in items if identity(item, key) not in wanted]
    result = []
    for item in ordered:
        while others and _precedes(identity(others[0], key), identity(item, key), known):
            result.append(others.pop(0))
        result.append(item)
    return result + others


def _precedes(first: Any, second: Any, known: list[Any]) -> bool:
    return first in known and second in known and known.index(first) < known.index(second)


def _of_lists(overlay: Mapping[str, Any], directive: str) -> Iterator[tuple[str, list[Any]]]:
    """(name of the list, value of the directive)."""
    for key, value in overlay.items():
        if is_directive(key) and key.startswith(directive):
            yield key.removeprefix(directive), value


def identity(item: Any, key: str | None) -> Any:
    """What distinguishes an item of a list: its merge key, or the item itself in a list of strings."""
    return item.get(key) if key else item


def is_directive(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("$")


def given_fields(overlay: Mapping[str, Any]) -> list[str]:
    """Names of the fields that it sets: neither nulls, which remove a field, nor directives."""
    return [name for name, value in overlay.items() if value is not None and not is_directive(name)]


def inner_path(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
