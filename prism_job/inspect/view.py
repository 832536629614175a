"""What to inspect: the sources of a document, or files with options. Does not read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prism_job.spec.data import ColumnsSpec
from prism_job.spec.document import API_VERSION, SelectionRun, check_document, read_yaml
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec

Role = Literal["candidates", "targets"]

_ELSEWHERE = "not/inspected"
"""Fills the fields of a document that an inspection of files does not need."""


@dataclass(frozen=True)
class Part:
    """Files whose rows are read in the same way. `name`: of the target set, "" without sets."""

    role: Role
    name: str
    uris: tuple[str, ...]
    columns: ColumnsSpec | None


@dataclass(frozen=True)
class View:
    """What to inspect. Without a model only layouts and contents are shown."""

    parts: tuple[Part, ...]
    model: ModelSpec | None
    extraction: ExtractionSpec
    needs_rejected: bool


def view_of_document(run: SelectionRun) -> View:
    """Candidates and targets of a document, with its model and its settings."""
    spec = run.spec
    candidates = Part("candidates", "", spec.candidates.uris, spec.candidates.columns)
    targets = (Part("targets", each.name, each.uris, each.columns) for each in spec.targets.as_sets())
    return View((candidates, *targets), spec.model, spec.extraction, spec.scoring.weighting == "preference")


def view_of_files(
    uris: Sequence[str], are_targets: bool, columns: str | None, model: str | None, extraction: dict[str, Any]
) -> View:
    """Files, folders or prefixes, read as the document with these fields would read them.

    Args:
        columns: YAML of `columns`, with or without its braces.
        extraction: fields of spec.extraction.

    Raises SpecError: a field that the document would refuse.
    """
    role: Role = "targets" if are_targets else "candidates"
    given: dict[str, Any] = {"uris": list(uris)}
    if columns is not None:
        text = columns if columns.lstrip().startswith("{") else f"{{{columns}}}"
        given["columns"] = read_yaml(text, "--columns")
    sources = {"candidates": {"uris": [_ELSEWHERE]}, "targets": {"uris": [_ELSEWHERE]}} | {role: given}
    spec = {
        "model": {"uri": model or _ELSEWHERE},
        **sources,
        "store": _ELSEWHERE,
        "output": _ELSEWHERE,
        "extraction": extraction,
        "selection": {"keep": "highest", "budget": {"count": 1}},
    }
    document = {"apiVersion": API_VERSION, "kind": "SelectionRun", "metadata": {"name": "inspect"}, "spec": spec}
    view = view_of_document(check_document(document, "the options of inspect"))
    parts = tuple(part for part in view.parts if part.role == role)
    return View(parts, view.model if model else None, view.extraction, view.needs_rejected)
