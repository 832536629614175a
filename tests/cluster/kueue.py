"""Kueue's kinds and objects, on the tests' API server. Nothing here admits anything."""

from __future__ import annotations

from typing import Any

from launcher.resource.names import labels_of_run
from tests.cluster.server.apiserver import ApiServer

GROUP = "kueue.x-k8s.io"

RELEASES = {
    "up to 0.14": ("v1beta1",),
    "0.15 to 0.19": ("v1beta1", "v1beta2"),
    "0.20 on": ("v1beta2",),
    "a later one that still serves v1beta2": ("v1beta2", "v1"),
}
"""Releases of Kueue -> the versions of LocalQueue and Workload that they serve."""


def kueue(server: ApiServer, *served: str, kind: str = "LocalQueue") -> None:
    """Kueue's definition of a kind. Each version is served, the last one is stored; v1beta1 beside others is deprecated."""
    plural = f"{kind.lower()}s"
    names = {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"}
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    versions = [
        {
            "name": version,
            "served": True,
            "storage": version == served[-1],
            "deprecated": version == "v1beta1" and len(served) > 1,
            "schema": {"openAPIV3Schema": schema},
        }
        for version in served
    ]
    server.create(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{GROUP}"},
            "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": versions},
        }
    )


def suspended_job(server: ApiServer, name: str, run: str = "demo") -> dict[str, Any]:
    """A Job of a run, suspended as by Kueue's webhook."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "registry/prism:1"}]}
    spec = {"suspend": True, "template": {"spec": pod}}
    metadata = {"name": name, "namespace": "default", "labels": labels_of_run(run)}
    return server.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})


def workload(server: ApiServer, job: dict[str, Any], *conditions: dict[str, str], version: str = "v1beta2") -> None:
    """The Workload that Kueue makes for a Job."""
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}
    metadata = {"name": f"job-{name}-52b0b", "namespace": "default", "labels": {f"{GROUP}/job-uid": uid}}
    metadata |= {"ownerReferences": [{**owner, "blockOwnerDeletion": True}]}
    status = {"conditions": list(conditions)}
    server.create({"apiVersion": f"{GROUP}/{version}", "kind": "Workload", "metadata": metadata, "status": status})
