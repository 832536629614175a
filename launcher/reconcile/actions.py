"""What a decision reads of the cluster, what it may ask for, and how long it waits: plain data. Not: what is decided."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.resource.status import Status

Object = dict[str, Any]


@dataclass(frozen=True)
class CreateError:
    """A Job that the API server would not make: the HTTP status, its words, and since when that is so without a break."""

    code: int
    message: str
    since: datetime.datetime


@dataclass(frozen=True)
class Observed:
    """What the cluster holds of one run.

    Attributes:
        jobs: by name.
        pods: all of the run's.
        notes: by Job name, what its events say of pods that could not be made.
        refused: by Job name, the last answer to its Create where that was a no.
    """

    jobs: Mapping[str, Object]
    pods: Sequence[Object] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, CreateError] = field(default_factory=dict)

    def pods_of(self, job: Object) -> list[Object]:
        uid = job["metadata"]["uid"]
        return [
            pod for pod in self.pods if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", ()))
        ]


@dataclass(frozen=True)
class Apply:
    """Server-side apply: the object is then so, whatever it was."""

    object: Object


@dataclass(frozen=True)
class Create:
    """Make an object that must not be there. One of the same name that another owner left is waited for, never taken over."""

    object: Object


@dataclass(frozen=True)
class Delete:
    """Remove an object, and in the background all that it owns. `uid`: only if it is still this one."""

    kind: str
    namespace: str
    name: str
    uid: str


Action = Apply | Create | Delete


@dataclass(frozen=True)
class Decision:
    """What to do, in this order; then the status to write; and when to look again even if nothing happens."""

    actions: tuple[Action, ...]
    status: Status
    look_again: datetime.datetime | None = None


@dataclass(frozen=True)
class Timeouts:
    """Waiting times. Tests shorten them."""

    backoff_seconds: float = 10
    """After the first crash; doubled after each further one."""

    longest_backoff_seconds: float = 300

    stuck_seconds: float = 300
    """A pod that should be gone, or that its Job counts and nobody sees, for so long: the attempt is given up."""

    untold_seconds: float = 10
    """A Job that ended before we were told how its pods did: so long is waited for that."""
