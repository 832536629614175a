"""The log of a container as pods/log gives it, from the file that a kubelet writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.faults import Request

if TYPE_CHECKING:
    from tests.cluster.apiserver import ApiServer


def follow(server: ApiServer, place: Path, request: Request, uid: str, alive: Callable[[], bool]) -> Iterator[bytes]:
    """Whole lines; the last one as it is, where it has no end. A line keeps the time at which it was first read."""
    query, number, position = request.query, 0, 0
    since = datetime.fromisoformat(query["sinceTime"]) if query.get("sinceTime") else None
    tail = query.get("tailLines")
    while True:
        ended = server.ended_pod(request.namespace, request.name, uid)
        text = b""
        if place.exists():
            with place.open("rb") as file:
                file.seek(position)
                text = file.read()
        following = query.get("follow") in ("true", "1")
        if following and not ended:
            text = text[: text.rfind(b"\n") + 1]
        position += len(text)
        lines = list(enumerate(text.splitlines(keepends=True), number))
        number += len(lines)
        times = server.times_of(place, number)
        if tail is not None:
            lines, tail = lines[len(lines) - min(int(tail), len(lines)) :], None
        if since is not None:
            lines = [(line, words) for line, words in lines if times[line] >= since]
        stamps = query.get("timestamps") in ("true", "1")
        out = b"".join(
            (f"{times[line]:%Y-%m-%dT%H:%M:%S.%f}000Z ".encode() if stamps else b"") + it for line, it in lines
        )
        yield out
        if not following or not alive() or (ended and not text):
            return
        if not text:
            time.sleep(0.05)
