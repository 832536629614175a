"""Where the logs of a run's pods are kept: `<output>/<run>/logs/<uid>/<round>/<pod's prefix>/<pod>.log`. Puts and fetches them.

The uid is that of the run's record in its cluster: another run of the same name and output, before or elsewhere, has another.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_job.storage.address import open_store

LOG_VARIABLE = "PRISM_LOG"
"""Environment variable of a pod: the key of its log below `<run>/logs/`. Not set or empty: no log is kept."""


def put_log(output_uri: str, run: str, key: str, content: bytes) -> None:
    open_store(output_uri).put(f"{run}/logs/{key}", content)


def fetch_logs(
    output_uri: str, run: str, folder: str, round_key: str = "", prefixes: Sequence[str] = ()
) -> dict[str, Any]:
    """Copy logs into a folder. Returns where they are kept, and of each its key below there, its copy and its time.

    Args:
        round_key: `<uid>/<round>`. Empty: that of the newest log.
        prefixes: of the pods wanted. Empty: all.
    """
    store = open_store(output_uri)
    root = f"{run}/logs/"
    found = [listed for listed in store.list(f"{root}{round_key}") if listed.key.endswith(".log")]
    if not round_key and found:
        newest = max(found, key=lambda listed: listed.modified).key.removeprefix(root)
        round_key = "/".join(newest.split("/")[:2])
    start = f"{root}{round_key}/"
    wanted = tuple(f"{start}{prefix}/" for prefix in prefixes) or start
    logs: list[dict[str, Any]] = []
    for listed in found:
        if listed.key.startswith(wanted):
            path = Path(folder) / f"{len(logs)}.log"
            store.download(listed.key, path)
            logs.append({"key": listed.key.removeprefix(start), "path": str(path), "modified": listed.modified})
    return {"kept": store.uri(start), "logs": logs}
