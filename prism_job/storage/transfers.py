"""Large files to and from an object store in pieces, several at once; an interrupted download resumes.

Does not know S3: the caller requests a piece, and retries it.
"""

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
"""16 MiB: large enough to hide a request's latency, small enough to be requested again."""

MAX_PARTS = 10_000
"""S3's limit for one object; a file over 160 GB gets larger parts."""

NUM_STREAMS = 8
"""Pieces in flight, and in memory: one stream from S3 carries some 50 to 100 MB/s."""

Result = TypeVar("Result")
GetPiece = Callable[[int, int, threading.Event], bytes]
"""(first byte, number of bytes, cancelled) -> exactly these bytes."""


def resumable_download(
    path: Path, size_bytes: int, tag: str, get_piece: GetPiece, check: Callable[[Path], None]
) -> None:
    """Write the object to `path`, which appears whole and checked, or not at all.

    Until then the bytes lie in `<path>.part`, and `<path>.part.index` lists the pieces that are there, each with its CRC32. A
    later call for the same content (same tag and size) requests only the other pieces. One caller per path at a time.
    `check` gets the finished file and raises if it is not what was sent; then both files are removed.
    """
    part, index = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.index")
    heading = json.dumps({"tag": tag, "bytes": size_bytes, "piece": PIECE_BYTES})
    pieces = _pieces(size_bytes)
    finished = _finished_pieces(part, index, heading, pieces)
    if not finished:
        part.write_bytes(b"")
    index.write_text("".join(f"{line}\n" for line in (heading, *(f"{start} {crc}" for start, crc in finished.items()))))

    def download_piece(start: int, length: int, cancelled: threading.Event) -> None:
        content = get_piece(start, length, cancelled)
        if cancelled.is_set():  # another call may own the file by now
            return
        with part.open("r+b") as file:
            file.seek(start)
            file.write(content)
        # The index after the bytes: a piece in the index is in the file.
        with index.open("a") as index_file:
            index_file.write(f"{start} {zlib.crc32(content)}\n")

    with _streams() as (pool, cancelled):
        for future in as_completed(
            [pool.submit(download_piece, *piece, cancelled) for piece in pieces if piece[0] not in finished]
        ):
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


def upload(path: Path, put_piece: Callable[[int, bytes, threading.Event], Result]) -> list[Result]:
    """Call `put_piece` (number from 0, bytes, cancelled) for each piece of the file. Returns its results in order."""
    size_bytes = path.stat().st_size

    def put(number: int, start: int, length: int, cancelled: threading.Event) -> Result:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(length)
        return put_piece(number, content, cancelled)

    with _streams() as (pool, cancelled):
        pieces = enumerate(_pieces(size_bytes, MAX_PARTS))
        futures = [pool.submit(put, number, *piece, cancelled) for number, piece in pieces]
        for future in as_completed(futures):  # the first failure ends it, whichever piece it is
            future.result()
        return [future.result() for future in futures]


def _pieces(size_bytes: int, max_pieces: int | None = None) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of each piece; longer ones where there would be more than `max_pieces`."""
    length = max(PIECE_BYTES, -(-size_bytes // max_pieces)) if max_pieces else PIECE_BYTES
    return [(start, min(length, size_bytes - start)) for start in range(0, size_bytes, length)]


def _finished_pieces(part: Path, index: Path, heading: str, pieces: list[tuple[int, int]]) -> dict[int, int]:
    """First byte and CRC32 of the pieces of an earlier call. Each is read and checked: a crash may have lost bytes."""
    if not (part.exists() and index.exists()):
        return {}
    first, *lines = index.read_text().splitlines() or [""]
    if first != heading:
        return {}
    lengths = dict(pieces)
    finished = {}
    with part.open("rb") as file:
        for line in lines:
            start, _, crc = line.partition(" ")
            if start.isdigit() and crc.isdigit() and int(start) in lengths:
                file.seek(int(start))
                if zlib.crc32(file.read(lengths[int(start)])) == int(crc):
                    finished[int(start)] = int(crc)
    return finished


@contextlib.contextmanager
def _streams() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads that are cancelled, not waited for, once one failed or SIGTERM arrived. Waits before a retry end at once."""
    pool, cancelled = ThreadPoolExecutor(NUM_STREAMS), threading.Event()
    try:
        yield pool, cancelled
    finally:
        cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)
