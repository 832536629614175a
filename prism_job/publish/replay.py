"""The document that replays a run: local paths made absolute, a hub model pinned to its commit."""

from pathlib import Path
from typing import Any

from prism_job.plan.plan import Plan
from prism_job.spec.document import SelectionRun


def replaying(run: SelectionRun, plan: Plan) -> SelectionRun:
    """The same run from any folder and at any time."""
    spec = run.spec
    sets = spec.targets.sets
    targets = (
        spec.targets.model_copy(update={"sets": tuple(map(_full_uris, sets))}) if sets else _full_uris(spec.targets)
    )
    model = {
        "uri": _full(spec.model.uri),
        "adapter": spec.model.adapter and _full(spec.model.adapter),
        "revision": plan.extractor_parts["model"].get("commit", spec.model.revision),
    }
    changed = {
        "model": spec.model.model_copy(update=model),
        "candidates": _full_uris(spec.candidates),
        "targets": targets,
        "store": _full(spec.store),
        "output": _full(spec.output),
    }
    return run.model_copy(update={"spec": spec.model_copy(update=changed)})


def _full(uri: str) -> str:
    return str(Path(uri).resolve()) if "://" not in uri and Path(uri).exists() else uri


def _full_uris(section: Any) -> Any:
    return section.model_copy(update={"uris": tuple(map(_full, section.uris))})
