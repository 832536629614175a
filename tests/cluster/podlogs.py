"""Logs of containers as files: where they lie, and how pods/log shows them. The kubelet writes them; the fake API server and
the kubelet's own HTTPS (logserver.py) read them through here. Knows nothing of HTTP, nor of who may read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path


class PodLogs:
    """The logs below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._times: dict[Path, list[datetime]] = {}
        self._lock = threading.Lock()

    def path(self, namespace: str, pod: str, uid: str, container: str) -> Path:
        return self.folder / namespace / f"{pod}.{uid}" / f"{container}.log"

    def follow(
        self, path: Path, query: Mapping[str, str], has_ended: Callable[[], bool], alive: Callable[[], bool]
    ) -> Iterator[bytes]:
        """Whole lines; the last one as it is, where it has no end. A line keeps the time at which it was first read.

        Args:
            query: follow, timestamps, tailLines, sinceTime, limitBytes, as in pods/log.
            has_ended: whether nothing more will be written; asked before each look at the file.
            alive: whether the reader is still there.
        """
        sent, number, position = 0, 0, 0
        limit = int(query.get("limitBytes") or 2**62)
        since = datetime.fromisoformat(query["sinceTime"]) if query.get("sinceTime") else None
        tail = query.get("tailLines")
        while True:
            ended = has_ended()
            text = b""
            if path.exists():
                with path.open("rb") as file:
                    file.seek(position)
                    text = file.read()
            following = query.get("follow") in ("true", "1") and sent < limit
            if following and not ended:
                text = text[: text.rfind(b"\n") + 1]
            position += len(text)
            lines = list(enumerate(text.splitlines(keepends=True), number))
            number += len(lines)
            times = self._times_of(path, number)
            if tail is not None:
                lines, tail = lines[len(lines) - min(int(tail), len(lines)) :], None
            if since is not None:
                lines = [(line, words) for line, words in lines if times[line] >= since]
            stamps = query.get("timestamps") in ("true", "1")
            out = b"".join(
                (f"{times[line]:%Y-%m-%dT%H:%M:%S.%f}000Z ".encode() if stamps else b"") + it for line, it in lines
            )
            yield out[: limit - sent]
            sent += len(out)
            if not following or sent >= limit or not alive() or (ended and not text):
                return
            if not text:
                time.sleep(0.05)

    def _times_of(self, path: Path, num_lines: int) -> list[datetime]:
        """When each line was first read by anybody: a line has the same time whenever it is asked for."""
        with self._lock:
            times = self._times.setdefault(path, [])
            times += [datetime.now(UTC)] * (num_lines - len(times))
            return times
