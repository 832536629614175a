"""Large files to and from an object store in pieces, several at once; one that was cut off goes on where it stopped.

Not: S3. How a piece is asked for, and how patiently, is the caller's.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

PIECE_BYTES = 2**24
"""16 MiB: long enough that a request's latency does not count, short enough to be asked for again."""

MOST_PARTS = 10_000
"""S3 takes no more parts of one object; those of a file beyond 160 GB are longer."""

NUM_STREAMS = 8
"""Pieces in flight: one stream of S3 carries some 50 to 100 MB/s. At most NUM_STREAMS pieces are held in memory."""

Result = TypeVar("Result")
GetPiece = Callable[[int, int, threading.Event], bytes]
"""(first byte, number of bytes, given up) -> exactly these bytes."""


def fetch(path: Path, size_bytes: int, tag: str, get_piece: GetPiece, check: Callable[[Path], None]) -> None:
    """Write the object to `path`, which appears whole and checked, or not at all.

    Until then the bytes lie in `<path>.part`, and `<path>.part.index` says which pieces are there, each with its CRC32. A later
    call for the same content (same tag and size) asks for the other pieces alone. One caller a path at a time.
    `check` gets the finished file and raises if it is not what was sent; then nothing of it is kept.
    """
    part, index = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.index")
    heading = json.dumps({"tag": tag, "bytes": size_bytes, "piece": PIECE_BYTES})
    pieces = _pieces(size_bytes)
    kept = _kept(part, index, heading, pieces)
    if not kept:
        part.write_bytes(b"")
    index.write_text("".join(f"{line}\n" for line in (heading, *(f"{start} {crc}" for start, crc in kept.items()))))

    def bring(start: int, length: int, given_up: threading.Event) -> None:
        content = get_piece(start, length, given_up)
        if given_up.is_set():  # the file may be another call's by now
            return
        with part.open("r+b") as file:
            file.seek(start)
            file.write(content)
        # The index after the bytes: a piece that it names is there.
        with index.open("a") as notes:
            notes.write(f"{start} {zlib.crc32(content)}\n")

    with _streams() as (pool, given_up):
        for future in as_completed([pool.submit(bring, *piece, given_up) for piece in pieces if piece[0] not in kept]):
            future.result()
    try:
        check(part)
    except BaseException:
        index.unlink()
        part.unlink()
        raise
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)
    index.unlink()


def send(path: Path, put_piece: Callable[[int, bytes, threading.Event], Result]) -> list[Result]:
    """Call `put_piece` (number from 0, bytes, given up) for each piece of the file; what it returned, in order."""
    size_bytes = path.stat().st_size

    def put(number: int, start: int, length: int, given_up: threading.Event) -> Result:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(length)
        return put_piece(number, content, given_up)

    with _streams() as (pool, given_up):
        pieces = enumerate(_pieces(size_bytes, MOST_PARTS))
        futures = [pool.submit(put, number, *piece, given_up) for number, piece in pieces]
        for future in as_completed(futures):  # so that the first failure ends it, not the first piece's turn
            future.result()
        return [future.result() for future in futures]


def _pieces(size_bytes: int, most: int | None = None) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of each piece; longer ones where there would be more than `most`."""
    length = max(PIECE_BYTES, -(-size_bytes // most)) if most else PIECE_BYTES
    return [(start, min(length, size_bytes - start)) for start in range(0, size_bytes, length)]


def _kept(part: Path, index: Path, heading: str, pieces: list[tuple[int, int]]) -> dict[int, int]:
    """First byte and CRC32 of the pieces that an earlier call left. Each is read again: a crash may have lost bytes."""
    if not (part.exists() and index.exists()):
        return {}
    first, *lines = index.read_text().splitlines() or [""]
    if first != heading:
        return {}
    lengths = dict(pieces)
    kept = {}
    with part.open("rb") as file:
        for line in lines:
            start, _, crc = line.partition(" ")
            if start.isdigit() and crc.isdigit() and int(start) in lengths:
                file.seek(int(start))
                if zlib.crc32(file.read(lengths[int(start)])) == int(crc):
                    kept[int(start)] = int(crc)
    return kept


@contextlib.contextmanager
def _streams() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads that nobody waits for once something failed or SIGTERM came: those that wait for the weather end at once."""
    pool, given_up = ThreadPoolExecutor(NUM_STREAMS), threading.Event()
    try:
        yield pool, given_up
    finally:
        given_up.set()
        pool.shutdown(wait=False, cancel_futures=True)
