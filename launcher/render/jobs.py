"""From a run to the objects of its stages: Job, Service, ConfigMap, NetworkPolicy, as plain dicts. Pure: no clock, no cluster.

Every pod passes Pod Security *restricted*: no root, no privilege, a read-only root file system, nothing of the node's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from launcher.resource.document import pods_document, request_digest
from launcher.resource.names import (
    API_GROUP,
    ATTEMPT_LABEL,
    GROUP_LABEL,
    ROUND_LABEL,
    STAGE_LABEL,
    WORKER_CONTAINER,
    job_name,
    labels_of_run,
)
from launcher.resource.overlay import merge
from launcher.resource.status import StageName
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun

Object = dict[str, Any]

GPU = "nvidia.com/gpu"
QUEUE = "kueue.x-k8s.io/queue-name"
MASTER_PORT = 29500
DOCUMENT = "/etc/prism/selection.yaml"
CACHE, MODELS = "/cache", "/cache/models"

GRACE_SECONDS = 30
"""From SIGTERM to SIGKILL: a worker leaves within 20 s."""

WRONG_REQUEST, DAMAGED_DATA = 64, 65
"""Exit codes that no second attempt can mend."""

ENVIRONMENT = {
    "HOME": f"{CACHE}/home",
    "HF_HOME": f"{CACHE}/huggingface",
    "PRISM_CACHE": CACHE,
    "XDG_CACHE_HOME": f"{CACHE}/xdg",
    "TRITON_CACHE_DIR": f"{CACHE}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
    "TMPDIR": "/tmp",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""The root file system is read-only: whatever a library writes goes to the scratch volumes."""

NOT_CARRIED = (f"{API_GROUP}/", "kueue.x-k8s.io/", "app.kubernetes.io/", "argocd.argoproj.io/")
"""Beginnings of labels that say whose an object is, or who sees to it: of a run they are not carried to its children."""


def render(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None = None) -> list[Object]:
    """Every object of a run's first round, first attempts, in the order in which they are made."""
    assert run.spec.cluster is not None, "parse_for_cluster refuses a run without"
    objects = support(run, namespace, owner)
    for stage, group in stages(run.spec.cluster):
        objects += [*service(run, namespace, stage, group, owner), job(run, namespace, stage, group, 0, 0, owner)]
    return objects


def stages(cluster: ClusterSpec) -> Iterator[tuple[StageName, int]]:
    """Every (stage, group) in order."""
    yield "plan", 0
    for group in range(cluster.groups):
        yield "extract", group
    yield "reduce", 0


def support(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None) -> list[Object]:
    """What all stages stand on: the document as pods read it, and who may talk to them."""
    name = run.metadata.name
    document = yaml.safe_dump(pods_document(run), sort_keys=False, allow_unicode=True)
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _metadata(run, namespace, f"{name}-document", owner, {}),
            "data": {"selection.yaml": document},
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(run, namespace, f"prism-{name}", owner, {}),
            "spec": {
                # Ranks of one run may reach each other, and nobody else may reach them. Outward they need the object store.
                "podSelector": {"matchLabels": labels_of_run(name)},
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": labels_of_run(name)}}]}],
            },
        },
    ]


def service(run: SelectionRun, namespace: str, stage: str, group: int, owner: Mapping[str, Any] | None) -> list[Object]:
    """The headless Service by which the nodes of a group find their first; none where a group is one node."""
    if stage != "extract" or _cluster(run).nodes_per_group == 1:
        return []
    labels = {STAGE_LABEL: stage, GROUP_LABEL: str(group)}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(run, namespace, _service_name(run, group), owner, labels),
            "spec": {
                "clusterIP": "None",
                # Ranks look for their master before it is ready, and it is ready only once they have met.
                "publishNotReadyAddresses": True,
                "selector": {**labels_of_run(run.metadata.name), **labels},
            },
        }
    ]


def job(
    run: SelectionRun,
    namespace: str,
    stage: str,
    group: int,
    round_number: int,
    attempt: int,
    owner: Mapping[str, Any] | None,
) -> Object:
    """One attempt at one stage. A pod that fails ends its Job; the next attempt is another Job."""
    cluster = _cluster(run)
    name = job_name(run.metadata.name, stage, group, round_number, attempt)
    labels = {STAGE_LABEL: stage, GROUP_LABEL: str(group), ROUND_LABEL: str(round_number), ATTEMPT_LABEL: str(attempt)}
    nodes = cluster.nodes_per_group if stage == "extract" else 1
    ours = {"metadata": {"labels": {**labels_of_run(run.metadata.name), **labels}}}
    template = merge(_pod_template(run, stage, group, name, labels), cluster.pod_overlay)
    queue = {QUEUE: cluster.queue_name} if cluster.queue_name else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(run, namespace, name, owner, {**labels, **queue}),
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": WORKER_CONTAINER,
                            "operator": "In",
                            "values": [WRONG_REQUEST, DAMAGED_DATA],
                        },
                    },
                ]
            },
            "template": merge(template, ours),  # by our labels a pod is found: no overlay lends it to another run
        },
    }


def _pod_template(run: SelectionRun, stage: str, group: int, job: str, labels: Mapping[str, str]) -> Object:
    cluster = _cluster(run)
    in_world = stage == "extract" and cluster.nodes_per_group > 1
    pod: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(run, stage, group, job)],
        "volumes": _volumes(run),
    }
    if in_world:
        pod["subdomain"] = _service_name(run, group)
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    if cluster.weights_claim:
        # The claim's folder belongs to root until somebody says otherwise.
        pod["securityContext"] |= {"fsGroup": 10001, "fsGroupChangePolicy": "OnRootMismatch"}
    return {
        "metadata": {
            "labels": _labels(run, labels),
            "annotations": {
                "prism.dev/request": request_digest(run),
                # A node is not worth emptying if that costs a unit of work in hand.
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            },
        },
        "spec": pod,
    }


def _container(run: SelectionRun, stage: str, group: int, job: str) -> Object:
    cluster = _cluster(run)
    amounts = {"cpu": cluster.cpu, "memory": cluster.memory}
    limits = {"memory": cluster.memory}
    if stage == "extract" and cluster.gpus_per_node:
        gpus = {GPU: str(cluster.gpus_per_node)}  # requests of a device must equal its limits
        amounts, limits = {**amounts, **gpus}, {**limits, **gpus}
    mounts = [
        {"name": "document", "mountPath": "/etc/prism", "readOnly": True},
        {"name": "cache", "mountPath": CACHE},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if cluster.weights_claim:
        mounts.append({"name": "models", "mountPath": MODELS})
        mounts.append({"name": "models", "mountPath": f"{CACHE}/huggingface", "subPath": "huggingface"})
    return {
        "name": WORKER_CONTAINER,
        "image": cluster.image,
        "command": ["python", "-m", "prism_job"],
        "args": [stage, "--spec", DOCUMENT, *_topology(run, stage, group, job)],
        "env": _environment(cluster),
        "resources": {"requests": amounts, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # A crash leaves its last lines where the launcher looks for the stage's last words.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _topology(run: SelectionRun, stage: str, group: int, job: str) -> list[str]:
    cluster = _cluster(run)
    if stage != "extract":
        return []
    words = [f"--ranks={max(1, cluster.gpus_per_node)}", f"--groups={cluster.groups}", f"--group={group}"]
    if cluster.nodes_per_group > 1:
        words += [
            f"--nodes={cluster.nodes_per_group}",
            "--node=$(JOB_COMPLETION_INDEX)",
            f"--master={job}-0.{_service_name(run, group)}:{MASTER_PORT}",
        ]
    return words


def _environment(cluster: ClusterSpec) -> list[Object]:
    given = [variable.model_dump(mode="json", by_alias=True, exclude_none=True) for variable in cluster.env]
    names = {variable["name"] for variable in given}
    return [{"name": name, "value": value} for name, value in ENVIRONMENT.items() if name not in names] + given


def _volumes(run: SelectionRun) -> list[Object]:
    cluster = _cluster(run)
    volumes: list[Object] = [
        {"name": "document", "configMap": {"name": f"{run.metadata.name}-document"}},
        {"name": "cache", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "tmp", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
    ]
    if cluster.weights_claim:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": cluster.weights_claim}})
    return volumes


def _metadata(
    run: SelectionRun, namespace: str, name: str, owner: Mapping[str, Any] | None, labels: Mapping[str, str]
) -> Object:
    metadata: Object = {
        "name": name,
        "namespace": namespace,
        "labels": _labels(run, labels),
    }
    return {**metadata, "ownerReferences": [dict(owner)]} if owner else metadata


def _labels(run: SelectionRun, labels: Mapping[str, str]) -> dict[str, str]:
    carried = {key: value for key, value in run.metadata.labels.items() if not key.startswith(NOT_CARRIED)}
    return {**carried, **labels_of_run(run.metadata.name), **labels}


def _service_name(run: SelectionRun, group: int) -> str:
    return f"prism-{run.metadata.name}-{group}"  # a Service's name begins with a letter, a run's may not


def _cluster(run: SelectionRun) -> ClusterSpec:
    assert run.spec.cluster is not None, "parse_for_cluster refuses a run without"
    return run.spec.cluster
