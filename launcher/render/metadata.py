"""Metadata that every rendered object of a run has: name, namespace, labels, owner."""

from collections.abc import Mapping
from typing import Any

from launcher.resource.names import API_GROUP, labels_of_run
from prism_job.spec.document import SelectionRun

NOT_COPIED = (f"{API_GROUP}/", "kueue.x-k8s.io/", "app.kubernetes.io/", "argocd.argoproj.io/")
"""Prefixes of labels that name an object's owner or manager: a run's children do not get them from the run."""


def child_metadata(
    run: SelectionRun,
    namespace: str,
    name: str,
    owner: Mapping[str, Any] | None,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Metadata of an object that belongs to the run; its record owns it where there is one."""
    metadata = {"name": name, "namespace": namespace, "labels": child_labels(run, labels or {})}
    return {**metadata, "ownerReferences": [dict(owner)]} if owner else metadata


def child_labels(run: SelectionRun, labels: Mapping[str, str]) -> dict[str, str]:
    """The run's own labels, as far as they are copied, then ours."""
    copied = {key: value for key, value in run.metadata.labels.items() if not key.startswith(NOT_COPIED)}
    return {**copied, **labels_of_run(run.metadata.name), **labels}
