"""Tries a run's addresses from where its pods will be: one small Job with their image, account, variables and network.

The only check of the doctor that makes anything, and it removes it again: the Job, and the small object that it writes to
store and output. Not: what the answers mean for other checks.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Conflict, Refused, Unavailable
from launcher.reconcile.failures import ending_of, why_not_running
from launcher.render.attempt import Attempt
from launcher.render.job import job as plan_job
from launcher.resource.document import request_digest
from launcher.resource.names import API_GROUP, WORKER_CONTAINER
from prism_job.spec.document import SelectionRun

Object = dict[str, Any]

DEADLINE_SECONDS = 300.0
"""Until its pod has run; a node that has to pull a worker image with torch takes minutes."""

POLL_INTERVAL_SECONDS = 1.0
KEPT_SECONDS = 600
"""A doctor that is killed leaves its Job; the cluster removes it so long after its end."""

SCRIPT = """\
import json, sys, uuid
from prism_job.errors import PrismError
from prism_job.storage.address import open_store, split_uri

def written(address):
    store, key = open_store(address), f"prism-doctor-{uuid.uuid4().hex}"
    store.put(key, b"prism doctor")
    try:
        content = store.get(key)
    finally:
        store.delete([key])
    return "written, read and removed" if content == b"prism doctor" else "written, and something else was read"

def listed(address):
    parent, name = (address, "") if address.endswith("/") else split_uri(address)
    store = open_store(parent)
    first = next((one for one in store.list(name) if one.key == name or one.key.startswith(f"{name}/".lstrip("/"))), None)
    if first is None:
        return "listed, and nothing is there"
    store.exists(first.key)
    return f"listed; {store.uri(first.key)} is there"

failed = 0
for how, address in json.loads(sys.argv[1]):
    try:
        said = {"can": {"write": written, "read": listed}[how](address)}
    except PrismError as error:
        said, failed = {"error": error.what, "fix": error.fix}, 1
    except Exception as error:
        said, failed = {"error": f"{type(error).__name__}: {error}", "fix": "look at the image and podOverlay"}, 1
    print(json.dumps({"event": "probe", "address": address, **said}), flush=True)
sys.exit(failed)
"""
"""Runs in the worker image. Its verbs are those that plan, extract and reduce use."""


def try_buckets(
    cluster: Cluster, namespace: str, run: SelectionRun, *, deadline_seconds: float = DEADLINE_SECONDS
) -> Iterator[Finding]:
    """A finding an address; or one that says why there are none."""
    job = probe_job(run, namespace, deadline_seconds)
    try:
        made = _create(cluster, job)
    except Refused as refused:
        yield warning("addresses", f"not tried: {refused.what}", "have somebody look who may make Jobs here")
        return
    except ClusterError as failed:
        yield warning("addresses", f"not tried: {failed.what}", failed.fix)
        return
    try:
        yield from _outcome(cluster, made, run, deadline_seconds)
    except ClusterError as failed:
        yield warning("addresses", f"no answer: {failed.what}", failed.fix)
    finally:
        with contextlib.suppress(ClusterError):
            cluster.delete("Job", namespace, made["metadata"]["name"], uid=made["metadata"]["uid"])


def addresses_of(run: SelectionRun) -> list[tuple[str, str]]:
    """('write' or 'read', address), each once: what the stages write, then what they read."""
    spec = run.spec
    found = [("write", spec.store), ("write", spec.output)]
    found += [("read", uri) for uri in (*spec.candidates.uris, *spec.targets.all_uris())]
    # A model without a scheme may be a name on the hub, and cannot be told from a folder.
    found += [("read", uri) for uri in (spec.model.uri, spec.model.adapter) if uri and uri.startswith("s3://")]
    return list(dict.fromkeys(found))


def probe_job(run: SelectionRun, namespace: str, deadline_seconds: float = DEADLINE_SECONDS) -> Object:
    """The plan's Job with another command, little to ask for, and nothing by which it would be taken for a part of the run."""
    job = plan_job(Attempt(run, "plan", namespace=namespace))
    name = f"prism-doctor-{request_digest(run)[:8]}"
    labels = {**run.metadata.labels, "app.kubernetes.io/name": "prism", "app.kubernetes.io/component": "doctor"}
    template = job["spec"]["template"]
    pod = template["spec"]
    # The document's ConfigMap comes with the run; the claim of the weights may be another pod's.
    left_out = {"document", "models"}
    pod["volumes"] = [one for one in pod.get("volumes") or () if one["name"] not in left_out]
    for container in pod["containers"]:
        if container["name"] == WORKER_CONTAINER:
            container |= {
                "command": ["python", "-P", "-c", SCRIPT],
                # $(NAME) in an argument is a variable to Kubernetes, $$(NAME) is not.
                "args": [json.dumps(addresses_of(run)).replace("$(", "$$(")],
                "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            }
        mounts = container.get("volumeMounts") or []
        container["volumeMounts"] = [one for one in mounts if one["name"] not in left_out]
    return {
        **job,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            **job["spec"],
            "activeDeadlineSeconds": int(deadline_seconds) + 60,  # after us, who can say why it took so long
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"metadata": {"labels": {**labels, f"{API_GROUP}/doctor": name}}, "spec": pod},
        },
    }


def _create(cluster: Cluster, job: Object) -> Object:
    """One that another doctor left is removed first. Raises Unavailable where it does not go."""
    metadata = job["metadata"]
    for _ in range(10):
        try:
            return cluster.create(job)
        except Conflict:
            cluster.delete("Job", metadata["namespace"], metadata["name"])
            time.sleep(POLL_INTERVAL_SECONDS)
    fix = f"kubectl -n {metadata['namespace']} delete job {metadata['name']}"
    raise Unavailable("an earlier probe of the same run does not go away", where=metadata["name"], fix=fix)


def _outcome(cluster: Cluster, job: Object, run: SelectionRun, deadline_seconds: float) -> Iterator[Finding]:
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    spec = run.spec.cluster
    assert spec is not None
    deadline = time.monotonic() + deadline_seconds
    pods: list[Object] = []
    while True:
        with contextlib.suppress(Unavailable):
            job = cluster.get("Job", namespace, name)
            pods = cluster.list("Pod", namespace, labels=f"{API_GROUP}/doctor={name}").items or pods
            ended = ending_of(job, pods, False)
            if ended is not None:
                break
        if time.monotonic() >= deadline:
            state, why = why_not_running(job, pods, "", spec)
            running = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
            detail = "it runs, and does not end: no way to the addresses?" if running else f"{state}: {why}"
            fix = "see that its pod can start and reach its addresses, or leave the probe out"
            yield error("addresses", f"no answer within {deadline_seconds:.0f} s; {detail}", fix)
            return
        time.sleep(POLL_INTERVAL_SECONDS)
    said = _said(cluster, namespace, pods)
    findings = list(_findings(said))
    yield from findings
    if len(findings) < len(addresses_of(run)):
        words = [line for line in said if not line.startswith('{"event": "probe"')][-3:]
        detail = "; ".join([f"the probe did not try all: {ended.message or ended.kind}", *words])
        yield error("addresses", detail, "see that the image is PRISM's worker, and that podOverlay lets it run")


def _said(cluster: Cluster, namespace: str, pods: Sequence[Object]) -> list[str]:
    """The pod's log; its termination message, which has the log's last lines, where logs may not be read."""
    lines: list[str] = []
    for pod in pods:
        try:
            lines += cluster.log_lines(namespace, pod["metadata"]["name"], WORKER_CONTAINER, follow=False)
        except ClusterError:
            states = [one.get("state", {}) for one in pod.get("status", {}).get("containerStatuses") or ()]
            lines += [line for one in states for line in one.get("terminated", {}).get("message", "").splitlines()]
    return lines


def _findings(lines: Sequence[str]) -> Iterator[Finding]:
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(event, dict) or event.get("event") != "probe":
            continue
        address = str(event.get("address"))
        if "error" in event:
            yield error("addresses", f"{address}: {event['error']}", str(event.get("fix")))
        elif "nothing is there" in str(event.get("can")):
            yield warning("addresses", f"{address}: {event.get('can')}", "check the address, or fill it before the run")
        else:
            yield ok("addresses", f"{address}: {event.get('can')}")
