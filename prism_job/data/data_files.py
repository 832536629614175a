"""Data files -> rows: jsonl, json, csv, parquet, plain or .gz or .zst, in a folder or a bucket. Does not interpret rows."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_job.errors import DataError, RequestError
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.objects import Store

KINDS = (".jsonl", ".json", ".parquet", ".csv")
COMPRESSIONS = (".gz", ".zst")
MAX_LINE_BYTES = 64 * 2**20
"""Limit of one JSON line: no example is as long, and a line without end would take all memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One data file: its store, its key there, and its address for messages."""

    store: Store
    key: str
    uri: str


@dataclass(frozen=True)
class Unreadable:
    """A line that is no row, and why."""

    reason: str


def list_sources(uris: Iterable[str]) -> tuple[list[Source], list[str]]:
    """The data files at each uri (a file, a folder, a prefix) in key order, and the addresses of all other files there.

    Raises RequestError: nothing there, or a single file of an unsupported kind.
    """
    sources: list[Source] = []
    ignored: list[str] = []
    for uri in uris:
        files, others = _list_uri(uri)
        sources += files
        ignored += others
    return sources, ignored


def _list_uri(uri: str) -> tuple[list[Source], list[str]]:
    parent, name = split_uri(uri)
    is_bucket = uri.startswith("s3://") and "/" not in uri.removeprefix("s3://").rstrip("/")
    folder = None if is_bucket else open_store(parent)
    if folder is not None and not uri.endswith("/") and not Path(uri).is_dir() and folder.exists(name):
        if _kind(name) is None:
            raise RequestError(
                "not a kind of data file that PRISM reads",
                where=uri,
                fix=f"use {', '.join(KINDS)}, also with {' or '.join(COMPRESSIONS)}",
            )
        return [Source(folder, name, folder.uri(name))], []
    folder = open_store(uri)
    keys = [listed.key for listed in folder.list()]
    if not keys:
        fix = "check the address; ~ and * are not expanded, and a dataset of the hub must be downloaded first"
        raise RequestError("nothing there: no such file, and no folder or prefix with objects", where=uri, fix=fix)
    unprintable = [key for key in keys if _UNPRINTABLE.search(key)]
    if unprintable:
        fix = "rename that file: its name holds bytes that are not UTF-8, or control characters"
        raise RequestError(f"a file name that cannot be printed: {unprintable[0]!r}", where=uri, fix=fix)
    sources = [Source(folder, key, folder.uri(key)) for key in keys if _kind(key) is not None]
    if not sources:
        fix = f"PRISM reads {', '.join(KINDS)}, also with {' or '.join(COMPRESSIONS)}"
        raise RequestError(f"{len(keys)} objects, but none is a data file", where=uri, fix=fix)
    return sources, [folder.uri(key) for key in keys if _kind(key) is None]


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def _kind(key: str) -> tuple[str, str] | None:
    name = key.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    kind = next((ending for ending in KINDS if name.removesuffix(compression).endswith(ending)), None)
    return None if kind is None else (kind, compression)


def read_rows(source: Source) -> Iterator[tuple[int, Row | Unreadable]]:
    """Each row with its number: the line in jsonl and csv, the position from 1 in json and parquet.

    Raises DataError: the file cannot be read: cut short, or not of the kind or compression in its name.
    """
    kind, compression = _kind(source.key) or ("", "")
    with source.store.as_file(source.key) as path:
        try:
            with _decompressed(path, compression) as stream:
                yield from _READERS[kind](stream)
        except (OSError, EOFError, pa.ArrowException, csv.Error, zlib.error, ValueError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = f"cannot be read as {kind}{compression}: {str(error).splitlines()[0][:200]}"
            raise DataError(what, where=source.uri, fix="write the file again, or take it out of the uris") from error


def _decompressed(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return io.BufferedReader(gzip.open(path))
    if compression == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _jsonl(stream: IO[bytes]) -> Iterator[tuple[int, Row | Unreadable]]:
    for line, content in enumerate(_lines(stream), start=1):
        if len(content) > MAX_LINE_BYTES:
            yield line, Unreadable(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        elif content.strip():
            yield line, _json_row(content)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines; one that is longer than MAX_LINE_BYTES is cut to one byte more than that, as it may never end."""
    while content := stream.readline(MAX_LINE_BYTES + 1):
        yield content
        too_long = len(content) > MAX_LINE_BYTES
        while too_long and content and not content.endswith(b"\n"):
            content = stream.readline(MAX_LINE_BYTES)


def _json_row(content: bytes) -> Row | Unreadable:
    try:
        row = json.loads(content)
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON: {error}")
    return row if isinstance(row, dict) else Unreadable(f"a JSON {type(row).__name__}, not an object")


def _json(stream: IO[bytes]) -> Iterator[tuple[int, Row | Unreadable]]:
    # Both a JSON array and JSON lines have this ending in practice; the first character tells them apart.
    start = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:2] if isinstance(stream, io.BufferedReader) else b""
    if start in (b"{\n", b"{\r"):
        raise ValueError("one object over several lines; PRISM reads an array of objects, or one object a line")
    if start[:1] != b"[":
        yield from _jsonl(stream)
        return
    for position, row in enumerate(json.load(stream), start=1):
        yield position, row if isinstance(row, dict) else Unreadable(f"a JSON {type(row).__name__}, not an object")


def _csv(stream: IO[bytes]) -> Iterator[tuple[int, Row | Unreadable]]:
    csv.field_size_limit(2**27)
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    for row in reader:
        if None in row:
            yield reader.line_num, Unreadable("more fields than the header names")
        else:
            yield reader.line_num, dict(row)


def _parquet(stream: IO[bytes]) -> Iterator[tuple[int, Row | Unreadable]]:
    position = 0
    seekable = stream if isinstance(stream, io.FileIO) or stream.seekable() else io.BytesIO(stream.read())
    for batch in pq.ParquetFile(seekable).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            position += 1
            yield position, row


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
