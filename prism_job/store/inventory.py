"""What a store holds by extractor, which of it kept selections need, and the removal of the rest. Not: what rows mean.

Kept is what a manifest below the outputs given needs: shards, factor sums and staged rows of the plan beside it, those of its
audit too, which lie under an extractor of their own. A plan
whose selection is not published yet counts as well: its run may be going on.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from prism_job.errors import DataError, RequestError
from prism_job.plan.plan import Plan
from prism_job.publish import manifest
from prism_job.storage.objects import Listed, Store, open_store
from prism_job.store import shards, staged_rows

Part = Literal["candidates", "targets", "factors", "sums", "staged"]
PARTS: tuple[Part, ...] = ("candidates", "targets", "factors", "sums", "staged")

_SHARD = re.compile(r"^([0-9a-f]{32})/([0-9a-f]{32})(\.targets|\.factors|\.sums)?\.safetensors$")
_STAGED = re.compile(r"^rows/[0-9a-f]{32}\.jsonl\.zst$")
_PARTS_BY_NAME: dict[str | None, Part] = {
    None: "candidates",
    ".targets": "targets",
    ".factors": "factors",
    ".sums": "sums",
}

STAGED = "rows"
"""What stands for an extractor in listings of staged rows: they are of none."""


@dataclass(frozen=True)
class Held:
    """An object of ours: the extractor it is of (or STAGED), and what it is."""

    extractor: str
    part: Part
    listed: Listed


@dataclass
class Needed:
    """Keys of a store that kept selections need, and by how many selections each extractor is needed."""

    keys: set[str] = field(default_factory=set)
    extractors: Counter[str] = field(default_factory=Counter)
    selections: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def add(self, plan: Plan) -> None:
        targets = [unit.id for unit in plan.targets]
        candidates = [unit.id for unit in plan.candidates]
        self._add(plan.extractor, {"candidates": candidates, "targets": targets, "factors": plan.factors})
        sample = plan.audit.units if plan.audit else []
        if plan.audit:
            sampled = [unit.id for unit in sample]
            self._add(plan.audit.extractor, {"candidates": sampled, "sums": targets, "factors": plan.audit.factors})
        self.keys |= {staged_rows.rows_key(unit.rows) for unit in [*plan.candidates, *plan.targets, *sample]}

    def _add(self, extractor: str, units: dict[shards.Kind, list[str]]) -> None:
        self.extractors[extractor] += 1
        for kind, unit_ids in units.items():
            self.keys |= {shards.shard_key(extractor, kind, unit_id) for unit_id in unit_ids}


def list_contents(store_uri: str, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Units and rows by extractor, and how many selections below `keep` need it (None where no keep is given).

    Rows are read from one shard of each size: within an extractor shards of equal size hold equally many rows.

    Raises:
        RequestError: nothing there; a keep without manifests.
        DataError: a damaged shard, manifest or plan; named.
    """
    store = open_store(store_uri)
    held, _ = _look(store, store_uri)
    needed = find_needed(keep) if keep else None
    rows_of: dict[tuple[str, Part, int], int] = {}
    extractors: dict[str, Counter[str]] = defaultdict(Counter)
    for one in held:
        if one.part == "staged":
            continue
        counts = extractors[one.extractor]
        counts["bytes"] += one.listed.size_bytes
        counts[one.part] += 1
        if one.part != "factors":
            size = (one.extractor, one.part, one.listed.size_bytes)
            if size not in rows_of:
                rows_of[size] = _num_rows(store, one)
            counts["rows" if one.part == "candidates" else "pairs"] += rows_of[size]
    return {
        "store": store_uri,
        "extractors": [
            {
                "extractor": extractor,
                "units": counts["candidates"],
                "rows": counts["rows"],
                "target_units": counts["targets"] + counts["sums"],
                "pairs": counts["pairs"],
                "factor_units": counts["factors"],
                "bytes": counts["bytes"],
                "needed_by": None if needed is None else needed.extractors[extractor],
            }
            for extractor, counts in sorted(extractors.items())
        ],
    }


def disk_use(store_uri: str, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Bytes by extractor and part, and of them those that selections below `keep` need (None where no keep is given).

    Raises:
        RequestError: nothing there; a keep without manifests.
    """
    held, others = _look(open_store(store_uri), store_uri)
    needed = find_needed(keep) if keep else None
    kept = sum(one.listed.size_bytes for one in held if needed and one.listed.key in needed.keys)
    return {
        "store": store_uri,
        "bytes": sum(one.listed.size_bytes for one in held) + sum(listed.size_bytes for listed in others),
        "needed_bytes": None if needed is None else kept,
        "extractors": _sums(held),
        "other_objects": len(others),
        "other_bytes": sum(listed.size_bytes for listed in others),
    }


def prune(
    store_uri: str,
    keep: Sequence[str],
    older_than_hours: float = 24.0,
    *,
    really: bool = False,
    now: float | None = None,
) -> dict[str, Any]:
    """Remove what no kept selection needs and is older than so many hours; only say so unless `really`.

    Objects that are not PRISM's are never touched. A younger object may be one that a run in progress has just written.
    A run in progress that publishes elsewhere than below `keep` can lose older shards that it counts on; run it again.

    Raises:
        RequestError: no keep, a keep without manifests, or manifests that need nothing of this store: each would delete
            everything.
        DataError: a damaged manifest or plan: what it needs cannot be known.
    """
    if not keep:
        fix = "give --keep OUTPUT for every output whose selections use this store"
        raise RequestError("nothing is kept: this would delete the whole store", where=store_uri, fix=fix)
    if older_than_hours < 0:
        raise RequestError("a negative age", where="--older-than", fix="give hours, 0 or more")
    store = open_store(store_uri)
    # Listed before the manifests are read: what is written in between is not in the list and cannot be removed.
    held, _ = _look(store, store_uri)
    needed = find_needed(keep)
    if not any(one.listed.key in needed.keys for one in held):
        what = f"the {len(needed.selections)} selection(s) kept need nothing of this store: it would be deleted whole"
        fix = "check that the store and --keep belong together; to be rid of a store, delete it yourself"
        raise RequestError(what, where=store_uri, fix=fix)
    oldest_kept = (time.time() if now is None else now) - older_than_hours * 3600
    idle = [one for one in held if one.listed.key not in needed.keys]
    doomed = [one for one in idle if one.listed.modified <= oldest_kept]
    if really:
        store.delete([one.listed.key for one in doomed])
    return {
        "store": store_uri,
        "removed": really,
        "objects": len(doomed),
        "bytes": sum(one.listed.size_bytes for one in doomed),
        "extractors": _sums(doomed),
        "keys": [one.listed.key for one in doomed],
        "kept_selections": len(needed.selections),
        "kept_unfinished": needed.unfinished,
        "kept_objects": len(held) - len(idle),
        "too_young_objects": len(idle) - len(doomed),
        "too_young_bytes": sum(one.listed.size_bytes for one in idle) - sum(one.listed.size_bytes for one in doomed),
        "older_than_hours": older_than_hours,
    }


def find_needed(keep: Sequence[str]) -> Needed:
    """What the manifests below these outputs need, and the plans of runs that have not published yet.

    Raises:
        RequestError: no manifest below one of them: perhaps a mistyped address, and all it should keep would go.
        DataError: a damaged manifest or plan.
    """
    needed = Needed()
    for uri in keep:
        output = open_store(uri)
        keys = dict.fromkeys(listed.key for listed in output.list())
        published: set[str] = set()
        for key in keys:
            if key.rpartition("/")[2] == "manifest.json":
                selection = manifest.load(output.uri(key))
                needed.add(selection.plan())
                needed.selections.append(output.uri(key))
                published.add(selection.manifest.work)
        if not published:
            fix = "check the address: give spec.output of the runs to keep, or a folder below it"
            raise RequestError("no manifest is found there, so nothing of it would be kept", where=uri, fix=fix)
        for key in keys:
            folder, _, name = key.rpartition("/")
            if name != "plan.json" or f"{folder}/manifest.json".lstrip("/") in keys:
                continue
            plan = _read_plan(output, key)
            if plan.work_digest() not in published:
                needed.add(plan)
                needed.unfinished.append(output.uri(key))
    return needed


def _read_plan(output: Store, key: str) -> Plan:
    try:
        return Plan.model_validate_json(output.get(key))
    except ValidationError as error:
        fix = "delete that plan if its run is given up, or run its plan stage again"
        raise DataError("damaged plan: what its run needs cannot be known", where=output.uri(key), fix=fix) from error


def _look(store: Store, store_uri: str) -> tuple[list[Held], list[Listed]]:
    """Our objects, and those that are none of ours."""
    held: list[Held] = []
    others: list[Listed] = []
    for listed in store.list():
        if match := _SHARD.match(listed.key):
            held.append(Held(match[1], _PARTS_BY_NAME[match[3]], listed))
        elif _STAGED.match(listed.key):
            held.append(Held(STAGED, "staged", listed))
        else:
            others.append(listed)
    if not held:
        fix = "check the address: give what spec.store says"
        raise RequestError("there is no store: no shard and no staged rows", where=store_uri, fix=fix)
    return held, others


def _num_rows(store: Store, one: Held) -> int:
    unit_id = one.listed.key.partition("/")[2].partition(".")[0]
    assert one.part != "staged"
    return len(shards.read_shard(store, one.extractor, one.part, unit_id).arrays["ids"])


def _sums(held: list[Held]) -> list[dict[str, Any]]:
    """Objects and bytes by extractor, staged rows last."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in held:
        sums = found[one.extractor]
        sums["objects"] += 1
        sums["bytes"] += one.listed.size_bytes
        sums[f"{one.part}_bytes"] += one.listed.size_bytes
    ordered = sorted(found, key=lambda extractor: (extractor == STAGED, extractor))
    return [
        {
            "extractor": extractor,
            "objects": found[extractor]["objects"],
            "bytes": found[extractor]["bytes"],
            **{f"{part}_bytes": found[extractor][f"{part}_bytes"] for part in PARTS},
        }
        for extractor in ordered
    ]
