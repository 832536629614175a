"""The ConfigMap with the document that the pods of a run read."""

from collections.abc import Mapping
from typing import Any

import yaml

from launcher.render.metadata import child_metadata
from launcher.resource.document import pods_document
from prism_job.spec.document import SelectionRun

FILE = "selection.yaml"


def config_map_name(run: SelectionRun) -> str:
    return f"{run.metadata.name}-document"


def config_map(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without the fields that may change while the run exists: pods of all attempts read the same bytes."""
    document = yaml.safe_dump(pods_document(run), sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(run, namespace, config_map_name(run), owner),
        "data": {FILE: document},
    }
