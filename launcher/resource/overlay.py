"""A pod template with an overlay merged onto it: a strategic merge patch, as `kubectl patch` has it. Pure: dicts in, dict out.

This file owns the merge key of each list of a pod template, and what each directive does. It does not know what our template
holds. It differs from `kubectl patch` on purpose where that breaks the pod, or leaves something to chance:

- An item of a list in RETAIN_KEYS (a volume, a resource claim) keeps only the fields that the overlay's item gives, as if it
  listed them under `$retainKeys`. `kubectl apply` sends that directive by itself. Without it a claim in place of an emptyDir
  gives a volume with two sources, which an API server refuses.
- A directive within something new does what it says and is then gone: `$patch: replace` on a map that is not there gives that
  map. kubectl drops the map, or leaves the directive in the pod.
- Where a list loses an item, gains another and has a `$setElementOrder`, the new one stands where two patches would put it,
  the deletion first. kubectl puts it at a place that depends on how Go lays out the list in memory.
- What does nothing useful is refused; see `refusals`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prism_job.errors import SpecError

Object = dict[str, Any]
Wrong = tuple[str, str]
"""What is wrong, and what to do about it."""

FIELD = "spec.cluster.podOverlay"

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
"""Path of a list -> the field that tells its items apart (x-kubernetes-patch-merge-key in the API's schema)."""

MERGED_STRINGS = ("metadata.finalizers", f"{CLAIM_TEMPLATE}.finalizers")
"""Lists of strings that are merged. Every list that is neither here nor in MERGE_KEYS is replaced as a whole."""

RETAIN_KEYS = ("spec.resourceClaims", "spec.volumes")
"""Lists of the strategy retainKeys: their items have one field of several, a volume its source."""

PATCH, RETAIN = "$patch", "$retainKeys"
ORDER, REMOVE = "$setElementOrder/", "$deleteFromPrimitiveList/"


def merge(template: Mapping[str, Any], overlay: Mapping[str, Any]) -> Object:
    """The template with the overlay on it; neither is changed, and nothing mutable of the overlay is shared.

    Raises:
        SpecError: the first of the overlay's `refusals`.
    """
    for refusal in refusals(overlay):
        raise refusal
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
        if _is_directive(key):
            continue
        if value is None or (key not in merged and isinstance(value, dict) and value.get(PATCH) == "delete"):
            merged.pop(key, None)
        else:
            merged[key] = _merge_value(merged.get(key), value, _inner(path, key))
    for name, order in _of_lists(overlay, ORDER):
        if isinstance(merged.get(name), list):
            merge_key = MERGE_KEYS.get(_inner(path, name))
            merged[name] = _in_order(merged[name], order, _list(base.get(name)), merge_key)
    return merged


def _merge_value(base: Any, overlay: Any, path: str) -> Any:
    if isinstance(overlay, dict):
        return _merge_map(base if isinstance(base, dict) else {}, overlay, path)
    if not isinstance(overlay, list):
        return overlay
    if path in MERGE_KEYS:
        return _merge_items(_list(base), overlay, path, MERGE_KEYS[path])
    if path in MERGED_STRINGS and base:
        return _in_order(list(dict.fromkeys([*_list(base), *overlay])), overlay, _list(base), None)
    return [_merge_value(None, item, path) for item in overlay]


def _merge_items(base: list[Any], overlay: list[Any], path: str, key: str) -> list[Any]:
    """Items are matched by their merge key. Onto nothing the overlay's items are taken as written: a port that is open for
    TCP and UDP stands there twice."""
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
    """The item as `kubectl apply` sends it. One that only names itself, or only removes fields, retains the others."""
    fields = _fields(item)
    return {**item, RETAIN: fields} if path in RETAIN_KEYS and RETAIN not in item and len(fields) > 1 else item


def _in_order(items: list[Any], order: list[Any], before: list[Any], key: str | None) -> list[Any]:
    """The items that `order` names, as it has them; each other item stays ahead of those that it preceded in `before`.

    So what is new comes first, unless a `$setElementOrder` says where it belongs.
    """
    wanted, known = ([_identity(item, key) for item in listed] for listed in (order, before))
    ordered = [item for item in items if _identity(item, key) in wanted]
    ordered.sort(key=lambda item: wanted.index(_identity(item, key)))
    others = [item for item in items if _identity(item, key) not in wanted]
    result = []
    for item in ordered:
        while others and _precedes(_identity(others[0], key), _identity(item, key), known):
            result.append(others.pop(0))
        result.append(item)
    return result + others


def _precedes(first: Any, second: Any, known: list[Any]) -> bool:
    return first in known and second in known and known.index(first) < known.index(second)


def refusals(overlay: Mapping[str, Any]) -> Iterator[SpecError]:
    """Everything in an overlay that can be merged onto no pod template, or that kubectl takes and that does nothing useful."""
    for key in overlay:
        if key not in ("metadata", "spec") and not _is_directive(key):
            yield _refusal(f".{key}", "a pod template has only metadata and spec", "put it under one of them")
    yield from _refused_in_map(overlay, "", "")


def _refused_in_map(overlay: Mapping[str, Any], path: str, where: str) -> Iterator[SpecError]:
    for key, value in overlay.items():
        if _is_directive(key):
            if wrong := _wrong_with_directive(overlay, key, path):
                yield _refusal(f"{where}.{key}", *wrong)
        elif value is not None:
            yield from _refused_in_value(value, _inner(path, key), f"{where}.{key}")


def _refused_in_value(value: Any, path: str, where: str) -> Iterator[SpecError]:
    if path in MERGE_KEYS or path in MERGED_STRINGS:
        yield from _refused_in_list(value, path, where)
    elif isinstance(value, dict):
        yield from _refused_in_map(value, path, where)
    elif any(known.startswith(f"{path}.") for known in (*MERGE_KEYS, *MERGED_STRINGS)):
        yield _refusal(where, "must be a map", "write its fields under it")
    elif isinstance(value, list):
        for directive in _directives_within(value, where):
            fix = "remove the directive, and write the list as it should be"
            yield _refusal(directive, "no directive can stand within a list that is replaced as a whole", fix)


def _refused_in_list(items: Any, path: str, where: str) -> Iterator[SpecError]:
    if not isinstance(items, list):
        yield _refusal(where, "must be a list", "write its items as a list")
        return
    key = MERGE_KEYS.get(path)
    for index, item in enumerate(items):
        here = f"{where}[{index}]"
        if key is None:
            if not isinstance(item, str):
                yield _refusal(here, "must be a string", "put it in quotes")
        elif not isinstance(item, dict):
            yield _refusal(here, "must be a map", f"write it as {{{key}: …}}")
        elif item.get(PATCH) == "replace":
            if len(item) > 1:
                what = f"{PATCH}: replace drops the whole list, this item's other fields too"
                yield _refusal(here, what, f"write {{{PATCH}: replace}} as an item of its own, or leave it out")
        elif not _is_plain(item.get(key)):
            yield _refusal(here, f"has no {key}, which tells the items of this list apart", f"give its {key}")
        else:
            yield from _refused_in_map(item, path, here)


def _wrong_with_directive(overlay: Mapping[str, Any], key: str, path: str) -> Wrong | None:
    of_list = key.partition("/")[2]
    merge_key = MERGE_KEYS.get(_inner(path, of_list))
    if key == PATCH and overlay[PATCH] in ("delete", "replace"):
        return None
    if key == PATCH:
        return "must be delete or replace", "write one of them, or leave it out"
    if key == RETAIN:
        return _wrong_with_retain_keys(overlay)
    if key.startswith(ORDER):
        return _wrong_with_order(overlay[key], _list(overlay.get(of_list)), of_list, merge_key)
    if key.startswith(REMOVE):
        return _wrong_with_removal(overlay[key], of_list, merge_key)
    return "is no directive", f"write {PATCH}, {RETAIN}, {ORDER}LIST or {REMOVE}LIST, or remove it"


def _wrong_with_retain_keys(overlay: Mapping[str, Any]) -> Wrong | None:
    retained = overlay[RETAIN]
    if not isinstance(retained, list) or not all(isinstance(name, str) for name in retained):
        return "must be a list of names of fields", "write it as [name, …]"
    missing = [str(name) for name in _fields(overlay) if name not in retained]
    return (f"does not name {', '.join(missing)}, which the overlay gives", "name it there too") if missing else None


def _wrong_with_order(order: Any, given: list[Any], of_list: str, key: str | None) -> Wrong | None:
    if not isinstance(order, list) or not all(_has_identity(item, key) for item in order):
        fix = f"write it as [{{{key}: …}}, …]" if key else "order only lists of strings, or those with a merge key"
        return f"must list what tells the items of {of_list} apart", fix
    left = iter([_identity(item, key) for item in order])
    items = [item for item in given if _has_identity(item, key) and not (key and PATCH in item)]
    if all(_identity(item, key) in left for item in items):  # each is looked for behind the one before it
        return None
    what = f"does not name all items that the overlay gives for {of_list}, in their order"
    return what, "name them all, and order both lists alike"


def _wrong_with_removal(removed: Any, of_list: str, key: str | None) -> Wrong | None:
    if key:
        return f"{of_list} is no list of strings", f"write {{{key}: …, {PATCH}: delete}} as an item of {of_list}"
    if isinstance(removed, list) and all(_is_plain(item) for item in removed):
        return None
    return "must be a list of strings or numbers", "write it as [string, …]"


def _directives_within(value: Any, where: str) -> Iterator[str]:
    """Where they stand, at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _directives_within(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if _is_directive(key):
                yield f"{where}.{key}"
            else:
                yield from _directives_within(inner, f"{where}.{key}")


def _has_identity(item: Any, key: str | None) -> bool:
    return _is_plain(item) if key is None else isinstance(item, dict) and _is_plain(item.get(key))


def _identity(item: Any, key: str | None) -> Any:
    return item.get(key) if key else item


def _is_plain(value: Any) -> bool:
    """A string or a whole number: what can tell an item from others."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_directive(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("$")


def _of_lists(overlay: Mapping[str, Any], directive: str) -> Iterator[tuple[str, list[Any]]]:
    """(name of the list, what the directive says of it)."""
    for key, value in overlay.items():
        if _is_directive(key) and key.startswith(directive):
            yield key.removeprefix(directive), value


def _fields(overlay: Mapping[str, Any]) -> list[str]:
    """Those that it gives; a null removes one, and a directive is none."""
    return [name for name, value in overlay.items() if value is not None and not _is_directive(name)]


def _inner(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refusal(where: str, what: str, fix: str) -> SpecError:
    return SpecError(what, where=f"{FIELD}{where}", fix=fix)
