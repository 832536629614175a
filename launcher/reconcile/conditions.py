"""Conditions of a run, and the events for a change of its status. Pure. Does not know why a status changes."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.resource.status import Condition, Status, time_text

LONGEST_SENTENCE = 1024


class Conditions:
    """The conditions while a pass changes them. A transition time changes only with the status of its condition.

    At the start of a round none of them holds.
    """

    def __init__(self, before: Status, generation: int, now: datetime.datetime) -> None:
        self.found = {one.type: one for one in before.conditions}
        self.generation, self.now = generation, time_text(now)
        is_fresh = not before.stages and not before.is_terminal
        for name in ("Planned", "Extracted", "Reduced", "Complete", "Failed"):
            if is_fresh or name not in self.found:
                self.set(name, False, "NotYet")

    def set(self, name: str, holds: bool, reason: str, message: str = "") -> None:
        """Setting a condition to what it is changes nothing."""
        status = "True" if holds else "False"
        old = self.found.get(name)
        self.found[name] = Condition.model_validate(
            {
                "type": name,
                "status": status,
                "reason": reason,
                "message": sentence(message),
                "lastTransitionTime": old.last_transition_time if old and old.status == status else self.now,
                "observedGeneration": self.generation,
            }
        )

    def end(self, *, complete: bool, reason: str, message: str) -> None:
        """The run has ended: one of Complete and Failed holds, with the message."""
        self.set("Complete", complete, reason, message if complete else "")
        self.set("Failed", not complete, reason, "" if complete else message)

    def all(self) -> tuple[Condition, ...]:
        """All with the current generation: `kubectl wait` ignores a condition with an older one."""
        return tuple(one.model_copy(update={"observed_generation": self.generation}) for one in self.found.values())


@dataclass(frozen=True)
class Transition:
    """The content of an Event object."""

    is_warning: bool
    reason: str
    message: str


def transitions(before: Status, after: Status) -> Iterator[Transition]:
    """The events of one pass: a new phase, a failed attempt."""
    if after.phase != before.phase or after.round != before.round:
        yield Transition(after.phase == "Failed", after.phase, after.message or f"round {after.round}")
    earlier = {(entry.stage, entry.group): entry for entry in before.stages if after.round == before.round}
    for entry in after.stages:
        old = earlier.get((entry.stage, entry.group))
        title = f"{entry.stage}, group {entry.group}" if entry.stage == "extract" else entry.stage
        if old and entry.restarts > old.restarts:
            yield Transition(True, "Restarted", f"{title}: {entry.message}")
        if old and entry.preemptions > old.preemptions:
            yield Transition(False, "Preempted", f"{title}: {entry.message}")


def sentence(text: str) -> str:
    """One line, short enough for a status, valid UTF-8: JSON can contain half a surrogate pair."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST_SENTENCE else f"{line[: LONGEST_SENTENCE - 1]}…"
