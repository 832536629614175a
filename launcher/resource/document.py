"""The document of a run on a cluster: what a cluster can run, what pods read of it, and which two are the same request."""

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.resource.names import LONGEST_NAME, WORKER_CONTAINER
from launcher.resource.overlay import merge
from launcher.resource.overlay_refusals import refusals
from prism_job.errors import SpecError
from prism_job.spec.digest import digest
from prism_job.spec.document import SelectionRun, parse_spec

MAY_CHANGE = ("suspend", "retry", "ttlSecondsAfterFinished", "gpuHourPrice")
"""Fields of the spec that may change while a run exists. What its pods read has none of them."""


def parse_for_cluster(text: str, where: str) -> SelectionRun:
    """The checked document of a run on a cluster: `parse_spec`, then `check_for_cluster`. Raises SpecError."""
    return check_for_cluster(parse_spec(text, where), where)


def check_for_cluster(run: SelectionRun, where: str) -> SelectionRun:
    """The run, if pods can run it. Raises SpecError, which lists everything that they cannot."""
    wrong = []
    if len(run.metadata.name) > LONGEST_NAME:
        wrong.append(f"metadata.name has {len(run.metadata.name)} characters; at most {LONGEST_NAME} on a cluster")
    if run.spec.cluster is None:
        wrong.append("spec.cluster is missing; it names at least the image: cluster: {image: registry/prism@sha256:…}")
    else:
        overlay = run.spec.cluster.pod_overlay
        refused = [f"{refusal.where}: {refusal.what}; {refusal.fix}" for refusal in refusals(overlay)]
        wrong += refused
        if not refused and not _keeps_the_worker(overlay):
            what = f"leaves no container {WORKER_CONTAINER} in the pod; change it, do not remove it"
            wrong.append(f"spec.cluster.podOverlay {what}")
    for field, uri in _addresses(run):
        if not uri.startswith(("s3://", "/", "hf://")):  # the spec allows hf:// for data alone
            wrong.append(f"{field} is '{uri}', a path of one machine; on a cluster use s3://bucket/prefix")
    if wrong:
        lines = "\n  ".join([f"{len(wrong)} thing(s) that a cluster cannot run:", *wrong])
        raise SpecError(lines, where=where, fix="correct the fields named, or run it on this machine with `prism run`")
    return run


def _keeps_the_worker(overlay: Mapping[str, Any]) -> bool:
    merged = merge({"metadata": {}, "spec": {"containers": [{"name": WORKER_CONTAINER}]}}, overlay)
    containers = (merged.get("spec") or {}).get("containers") or ()
    return any(container.get("name") == WORKER_CONTAINER for container in containers)


def _addresses(run: SelectionRun) -> Iterator[tuple[str, str]]:
    """(field, address) of all that pods must be able to reach."""
    spec = run.spec
    yield from ((f"spec.candidates.uris[{index}]", uri) for index, uri in enumerate(spec.candidates.uris))
    for number, target_set in enumerate(spec.targets.as_sets()):
        field = f"spec.targets.sets[{number}].uris" if target_set.name else "spec.targets.uris"
        yield from ((f"{field}[{index}]", uri) for index, uri in enumerate(target_set.uris))
    yield from (("spec.store", spec.store), ("spec.output", spec.output))
    # A hub id (org/name) looks like a path, and cannot be distinguished from one here.
    models = {"spec.model": spec.model, "spec.scoring.preferenceModel": spec.scoring.preference_model}
    for field, model in models.items():
        if model and (model.uri.startswith(".") or model.uri.endswith(".gguf")):
            yield f"{field}.uri", model.uri
        if model and model.adapter is not None:
            yield f"{field}.adapter", model.adapter


def pods_document(run: SelectionRun) -> dict[str, Any]:
    """What the pods read: the document without labels, and without the fields that may change while it runs."""
    document = run.to_document()
    spec = {name: value for name, value in document["spec"].items() if name not in MAY_CHANGE}
    return {**document, "metadata": {"name": run.metadata.name}, "spec": spec}


def request_digest(run: SelectionRun) -> str:
    """Documents with the same digest are the same request, whatever defaults they write out."""
    return digest(pods_document(run))


def differences(mine: SelectionRun, theirs: SelectionRun) -> list[str]:
    """One line for each field that differs: 'spec.selection.budget.fraction: 0.1 here, 0.05 there'."""
    here, there = (dict(_leaves(pods_document(run))) for run in (mine, theirs))
    return [
        f"{path}: {here.get(path, 'nothing')} here, {there.get(path, 'nothing')} there"
        for path in sorted(here.keys() | there.keys())
        if here.get(path) != there.get(path)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}".lstrip("."))
    else:
        yield path, value
