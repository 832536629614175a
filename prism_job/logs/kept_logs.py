"""Where the logs of a run's pods are kept: `<output>/<run>/logs/<uid>/<round>/<pod's prefix>/<pod>.log`. Puts and reads them.

The uid is that of the run's record in its cluster: another run of the same name and output, before or elsewhere, has another.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from prism_job.logs.bounded_log import FIRST_BYTES, LAST_BYTES
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store

LOG_VARIABLE = "PRISM_LOG"
"""Environment variable of a pod: the key of its log below `<run>/logs/`. Not set or empty: no log is kept."""

STAGES = ("plan", "extract", "reduce")

MAX_BYTES = FIRST_BYTES + LAST_BYTES + 1024
"""No pod keeps more: both parts of a long log, and the line between them."""

_KEY = re.compile(
    r"(?P<round>[^/]+/\d+)"
    r"/(?P<pod>(?P<stage>plan|extract|reduce)(-(?P<group>\d+))?(\.(?P<attempt>\d+))?(/(?P<node>\d+))?)/[^/]+\.log"
)


def put_log(output_uri: str, run: str, key: str, content: bytes) -> None:
    open_store(output_uri).put(f"{run}/logs/{key}", content)


def read_logs(
    store: Store,
    run: str,
    *,
    round_key: str = "",
    pods: Collection[str] = (),
    stage: str | None = None,
    group: int | None = None,
    tail: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Logs by stage, attempt, group, node and time; of each its round, its pod's prefix and its lines. Holds one at a time.

    Args:
        round_key: `<uid>/<round>`. Empty: that of the newest log.
        pods: prefixes of the pods wanted. Empty: all.
        tail: only so many last lines of each.
    """
    root = f"{run}/logs/"
    listed = list(store.list(f"{root}{round_key}"))
    found = [(parts, log) for log in listed if (parts := _KEY.fullmatch(log.key, len(root)))]
    if found and not round_key:
        round_key = max(found, key=lambda each: each[1].modified)[0]["round"]
    wanted: list[tuple[tuple[float, ...], str, str, int]] = []
    for parts, log in found:
        order = [int(parts[name] or 0) for name in ("attempt", "group", "node")]
        is_wanted = stage in (None, parts["stage"]) and group in (None, order[1]) and (not pods or parts["pod"] in pods)
        if is_wanted and parts["round"] == round_key:
            place = (STAGES.index(parts["stage"]), *order, log.modified)
            wanted.append((place, log.key, parts["pod"], log.size_bytes))
    for _, key, pod, size_bytes in sorted(wanted):
        if size_bytes > MAX_BYTES:
            lines = [
                f"(not read: {store.uri(key)} has {size_bytes:,} bytes, and a log kept by a pod at most {MAX_BYTES:,})"
            ]
        else:
            lines = store.get(key).decode(errors="replace").split("\n")
            lines = lines if lines[-1] else lines[:-1]
        yield {"round": round_key, "pod": pod, "lines": lines if tail is None else lines[max(0, len(lines) - tail) :]}
