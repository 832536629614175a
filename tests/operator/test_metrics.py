"""Metrics of the operator: what each says of runs, passes and the queue."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry

from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller
from launcher.operator.metrics import metrics_registry
from launcher.resource.status import PHASES, TERMINAL
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer
from tests.operator.host import a_run, complete_run, end, hosted, status_of, unfinished
from tests.operator.test_leader_election import a_lease


def registry_of(controller: Controller) -> CollectorRegistry:
    return metrics_registry(controller, a_lease("a"))


def ended(registry: CollectorRegistry) -> dict[str, float | None]:
    """Final phase -> runs that ended in it."""
    return {phase: registry.get_sample_value("prism_run_seconds_count", {"phase": phase}) for phase in TERMINAL}


def test_each_round_that_ends_is_counted_once_with_its_duration_under_its_phase(server: ApiServer) -> None:
    server.create(a_run("good"))
    server.create(a_run("bad"))
    with hosted() as host:
        registry = registry_of(host.controller)
        assert ended(registry) == {
            "Complete": 0,
            "Failed": 0,
            "Cancelled": 0,
        }  # a series that is missing hides the first
        eventually(lambda: any("bad" in job["metadata"]["name"] for job in unfinished(server)))
        end(server, next(job for job in unfinished(server) if "bad" in job["metadata"]["name"]), code=64, words="wrong")
        eventually(lambda: status_of(server, "bad").phase == "Failed")
        complete_run(server, "good")
        for _ in range(3):  # an ended run has passes too
            for name in ("good", "bad"):
                host.controller.queue.add(("default", name))
            time.sleep(0.1)
        assert ended(registry) == {"Complete": 1, "Failed": 1, "Cancelled": 0}
        good = status_of(server, "good")
        assert good.start_time is not None
        assert good.completion_time is not None
        seconds = registry.get_sample_value("prism_run_seconds_sum", {"phase": "Complete"})
        assert seconds is not None
        assert 0 <= seconds < 60

        again = server.object("selectionruns", "bad")
        assert again is not None
        again["spec"]["retry"] = 1
        server.update(again)
        eventually(lambda: status_of(server, "bad").round == 1)
        complete_run(server, "bad")
        eventually(lambda: ended(registry) == {"Complete": 2, "Failed": 1, "Cancelled": 0})
        phases = {phase: registry.get_sample_value("prism_runs", {"phase": phase}) for phase in PHASES}
        assert phases == dict.fromkeys(PHASES, 0) | {"Complete": 2}


def test_the_age_of_the_oldest_pass_under_way_shows_one_that_hangs(server: ApiServer) -> None:
    controller = Controller(Cluster(), None)
    registry = registry_of(controller)
    assert registry.get_sample_value("prism_longest_pass_seconds") == 0
    controller.counters.busy_since |= {0: time.monotonic() - 100, 1: time.monotonic()}
    assert (registry.get_sample_value("prism_longest_pass_seconds") or 0) >= 100
