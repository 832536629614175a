"""Logs that pods left in the bucket: which pods of a run need them, and the lines of copies on this disk. Makes no requests."""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launcher.resource.names import pod_prefix
from launcher.resource.record import Record
from launcher.resource.status import STAGES

_KEY = re.compile(
    r"(?P<prefix>(?P<stage>plan|extract|reduce)(-(?P<group>\d+))?(\.(?P<attempt>\d+))?(/(?P<node>\d+))?)/[^/]+"
)

ENDED = ("Succeeded", "Failed", "Stopped")
"""States of a stage whose current attempt has ended: its pods may be gone."""


@dataclass(frozen=True)
class KeptLog:
    """A copy of a kept log."""

    path: Path
    prefix: str
    order: tuple[Any, ...]
    """As that of pods (merged_logs.py)."""
    tail: int | None

    @classmethod
    def of(cls, facts: Mapping[str, Any], round_number: int, tail: int | None = None) -> Self | None:
        """From what the job's verb `logs` says of it. None: no key of a pod's log."""
        parts = _KEY.fullmatch(facts["key"])
        if parts is None:
            return None
        stage, group, attempt, node = (parts[name] for name in ("stage", "group", "attempt", "node"))
        numbers = int(attempt or 0), int(group or 0), int(node or 0)
        order = (round_number, STAGES.index(stage), *numbers, str(facts["modified"]))
        return cls(Path(facts["path"]), parts["prefix"], order, tail)

    @property
    def stage(self) -> str:
        return STAGES[int(self.order[1])]

    @property
    def group(self) -> int:
        return int(self.order[3])

    def lines(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            lines: Iterable[bytes] = file if self.tail is None else deque(file, self.tail)
            for line in lines:
                yield line.decode(errors="replace").removesuffix("\n")


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
