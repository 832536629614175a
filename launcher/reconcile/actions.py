"""What a decision reads of the cluster, the actions it may return, and its timeouts: plain data. Decides nothing."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.reconcile.child_status import is_owned_by
from launcher.resource.object import Object
from launcher.resource.status import Status


@dataclass(frozen=True)
class CreateError:
    """The API server refused to create a Job: the HTTP status, its message, and since when every try has been refused."""

    code: int
    message: str
    since: datetime.datetime


@dataclass(frozen=True)
class Observed:
    """What the cluster holds of one run.

    Attributes:
        jobs: by name.
        pods: of all its Jobs.
        pod_warnings: by Job name, why its pods could not be created, from its events.
        create_errors: by Job name, the last refusal of its Create.
    """

    jobs: Mapping[str, Object]
    pods: Sequence[Object] = ()
    pod_warnings: Mapping[str, str] = field(default_factory=dict)
    create_errors: Mapping[str, CreateError] = field(default_factory=dict)

    def pods_of(self, job: Object) -> list[Object]:
        return [pod for pod in self.pods if is_owned_by(pod, job["metadata"]["uid"])]


@dataclass(frozen=True)
class Apply:
    """Server-side apply."""

    object: Object


@dataclass(frozen=True)
class Create:
    """Create an object that does not exist. One of the same name with another owner is waited for, never taken over."""

    object: Object


@dataclass(frozen=True)
class Delete:
    """Delete an object, and in the background all that it owns; only if it still has this uid."""

    kind: str
    namespace: str
    name: str
    uid: str


Action = Apply | Create | Delete


@dataclass(frozen=True)
class Decision:
    """Actions in order, then the status to write, then when the next pass is due even if nothing changes."""

    actions: tuple[Action, ...]
    status: Status
    requeue_at: datetime.datetime | None = None


@dataclass(frozen=True)
class Timeouts:
    """How long a decision waits before it acts. Tests shorten them."""

    backoff_seconds: float = 10
    """After the first crash; doubled after each further one."""

    max_backoff_seconds: float = 300

    lost_pod_seconds: float = 300
    """A pod that should have ended, or that its Job counts and the cluster does not list: given up after this long."""

    webhook_seconds: float = 3600
    """After its end a run's delivery to the webhook is tried again for so long; its record waits for it."""

    pod_status_seconds: float = 10
    """A Job has ended and its pods are not seen to have ended: their status is waited for this long. They are watched apart."""
