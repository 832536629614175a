"""What is refused in an overlay of a pod template. Does not merge."""

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.resource.overlay import (
    MERGE_KEYS,
    MERGED_STRINGS,
    ORDER,
    PATCH,
    REMOVE,
    RETAIN,
    as_list,
    given_fields,
    identity,
    inner_path,
    is_directive,
)
from prism_job.errors import SpecError

Wrong = tuple[str, str]
"""What is wrong, and what to do about it."""

FIELD = "spec.cluster.podOverlay"


def refusals(overlay: Mapping[str, Any]) -> Iterator[SpecError]:
    """Everything in an overlay that cannot be merged onto a pod template, or that kubectl accepts without a useful effect."""
    for key in overlay:
        if key not in ("metadata", "spec") and not is_directive(key):
            yield _refusal(f".{key}", "a pod template has only metadata and spec", "put it under one of them")
    yield from _refused_in_map(overlay, "", "")


def _refused_in_map(overlay: Mapping[str, Any], path: str, where: str) -> Iterator[SpecError]:
    for key, value in overlay.items():
        if is_directive(key):
            if wrong := _wrong_with_directive(overlay, key, path):
                yield _refusal(f"{where}.{key}", *wrong)
        elif value is not None:
            yield from _refused_in_value(value, inner_path(path, key), f"{where}.{key}")


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
            yield _refusal(directive, "a list that is replaced as a whole cannot contain a directive", fix)


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
            yield _refusal(here, f"is missing {key}, the merge key of this list", f"give its {key}")
        else:
            yield from _refused_in_map(item, path, here)


def _wrong_with_directive(overlay: Mapping[str, Any], key: str, path: str) -> Wrong | None:
    of_list = key.partition("/")[2]
    merge_key = MERGE_KEYS.get(inner_path(path, of_list))
    if key == PATCH and overlay[PATCH] in ("delete", "replace"):
        return None
    if key == PATCH:
        return "must be delete or replace", "write one of them, or leave it out"
    if key == RETAIN:
        return _wrong_with_retain_keys(overlay)
    if key.startswith(ORDER):
        return _wrong_with_order(overlay[key], as_list(overlay.get(of_list)), of_list, merge_key)
    if key.startswith(REMOVE):
        return _wrong_with_removal(overlay[key], of_list, merge_key)
    return "is not a known directive", f"write {PATCH}, {RETAIN}, {ORDER}LIST or {REMOVE}LIST, or remove it"


def _wrong_with_retain_keys(overlay: Mapping[str, Any]) -> Wrong | None:
    retained = overlay[RETAIN]
    if not isinstance(retained, list) or not all(isinstance(name, str) for name in retained):
        return "must be a list of names of fields", "write it as [name, …]"
    missing = [str(name) for name in given_fields(overlay) if name not in retained]
    return (f"does not name {', '.join(missing)}, which the overlay gives", "name it there too") if missing else None


def _wrong_with_order(order: Any, given: list[Any], of_list: str, key: str | None) -> Wrong | None:
    if not isinstance(order, list) or not all(_has_identity(item, key) for item in order):
        fix = f"write it as [{{{key}: …}}, …]" if key else "order only lists of strings, or those with a merge key"
        return f"must list the merge keys of {of_list}", fix
    left = iter([identity(item, key) for item in order])
    items = [item for item in given if _has_identity(item, key) and not (key and PATCH in item)]
    if all(identity(item, key) in left for item in items):  # each is searched behind the one before it
        return None
    what = f"does not name all items that the overlay gives for {of_list}, in their order"
    return what, "list all of them, in the same order in both lists"


def _wrong_with_removal(removed: Any, of_list: str, key: str | None) -> Wrong | None:
    if key:
        return f"{of_list} is not a list of strings", f"write {{{key}: …, {PATCH}: delete}} as an item of {of_list}"
    if isinstance(removed, list) and all(_is_plain(item) for item in removed):
        return None
    return "must be a list of strings or numbers", "write it as [string, …]"


def _directives_within(value: Any, where: str) -> Iterator[str]:
    """Paths of the directives in a value, at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _directives_within(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if is_directive(key):
                yield f"{where}.{key}"
            else:
                yield from _directives_within(inner, f"{where}.{key}")


def _has_identity(item: Any, key: str | None) -> bool:
    return _is_plain(item) if key is None else isinstance(item, dict) and _is_plain(item.get(key))


def _is_plain(value: Any) -> bool:
    """A string or a whole number, by which an item can be distinguished from others."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def _refusal(where: str, what: str, fix: str) -> SpecError:
    return SpecError(what, where=f"{FIELD}{where}", fix=fix)
