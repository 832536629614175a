"""The pod template of one attempt.

Every pod passes Pod Security *restricted*: no root, no privilege, a read-only root file system, nothing of the node's.
"""

from launcher.render.attempt import Attempt
from launcher.render.shared_objects import FILE, child_labels, config_map_name
from launcher.resource.document import request_digest
from launcher.resource.names import INDEX_ANNOTATION, WORKER_CONTAINER, pod_prefix
from launcher.resource.object import Object

GPU = "nvidia.com/gpu"
MASTER_PORT = 29500
DOCUMENT_FOLDER = "/etc/prism"
CACHE, MODELS = "/cache", "/cache/models"

GRACE_SECONDS = 30
"""From SIGTERM to SIGKILL: a worker leaves within 20 s."""

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


RESTRICTED_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""Security contexts that pass Pod Security *restricted*."""


def pod_template(attempt: Attempt) -> Object:
    """As PRISM wants it, before `podOverlay`."""
    cluster = attempt.cluster
    pod: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {**RESTRICTED_POD},
        "containers": [_container(attempt)],
        "volumes": _volumes(attempt),
    }
    if attempt.num_nodes > 1:
        pod["subdomain"] = attempt.service_name
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    if cluster.weights_claim:
        # Without fsGroup the claim's folder belongs to root.
        pod["securityContext"] |= {"fsGroup": 10001, "fsGroupChangePolicy": "OnRootMismatch"}
    return {
        "metadata": {
            "labels": child_labels(attempt.run, attempt.labels),
            "annotations": {
                "prism.dev/request": request_digest(attempt.run),
                # To empty a node saves less than the work unit that the eviction would lose.
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            },
        },
        "spec": pod,
    }


def _container(attempt: Attempt) -> Object:
    cluster = attempt.cluster
    requests, limits = {"cpu": cluster.cpu, "memory": cluster.memory}, {"memory": cluster.memory}
    if attempt.stage == "extract" and cluster.gpus_per_node:
        gpus = {GPU: str(cluster.gpus_per_node)}  # requests of a device must equal its limits
        requests, limits = {**requests, **gpus}, {**limits, **gpus}
    mounts = [
        {"name": "document", "mountPath": DOCUMENT_FOLDER, "readOnly": True},
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
        "args": [attempt.stage, "--spec", f"{DOCUMENT_FOLDER}/{FILE}", *_topology(attempt)],
        "env": _environment(attempt),
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {**RESTRICTED_CONTAINER},
        # After a crash the termination message is the end of the log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _topology(attempt: Attempt) -> list[str]:
    """Arguments of the extract stage: ranks a node, groups, nodes a group and where the first one is."""
    cluster = attempt.cluster
    if attempt.stage != "extract":
        return []
    arguments = [f"--ranks={max(1, cluster.gpus_per_node)}", f"--groups={cluster.groups}", f"--group={attempt.group}"]
    if attempt.num_nodes > 1:
        arguments += [
            f"--nodes={attempt.num_nodes}",
            "--node=$(JOB_COMPLETION_INDEX)",
            f"--master={attempt.job_name}-0.{attempt.service_name}:{MASTER_PORT}",
        ]
    return arguments


def _environment(attempt: Attempt) -> list[Object]:
    given = [variable.model_dump(mode="json", by_alias=True, exclude_none=True) for variable in attempt.cluster.env]
    names = {variable["name"] for variable in given}
    defaults = {**ENVIRONMENT, **attempt.used}
    ours = [{"name": name, "value": value} for name, value in defaults.items()] + _log_key(attempt)
    return [variable for variable in ours if variable["name"] not in names] + given


def _log_key(attempt: Attempt) -> list[Object]:
    """PRISM_LOG: where a stage keeps its log (prism_job/logs). Not in a dry run, whose pods belong to no run."""
    if not attempt.owner:
        return []
    fields = {"PRISM_POD": "metadata.name"}
    if attempt.num_nodes > 1:
        fields["PRISM_NODE"] = f"metadata.annotations['{INDEX_ANNOTATION}']"
    node = "$(PRISM_NODE)" if attempt.num_nodes > 1 else None
    key = f"{attempt.owner['uid']}/{attempt.round}/{pod_prefix(attempt.stage, attempt.group, attempt.number, node)}"
    sources = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    return [*sources, {"name": "PRISM_LOG", "value": f"{key}/$(PRISM_POD).log"}]


def _volumes(attempt: Attempt) -> list[Object]:
    cluster = attempt.cluster
    volumes: list[Object] = [
        {"name": "document", "configMap": {"name": config_map_name(attempt.run)}},
        {"name": "cache", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "tmp", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
    ]
    if cluster.weights_claim:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": cluster.weights_claim}})
    return volumes
