"""The shard: one immutable safetensors object with the arrays of one work unit.

The header names format version, kind, extractor and unit; a checksum covers header, names, types, shapes and bytes. So a
shard that is truncated, changed, renamed or of another extractor is refused. Does not know torch or scores.
"""

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
from prism_job.spec.digest import digest
from prism_job.storage.objects import Store

FORMAT = "prism-shard/1"
"""Changes with the meaning of any byte; part of the extractor digest."""

Kind = Literal["candidates", "targets", "factors", "sums", "nll"]
_SUFFIX: dict[Kind, str] = {
    "candidates": ".safetensors",
    "targets": ".targets.safetensors",
    "factors": ".factors.safetensors",
    "sums": ".sums.safetensors",
    "nll": ".nll.safetensors",
}
REDO = "delete that object and run again: only its unit is extracted again"


@dataclass(frozen=True)
class Shard:
    """The arrays of one unit, and notes such as its quarantined rows."""

    unit_id: str
    arrays: dict[str, NDArray[Any]]
    notes: dict[str, Any]


def unit_id_of(example_ids: list[str]) -> str:
    """A unit's id: 32 hex digits over its rows' content ids in order. Does not depend on paths, dates or ETags."""
    return hashlib.sha256("".join(example_ids).encode()).hexdigest()[:32]


def id_bytes(example_ids: list[str]) -> NDArray[np.uint8]:
    """Ids in the form of shards: uint8 [N, 16]."""
    return np.frombuffer(bytes.fromhex("".join(example_ids)), np.uint8).reshape(len(example_ids), 16)


def hex_ids(ids_N16: NDArray[Any]) -> list[str]:
    """Ids in the form of files and messages: 32 hex digits each."""
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
        for kind, kind_suffix in _SUFFIX.items():
            if f".{suffix}" == kind_suffix:
                present[kind].add(unit_id)
    return present


def write_shard(
    store: Store, extractor: str, kind: Kind, unit_id: str, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any]
) -> int:
    """Write a unit with one atomic put. Returns the number of bytes."""
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

    Raises DataError: missing, truncated, changed, renamed, of another extractor or format; names the object.
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
        checksum = header.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"damaged shard, cannot be parsed: {error}", where=where, fix=REDO) from error
    if header.get("format") != FORMAT:
        fix = f"this version reads {FORMAT}; use another store, or delete the object"
        raise DataError(f"shard of another format: {header.get('format')}", where=where, fix=fix)
    if checksum != _checksum(header, arrays):
        raise DataError("damaged shard: checksum mismatch", where=where, fix=REDO)
    for field, expected in (("extractor", extractor), ("unit", unit_id), ("kind", kind)):
        if header.get(field) != expected:
            what = f"wrong shard: its header has {field} {header.get(field)}, its name {expected}"
            raise DataError(what, where=where, fix=REDO)
    if "ids" in arrays and unit_id_of(hex_ids(arrays["ids"])) != unit_id:
        raise DataError("wrong shard: its name is not the digest of its row ids", where=where, fix=REDO)
    return Shard(unit_id, arrays, json.loads(header["notes"]))


def refuse_other_layers(shard: Shard, layers: Sequence[str], where: str) -> None:
    """Raise DataError: a shard of other weights than `layers`. Shards of older versions may not say."""
    stated = shard.notes.get("layers", layers)
    if stated != (layers if isinstance(stated, list) else digest(list(layers))):
        what = "this shard is of other weights of the model than the targets': it took another path when it was written"
        fix = "extract all on the same kind of device with the same packages; " + REDO
        raise DataError(what, where=where, fix=fix)


AHEAD_BYTES = 2**26
"""Limit of all shards in memory together, except that one is always allowed: 64 MiB are seven of 1,024 sign rows."""
MAX_AHEAD = 4
"""Limit of their number: enough to hide S3's latency behind the scoring, with few connections."""

Result = TypeVar("Result")


def read_depth(shard_bytes: int) -> int:
    """How many shards of that size are read ahead."""
    return max(1, min(MAX_AHEAD, AHEAD_BYTES // max(1, shard_bytes)))


def read_ahead(
    store: Store, extractor: str, unit_ids: Sequence[str], use: Callable[[Shard], Result], depth: int
) -> Iterator[Result]:
    """Apply `use` to each candidate shard; yields its results in the order of the units.

    Threads read, check and use up to `depth` shards at a time: file reads, checksums and numpy release the GIL. No shard
    outlives its `use`.

    Raises DataError: that of the first damaged unit in order, from `read_shard`.
    """

    def work(unit_id: str) -> Result:
        return use(read_shard(store, extractor, "candidates", unit_id))

    # Daemon threads: a stop must not wait for a read that hangs.
    with ThreadPool(depth) as pool:
        pending: deque[AsyncResult[Result]] = deque()
        for unit_id in unit_ids:
            pending.append(pool.apply_async(work, (unit_id,)))
            if len(pending) == depth:
                yield pending.popleft().get()
        while pending:
            yield pending.popleft().get()


_DTYPES = {"U8": "u1", "I32": "<i4", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""Data types of shards, by safetensors' name."""


def _parse(content: bytes) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    # safetensors' own loader copies every array; these are views of the content.
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])
    header = dict(described.pop("__metadata__"))
    payload = memoryview(content)[8 + length :]
    if max(array["data_offsets"][1] for array in described.values()) != len(payload):
        raise ValueError("truncated, or bytes after its last array")
    arrays: dict[str, NDArray[Any]] = {}
    for name, array in described.items():
        first, end = array["data_offsets"]
        arrays[name] = np.frombuffer(payload[first:end], _DTYPES[array["dtype"]]).reshape(array["shape"])
    return header, arrays


def _checksum(header: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    # xxh3, not SHA-256: it protects against damage, not malice, and runs at the speed of memory.
    state = xxhash.xxh3_128()
    state.update(json.dumps(dict(header), sort_keys=True).encode())
    for name, array in sorted(arrays.items(), key=lambda named: named[0]):
        state.update(f"{name} {array.dtype.str} {array.shape};".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
