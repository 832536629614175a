"""Which pods of a run are gone, so that only the bucket may have their logs. Makes no requests."""

from collections.abc import Collection, Iterable

from launcher.resource.names import pod_prefix
from launcher.resource.record import Record

ENDED = ("Succeeded", "Failed", "Stopped")
"""States of a stage whose current attempt has ended: its pods may be gone."""


def gone_pods(record: Record, there: Collection[str], stage: str | None = None, group: int | None = None) -> list[str]:
    """Prefixes of the pods that the current round had, as its status shows, and that are not `there` any more."""
    cluster = record.spec.get("cluster")
    given = cluster.get("nodesPerGroup") if isinstance(cluster, dict) else None
    num_nodes = given if isinstance(given, int) else 1
    found: list[str] = []
    for entry in sorted(record.status.stages, key=lambda entry: (entry.stage != "plan", entry.stage, entry.group)):
        if stage not in (None, entry.stage) or group not in (None, entry.group):
            continue
        has_nodes = entry.stage == "extract" and num_nodes > 1
        nodes: Iterable[int | None] = range(num_nodes) if has_nodes else (None,)
        attempts = range(entry.attempt + (entry.started and entry.state in ENDED))
        found += [pod_prefix(entry.stage, entry.group, attempt, node) for attempt in attempts for node in nodes]
    return [prefix for prefix in found if prefix not in there]
