"""The checksum that an S3 server reports for an object, and whether a file matches it. Sends no requests.

Verified: CRC32, SHA-1 and SHA-256 of the whole object or of its parts (`…-N`), else an ETag that is an MD5 of either.
Not verified: CRC32C and CRC64NVME, which Python's library does not compute, and ETags that are no MD5: of objects
encrypted with KMS or customer keys, and of directory buckets. Then only the size and an unchanged ETag are checked.
"""

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
class Checksum:
    """A checksum of a whole object (`num_parts` 0), or the checksum of its parts' checksums."""

    algorithm: Algorithm
    value: bytes
    num_parts: int


def expected_checksum(head: Mapping[str, Any], bucket: str) -> Checksum | None:
    """The checksum in the answer to HeadObject (with ChecksumMode ENABLED) that we can compute ourselves."""
    etag = str(head.get("ETag", "")).strip('"')
    algorithms: tuple[Algorithm, ...] = ("CRC32", "SHA256", "SHA1")
    for algorithm in algorithms:
        text, _, parts = str(head.get(f"Checksum{algorithm}", "")).partition("-")
        # Some servers do not mark a checksum of parts. An ETag of parts gives it away; such a checksum is not used.
        if text and (parts or "-" not in etag or head.get("ChecksumType") == "FULL_OBJECT"):
            return Checksum(algorithm, base64.b64decode(text), int(parts or 0))
    is_md5 = not (
        str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        or head.get("SSECustomerAlgorithm")
        or bucket.endswith("--x-s3")
    )
    md5 = re.fullmatch(r"([0-9a-f]{32})(?:-(\d+))?", etag)
    return Checksum("MD5", bytes.fromhex(md5[1]), int(md5[2] or 0)) if is_md5 and md5 else None


def matches(path: Path, expected: Checksum, part_bytes: Callable[[int], int]) -> bool:
    """Whether the file has that checksum. `part_bytes` returns the size of a part, by its number from 1."""
    if not expected.num_parts:
        return next(_digests(path, expected.algorithm, [path.stat().st_size])) == expected.value
    # Nearly all uploads have parts of one size, except the last. Only if that does not match, each part's size is requested.
    size_bytes, first_bytes = path.stat().st_size, part_bytes(1)
    starts = range(0, size_bytes, first_bytes) if first_bytes > 0 else []
    equal_sizes = [min(first_bytes, size_bytes - start) for start in starts]
    if len(equal_sizes) == expected.num_parts and _parts_match(path, expected, equal_sizes):
        return True
    sizes = [part_bytes(number) for number in range(1, expected.num_parts + 1)]
    return sizes != equal_sizes and _parts_match(path, expected, sizes)


def _parts_match(path: Path, expected: Checksum, sizes: list[int]) -> bool:
    joined = b"".join(_digests(path, expected.algorithm, sizes))
    return sum(sizes) == path.stat().st_size and _hash(expected.algorithm, [joined]) == expected.value


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
