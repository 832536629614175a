"""Prometheus metrics of the operator, read from the controller and the lease when they are asked for."""

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.operator.controller import Controller
from launcher.operator.leader_election import Lease
from launcher.resource.status import PHASES


def metrics_registry(controller: Controller, lease: Lease) -> CollectorRegistry:
    """From now on the controller also reports how long each pass takes."""
    registry = CollectorRegistry()
    registry.register(_OperatorCollector(controller, lease))
    seconds = Histogram("prism_reconcile_seconds", "Duration of one pass.", registry=registry)
    controller.counters.observe_seconds = seconds.observe
    return registry


class _OperatorCollector(Collector):
    def __init__(self, controller: Controller, lease: Lease) -> None:
        self.controller, self.lease = controller, lease

    def collect(self) -> list[Metric]:
        controller = self.controller
        statuses = [record.status for record in controller.cache.records(controller.kind)]
        runs = GaugeMetricFamily("prism_runs", "Runs by phase.", labels=["phase"])
        for phase in PHASES:
            runs.add_metric([phase], sum(status.phase == phase for status in statuses))
        restarts = sum(status.restarts for status in statuses)
        gauges = [
            ("prism_restarts", "Attempts after the first, of the runs that exist.", restarts),
            ("prism_queue_length", "Runs that are due for a pass, now or later.", len(controller.queue)),
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
        return [
            runs,
            *(GaugeMetricFamily(name, about, value=value) for name, about, value in gauges),
            *(CounterMetricFamily(name, about, value=value) for name, about, value in counters),
        ]
