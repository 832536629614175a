"""The shard: one immutable safetensors object that holds the arrays of one work unit, and proves what it is.

The header names format version, kind, extractor and unit; a checksum covers header, names, types, shapes and bytes. So a
shard that is cut short, flipped, renamed or made by another extractor is refused by name. Not: torch, scores.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from prism_job.errors import DataError
from prism_job.storage.objects import Store

FORMAT = "prism-shard/1"
"""Any change of the meaning of a byte makes a new version; it is part of the extractor digest."""

Kind = Literal["candidates", "targets", "factors", "sums"]
_SUFFIX: dict[Kind, str] = {
    "candidates": ".safetensors",
    "targets": ".targets.safetensors",
    "factors": ".factors.safetensors",
    "sums": ".sums.safetensors",
}
REDO = "delete that object and run again: only its unit is extracted anew"


@dataclass(frozen=True)
class Shard:
    """The arrays of one unit and the notes beside them (quarantined rows, say)."""

    unit_id: str
    arrays: dict[str, NDArray[Any]]
    notes: dict[str, Any]


def unit_id_of(example_ids: list[str]) -> str:
    """A unit's name: 32 hex digits over its rows' content ids in order. Not of paths, dates or ETags."""
    return hashlib.sha256("".join(example_ids).encode()).hexdigest()[:32]


def id_bytes(example_ids: list[str]) -> NDArray[np.uint8]:
    """Ids as shards hold them: uint8 [N, 16]."""
    return np.frombuffer(bytes.fromhex("".join(example_ids)), np.uint8).reshape(len(example_ids), 16)


def hex_ids(ids_N16: NDArray[Any]) -> list[str]:
    """Ids as files and messages show them: 32 hex digits each."""
    return [text.decode() for text in hex_array(ids_N16).tolist()]


def hex_array(ids_N16: NDArray[Any]) -> NDArray[np.bytes_]:
    """The same as one array, S32 [N]: half of the memory of a list of strings, and sortable.

    Raw S16 would not be: numpy drops trailing zero bytes and calls different ids equal.
    """
    raw = np.ascontiguousarray(ids_N16).view(np.uint8).reshape(-1, 16)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.empty((len(raw), 32), np.uint8)
    text[:, 0::2], text[:, 1::2] = digits[raw >> 4], digits[raw & 15]
    return text.reshape(-1).view("S32")


def shard_key(extractor: str, kind: Kind, unit_id: str) -> str:
    return f"{extractor}/{unit_id}{_SUFFIX[kind]}"


def units_present(store: Store, extractor: str) -> dict[Kind, set[str]]:
    """Units whose shard exists, by kind, from one listing. A shard that exists is whole: its put was atomic."""
    present: dict[Kind, set[str]] = {kind: set() for kind in _SUFFIX}
    for listed in store.list(f"{extractor}/"):
        name = listed.key.rpartition("/")[2]
        unit_id, _, suffix = name.partition(".")
        for kind, known in _SUFFIX.items():
            if f".{suffix}" == known:
                present[kind].add(unit_id)
    return present


def write_shard(
    store: Store,
    extractor: str,
    kind: Kind,
    unit_id: str,
    arrays: Mapping[str, NDArray[Any]],
    notes: Mapping[str, Any],
) -> int:
    """Commit a unit with one atomic put. Returns the bytes written."""
    header = {
        "format": FORMAT,
        "kind": kind,
        "extractor": extractor,
        "unit": unit_id,
        "notes": json.dumps(notes, sort_keys=True),
    }
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = safetensors.numpy.save(plain, metadata={**header, "checksum": _checksum(header, plain)})
    store.put(shard_key(extractor, kind, unit_id), content)
    return len(content)


def read_shard(store: Store, extractor: str, kind: Kind, unit_id: str) -> Shard:
    """Read and check one unit.

    Raises:
        DataError: missing, cut short, changed, renamed, of another extractor or format; names the object.
    """
    key = shard_key(extractor, kind, unit_id)
    where = store.uri(key)
    try:
        content = store.get(key)
    except DataError as error:
        fix = "run again: the plan finds what is missing and only that is extracted"
        raise DataError("missing shard", where=where, fix=fix) from error
    try:
        header, arrays = _parse(content)
        claimed = header.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"damaged shard, cannot be parsed: {error}", where=where, fix=REDO) from error
    if header.get("format") != FORMAT:
        fix = f"this version reads {FORMAT}; use another store, or delete the object"
        raise DataError(f"shard of another format: {header.get('format')}", where=where, fix=fix)
    if claimed != _checksum(header, arrays):
        raise DataError("damaged shard: its checksum does not fit its content", where=where, fix=REDO)
    for field, wanted in (("extractor", extractor), ("unit", unit_id), ("kind", kind)):
        if header.get(field) != wanted:
            what = f"foreign shard: its header says {field} {header.get(field)}, its name {wanted}"
            raise DataError(what, where=where, fix=REDO)
    if "ids" in arrays and unit_id_of(hex_ids(arrays["ids"])) != unit_id:
        raise DataError("foreign shard: its row ids do not make its name", where=where, fix=REDO)
    return Shard(unit_id, arrays, json.loads(header["notes"]))


AHEAD_BYTES = 2**26
"""Shards in hand at a time hold no more than this together (one always may): 64 MiB are seven of 1,024 sign rows."""
MAX_AHEAD = 4
"""Nor are there more of them: enough to hide the wait for S3 behind the scoring, without a crowd of connections."""

Result = TypeVar("Result")


def read_depth(shard_bytes: int) -> int:
    """How many shards of that size are read ahead."""
    return max(1, min(MAX_AHEAD, AHEAD_BYTES // max(1, shard_bytes)))


def read_ahead(
    store: Store, extractor: str, unit_ids: Sequence[str], use: Callable[[Shard], Result], depth: int
) -> Iterator[Result]:
    """What `use` makes of each candidate shard, in the order of the units, as the plain loop would give it.

    Threads read, check and use up to `depth` shards at a time; file reads, checksums and numpy let each other run. No shard
    outlives its `use`.

    Raises:
        DataError: that of the first damaged unit in order, as `read_shard` words it.
    """

    def work(unit_id: str) -> Result:
        return use(read_shard(store, extractor, "candidates", unit_id))

    # A pool whose threads do not outlive the process: a stop must not wait for a read that hangs.
    with ThreadPool(depth) as pool:
        waiting: deque[AsyncResult[Result]] = deque()
        for unit_id in unit_ids:
            waiting.append(pool.apply_async(work, (unit_id,)))
            if len(waiting) == depth:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


_DTYPES = {"U8": "u1", "I32": "<i4", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""Types that shards hold, by safetensors' name."""


def _parse(content: bytes) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    # safetensors' own loader copies every array. These are views of the content; the checksum covers what they show.
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])
    header = dict(described.pop("__metadata__"))
    payload = memoryview(content)[8 + length :]
    if max(array["data_offsets"][1] for array in described.values()) != len(payload):
        raise ValueError("cut short, or bytes behind its last array")
    arrays: dict[str, NDArray[Any]] = {}
    for name, array in described.items():
        first, end = array["data_offsets"]
        arrays[name] = np.frombuffer(payload[first:end], _DTYPES[array["dtype"]]).reshape(array["shape"])
    return header, arrays


def _checksum(header: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    # xxh3 rather than SHA-256: it guards against damage, not malice, and runs at the speed of memory.
    state = xxhash.xxh3_128()
    state.update(json.dumps(dict(header), sort_keys=True).encode())
    for name, array in _ordered(arrays):
        state.update(f"{name} {array.dtype.str} {array.shape};".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _ordered(arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in sorted(arrays):
        yield name, arrays[name]
