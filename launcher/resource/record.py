"""The record of a run in a cluster: a SelectionRun object, or, where that kind is not installed, a ConfigMap with the same
document and status in it. Makes no requests, and does not decide what comes next.
"""

import datetime
import functools
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.resource.document import check_for_cluster, parse_for_cluster
from launcher.resource.names import CANCEL_ANNOTATION, KIND, RECORD_LABEL, RUN_LABEL, labels_of_run, record_name
from launcher.resource.status import Status, parse_time
from prism_job.errors import SpecError
from prism_job.spec.document import API_VERSION, SelectionRun, check_document, read_yaml


@dataclass(frozen=True)
class Record:
    """A run's record, as the API server returns it."""

    object: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self.object["metadata"])

    @property
    def kind(self) -> str:
        """SelectionRun or ConfigMap."""
        return str(self.object["kind"])

    @property
    def is_config_map(self) -> bool:
        return self.kind == "ConfigMap"

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.metadata["labels"][RUN_LABEL] if self.is_config_map else self.metadata["name"])

    @property
    def namespace(self) -> str:
        return str(self.metadata["namespace"])

    @property
    def uid(self) -> str:
        return str(self.metadata["uid"])

    @property
    def generation(self) -> int:
        """Of the spec. A ConfigMap has no generation: there it counts rounds."""
        return int(self.metadata.get("generation") or self.round + 1)

    @property
    def is_deleting(self) -> bool:
        return "deletionTimestamp" in self.metadata

    @property
    def created(self) -> datetime.datetime:
        return parse_time(str(self.metadata["creationTimestamp"]))

    @property
    def _text(self) -> str:
        """The document of a ConfigMap."""
        return str((self.object.get("data") or {}).get("selection.yaml", ""))

    @functools.cached_property
    def document(self) -> dict[str, Any]:
        """apiVersion, kind, metadata (name and labels) and spec, not checked yet."""
        if self.is_config_map:
            try:
                written = read_yaml(self._text, self.name)
            except SpecError:
                written = None
            return written if isinstance(written, dict) else {}
        labels = self.metadata.get("labels")
        texts = {key: value for key, value in (labels or {}).items() if isinstance(value, str)}
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self.name, "labels": texts},
            "spec": self.object.get("spec"),
        }

    @property
    def spec(self) -> dict[str, Any]:
        found = self.document.get("spec")
        return found if isinstance(found, dict) else {}

    @property
    def is_cancelled(self) -> bool:
        """Whether the current round is to end."""
        return bool((self.metadata.get("annotations") or {}).get(CANCEL_ANNOTATION) == str(self.round))

    @property
    def round(self) -> int:
        """The requested round: spec.retry."""
        try:
            return int(self.spec.get("retry", 0))
        except (TypeError, ValueError, OverflowError):
            return 0

    @functools.cached_property
    def status(self) -> Status:
        """The last one written; a fresh one where there is none.

        A status that cannot be read has the phase Unknown and a message with the reason: it can be shown, and the run does
        not continue from it. A fresh status would restart a finished run.
        """
        try:
            if self.is_config_map:
                return Status.model_validate_json((self.object.get("data") or {}).get("status") or "{}")
            found = self.object.get("status")
            return Status.model_validate({} if found is None else found)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in ("status", *first["loc"]))
            return Status(round=self.round, phase="Unknown", message=f"{field} cannot be read: {first['msg']}")

    @property
    def owner_reference(self) -> dict[str, Any]:
        """In a child, so that the cluster removes it together with this record."""
        return {
            "apiVersion": "v1" if self.is_config_map else API_VERSION,
            "kind": "ConfigMap" if self.is_config_map else KIND,
            "name": self.metadata["name"],
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }

    def parse(self) -> SelectionRun:
        """The checked document. Raises SpecError, which names this record."""
        where = f"{self.namespace}/{self.name}"
        fix = "correct the document, or remove this record"
        try:
            if self.is_config_map:
                run = parse_for_cluster(self._text, where)
            else:
                run = check_for_cluster(check_document(self.document, where), where)
        except (RecursionError, ValueError, TypeError) as error:
            raise SpecError(f"this is no plain document: {error}", where=where, fix=fix) from error
        if run.metadata.name != self.name:
            what = f"the document's name is {run.metadata.name}, its record's {self.name}"
            raise SpecError(what, where=where, fix=fix)
        return run


def is_record(found: dict[str, Any]) -> bool:
    """Whether an object is the record of a run: a SelectionRun, or a ConfigMap with the label of a record."""
    return found["kind"] == KIND or RECORD_LABEL in (found["metadata"].get("labels") or {})


def config_map_record(run: SelectionRun, text: str, namespace: str) -> dict[str, Any]:
    """The record of a run where the custom resource is not installed.

    Args:
        text: the document as it was written; the version that runs it fills in the defaults.
    """
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": record_name(run.metadata.name),
            "namespace": namespace,
            "labels": {**run.metadata.labels, **labels_of_run(run.metadata.name), RECORD_LABEL: "true"},
            "annotations": run.metadata.annotations,
        },
        "data": {"selection.yaml": text},
    }


def text_of_round(record: Record, round_number: int) -> str:
    """The document of a ConfigMap with another round; all else as it was written."""
    document = {**record.document, "spec": {**record.spec, "retry": round_number}}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
