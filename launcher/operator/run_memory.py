"""What the controller remembers of each run beside the cache. Losing it costs time, never a wrong decision."""

import time
from dataclasses import dataclass, field

from launcher.operator.cache import RunKey
from launcher.reconcile.actions import CreateError
from launcher.resource.record import Record


@dataclass
class RunMemory:
    """Of one record.

    Attributes:
        first_seen: when this process saw the record first.
        create_errors: by Job name, the last refusal of its Create.
        pod_warnings: by Job name, the last Warning event about it, and when the events were read.
    """

    uid: str
    first_seen: float = field(default_factory=time.monotonic)
    create_errors: dict[str, CreateError] = field(default_factory=dict)
    pod_warnings: dict[str, str] = field(default_factory=dict)
    warnings_read_at: float = float("-inf")


class RunMemories:
    """One RunMemory a run; a record of the same name that is created later starts with an empty one."""

    def __init__(self) -> None:
        self._memories: dict[RunKey, RunMemory] = {}

    def of(self, record: Record) -> RunMemory:
        key = (record.namespace, record.name)
        memory = self._memories.get(key)
        if memory is None or memory.uid != record.uid:
            memory = self._memories[key] = RunMemory(record.uid)
        return memory

    def forget(self, key: RunKey) -> None:
        self._memories.pop(key, None)
