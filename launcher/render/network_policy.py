"""The NetworkPolicy of a run: its pods accept connections from each other only."""

from collections.abc import Mapping
from typing import Any

from launcher.render.metadata import child_metadata
from launcher.resource.names import labels_of_run
from prism_job.spec.document import SelectionRun


def network_policy(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None) -> dict[str, Any]:
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
