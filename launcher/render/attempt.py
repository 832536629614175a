"""One attempt at one stage of a run: what the objects of a stage depend on, and the names and labels that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL, STAGE_LABEL, job_name
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun


@dataclass(frozen=True)
class Attempt:
    """One attempt at one stage.

    Attributes:
        group: of the extract stage; 0 in the other stages.
        round: spec.retry of the run.
        number: counts the attempts at this stage and group, from 0.
        used: of the reduce stage: environment that states what the run has used (prism_job/spec/used.py).
        owner: reference to the run's record, which owns every object; None in a dry run.
    """

    run: SelectionRun
    stage: str
    group: int = 0
    round: int = 0
    number: int = 0
    namespace: str = ""
    owner: Mapping[str, Any] | None = None
    used: Mapping[str, str] = field(default_factory=dict)

    @property
    def job_name(self) -> str:
        return job_name(self.run.metadata.name, self.stage, self.group, self.round, self.number)

    @property
    def service_name(self) -> str:
        return f"prism-{self.run.metadata.name}-{self.group}"  # a Service's name begins with a letter, a run's may not

    @property
    def stage_labels(self) -> dict[str, str]:
        """By which a stage's pods are found, whichever attempt they belong to."""
        return {STAGE_LABEL: self.stage, GROUP_LABEL: str(self.group)}

    @property
    def labels(self) -> dict[str, str]:
        return {**self.stage_labels, ROUND_LABEL: str(self.round), ATTEMPT_LABEL: str(self.number)}

    @property
    def cluster(self) -> ClusterSpec:
        assert self.run.spec.cluster is not None, "parse_for_cluster refuses a run without spec.cluster"
        return self.run.spec.cluster

    @property
    def num_nodes(self) -> int:
        return self.cluster.nodes_per_group if self.stage == "extract" else 1
