"""What a test sees of a run on a rig: its record, its Jobs, its pods. Read as the administrator, in namespace `default`."""

from __future__ import annotations

from typing import Any

from tests.cluster.rig import Rig, eventually


def status(rig: Rig, name: str) -> dict[str, Any]:
    found = rig.server.object("selectionruns", name)
    assert found is not None
    return dict(found.get("status") or {})


def phase(rig: Rig, name: str) -> str:
    return str(status(rig, name).get("phase", ""))


def create(rig: Rig, document: dict[str, Any]) -> None:
    rig.server.create({**document, "metadata": {**document["metadata"], "namespace": "default"}})


def end_of(rig: Rig, name: str, seconds: float = 240.0) -> dict[str, Any]:
    eventually(lambda: phase(rig, name) in ("Complete", "Failed", "Cancelled"), seconds)
    return status(rig, name)


def jobs(rig: Rig, name: str) -> list[str]:
    found = rig.server.objects("jobs", "default")
    return sorted(
        job["metadata"]["name"] for job in found if job["metadata"].get("labels", {}).get("prism.dev/run") == name
    )


def pods(rig: Rig, name: str, stage: str) -> list[dict[str, Any]]:
    labels = {"prism.dev/run": name, "prism.dev/stage": stage}
    return [
        pod
        for pod in rig.server.objects("pods", "default")
        if labels.items() <= pod["metadata"].get("labels", {}).items()
    ]


def running_pod(rig: Rig, name: str, stage: str) -> str:
    """The name of a pod of that stage whose process runs."""

    def find() -> str:
        names = [pod["metadata"]["name"] for pod in pods(rig, name, stage)]
        return next((name for name in names if rig.kubelet.pid("default", name)), "")

    return str(eventually(find))
