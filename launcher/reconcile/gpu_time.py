"""The GPU time of a run: GPUs × seconds from a container's start to its end, over the pods of all attempts. Pure.

The end of an attempt is written to the status together with its time. So no attempt is counted twice or forgotten: a pass
whose status was not written is repeated from the same beginning. Time that gave no result counts as well.
"""

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.reconcile.actions import Observed
from launcher.reconcile.child_status import finished_at, running_times
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
        """Of the attempts that have ended since `found`, where these are the stages now."""
        return sum(self._of_stage(entry) for entry in stages)

    def running(self, stages: Iterable[StageStatus]) -> int:
        """Of the attempts that have not ended, until now."""
        return sum(self._of_attempt(entry) for entry in stages if entry.state not in OVER)

    def _of_stage(self, entry: StageStatus) -> int:
        found = self.found.stage(entry.stage, entry.group)
        if found.state in OVER:
            return 0
        first_running = entry.attempt + (entry.state in OVER)
        later = [entry.model_copy(update={"attempt": it}) for it in range(found.attempt + 1, first_running)]
        return sum(self._of_attempt(each) for each in ([found, *later] if first_running > found.attempt else []))

    def _of_attempt(self, entry: StageStatus) -> int:
        wanted = job_of(Attempt(self.run, entry.stage, entry.group, self.found.round, entry.attempt))
        job = self.observed.jobs.get(wanted["metadata"]["name"])
        ended = (finished_at(job) if job else None) or self.now
        since = parse_time(entry.running_since) if entry.running_since else None
        return held_seconds(wanted, self.observed.pods_of(job) if job else (), since, ended)


def held_seconds(job: Object, pods: Sequence[Object], since: datetime.datetime | None, ended: datetime.datetime) -> int:
    """Seconds × GPUs that the pods of one attempt held.

    A pod that is gone counts from `since` to `ended`: the pods of a Job start together, and the end of one ends the others.

    Args:
        job: as rendered.
        pods: those that exist.
        since: when its first container was seen to start; None if none was.
        ended: when the attempt ended, and with it the containers that are not seen to have ended.
    """
    gpus = gpus_of(job["spec"]["template"])
    if not gpus:
        return 0
    times = [running_times(pod) for pod in pods]
    known = [(start, end or ended) for start, end in filter(None, times)]
    started = min([start for start, _ in known] + ([since] if since else []), default=ended)
    gone = max(0, job["spec"]["completions"] - len(pods))
    spans = [*known, *[(started, ended)] * gone]
    return gpus * sum(max(0, round((end - start).total_seconds())) for start, end in spans)


def gpus_of(template: Object) -> int:
    """GPUs that a pod asks for, of any vendor (nvidia.com/gpu, amd.com/gpu)."""
    limits = [(each.get("resources") or {}).get("limits") or {} for each in template["spec"]["containers"]]
    counts = [str(count) for each in limits for name, count in each.items() if name.endswith("/gpu")]
    return sum(int(count) for count in counts if count.isdecimal())
