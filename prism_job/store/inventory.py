"""What a store holds by extractor, and the removal of what no kept selection needs. Does not read manifests or plans.

`publish/needed_keys.py` finds out which keys are needed.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from prism_job.errors import RequestError
from prism_job.storage.address import open_store
from prism_job.storage.objects import Listed, Store
from prism_job.store import shards

Part = Literal["candidates", "targets", "factors", "sums", "nll", "staged"]
PARTS: tuple[Part, ...] = ("candidates", "targets", "factors", "sums", "nll", "staged")

_SHARD = re.compile(r"^([0-9a-f]{32})/[0-9a-f]{32}(?:\.(targets|factors|sums|nll))?\.safetensors$")
_STAGED = re.compile(r"^rows/[0-9a-f]{32}\.jsonl\.zst$")

STAGED = "rows"
"""Stands for the extractor in listings of staged rows, which belong to no extractor."""


@dataclass(frozen=True)
class StoredObject:
    """An object that PRISM wrote: its extractor (or STAGED), and which part of the store it belongs to."""

    extractor: str
    part: Part
    listed: Listed

    @property
    def size_bytes(self) -> int:
        return self.listed.size_bytes


@dataclass(frozen=True)
class Contents:
    """A listing of a store: the objects that PRISM wrote, and all others."""

    uri: str
    store: Store
    objects: list[StoredObject]
    others: list[Listed]


@dataclass
class Needed:
    """Keys of a store that kept selections need, and the number of selections that need each extractor."""

    keys: set[str] = field(default_factory=set)
    extractors: Counter[str] = field(default_factory=Counter)
    selections: list[str] = field(default_factory=list)  # addresses of their manifests
    unfinished: list[str] = field(default_factory=list)  # addresses of plans that are not published yet


def list_contents(store_uri: str) -> Contents:
    """List a store. Raises RequestError: there is no shard and no staged row."""
    store = open_store(store_uri)
    objects: list[StoredObject] = []
    others: list[Listed] = []
    for listed in store.list():
        if match := _SHARD.match(listed.key):
            objects.append(StoredObject(match[1], cast(Part, match[2] or "candidates"), listed))
        elif _STAGED.match(listed.key):
            objects.append(StoredObject(STAGED, "staged", listed))
        else:
            others.append(listed)
    if not objects:
        fix = "check the URI: it must be spec.store of the runs"
        raise RequestError("there is no store: no shard and no staged rows", where=store_uri, fix=fix)
    return Contents(store_uri, store, objects, others)


def count_rows(contents: Contents, needed: Needed | None = None) -> dict[str, Any]:
    """Units and rows by extractor, and the number of selections that need it (None where `needed` is not given).

    Reads one shard of each size: within an extractor, shards of equal size hold equally many rows.

    Raises DataError: a damaged shard; named.
    """
    rows_of: dict[tuple[str, Part, int], int] = {}
    extractors: dict[str, Counter[str]] = defaultdict(Counter)
    for stored in contents.objects:
        if stored.part == "staged":
            continue
        counts = extractors[stored.extractor]
        counts["bytes"] += stored.size_bytes
        counts[stored.part] += 1
        if stored.part != "factors":
            size = (stored.extractor, stored.part, stored.size_bytes)
            if size not in rows_of:
                unit_id = stored.listed.key.partition("/")[2].partition(".")[0]
                shard = shards.read_shard(contents.store, stored.extractor, stored.part, unit_id)
                rows_of[size] = len(shard.arrays["ids"])
            counts["rows" if stored.part == "candidates" else "pairs"] += rows_of[size]
    return {
        "store": contents.uri,
        "extractors": [
            {
                "extractor": extractor,
                "units": counts["candidates"],
                "rows": counts["rows"],
                "target_units": counts["targets"] + counts["sums"] + counts["nll"],
                "pairs": counts["pairs"],
                "factor_units": counts["factors"],
                "bytes": counts["bytes"],
                "needed_by": None if needed is None else needed.extractors[extractor],
            }
            for extractor, counts in sorted(extractors.items())
        ],
    }


def disk_use(contents: Contents, needed: Needed | None = None) -> dict[str, Any]:
    """Bytes by extractor and part, and how many of them are needed (None where `needed` is not given)."""
    needed_bytes = None if needed is None else _num_bytes(it for it in contents.objects if it.listed.key in needed.keys)
    other_bytes = sum(listed.size_bytes for listed in contents.others)
    return {
        "store": contents.uri,
        "bytes": _num_bytes(contents.objects) + other_bytes,
        "needed_bytes": needed_bytes,
        "extractors": _sums(contents.objects),
        "other_objects": len(contents.others),
        "other_bytes": other_bytes,
    }


def prune(
    contents: Contents,
    needed: Needed,
    older_than_hours: float = 24.0,
    *,
    really: bool = False,
    now: float | None = None,
) -> dict[str, Any]:
    """Remove objects that are not needed and older than so many hours. Unless `really`, only list them.

    Never touches objects that are not PRISM's. `contents` must be listed before `needed` is read: then an object written
    in between is not in the list and cannot be removed. A run in progress that publishes to an output that is not kept can
    lose older shards that it needs; run it again.

    Raises RequestError: nothing of this store is needed, so all of it would be removed; or a negative age.
    """
    if older_than_hours < 0:
        raise RequestError("a negative age", where="--older-than", fix="give hours, 0 or more")
    unneeded = [stored for stored in contents.objects if stored.listed.key not in needed.keys]
    if len(unneeded) == len(contents.objects):
        what = f"none of the {len(needed.selections)} kept selections uses this store: all of it would be removed"
        fix = "check that the store and --keep belong together; to remove a whole store, delete it yourself"
        raise RequestError(what, where=contents.uri, fix=fix)
    oldest_kept = (time.time() if now is None else now) - older_than_hours * 3600
    removed = [stored for stored in unneeded if stored.listed.modified <= oldest_kept]
    if really:
        contents.store.delete([stored.listed.key for stored in removed])
    return {
        "store": contents.uri,
        "removed": really,
        "objects": len(removed),
        "bytes": _num_bytes(removed),
        "extractors": _sums(removed),
        "keys": [stored.listed.key for stored in removed],
        "kept_selections": len(needed.selections),
        "kept_unfinished": needed.unfinished,
        "kept_objects": len(contents.objects) - len(unneeded),
        "too_young_objects": len(unneeded) - len(removed),
        "too_young_bytes": _num_bytes(unneeded) - _num_bytes(removed),
        "older_than_hours": older_than_hours,
    }


def _num_bytes(objects: Iterable[StoredObject]) -> int:
    return sum(stored.size_bytes for stored in objects)


def _sums(objects: list[StoredObject]) -> list[dict[str, Any]]:
    """Objects and bytes by extractor, staged rows last."""
    by_extractor: dict[str, Counter[str]] = defaultdict(Counter)
    for stored in objects:
        sums = by_extractor[stored.extractor]
        sums["objects"] += 1
        sums["bytes"] += stored.size_bytes
        sums[f"{stored.part}_bytes"] += stored.size_bytes
    ordered = sorted(by_extractor, key=lambda extractor: (extractor == STAGED, extractor))
    return [
        {
            "extractor": extractor,
            "objects": by_extractor[extractor]["objects"],
            "bytes": by_extractor[extractor]["bytes"],
            **{f"{part}_bytes": by_extractor[extractor][f"{part}_bytes"] for part in PARTS},
        }
        for extractor in ordered
    ]
