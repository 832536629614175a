"""Why Kueue does not admit a run's Jobs, in its own words. Asked when a person looks: the operator reads no Workload, and
nothing is decided from one.
"""

from collections.abc import Mapping

from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Unavailable
from launcher.kube.kinds import KUEUE
from launcher.resource.names import RUN_LABEL, job_name
from launcher.resource.object import Object
from launcher.resource.record import Record
from launcher.resource.status import StageStatus, Status

JOB_UID = f"{KUEUE}/job-uid"
"""Label of a Workload: the uid of the Job that owns it (pkg/controller/constants of kubernetes-sigs/kueue)."""

UIDS_PER_REQUEST = 100
"""A run has up to 256 groups. A hundred uids make an address of 4 kB: many proxies refuse more than 8 kB."""


def kueue_reasons(cluster: Cluster, record: Record, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Kueue's reasons for the Jobs that are queued, by their names. Makes no request where none is queued.

    Args:
        known: reasons of a moment ago, which hold where the API server does not answer now.

    Empty where we may not read Jobs or Workloads, where Kueue is not installed or serves no version that we can read, and
    before it has decided. That hides nothing of the run: its status, which was read, names the queue that it waits for, and
    no decision depends on the reason.
    """
    queued = {_job_name(record.name, record.status, entry) for entry in record.status.stages if entry.state == "Queued"}
    if not queued:
        return {}
    cluster, reasons = cluster.without_retries(), {}
    try:
        jobs = cluster.list("Job", record.namespace, labels=f"{RUN_LABEL}={record.name}", keep=_metadata).items
        names = {job["metadata"]["uid"]: job["metadata"]["name"] for job in jobs if job["metadata"]["name"] in queued}
        for first in range(0, len(names), UIDS_PER_REQUEST):
            labels = f"{JOB_UID} in ({','.join([*names][first : first + UIDS_PER_REQUEST])})"
            for workload in cluster.list("Workload", record.namespace, labels=labels).items:
                reasons[names[workload["metadata"]["labels"][JOB_UID]]] = why_not_admitted(workload)
    except Unavailable:
        return {**(known or {}), **reasons}
    except ClusterError:
        return {}
    return reasons


def why_not_admitted(workload: Object) -> str:
    """What a Workload's conditions say against its admission. Empty where they say nothing.

    Evicted holds until quota is reserved again, with its first message; that of QuotaReserved is kept up to date.
    """
    messages = {
        (one["type"], one["status"]): str(one.get("message", ""))
        for one in workload.get("status", {}).get("conditions") or ()
    }
    evicted, reserved = messages.get(("Evicted", "True"), ""), messages.get(("QuotaReserved", "False"), "")
    return f"evicted: {evicted}" if evicted and reserved in ("", evicted) else reserved


def with_kueue_reasons(status: Status, run: str, reasons: Mapping[str, str]) -> Status:
    """The status of a run, with Kueue's reason after the message of each stage that is queued."""

    def explained(entry: StageStatus) -> StageStatus:
        reason = reasons.get(_job_name(run, status, entry)) if entry.state == "Queued" else ""
        return entry.model_copy(update={"message": f"{entry.message}: {reason}"}) if reason else entry

    return status.model_copy(update={"stages": tuple(map(explained, status.stages))})


def _job_name(run: str, status: Status, entry: StageStatus) -> str:
    return job_name(run, entry.stage, entry.group, status.round, entry.attempt)


def _metadata(job: Object) -> Object:
    return {"metadata": {name: job["metadata"][name] for name in ("name", "uid")}}
