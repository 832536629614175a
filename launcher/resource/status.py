"""How far a run has come, as the cluster keeps it: phases, stages and conditions. Does not decide what comes next."""

import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field

from prism_job.spec.section import Section

StageName = Literal["plan", "extract", "reduce"]
StageState = Literal["Waiting", "Queued", "Pending", "Running", "Succeeded", "Failed", "Stopped"]
Phase = Literal["Pending", "Planning", "Extracting", "Reducing", "Suspended", "Complete", "Failed", "Cancelled"]

STAGES: tuple[str, ...] = get_args(StageName)
"""In the order in which they run."""

STATES: tuple[str, ...] = get_args(StageState)
PHASES: tuple[str, ...] = get_args(Phase)
PENDING, DELIVERED, GIVEN_UP = "Pending", "Delivered", "GivenUp"
"""What `webhook` may be."""

TERMINAL = ("Complete", "Failed", "Cancelled")


def parse_time(text: str) -> datetime.datetime:
    """A time as Kubernetes writes it."""
    return datetime.datetime.fromisoformat(text)


def time_text(time: datetime.datetime) -> str:
    """To whole seconds, in UTC, as Kubernetes writes it."""
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _check_time(text: str) -> str:
    if parse_time(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Time = Annotated[str, AfterValidator(_check_time)]
"""A time with its zone. A status with anything else there cannot be read."""


class Shown(Section):
    """Base of what a status holds. Read leniently: fields and words of a later version are accepted."""

    model_config = ConfigDict(extra="ignore", validate_by_name=True)


class Condition(Shown):
    """As metav1.Condition."""

    type: str = Field(description="Accepted, Planned, Extracted, Reduced, Complete, Failed or Suspended.")
    status: str = Field(description="Whether the condition holds: True, False or Unknown.")
    reason: str = Field(description="One word for programs.")
    message: str = Field("", description="A sentence for people.")
    last_transition_time: Time = Field(description="When the status of this condition last changed.")
    observed_generation: int = Field(0, description="Generation of the spec that this condition is about.")


class StageStatus(Shown):
    """One stage, or one group of the extract stage, in the current round."""

    stage: str = Field(description="plan, extract or reduce.")
    group: int = Field(0, description="Group of the extract stage.")
    attempt: int = Field(0, description="Number of the current attempt, from 0.")
    state: str = Field(
        "Waiting",
        description="Waiting, Queued, Pending, Running, Succeeded, Failed or Stopped. A later version may write others.",
    )
    message: str = Field("", description="Why the stage waits, or how its last attempt ended.")
    reason: str = Field("", description="Why the stage failed and is not retried, in one word.")
    restarts: int = Field(0, description="Number of attempts that crashed.")
    preemptions: int = Field(0, description="Number of attempts that an eviction or the loss of a node ended.")
    disrupted: bool = Field(False, description="Whether a pod of the current attempt is known to be evicted.")
    started: bool = Field(False, description="Whether the Job of the current attempt was created.")
    not_before: Time | None = Field(None, description="Time before which the current attempt does not start.")
    running_since: Time | None = Field(
        None, description="When the first container of the current attempt started; empty while its Job is suspended."
    )
    missing_since: Time | None = Field(
        None, description="Time since which the Job counts active pods that do not exist."
    )
    units: int | None = Field(None, description="Number of work units that it extracted.")


class Status(Shown):
    """How far the run has come. The operator writes it, or a `prism submit --wait`."""

    observed_generation: int = Field(0, description="Generation of the spec that this status is about.")
    round: int = Field(0, description="spec.retry of the current round.")
    phase: str = Field(
        "Pending",
        description="Pending, Planning, Extracting, Reducing or Suspended; Complete, Failed and Cancelled are final.",
    )
    message: str = Field("", description="Why the run waits, or how it ended.")
    driver: str | None = Field(
        None,
        description="Who wrote this status: the operator, or a `prism submit --wait` until an operator takes over.",
    )
    groups: str = Field("", description="Number of groups that are done, and of all groups.")
    shards: str = Field("", description="Number of work units extracted, and of those that the store lacked.")
    restarts: int = Field(0, description="Number of restarts of all stages in this round, preemptions included.")
    units: int | None = Field(None, description="Number of work units in the plan.")
    missing_units: int | None = Field(None, description="Number of work units that the store lacked.")
    examples: int | None = Field(None, description="Number of candidate examples.")
    pairs: int | None = Field(None, description="Number of target pairs.")
    bad_rows: int | None = Field(None, description="Number of rows in quarantine.")
    selected: int | None = Field(None, description="Number of selected examples.")
    manifest: str | None = Field(None, description="Address of the manifest.")
    request: str | None = Field(None, description="Digest of the document without the fields that may change.")
    start_time: Time | None = Field(None, description="When this round began.")
    completion_time: Time | None = Field(None, description="When this round ended.")
    gpu_seconds: int = Field(
        0,
        description="Seconds × GPUs that the pods of all ended attempts held, those that failed and those of earlier rounds "
        "included.",
    )
    gpu: str | None = Field(None, description="Name of the GPUs, as the pods report it.")
    price: float | None = Field(
        None, description="Price of gpuSeconds, by spec.gpuHourPrice; empty where not every GPU is counted."
    )
    webhook: str | None = Field(
        None,
        description="Whether the operator's webhook has taken the end of this round: Pending, Delivered or GivenUp.",
    )
    stages: tuple[StageStatus, ...] = Field((), description="Each stage, and each group of the extract stage.")
    conditions: tuple[Condition, ...] = Field((), description="For `kubectl wait --for=condition=`.")

    @property
    def is_terminal(self) -> bool:
        return self.phase in TERMINAL

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / 3600

    @property
    def unknown(self) -> tuple[str, ...]:
        """Words of a later version that this one cannot continue from; none matters once the run has ended."""
        if self.is_terminal:
            return ()
        states = (entry.state for entry in self.stages if entry.state not in STATES)
        stages = (entry.stage for entry in self.stages if entry.stage not in STAGES)
        return (*(() if self.phase in PHASES else (self.phase,)), *states, *stages)

    def condition(self, name: str) -> Condition | None:
        return next((condition for condition in self.conditions if condition.type == name), None)

    def holds(self, name: str) -> bool:
        found = self.condition(name)
        return found is not None and found.status == "True"

    def stage(self, stage: str, group: int = 0) -> StageStatus:
        """The entry of a stage; a fresh one where the stage has not begun."""
        entries = (entry for entry in self.stages if (entry.stage, entry.group) == (stage, group))
        return next(entries, StageStatus(stage=stage, group=group))

    def to_document(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
