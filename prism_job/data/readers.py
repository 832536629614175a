"""A data file -> its rows, by the ending of its name: JSON, CSV, parquet, Arrow, plain or compressed. Does not interpret rows.

Every reader gives each row with its number: the line in JSON lines, .csv and .tsv, else the position from 1.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_job.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""Limit of one line: no example is as long, and a line without end would take all memory."""

MAX_WHOLE_BYTES = 4 * 2**30
"""Limit of a file that is held in memory whole, decompressed: a small compressed file may expand without end."""

BATCH_ROWS = 1024
"""Rows of a table that are Python objects at one time."""

Row = dict[str, Any]


class Unreadable:
    """A line that is no row, and why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


Numbered = tuple[int, Row | Unreadable]

KINDS = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
KNOWN = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the ending of a file's name; None for files that PRISM does not read."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    kind = next((ending for ending in KINDS if name.removesuffix(compression).endswith(ending)), None)
    return None if kind is None else (kind, compression)


def read_file(path: Path, name: str, uri: str) -> Iterator[Numbered]:
    """The rows of the file at `path`, whose kind the ending of `name` says; `uri` is its address in errors.

    Raises DataError: it cannot be read: cut short, or not of the kind or compression in its name.
    """
    kind, compression = kind_of(name) or ("", "")
    try:
        with _decompressed(path, compression) as stream:
            if kind in _TEXT:
                _refuse_wide_text(stream.peek(1024)[:1024])
            yield from _READERS[kind](stream)
    except _ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = f"cannot be read as {kind}{compression}: {(str(error).splitlines() or [repr(error)])[0][:200]}"
        raise DataError(what, where=uri, fix="write the file again, or take it out of the uris") from error


_ERRORS = (
    OSError,
    EOFError,
    pa.ArrowException,
    csv.Error,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    OverflowError,
    RecursionError,
)  # OverflowError: a date that Python cannot hold


def _decompressed(path: Path, compression: str) -> io.BufferedReader:
    if compression == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(openers[compression](path)) if compression else path.open("rb")


def _refuse_wide_text(start: bytes) -> None:
    """UTF-16 and UTF-32 have a byte order mark, or zero bytes on one side of each ASCII letter. Raises ValueError.

    Text in UTF-8 holds no zero byte: JSON writes it as an escape.
    """
    has_mark = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    num_zeros = start.count(0)
    if not has_mark and not (num_zeros * 10 >= len(start) > 0 and any(start[:4])):
        return
    sides = [start[side::2].count(0) for side in (0, 1)]
    if 2 * num_zeros > len(start):
        encoding = "UTF-32" if any(start[side::4].count(0) * 4 >= len(start) - 3 for side in (0, 3)) else None
    else:
        encoding = "UTF-16" if has_mark or max(sides) >= 0.9 * num_zeros else None
    raise ValueError(f"the file is {encoding}; save as UTF-8" if encoding else "the file is binary, not text")


def _json_lines(stream: io.BufferedReader) -> Iterator[Numbered]:
    for line, content in enumerate(_lines(stream), start=1):
        if len(content) > MAX_LINE_BYTES:
            yield line, Unreadable(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        elif content.strip():
            yield line, _json_row(content.removeprefix(codecs.BOM_UTF8) if line == 1 else content)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines; one that is longer than MAX_LINE_BYTES is cut to one byte more than that, as it may never end."""
    while content := stream.readline(MAX_LINE_BYTES + 1):
        yield content
        too_long = len(content) > MAX_LINE_BYTES
        while too_long and content and not content.endswith(b"\n"):
            content = stream.readline(MAX_LINE_BYTES)


def _json_row(content: bytes) -> Row | Unreadable:
    try:
        return _as_row(_decode_json(content.decode("utf-8", "surrogatepass")))
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        return Unreadable(f"not JSON: {error}")
    except ValueError as error:
        return Unreadable(str(error))


def _as_row(value: Any) -> Row | Unreadable:
    return value if isinstance(value, dict) else Unreadable(f"a JSON {type(value).__name__}, not an object")


def _without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    """An object with one key twice is refused: JSON takes the last value in silence."""
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError(f"an object has the key {_twice([key for key, _ in pairs])!r} twice")
    return row


_decode_json = json.JSONDecoder(object_pairs_hook=_without_repeats).decode
"""Made once. json.loads would make it for every row."""


def _twice(names: list[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _json(stream: io.BufferedReader) -> Iterator[Numbered]:
    # Both a JSON array and JSON lines have this ending in practice; the first character tells them apart.
    if stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        text = _whole(stream).getvalue().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass")
        yield from ((position, _as_row(value)) for position, value in enumerate(_decode_json(text), start=1))
        return
    rows = _json_lines(stream)
    first, second = next(rows, None), next(rows, None)
    if first and second and isinstance(first[1], Unreadable) and isinstance(second[1], Unreadable):
        raise ValueError("one object over several lines; PRISM reads an array of objects, or one object a line")
    if first and second is None and _holds_columns(first[1]):
        hint = 'save it as rows: DataFrame.to_json(…, orient="records", lines=True)'
        raise ValueError(f"one object that holds columns, not rows; {hint}")
    yield from chain(*([one] for one in (first, second) if one), rows)


def _holds_columns(row: Row | Unreadable) -> bool:
    """True for pandas' {column: {"0": value, …}}, and for {column: [value, …]} whose values are plain."""
    values = list(row.values()) if isinstance(row, dict) else []
    keys: set[Any] = {tuple(value) for value in values if isinstance(value, dict)}
    if values and all(isinstance(value, dict) for value in values):
        return len(keys) == 1 and any(keys) and all(key.isdigit() for key in next(iter(keys)))
    if len(values) < 2 or not all(isinstance(value, list) for value in values):
        return False
    return len({len(value) for value in values}) == 1 and not any(
        isinstance(it, dict) for value in values for it in value
    )


def _csv(stream: io.BufferedReader, delimiter: str = ",") -> Iterator[Numbered]:
    csv.field_size_limit(2**27)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    reader = csv.DictReader(_text_lines(text), strict=True, delimiter=delimiter)
    _refuse_repeats(list(reader.fieldnames or ()))
    for row in reader:
        if None in row:
            yield reader.line_num, Unreadable("more fields than the header names")
        else:
            yield reader.line_num, dict(row)


def _text_lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        yield line


def _tsv(stream: io.BufferedReader) -> Iterator[Numbered]:
    return _csv(stream, "\t")


def _refuse_repeats(columns: list[str]) -> None:
    if (name := _twice(columns)) is not None:
        raise ValueError(f"two columns have the name {name!r}; rename one of them")


def _parquet(stream: io.BufferedReader) -> Iterator[Numbered]:
    file = pq.ParquetFile(_seekable(stream))
    return _table_rows(file.schema_arrow, file.iter_batches(batch_size=BATCH_ROWS))


def _arrow(stream: io.BufferedReader) -> Iterator[Numbered]:
    """Both formats of Arrow have this ending: the file format, and the stream that `save_to_disk` writes."""
    if stream.peek(6)[:6] == b"ARROW1":
        file = pa.ipc.open_file(_seekable(stream))
        return _table_rows(file.schema, map(_valid, map(file.get_batch, range(file.num_record_batches))))
    if stream.peek(1)[:1] in (b"{", b"["):
        raise ValueError("the file holds JSON, not Arrow; end its name in .jsonl or .json")
    if isinstance(stream.raw, io.FileIO):
        _refuse_open_end(stream)
    reader = pa.ipc.open_stream(stream)
    return _table_rows(reader.schema, map(_valid, reader))


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Raises pa.ArrowInvalid: damaged. Nothing else checks the offsets of a batch, and a wrong one ends the process."""
    batch.validate(full=True)
    return batch


def _seekable(stream: io.BufferedReader) -> IO[bytes]:
    return stream if isinstance(stream.raw, io.FileIO) else _whole(stream)


def _whole(stream: io.BufferedReader) -> io.BytesIO:
    content = io.BytesIO()
    while part := stream.read(2**20):
        content.write(part)
        if content.tell() > MAX_WHOLE_BYTES:
            raise ValueError(f"it takes more than {MAX_WHOLE_BYTES >> 30} GiB of memory; use .jsonl, or plain .parquet")
    content.seek(0)
    return content


def _refuse_open_end(stream: io.BufferedReader) -> None:
    """A stream that was cut between two batches reads like a whole one, but for its end mark. Raises ValueError."""
    mark = b"\xff\xff\xff\xff\0\0\0\0" if stream.peek(4)[:4] == b"\xff" * 4 else b"\0\0\0\0"  # before Arrow 0.15
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - len(mark)))
    if stream.read() != mark:
        raise ValueError("cut short, or not an Arrow file: the end mark of a stream is missing")
    stream.seek(0)


def _table_rows(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[Numbered]:
    _refuse_repeats(schema.names)
    decoders = {field.name: decode for field in schema if (decode := _json_decoder(field.type))}
    position = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                for name, decode in decoders.items():
                    row[name] = decode(row[name])
                position += 1
                yield position, row


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """How to decode a column that holds JSON text, somewhere within, by its type: `datasets.Json` is stored so."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else _decode_json(value)
    if pa.types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _json_decoder(field.type))}
        if inner:
            return lambda value: value and value | {name: decode(value[name]) for name, decode in inner.items()}
    elif (
        hasattr(kind, "value_type") and not pa.types.is_dictionary(kind) and (decode := _json_decoder(kind.value_type))
    ):
        return lambda value: value and [decode(item) for item in value]
    return None


_TEXT = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv")
_READERS: dict[str, Callable[[io.BufferedReader], Iterator[Numbered]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonlines": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
