"""Chunks of bytes as lines of text: of a watch, and of a container's log. Makes no requests."""

from collections.abc import Iterable, Iterator

LONGEST_LINE = 2**20
"""Bytes that are kept of a line of a log: a line without an end would fill the memory."""

CUT = "… (the rest of this line is left out)"


def decoded_lines(chunks: Iterable[bytes], longest: int | None) -> Iterator[str]:
    """The lines, without their ends.

    Args:
        longest: bytes of a line; what comes after them is left out, and `CUT` stands in its place.
    """
    parts: list[bytes] = []
    num_bytes, is_cut = 0, False
    for chunk in chunks:
        for index, piece in enumerate(chunk.split(b"\n")):
            if index:  # a line break stood before this piece
                if not is_cut:
                    yield b"".join(parts).decode(errors="replace")
                parts, num_bytes, is_cut = [], 0, False
            if is_cut:
                continue
            parts.append(piece)
            num_bytes += len(piece)
            if longest is not None and num_bytes > longest:
                # Always at the same byte: after a broken connection the line must look the same.
                yield b"".join(parts)[:longest].decode(errors="replace") + CUT
                parts, is_cut = [], True
    if num_bytes and not is_cut:
        yield b"".join(parts).decode(errors="replace")
