"""How far a run has come, as the cluster keeps it: phases, stages and conditions. Does not decide what comes next."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field

from launcher.resource.timestamps import Time
from prism_job.spec.section import Section

StageName = Literal["plan", "extract", "reduce"]
Phase = Literal["Pending", "Planning", "Extracting", "Reducing", "Suspended", "Complete", "Failed", "Cancelled"]
TERMINAL = ("Complete", "Failed", "Cancelled")
StageState = Literal["Waiting", "Queued", "Pending", "Running", "Succeeded", "Failed", "Stopped"]


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
