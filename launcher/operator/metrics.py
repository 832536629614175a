"""Prometheus metrics of the operator, read from the controller and the lease when they are requested.

Only the leader has runs in its cache and its queue; the other replicas report zero.
"""

import time

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.operator.controller import Controller
from launcher.operator.leader_election import Lease
from launcher.resource.status import PENDING, PHASES, TERMINAL, Status, parse_time

RUN_BUCKETS_SECONDS = (30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 57600, 86400, 172800)
"""From half a minute, a run that finds everything in its store, to two days."""


def metrics_registry(controller: Controller, lease: Lease) -> CollectorRegistry:
    """From now on the controller also reports how long each pass takes, and each run that ends."""
    registry = CollectorRegistry()
    registry.register(_OperatorCollector(controller, lease))
    ProcessCollector(registry=registry)
    passes = Histogram("prism_reconcile_seconds", "Duration of one pass.", registry=registry)
    controller.counters.observe_seconds = passes.observe
    runs = Histogram(
        "prism_run_seconds",
        "Duration of the rounds that ended under this replica, by final phase.",
        ["phase"],
        buckets=RUN_BUCKETS_SECONDS,
        registry=registry,
    )
    for phase in TERMINAL:  # a series that begins with its first run would hide that run from increase()
        runs.labels(phase)
    controller.counters.observe_end = lambda status: runs.labels(status.phase).observe(_run_seconds(status))
    return registry


def _run_seconds(status: Status) -> float:
    """From the start of the round to its end; 0 for a run that ended before it was accepted."""
    if status.start_time is None or status.completion_time is None:
        return 0.0
    return (parse_time(status.completion_time) - parse_time(status.start_time)).total_seconds()


class _OperatorCollector(Collector):
    def __init__(self, controller: Controller, lease: Lease) -> None:
        self.controller, self.lease = controller, lease

    def collect(self) -> list[Metric]:
        controller = self.controller
        statuses = [record.status for record in controller.cache.records(controller.kind)]
        runs = GaugeMetricFamily("prism_runs", "Runs that exist, by phase.", labels=["phase"])
        for phase in PHASES:
            runs.add_metric([phase], sum(status.phase == phase for status in statuses))
        restarts = sum(status.restarts for status in statuses)
        began = list(controller.counters.busy_since.values())
        waiting_seconds = _age_of_oldest_end(statuses, controller) if controller.deliveries else 0.0
        gauges = [
            ("prism_restarts", "Attempts after the first, of the runs that exist.", restarts),
            ("prism_queue_depth", "Runs that are due for a pass and wait for a worker.", controller.queue.num_due()),
            ("prism_queue_length", "Runs that are due for a pass, now or later.", len(controller.queue)),
            ("prism_longest_pass_seconds", "Age of the oldest pass that is under way.", _age_of_oldest(began)),
            (
                "prism_webhook_oldest_pending_seconds",
                "Age of the oldest end that the webhook is to take.",
                waiting_seconds,
            ),
            ("prism_leading", "1 where this replica holds the lease.", self.lease.held_since is not None),
            ("prism_synced", "1 once every kind was listed; nothing is decided before.", controller.informer.is_synced),
        ]
        counters = [
            ("prism_api_requests", "Requests to the API server.", controller.cluster.num_requests),
            ("prism_api_errors", "Requests that were refused or not answered.", controller.cluster.num_errors),
            ("prism_reconciles", "Passes.", controller.counters.reconciles),
            ("prism_reconcile_failures", "Passes that ended in an error.", controller.counters.failures),
            ("prism_status_writes", "Status writes.", controller.counters.status_writes),
        ]
        if deliveries := controller.deliveries:
            counters += [
                ("prism_webhook_deliveries", "Ends of runs that the webhook took.", deliveries.num_delivered),
                ("prism_webhook_failures", "Requests that the webhook did not take.", deliveries.num_failures),
            ]
        return [
            runs,
            *(GaugeMetricFamily(name, about, value=value) for name, about, value in gauges),
            *(CounterMetricFamily(name, about, value=value) for name, about, value in counters),
        ]


def _age_of_oldest(began: list[float]) -> float:
    return time.monotonic() - min(began) if began else 0.0


def _age_of_oldest_end(statuses: list[Status], controller: Controller) -> float:
    ended = [parse_time(it.completion_time) for it in statuses if it.webhook == PENDING and it.completion_time]
    return max(0.0, (controller.clock() - min(ended)).total_seconds()) if ended else 0.0
