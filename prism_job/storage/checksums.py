"""What an S3 server states of an object's content, and whether a file has it. Not: requests.

Verified: CRC32, SHA-1 and SHA-256 of the whole or of its parts (`…-N`), else an ETag that is an MD5, of the whole or of its
parts. Not verified: CRC32C and CRC64NVME (no such sum in Python's library), and the ETags of objects that are encrypted with
keys of KMS or of the customer, or lie in directory buckets: those are no MD5s. Then size and unchanged ETag are all there is.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Algorithm = Literal["CRC32", "SHA256", "SHA1", "MD5"]
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Stated:
    """A checksum of a whole object (`num_parts` 0), or the checksum of its parts' checksums."""

    algorithm: Algorithm
    value: bytes
    num_parts: int


def stated(head: Mapping[str, Any], bucket: str) -> Stated | None:
    """The checksum in the answer to HeadObject (with ChecksumMode ENABLED) that we can compute ourselves."""
    etag = str(head.get("ETag", "")).strip('"')
    algorithms: tuple[Algorithm, ...] = ("CRC32", "SHA256", "SHA1")
    for algorithm in algorithms:
        text, _, parts = str(head.get(f"Checksum{algorithm}", "")).partition("-")
        # A checksum of parts that does not say so (some servers) is told by an ETag of parts; nothing is concluded from it.
        if text and (parts or "-" not in etag or head.get("ChecksumType") == "FULL_OBJECT"):
            return Stated(algorithm, base64.b64decode(text), int(parts or 0))
    is_md5 = not (
        str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        or head.get("SSECustomerAlgorithm")
        or bucket.endswith("--x-s3")
    )
    md5 = re.fullmatch(r"([0-9a-f]{32})(?:-(\d+))?", etag)
    return Stated("MD5", bytes.fromhex(md5[1]), int(md5[2] or 0)) if is_md5 and md5 else None


def fits(path: Path, wanted: Stated, part_bytes: Callable[[int], int]) -> bool:
    """Whether the file has that checksum. `part_bytes` tells the size of a part, by its number from 1."""
    if not wanted.num_parts:
        return next(_digests(path, wanted.algorithm, [path.stat().st_size])) == wanted.value
    # Nearly all uploads have parts of one size, the last apart; only where that does not fit is each part's size asked for.
    size_bytes, usual = path.stat().st_size, part_bytes(1)
    alike = [min(usual, size_bytes - start) for start in range(0, size_bytes, usual)] if usual > 0 else []
    if len(alike) == wanted.num_parts and _fits_parts(path, wanted, alike):
        return True
    sizes = [part_bytes(number) for number in range(1, wanted.num_parts + 1)]
    return sizes != alike and _fits_parts(path, wanted, sizes)


def _fits_parts(path: Path, wanted: Stated, sizes: list[int]) -> bool:
    joined = b"".join(_digests(path, wanted.algorithm, sizes))
    return sum(sizes) == path.stat().st_size and _hash(wanted.algorithm, [joined]) == wanted.value


def _digests(path: Path, algorithm: Algorithm, sizes: list[int]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for size in sizes:
            yield _hash(algorithm, (file.read(min(BLOCK_BYTES, size - at)) for at in range(0, size, BLOCK_BYTES)))


def _hash(algorithm: Algorithm, blocks: Iterator[bytes] | list[bytes]) -> bytes:
    if algorithm == "CRC32":
        crc = 0
        for block in blocks:
            crc = zlib.crc32(block, crc)
        return crc.to_bytes(4, "big")
    state = hashlib.new(algorithm.lower(), usedforsecurity=False)
    for block in blocks:
        state.update(block)
    return state.digest()
