"""Every object of a run, in the order in which they are created."""

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.render.attempt import Attempt
from launcher.render.job import job
from launcher.render.service import services
from launcher.render.shared_objects import shared_objects
from launcher.resource.object import Object
from launcher.resource.status import StageName
from prism_job.spec.cluster import ClusterSpec
from prism_job.spec.document import SelectionRun


def run_objects(run: SelectionRun, namespace: str, owner: Mapping[str, Any] | None = None) -> list[Object]:
    """The objects of a run's first round, first attempts."""
    assert run.spec.cluster is not None, "parse_for_cluster refuses a run without spec.cluster"
    objects = shared_objects(run, namespace, owner)
    for stage, group in stages(run.spec.cluster):
        attempt = Attempt(run, stage, group, namespace=namespace, owner=owner)
        objects += [*services(attempt), job(attempt)]
    return objects


def stages(cluster: ClusterSpec) -> Iterator[tuple[StageName, int]]:
    """Every (stage, group) in order."""
    yield "plan", 0
    for group in range(cluster.groups):
        yield "extract", group
    yield "reduce", 0
