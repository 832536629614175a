"""The GPU time of a run: GPUs × seconds from a container's start to its end, over the pods of all attempts. Pure.

The end of an attempt is written to the status together with its time. So no attempt is counted twice or forgotten: a pass
whose status was not written is repeated from the same beginning. Time that gave no result counts as well.
"""

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.reconcile.actions import Observed
from launcher.reconcile.child_status import running_times, stopped_at
from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from launcher.resource.object import Object
from launcher.resource.status import StageStatus, Status, parse_time
from prism_job.spec.document import SelectionRun

OVER = ("Succeeded", "Failed", "Stopped")
"""States of a stage whose last attempt has ended."""


@dataclass(frozen=True)
class GpuTime:
    """Of one run in one pass.

    Attributes:
        found: the status as the pass found it: whatever has ended there is counted in its `gpu_seconds`.
    """

    run: SelectionRun
    observed: Observed
    found: Status
    now: datetime.datetime

    def ended_since(self, stages: Iterable[StageStatus]) -> int:
        """Of the attempts that have ended or were suspended since `found`, where these are the stages now."""
        return sum(self._of_stage(entry) for entry in stages)

    def running(self, stages: Iterable[StageStatus]) -> int:
        """Of the attempts that have not ended, until now."""
        return sum(self._of_attempt(entry) for entry in stages if entry.state not in OVER)

    def _of_stage(self, entry: StageStatus) -> int:
        found = self.found.stage(entry.stage, entry.group)
        if found.state in OVER:
            return 0
        first_running = entry.attempt + (entry.state in OVER)
        if first_running == found.attempt:
            was_suspended = found.running_since is not None and entry.running_since is None
            return self._of_attempt(found) if was_suspended else 0
        later = [entry.model_copy(update={"attempt": it}) for it in range(found.attempt + 1, first_running)]
        return sum(self._of_attempt(each) for each in [found, *later])

    def _of_attempt(self, entry: StageStatus) -> int:
        """Since its Job was resumed, if it was suspended: what came before was counted then."""
        wanted = job_of(Attempt(self.run, entry.stage, entry.group, self.found.round, entry.attempt))
        job = self.observed.jobs.get(wanted["metadata"]["name"])
        since = parse_time(entry.running_since) if entry.running_since else None
        if job is None:
            return held_seconds(wanted, (), since, self.now)
        if job["spec"].get("suspend") and since is None:
            return 0
        return held_seconds(wanted, self.observed.pods_of(job), since, stopped_at(job) or self.now)


def held_seconds(job: Object, pods: Sequence[Object], since: datetime.datetime | None, ended: datetime.datetime) -> int:
    """Seconds × GPUs that the pods of one attempt held.

    A pod that is gone counts from `since` to `ended`: the pods of a Job start together, and the end of one ends the others.

    Args:
        job: as rendered.
        pods: those that exist.
        since: when its first container was seen to start; None if none was. Whatever ran before it is not counted.
        ended: when the attempt ended or was suspended, and with it the containers that are not seen to have ended.
    """
    gpus = gpus_of(job["spec"]["template"])
    if not gpus:
        return 0
    times = [running_times(pod) for pod in pods]
    known = [(max(start, since or start), end or ended) for start, end in filter(None, times)]
    started = min([start for start, _ in known] + ([since] if since else []), default=ended)
    gone = max(0, job["spec"]["completions"] - len(pods))
    spans = [*known, *[(started, ended)] * gone]
    return gpus * sum(max(0, round((end - start).total_seconds())) for start, end in spans)


def gpus_of(template: Object) -> int:
    """GPUs that a pod asks for, of any vendor (nvidia.com/gpu, amd.com/gpu)."""
    counts = [str(count) for name, count in _limits(template) if name.endswith("/gpu")]
    return sum(int(count) for count in counts if count.isdecimal())


def are_gpus_known(run: SelectionRun) -> bool:
    """False where the pods of extraction ask for devices and none is a whole GPU: what a part of one is worth is not known."""
    template = job_of(Attempt(run, "extract"))["spec"]["template"]
    devices = [name for name, _ in _limits(template) if "/" in name]
    claims = [(each.get("resources") or {}).get("claims") for each in template["spec"]["containers"]]
    return bool(gpus_of(template)) or not (devices or any(claims))


def _limits(template: Object) -> list[tuple[str, Any]]:
    limits = [(each.get("resources") or {}).get("limits") or {} for each in template["spec"]["containers"]]
    return [one for each in limits for one in each.items()]
