"""What the operator reports and reads as events: Kubernetes Events of a run, Warning events of its Jobs, JSON log lines."""

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError
from launcher.operator.cache import RunKey
from launcher.operator.run_memory import RunMemory
from launcher.reconcile.actions import Observed
from launcher.reconcile.child_status import is_finished
from launcher.reconcile.conditions import Transition
from launcher.resource.names import API_GROUP, MANAGER
from launcher.resource.object import Object
from launcher.resource.record import Record
from launcher.resource.status import parse_time, time_text
from prism_job.spec.digest import digest

SETTLE_SECONDS = 3.0
"""A Job without pods for this long: its Warning events are read."""

WARNINGS_SECONDS = 30.0
"""Warning events are read again after this long: a run of many groups would ask for them at every change."""


def print_json_line(**fields: Any) -> None:
    """One JSON line on stderr."""
    line = json.dumps({"time": time_text(datetime.datetime.now(datetime.UTC)), **fields}, default=str)
    sys.stderr.write(line + "\n")


def create_event(cluster: Cluster, record: Record, transition: Transition, now: datetime.datetime) -> None:
    """A Kubernetes Event of a transition. A failure to create it is ignored: nothing depends on it.

    Its name contains the version of the record whose status changed, so that a transition that repeats has another name.
    """
    at, about = time_text(now), record.object
    name = digest([record.uid, record.metadata["resourceVersion"], transition.reason, transition.message])[:16]
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{record.metadata['name']}.{name}", "namespace": record.namespace},
        "involvedObject": {
            "apiVersion": about.get("apiVersion", record.owner_reference["apiVersion"]),
            "kind": about["kind"],
            "name": record.metadata["name"],
            "namespace": record.namespace,
            "uid": record.uid,
        },
        "type": "Warning" if transition.is_warning else "Normal",
        "reason": transition.reason,
        "message": transition.message,
        "source": {"component": MANAGER},
        "reportingComponent": f"{API_GROUP}/{MANAGER}",
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
    with contextlib.suppress(ClusterError):
        cluster.create(event)


def read_pod_warnings(
    cluster: Cluster,
    record: Record,
    observed: Observed,
    memory: RunMemory,
    now: datetime.datetime,
    requeue: Callable[[RunKey, float], None],
    *,
    refresh: bool = False,
) -> dict[str, str]:
    """Why Jobs have no pods (a quota, a policy): Job name -> its newest Warning event. One request, every 30 s at most.

    Args:
        requeue: called with the run and the seconds after which to look again.
        refresh: read the events however lately that was done.
    """
    key = (record.namespace, record.name)
    jobs, is_settling = {}, False
    for name, job in observed.jobs.items():
        has_pods = observed.pods_of(job) or job.get("status", {}).get("active")
        if has_pods or is_finished(job) or job["spec"].get("suspend"):
            continue
        age_seconds = (now - parse_time(job["metadata"]["creationTimestamp"])).total_seconds()
        if age_seconds < SETTLE_SECONDS:
            is_settling = True
        else:
            jobs[job["metadata"]["uid"]] = name
    if is_settling:
        requeue(key, SETTLE_SECONDS)
    if not jobs:
        return {}
    read_before_seconds = time.monotonic() - memory.warnings_read_at
    if refresh or read_before_seconds >= WARNINGS_SECONDS:
        about = f"involvedObject.uid={next(iter(jobs))}" if len(jobs) == 1 else "involvedObject.kind=Job"
        with contextlib.suppress(ClusterError):
            events = cluster.list("Event", record.namespace, fields=f"{about},type=Warning").items
            memory.pod_warnings = {
                jobs[event["involvedObject"]["uid"]]: f"{event.get('reason')}: {event.get('message')}"
                for event in sorted(events, key=_last_time)
                if event["involvedObject"].get("uid") in jobs
            }
        memory.warnings_read_at, read_before_seconds = time.monotonic(), 0.0
    requeue(key, WARNINGS_SECONDS - read_before_seconds)
    return memory.pod_warnings


def _last_time(event: Object) -> str:
    """When it happened last, as text that sorts. The API has two fields for it."""
    times = (event.get("lastTimestamp"), event.get("eventTime"), event["metadata"].get("creationTimestamp"))
    return str(next(filter(None, times), "")).rstrip("Z")
