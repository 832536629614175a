"""Laws of a bounded log: whole below its bounds; above, its first and last lines, and how much lies between."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from prism_job.logs.bounded_log import LONGEST_LINE_BYTES, BoundedLog

chunks = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=30)), max_size=30)


@given(chunks)
def test_a_short_log_holds_each_byte_of_each_stream_once(parts: list[tuple[int, bytes]]) -> None:
    log = BoundedLog()
    for stream, chunk in parts:
        log.add(stream, chunk)
    log.finish()
    said = b"".join(chunk for _, chunk in parts)
    assert sorted(log.content()) == sorted(said)
    assert log.num_bytes == len(said)
    if len({stream for stream, _ in parts}) < 2:
        assert log.content() == said


@given(st.lists(st.text("ab", max_size=20), max_size=60), st.integers(1, 7))
def test_a_long_log_keeps_whole_lines_of_its_begin_and_end_and_says_how_much_is_missing(
    lines: list[str], size: int
) -> None:
    log = BoundedLog(first_bytes=40, last_bytes=60)
    said = "".join(f"{line}\n" for line in lines).encode()
    for start in range(0, len(said), size):
        log.add(1, said[start : start + size])
    log.finish()
    content = log.content()
    if len(said) <= 60:
        assert content == said
    parts = re.fullmatch(rb"((?:.*\n)*?)\(([\d,]+) bytes of this log .*\n((?:.*\n)*)", content)
    if parts is None:
        assert content == said
    else:
        first, missing, last = parts[1], int(parts[2].replace(b",", b"")), parts[3]
        assert len(first) <= 40
        assert len(last) <= 60
        assert said.startswith(first)
        assert said.endswith(last)
        assert len(first) + missing + len(last) == len(said)


def test_a_line_without_an_end_takes_no_more_than_the_bounds() -> None:
    log = BoundedLog(first_bytes=10, last_bytes=LONGEST_LINE_BYTES)
    for _ in range(100):
        log.add(1, b"x" * 10_000)
    log.finish()
    assert log.num_bytes == 1_000_000
    assert len(log.content()) < LONGEST_LINE_BYTES + 200


def test_lines_of_two_streams_do_not_break_each_other() -> None:
    log = BoundedLog()
    log.add(1, b"begin of ")
    log.add(2, b"an error\n")
    log.add(1, b"an event\n")
    assert log.content() == b"an error\nbegin of an event\n"


@given(
    st.lists(st.tuples(st.sampled_from([b"o", b"e"]), st.integers(0, 3000), st.integers(1, 60)), max_size=4),
    st.integers(1000, 2 * LONGEST_LINE_BYTES),
)
@example([(b"o", 99, 700), (b"e", 10, 1)], LONGEST_LINE_BYTES)
def test_lines_of_two_streams_stay_whole_in_bursts(bursts: list[tuple[bytes, int, int]], chunk_bytes: int) -> None:
    """However many lines a chunk has, and wherever it ends."""
    log = BoundedLog()
    said = dict.fromkeys((b"o", b"e"), b"")
    for letter, length, num_lines in bursts:
        said[letter] += (letter * length + b"\n") * num_lines
    for start in range(0, max(map(len, said.values())), chunk_bytes):
        for letter, text in said.items():
            log.add(ord(letter), text[start : start + chunk_bytes])
    log.finish()
    lines = log.content().split(b"\n")
    assert all(len(set(line)) < 2 for line in lines)
    assert sorted(lines) == sorted(b"".join(said.values()).split(b"\n"))
