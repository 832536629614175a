"""A run as a cluster keeps it: its record, its status, its names and labels. Not: how pods look, what to do next, any API call.

A record is a SelectionRun object, or, where that kind is not installed, a ConfigMap with the same document and status in it.
Names of children are functions of (run, stage, group, round, attempt) alone, so that doing a thing twice makes one object.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from launcher.resource.overlay import merge, refusals
from prism_job.errors import SpecError
from prism_job.spec.digest import digest
from prism_job.spec.document import API_VERSION, SelectionRun, check_document, parse_spec, read_yaml
from prism_job.spec.section import Section

GROUP, VERSION = API_VERSION.split("/")
KIND, PLURAL = "SelectionRun", "selectionruns"
MANAGER = "prism"
"""Our field manager, and the value of `app.kubernetes.io/managed-by`."""

RUN, STAGE, GROUP_LABEL, ROUND, ATTEMPT = (f"{GROUP}/{name}" for name in ("run", "stage", "group", "round", "attempt"))
MANAGED = {"app.kubernetes.io/name": "prism", "app.kubernetes.io/managed-by": MANAGER}
CANCEL = f"{GROUP}/cancel"
"""Annotation: the round (`spec.retry`) that is cancelled. A later round is not."""

RECORD_LABEL = f"{GROUP}/record"
"""On a ConfigMap that is a record; the one that pods read their document from has it not."""

CONTAINER = "worker"
"""Of the pods of a run."""

LONGEST_NAME = 40
"""Characters of a run's name on a cluster: names of Jobs, pods and services add to it, and a host name ends at 63."""

LONGEST_JOB_NAME = 59
"""Of a Job: a pod's host name adds a hyphen and its index, of three digits at most."""

MAY_CHANGE = ("suspend", "retry", "ttlSecondsAfterFinished")
"""Fields of the spec that may change while a run exists. What its pods read has none of them."""

StageName = Literal["plan", "extract", "reduce"]
Phase = Literal["Pending", "Planning", "Extracting", "Reducing", "Suspended", "Complete", "Failed", "Cancelled"]
TERMINAL = ("Complete", "Failed", "Cancelled")
StageState = Literal["Waiting", "Queued", "Pending", "Running", "Succeeded", "Failed", "Stopped"]


def _check_time(text: str) -> str:
    if parse_time(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Time = Annotated[str, AfterValidator(_check_time)]
"""As Kubernetes writes it. A status by another hand with anything else there cannot be read."""


class Shown(Section):
    """Base of what a status holds, read leniently: fields of a later version are passed over, its words are kept as text."""

    model_config = ConfigDict(extra="ignore", validate_by_name=True)


class Condition(Shown):
    """As metav1.Condition."""

    type: str = Field(description="Accepted, Planned, Extracted, Reduced, Complete, Failed or Suspended.")
    status: str = Field(description="Whether it holds: True, False or Unknown.")
    reason: str = Field(description="One word for programs.")
    message: str = Field("", description="A sentence for people.")
    last_transition_time: Time = Field(description="When its status last changed.")
    observed_generation: int = Field(0, description="Generation of the spec that this was said of.")


class StageStatus(Shown):
    """One stage, or one group of the extract stage, in the present round."""

    stage: str = Field(description="plan, extract or reduce.")
    group: int = Field(0, description="Group of the extract stage.")
    attempt: int = Field(0, description="Attempt in hand, from 0.")
    state: str = Field(
        "Waiting",
        description="Waiting, Queued, Pending, Running, Succeeded, Failed or Stopped; by a later version: others.",
    )
    message: str = Field("", description="Why it waits, or how its last attempt ended.")
    reason: str = Field("", description="One word for how it failed for good.")
    restarts: int = Field(0, description="Attempts that crashed.")
    preemptions: int = Field(0, description="Attempts ended by an eviction, or a node that was lost.")
    disrupted: bool = Field(False, description="A pod of the attempt in hand was seen being evicted.")
    started: bool = Field(False, description="The Job of the attempt in hand was made.")
    not_before: Time | None = Field(None, description="The attempt in hand starts no sooner.")
    missing_since: Time | None = Field(None, description="Since when its Job counts pods that nobody sees.")
    units: int | None = Field(None, description="Units that it extracted.")


class Status(Shown):
    """What the cluster shows of a run; written by one reconcile pass at its end."""

    observed_generation: int = Field(0, description="Generation of the spec that this was decided on.")
    round: int = Field(0, description="spec.retry of the round in hand.")
    phase: str = Field(
        "Pending",
        description="Pending, Planning, Extracting, Reducing or Suspended; Complete, Failed and Cancelled are final.",
    )
    message: str = Field("", description="Why it waits, or how it ended.")
    driver: str | None = Field(
        None, description="Who wrote this: the operator, or a `prism submit --wait`, which yields to an operator."
    )
    groups: str = Field("", description="Groups done, of all.")
    shards: str = Field("", description="Units extracted, of those the store lacked.")
    restarts: int = Field(0, description="Of all stages in this round, preemptions counted too.")
    units: int | None = Field(None, description="Work units of the plan.")
    missing_units: int | None = Field(None, description="Units that the store lacked.")
    examples: int | None = Field(None, description="Candidates.")
    pairs: int | None = Field(None, description="Target pairs.")
    bad_rows: int | None = Field(None, description="Rows in quarantine.")
    selected: int | None = Field(None, description="Examples selected.")
    manifest: str | None = Field(None, description="Address of the manifest.")
    request: str | None = Field(None, description="Digest of the document, without what may change.")
    start_time: Time | None = Field(None, description="When this round began.")
    completion_time: Time | None = Field(None, description="When this round ended.")
    stages: tuple[StageStatus, ...] = Field((), description="Each stage, and each group of the extract stage.")
    conditions: tuple[Condition, ...] = Field((), description="For `kubectl wait --for=condition=`.")

    @property
    def is_terminal(self) -> bool:
        return self.phase in TERMINAL

    @property
    def unknown(self) -> tuple[str, ...]:
        """Words of a later version on which it depends what follows; none matters once the run has ended."""
        phases, states, stages = get_args(Phase), get_args(StageState), get_args(StageName)
        if self.is_terminal:
            return ()
        words = [] if self.phase in phases else [self.phase]
        words += [one.state for one in self.stages if one.state not in states]
        return (*words, *(one.stage for one in self.stages if one.stage not in stages))

    def condition(self, name: str) -> Condition | None:
        return next((one for one in self.conditions if one.type == name), None)

    def holds(self, name: str) -> bool:
        found = self.condition(name)
        return found is not None and found.status == "True"

    def stage(self, stage: str, group: int = 0) -> StageStatus:
        """How a stage stands; untouched where it has not begun."""
        found = (one for one in self.stages if (one.stage, one.group) == (stage, group))
        return next(found, StageStatus(stage=stage, group=group))

    def to_document(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Record:
    """A run's record, as the API server shows it: a SelectionRun, or a ConfigMap that stands for one."""

    object: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self.object["metadata"])

    @property
    def is_config_map(self) -> bool:
        return bool(self.object.get("kind") == "ConfigMap")

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.metadata["labels"][RUN] if self.is_config_map else self.metadata["name"])

    @property
    def namespace(self) -> str:
        return str(self.metadata["namespace"])

    @property
    def uid(self) -> str:
        return str(self.metadata["uid"])

    @property
    def generation(self) -> int:
        """Of the spec. A ConfigMap has none: there it counts rounds."""
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
        """apiVersion, kind, metadata (name and labels) and spec; whatever a hand wrote there."""
        if self.is_config_map:
            try:
                written = read_yaml(self._text, self.name)
            except SpecError:
                written = None
            return written if isinstance(written, dict) else {}
        labels = self.metadata.get("labels")
        carried = {key: value for key, value in (labels or {}).items() if isinstance(value, str)}
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self.name, "labels": carried},
            "spec": self.object.get("spec"),
        }

    @property
    def spec(self) -> dict[str, Any]:
        found = self.document.get("spec")
        return found if isinstance(found, dict) else {}

    @property
    def is_cancelled(self) -> bool:
        """Whether the round in hand is to end."""
        return bool((self.metadata.get("annotations") or {}).get(CANCEL) == str(self.round))

    @property
    def round(self) -> int:
        """The round that is asked for: spec.retry."""
        try:
            return int(self.spec.get("retry", 0))
        except (TypeError, ValueError, OverflowError):
            return 0

    @functools.cached_property
    def status(self) -> Status:
        """What was last written; a fresh one where that is nothing.

        One that cannot be read is of the phase Unknown, in the round in hand, and says why: it can be shown, and nobody goes
        on from it. To begin anew would run again what has ended.
        """
        try:
            if self.is_config_map:
                return Status.model_validate_json((self.object.get("data") or {}).get("status") or "{}")
            found = self.object.get("status")
            return Status.model_validate({} if found is None else found)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in ("status", *first["loc"]))
            return Status(round=self.round, phase="Unknown", message=f"{place} cannot be read: {first['msg']}")

    @property
    def owner_reference(self) -> dict[str, Any]:
        """What makes the cluster remove a child with this record."""
        return {
            "apiVersion": "v1" if self.is_config_map else API_VERSION,
            "kind": "ConfigMap" if self.is_config_map else KIND,
            "name": self.metadata["name"],
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }

    def parse(self) -> SelectionRun:
        """The checked document. Raises SpecError, naming this record."""
        where = f"{self.namespace}/{self.name}"
        fix = "correct the document, or remove this record"
        try:
            if self.is_config_map:
                run = parse_for_cluster(self._text, where)
            else:
                run = _for_cluster(check_document(self.document, where), where)
        except (RecursionError, ValueError, TypeError) as error:
            raise SpecError(f"this is no plain document: {error}", where=where, fix=fix) from error
        if run.metadata.name != self.name:
            raise SpecError(
                f"the document's name is {run.metadata.name}, its record's {self.name}", where=where, fix=fix
            )
        return run


def parse_for_cluster(text: str, where: str) -> SelectionRun:
    """A document that pods can run: parse_spec's checks, and those that hold on a cluster alone. Raises SpecError."""
    return _for_cluster(parse_spec(text, where), where)


def _for_cluster(run: SelectionRun, where: str) -> SelectionRun:
    wrong = []
    if len(run.metadata.name) > LONGEST_NAME:
        wrong.append(f"metadata.name has {len(run.metadata.name)} characters; at most {LONGEST_NAME} on a cluster")
    if run.spec.cluster is None:
        wrong.append("spec.cluster is missing; it names at least the image: cluster: {image: registry/prism@sha256:…}")
    else:
        overlay = run.spec.cluster.pod_overlay
        refused = [f"{one.where}: {one.what}; {one.fix}" for one in refusals(overlay)]
        wrong += refused
        if not refused and not _keeps_the_worker(overlay):
            wrong.append(
                f"spec.cluster.podOverlay leaves no container {CONTAINER} in the pod; change it, do not remove it"
            )
    for field, uri in _addresses(run):
        if not uri.startswith(("s3://", "/")):
            wrong.append(f"{field} is '{uri}', a path of one machine; on a cluster use s3://bucket/prefix")
    if wrong:
        lines = "\n  ".join([f"{len(wrong)} thing(s) that a cluster cannot run:", *wrong])
        raise SpecError(lines, where=where, fix="correct the fields named, or run it on this machine with `prism run`")
    return run


def _keeps_the_worker(overlay: Mapping[str, Any]) -> bool:
    merged = merge({"metadata": {}, "spec": {"containers": [{"name": CONTAINER}]}}, overlay)
    containers = (merged.get("spec") or {}).get("containers") or ()
    return any(one.get("name") == CONTAINER for one in containers)


def _addresses(run: SelectionRun) -> Iterator[tuple[str, str]]:
    spec = run.spec
    yield from ((f"spec.candidates.uris[{place}]", uri) for place, uri in enumerate(spec.candidates.uris))
    for number, one in enumerate(spec.targets.as_sets()):
        field = f"spec.targets.sets[{number}].uris" if one.name else "spec.targets.uris"
        yield from ((f"{field}[{place}]", uri) for place, uri in enumerate(one.uris))
    yield from (("spec.store", spec.store), ("spec.output", spec.output))
    # A hub id (org/name) looks like a path, and cannot be told from one here.
    if spec.model.uri.startswith(".") or spec.model.uri.endswith(".gguf"):
        yield "spec.model.uri", spec.model.uri
    if spec.model.adapter is not None:
        yield "spec.model.adapter", spec.model.adapter


def pods_document(run: SelectionRun) -> dict[str, Any]:
    """What the pods read: the document without labels, and without the fields that may change while it runs."""
    document = run.to_document()
    spec = {name: value for name, value in document["spec"].items() if name not in MAY_CHANGE}
    return {**document, "metadata": {"name": run.metadata.name}, "spec": spec}


def request_digest(run: SelectionRun) -> str:
    """Two documents with the same are the same request, whatever defaults they write out."""
    return digest(pods_document(run))


def differences(mine: SelectionRun, theirs: SelectionRun) -> list[str]:
    """'spec.selection.budget.fraction: 0.1 here, 0.05 there', a line each."""
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


def job_name(run: str, stage: str, group: int, round_number: int, attempt: int) -> str:
    """`curate-math-extract-2-0-1`: group 2, round 0, attempt 1; the other stages have no group.

    A long name with large numbers would pass LONGEST_JOB_NAME: its end is then a digest of the whole.
    """
    place = f"{stage}-{group}" if stage == "extract" else stage
    name = f"{run}-{place}-{round_number}-{attempt}"
    if len(name) <= LONGEST_JOB_NAME:
        return name
    return f"{name[: LONGEST_JOB_NAME - 17]}-{digest(name)[:16]}"


def record_name(run: str) -> str:
    """Of the ConfigMap that stands for a SelectionRun."""
    return f"{run}-prism-record"


def labels_of_run(run: str) -> dict[str, str]:
    """On every child, and what the children are found by."""
    return {**MANAGED, RUN: run}


def config_map_record(run: SelectionRun, text: str, namespace: str) -> dict[str, Any]:
    """The ConfigMap that keeps a run where the custom resource is not installed.

    Args:
        text: the document as it was written; defaults are those of the version that runs it.
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
    """The document of a ConfigMap, asking for this round; all else as it was written."""
    document = {**record.document, "spec": {**record.spec, "retry": round_number}}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def parse_time(text: str) -> datetime.datetime:
    """A time as Kubernetes writes it."""
    return datetime.datetime.fromisoformat(text)


def time_text(time: datetime.datetime) -> str:
    """To whole seconds, in UTC, as Kubernetes writes it."""
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
