"""The smallest document of a run, as plain data; a test changes the field that it is about."""

from __future__ import annotations

from typing import Any


def run_document(name: str = "demo", *, bucket: str = "bucket", **cluster: Any) -> dict[str, Any]:
    spec = {
        "model": {"uri": "org/model"},
        "candidates": {"uris": [f"s3://{bucket}/pool/"]},
        "targets": {"uris": [f"s3://{bucket}/targets.jsonl"]},
        "store": f"s3://{bucket}/store",
        "output": f"s3://{bucket}/selections",
        "selection": {"keep": "highest", "budget": {"count": 4}},
        "cluster": {"image": "registry/prism:1", **cluster},
    }
    return {"apiVersion": "prism.dev/v1alpha1", "kind": "SelectionRun", "metadata": {"name": name}, "spec": spec}
