"""What the pods of a run share: the ConfigMap with its document and the NetworkPolicy; and the metadata of every object."""

from collections.abc import Mapping
from typing import Any

import yaml

from launcher.resource.document import pods_document
from launcher.resource.names import API_GROUP, labels_of_run
from launcher.resource.object import Object
from prism_job.spec.document import SelectionRun

FILE = "selection.yaml"

NOT_COPIED = (f"{API_GROUP}/", "kueue.x-k8s.io/", "app.kubernetes.io/", "argocd.argoproj.io/")
"""Prefixes of labels that name an object's owner or manager: a run's children do not get them from the run."""


def config_map_name(run: SelectionRun) -> str:
    return f"{run.metadata.name}-document"


def config_map(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None) -> Object:
    """Without the fields that may change while the run exists: pods of all attempts read the same bytes."""
    document = yaml.safe_dump(pods_document(run), sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(run, namespace, config_map_name(run), owner),
        "data": {FILE: document},
    }


def shared_objects(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None) -> list[Object]:
    """What the pods of all stages need."""
    return [config_map(run, namespace, owner), network_policy(run, namespace, owner)]


def network_policy(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None) -> Object:
    """Restricts incoming connections. Outgoing ones stay open: pods need the object store."""
    name = run.metadata.name
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(run, namespace, f"prism-{name}", owner),
        "spec": {
            "podSelector": {"matchLabels": labels_of_run(name)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": labels_of_run(name)}}]}],
        },
    }


def child_metadata(
    run: SelectionRun,
    namespace: str,
    name: str,
    owner: Mapping[str, Any] | None,
    labels: Mapping[str, str] | None = None,
) -> Object:
    """Metadata of an object that belongs to the run; its record owns it where there is one."""
    metadata = {"name": name, "namespace": namespace, "labels": child_labels(run, labels or {})}
    return {**metadata, "ownerReferences": [dict(owner)]} if owner else metadata


def child_labels(run: SelectionRun, labels: Mapping[str, str]) -> dict[str, str]:
    """The run's own labels, as far as they are copied, then ours."""
    copied = {key: value for key, value in run.metadata.labels.items() if not key.startswith(NOT_COPIED)}
    return {**copied, **labels_of_run(run.metadata.name), **labels}
