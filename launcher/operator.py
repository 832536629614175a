"""The process `prism operator`: leads by a Lease, runs the controller, answers probes and metrics. Not: any decision."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.cluster import Cluster
from launcher.controller import Controller, say_lines
from launcher.lease import Lease

LEASE = "prism-operator"
HUNG_SECONDS = 300.0
"""A pass that takes longer hangs: /healthz says so, and the kubelet starts another operator."""

WORKERS = 4


def run_operator(cluster: Cluster, namespace: str | None, port: int, own_namespace: str) -> int:
    """Lead, reconcile, serve; until SIGTERM. Returns the exit code: 1 where the lease was lost.

    Args:
        namespace: whose runs; None for all namespaces.
        port: of /healthz, /readyz and /metrics; 0 takes a free one.
        own_namespace: where the lease is.
    """
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}"
    lease = Lease(cluster, own_namespace, LEASE, identity)
    controller = Controller(cluster, namespace, say=say_lines, workers=WORKERS)
    stopping, lost = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        controller.stop()

    def give_up() -> None:
        # Another one may lead already: no orderly end, which could take as long as a request.
        say_lines(event="lease lost")
        lost.set()
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with Health(controller, port) as health:
        say_lines(event="started", identity=identity, port=health.port, namespace=namespace or "all")
        if not lease.acquire(stopping):
            return 0
        say_lines(event="leading", identity=identity)
        threading.Thread(target=lease.keep, args=(stopping, give_up), daemon=True).start()
        controller.run()
        lease.release()
    say_lines(event="stopped")
    return 0


class Health:
    """A small server beside the loop. Entered: it answers on `port`."""

    def __init__(self, controller: Controller, port: int) -> None:
        self.controller = controller
        self.registry = CollectorRegistry()
        self.registry.register(_Figures(controller))
        seconds = Histogram("prism_reconcile_seconds", "Duration of one pass.", registry=self.registry)
        controller.counters.seconds = seconds.observe
        self.server = ThreadingHTTPServer(("", port), self._handler())
        self.port = self.server.server_address[1]

    def __enter__(self) -> Health:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str) -> tuple[int, bytes, str]:
        """(status, body, content type) of a request."""
        plain = "text/plain; charset=utf-8"
        if path == "/metrics":
            return 200, generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"
        if path == "/healthz":
            hung = [since for since in list(self.controller.counters.busy_since.values()) if _age(since) > HUNG_SECONDS]
            return (500, b"a pass hangs\n", plain) if hung else (200, b"ok\n", plain)
        if path == "/readyz":
            # One that waits for the lease is ready too: to take over is what it is there for.
            return 200, b"ok\n", plain
        return 404, b"here are /healthz, /readyz and /metrics\n", plain

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, kind = health.answer(self.path.partition("?")[0])
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class _Figures(Collector):
    """Counted where they arise, read when they are asked for."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def collect(self) -> list[Metric]:
        controller = self.controller
        records = controller.cache.records(controller.kind)
        statuses = [record.status for record in records]
        runs = GaugeMetricFamily("prism_runs", "Runs by phase.", labels=["phase"])
        for phase in ("Pending", "Planning", "Extracting", "Reducing", "Suspended", "Complete", "Failed", "Cancelled"):
            runs.add_metric([phase], sum(status.phase == phase for status in statuses))
        restarts = GaugeMetricFamily("prism_restarts", "Attempts after the first, of the runs that exist.")
        restarts.add_metric([], sum(status.restarts for status in statuses))
        waiting = GaugeMetricFamily("prism_queue_length", "Runs that a pass is due for, now or later.")
        waiting.add_metric([], len(controller.queue))
        counted = [
            ("prism_api_requests", "Requests to the API server.", controller.cluster.num_requests),
            ("prism_api_errors", "Those that were refused or not answered.", controller.cluster.num_errors),
            ("prism_reconciles", "Passes.", controller.counters.reconciles),
            ("prism_reconcile_failures", "Passes that ended in an error.", controller.counters.failures),
            ("prism_status_writes", "Status writes.", controller.counters.status_writes),
        ]
        counters: list[Metric] = []
        for name, about, value in counted:
            family = CounterMetricFamily(name, about)
            family.add_metric([], value)
            counters.append(family)
        return [runs, restarts, waiting, *counters]


def _age(since: float) -> float:
    return time.monotonic() - since
