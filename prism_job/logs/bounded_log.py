"""The log of one process in memory, bounded: its first and its last bytes, by whole lines. Does not know where it is kept."""

import threading
from collections import defaultdict

MIB = 2**20
FIRST_BYTES, LAST_BYTES = MIB, 7 * MIB
"""Kept of a longer log: how it began, and how it ended."""

LONGEST_LINE_BYTES = 2**16
"""A line that is still unfinished at this length is taken as it is."""


class BoundedLog:
    """Chunks of several streams, merged by line. One thread adds, another may read."""

    def __init__(self, first_bytes: int = FIRST_BYTES, last_bytes: int = LAST_BYTES) -> None:
        self.first_bytes, self.last_bytes = first_bytes, last_bytes
        self.num_bytes = 0
        """Of all whole lines so far, those left out included."""
        self._first, self._last = bytearray(), bytearray()
        self._unfinished: dict[int, bytes] = defaultdict(bytes)
        self._lock = threading.Lock()

    def add(self, stream: int, chunk: bytes) -> None:
        text = self._unfinished[stream] + chunk
        end = text.rfind(b"\n") + 1
        if len(text) - end >= LONGEST_LINE_BYTES:
            end = len(text)
        self._unfinished[stream] = text[end:]
        self._add_lines(text[:end])

    def finish(self) -> None:
        """No more comes: last lines without an end count too."""
        for text in self._unfinished.values():
            self._add_lines(text)
        self._unfinished.clear()

    def content(self) -> bytes:
        with self._lock:
            num_left_out = self.num_bytes - len(self._first) - len(self._last)
            if not num_left_out:
                return bytes(self._first + self._last)
            kept = f"its first {len(self._first):,} and its last {len(self._last):,} bytes are kept"
            between = f"({num_left_out:,} bytes of this log are left out here: {kept})\n".encode()
            return bytes(self._first) + between + bytes(self._last)

    def _add_lines(self, text: bytes) -> None:
        with self._lock:
            self.num_bytes += len(text)
            if not self._last:
                room = self.first_bytes - len(self._first)
                end = len(text) if len(text) <= room else text.rfind(b"\n", 0, max(room, 0)) + 1
                self._first += text[:end]
                text = text[end:]
            self._last += text
            too_many = len(self._last) - self.last_bytes
            if too_many > 0:  # up to the end of a line; a single line longer than all of it is cut
                end = self._last.find(b"\n", too_many - 1) + 1
                del self._last[: end or too_many]
