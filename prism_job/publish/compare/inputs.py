"""Which inputs of two selections differ, one sentence each. Does not read files: it is given manifests, ids and counts.

Store, output, name and the cluster's section are where a run happens, not what it computes from, and are left out.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from prism_job.publish.manifest import Manifest

Pairs = Mapping[str, frozenset[str]]
"""Name of each target set -> ids of its pairs."""


class Change(NamedTuple):
    """A changed input and what changed of it."""

    input: Literal["data", "targets", "model", "settings", "package"]
    sentence: str


class PoolCounts(NamedTuple):
    """Distinct examples of the pools: only in the new one, only in the old one, in both."""

    new: int
    gone: int
    common: int


_PLACES = ("store", "output", "cluster", "suspend", "retry", "ttlSecondsAfterFinished")
_OF_SPEC = {
    "model",
    "adapter",
    "dtype",
    "products",
    "quantization",
    "loss_on",
    "max_length",
    "layers",
    "projection",
    "codec",
}
"""Parts of the extractor that the document or the model already names."""


def find_changes(old: Manifest, new: Manifest, pool: PoolCounts, old_pairs: Pairs, new_pairs: Pairs) -> list[Change]:
    """Every input that differs. Empty: the same inputs."""
    before, after = (_settings(manifest) for manifest in (old, new))
    return [
        *_data(old, new, pool, before.pop("candidates.uris") != after.pop("candidates.uris")),
        *_targets(before, after, old_pairs, new_pairs),
        *_model(old, new, before, after),
        *_preference_model(old, new, before, after),
        *(
            Change("settings", f"{name} changed from {_shown(before.get(name))} to {_shown(after.get(name))}.")
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ),
        *_package(old, new),
    ]


def _data(old: Manifest, new: Manifest, pool: PoolCounts, moved: bool) -> Iterator[Change]:
    if pool.new or pool.gone:
        yield Change(
            "data",
            f"{_many(pool.new, 'candidate')} {_is(pool.new)} new in the pool and {pool.gone:,} {_is(pool.gone)} gone; "
            f"{pool.common:,} {_is(pool.common)} in both.",
        )
    elif moved:
        yield Change("data", "The candidates' addresses changed; their examples did not.")
    quarantined = old.counts.quarantined, new.counts.quarantined
    if quarantined[0] != quarantined[1]:
        yield Change("data", f"Rows in quarantine: {quarantined[0]:,} before, {quarantined[1]:,} now.")


def _targets(before: dict[str, Any], after: dict[str, Any], old_pairs: Pairs, new_pairs: Pairs) -> Iterator[Change]:
    """Takes the addresses of the targets out of the settings."""
    uris = [{name: each.pop(name) for name in list(each) if _is_target_uris(name)} for each in (before, after)]
    changed = False
    for name in sorted(old_pairs.keys() | new_pairs.keys()):
        old, new = old_pairs.get(name, frozenset()), new_pairs.get(name, frozenset())
        if old == new:
            continue
        changed = True
        of_set = f" of set {name!r}" if name else ""
        added, gone = len(new - old), len(old - new)
        yield Change(
            "targets",
            f"{_many(added, 'target pair')}{of_set} {_is(added)} new and {gone:,} {_is(gone)} gone; "
            f"{len(old & new):,} {_is(len(old & new))} in both.",
        )
    if not changed and uris[0] != uris[1]:
        yield Change("targets", "The targets' addresses changed; their pairs did not.")


def _model(old: Manifest, new: Manifest, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Takes what names the model and its adapter out of the settings."""
    for part, names in (("model", ("model.uri", "model.revision")), ("adapter", ("model.adapter",))):
        named = [[each.pop(name, None) for name in names] for each in (before, after)]
        if old.extractor_parts.get(part) == new.extractor_parts.get(part):
            continue
        if named[0] == named[1]:
            yield Change("model", f"The files of the {part} {_shown(named[0][0])} changed.")
        else:
            shown = [f"{_shown(uri)}{f' ({at[0]})' if uri and at and at[0] else ''}" for uri, *at in named]
            yield Change("model", f"The {part} changed from {shown[0]} to {shown[1]}.")


def _preference_model(old: Manifest, new: Manifest, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """What its settings do not tell: that its files are others."""
    uri = before.get("scoring.preferenceModel.uri")
    if not old.preference_model or not new.preference_model or uri != after.get("scoring.preferenceModel.uri"):
        return
    for part in ("model", "adapter"):
        if old.preference_model.extractor_parts.get(part) != new.preference_model.extractor_parts.get(part):
            yield Change("model", f"The files of the {part} of scoring.preferenceModel {_shown(uri)} changed.")


def _package(old: Manifest, new: Manifest) -> Iterator[Change]:
    if old.code_version != new.code_version:
        yield Change("package", f"PRISM's version changed from {old.code_version} to {new.code_version}.")
    before, after = old.extractor_parts, new.extractor_parts
    for name in sorted((before.keys() | after.keys()) - _OF_SPEC):
        if before.get(name) != after.get(name):
            what = f"How rows are made changed: {name} was {_shown(before.get(name))} and is {_shown(after.get(name))}."
            yield Change("package", what)


def _settings(manifest: Manifest) -> dict[str, Any]:
    spec = manifest.spec.to_document()["spec"]
    return dict(_flat({name: section for name, section in spec.items() if name not in _PLACES}))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if name == "sets" and isinstance(inner, list):
            inner = {each["name"]: {key: part for key, part in each.items() if key != "name"} for each in inner}
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _is_target_uris(name: str) -> bool:
    return name.startswith("targets.") and name.endswith(".uris")


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"
