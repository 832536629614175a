"""Tests a run's URIs from inside the cluster: one small Job with its pods' image, account, variables and network.

The only check of the doctor that creates anything: the Job, and a small object in store and output. It removes both.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.follow.event_text import parse_event
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Conflict, Refused, Unavailable
from launcher.reconcile.child_status import why_not_running
from launcher.reconcile.failures import classify_attempt
from launcher.render.attempt import Attempt
from launcher.render.job import job as plan_job
from launcher.resource.document import request_digest
from launcher.resource.names import API_GROUP, WORKER_CONTAINER
from launcher.resource.object import Object
from prism_job.spec.document import SelectionRun

DEADLINE_SECONDS = 300.0
"""Until the pod has run; pulling a worker image with torch takes minutes."""

POLL_INTERVAL_SECONDS = 1.0
JOB_TTL_SECONDS = 600
"""If the doctor is killed, the cluster removes the Job this long after its end."""

SCRIPT = """\
import json, sys, uuid
from prism_job.errors import PrismError
try:
    from prism_job.storage.address import open_store, split_uri
except ImportError:  # an image of 0.1.0
    from prism_job.storage.objects import open_store, split_uri

def write(address):
    store, key = open_store(address), f"prism-doctor-{uuid.uuid4().hex}"
    store.put(key, b"prism doctor")
    try:
        content = store.get(key)
    finally:
        store.delete([key])
    return "written, read and removed" if content == b"prism doctor" else "written, but read back differently"

def read(address):
    if address.startswith("hf://"):
        from prism_job.data.hub import pin
        return f"found {pin([address])[address]}"
    parent, name = (address, "") if address.endswith("/") else split_uri(address)
    store = open_store(parent)
    first = next((it for it in store.list(name) if it.key == name or it.key.startswith(f"{name}/".lstrip("/"))), None)
    if first is None:
        return "listed, but empty"
    store.exists(first.key)
    return f"listed; found {store.uri(first.key)}"

failed = 0
for how, address in json.loads(sys.argv[1]):
    try:
        answer = {"can": {"write": write, "read": read}[how](address)}
    except PrismError as error:
        answer, failed = {"error": error.what, "fix": error.fix}, 1
    except Exception as error:
        answer, failed = {"error": f"{type(error).__name__}: {error}", "fix": "check the image and podOverlay"}, 1
    print(json.dumps({"event": "probe", "address": address, **answer}), flush=True)
sys.exit(failed)
"""
"""Runs in the worker image, with the storage calls that the stages make."""


def try_buckets(
    cluster: Cluster, namespace: str, run: SelectionRun, *, deadline_seconds: float = DEADLINE_SECONDS
) -> Iterator[Finding]:
    """One finding per URI, or a single one that explains why there are none."""
    job = probe_job(run, namespace, deadline_seconds)
    try:
        created = _create(cluster, job)
    except ClusterError as failed:
        fix = "ask someone who may create Jobs here to run it" if isinstance(failed, Refused) else failed.fix
        yield warning("addresses", f"not tested: {failed.what}", fix)
        return
    try:
        yield from _outcome(cluster, created, run, deadline_seconds)
    except ClusterError as failed:
        yield warning("addresses", f"no answer: {failed.what}", failed.fix)
    finally:
        with contextlib.suppress(ClusterError):
            cluster.delete("Job", namespace, created["metadata"]["name"], uid=created["metadata"]["uid"])


def uris_of(run: SelectionRun) -> list[tuple[str, str]]:
    """('write' or 'read', URI), without repeats: what the stages write, then what they read."""
    spec = run.spec
    uris = [("write", spec.store), ("write", spec.output)]
    uris += [("read", uri) for uri in (*spec.candidates.uris, *spec.targets.all_uris())]
    # A model without a scheme may be a name on the Hub or a folder; it is not tested.
    models = [model for model in (spec.model, spec.scoring.preference_model) if model]
    of_models = [uri for model in models for uri in (model.uri, model.adapter)]
    uris += [("read", uri) for uri in of_models if uri and uri.startswith("s3://")]
    return list(dict.fromkeys(uris))


def probe_job(run: SelectionRun, namespace: str, deadline_seconds: float = DEADLINE_SECONDS) -> Object:
    """The plan's Job with another command, small requests, and no label that would make it part of the run."""
    job = plan_job(Attempt(run, "plan", namespace=namespace))
    name = f"prism-doctor-{request_digest(run)[:8]}"
    labels = {**run.metadata.labels, "app.kubernetes.io/name": "prism", "app.kubernetes.io/component": "doctor"}
    template = job["spec"]["template"]
    pod = template["spec"]
    # The document's ConfigMap is created with the run; the weights' claim may be in use by another pod.
    omitted = {"document", "models"}
    pod["volumes"] = [volume for volume in pod.get("volumes") or () if volume["name"] not in omitted]
    for container in pod["containers"]:
        if container["name"] == WORKER_CONTAINER:
            container |= {
                "command": ["python", "-P", "-c", SCRIPT],
                # Kubernetes expands $(NAME) in an argument; $$(NAME) stays literal.
                "args": [json.dumps(uris_of(run)).replace("$(", "$$(")],
                "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            }
        mounts = container.get("volumeMounts") or []
        container["volumeMounts"] = [mount for mount in mounts if mount["name"] not in omitted]
    return {
        **job,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            **job["spec"],
            "activeDeadlineSeconds": int(deadline_seconds) + 60,  # later than ours, which can explain the delay
            "ttlSecondsAfterFinished": JOB_TTL_SECONDS,
            "template": {"metadata": {"labels": {**labels, f"{API_GROUP}/doctor": name}}, "spec": pod},
        },
    }


def _create(cluster: Cluster, job: Object) -> Object:
    """Removes a Job that an earlier doctor left first. Raises Unavailable if it cannot be removed."""
    metadata = job["metadata"]
    for _ in range(10):
        try:
            return cluster.create(job)
        except Conflict:
            cluster.delete("Job", metadata["namespace"], metadata["name"])
            time.sleep(POLL_INTERVAL_SECONDS)
    fix = f"kubectl -n {metadata['namespace']} delete job {metadata['name']}"
    raise Unavailable("the Job of an earlier probe is not removed", where=metadata["name"], fix=fix)


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
            ended = classify_attempt(job, pods, False)
            if ended is not None:
                break
        if time.monotonic() >= deadline:
            _, why = why_not_running(job, pods, "", spec)
            running = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
            detail = "it runs but does not end: are the URIs reachable?" if running else f"its pod does not run: {why}"
            fix = "check that its pod can start and reach the URIs, or use --no-probe"
            yield error("addresses", f"no answer within {deadline_seconds:.0f} s; {detail}", fix)
            return
        time.sleep(POLL_INTERVAL_SECONDS)
    lines = _log_lines(cluster, namespace, pods)
    findings = list(_findings(lines))
    yield from findings
    if len(findings) < len(uris_of(run)):
        last_lines = [line for line in lines if not line.startswith('{"event": "probe"')][-3:]
        detail = "; ".join([f"the probe did not test all URIs: {ended.message or 'its Job succeeded'}", *last_lines])
        yield error("addresses", detail, "check that the image is PRISM's worker and that podOverlay lets it run")


def _log_lines(cluster: Cluster, namespace: str, pods: Sequence[Object]) -> list[str]:
    """The pod's log; if logs may not be read, its termination message, which holds the log's last lines."""
    lines: list[str] = []
    for pod in pods:
        try:
            lines += cluster.log_lines(namespace, pod["metadata"]["name"], WORKER_CONTAINER, follow=False)
        except ClusterError:
            states = [status.get("state", {}) for status in pod.get("status", {}).get("containerStatuses") or ()]
            lines += [line for state in states for line in state.get("terminated", {}).get("message", "").splitlines()]
    return lines


def _findings(lines: Sequence[str]) -> Iterator[Finding]:
    for event in filter(None, map(parse_event, lines)):
        if event["event"] != "probe":
            continue
        detail = f"{event.get('address')}: {event.get('error', event.get('can'))}"
        if "error" in event:
            yield error("addresses", detail, str(event.get("fix")))
        elif "but empty" in str(event.get("can")):
            yield warning("addresses", detail, "check the URI, or upload the data before the run")
        else:
            yield ok("addresses", detail)
