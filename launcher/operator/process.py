"""The process `prism operator`: leads by a Lease, runs the controller, answers probes and metrics. Not: any decision."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import socketserver
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller, say_lines
from launcher.operator.leader_election import Lease
from launcher.resource.names import LEASE
from launcher.resource.status import PHASES

HUNG_SECONDS = 300.0
"""A pass that takes longer hangs: /healthz says so, and the kubelet starts another operator."""

SILENT_SECONDS = 60.0
"""Without an answer to the lease, or a full look at the cluster, for so long: /readyz says so; nothing is restarted."""

HANDLER_SECONDS, MAX_CONNECTIONS = 10.0, 32
"""A client that sends nothing for so long is left. One connection more than so many ends the oldest."""

WORKERS = 4


def run_operator(cluster: Cluster, namespace: str | None, port: int, own_namespace: str) -> int:
    """Lead, reconcile, serve; until SIGTERM. Returns the exit code: 1 where the lease was lost.

    Args:
        namespace: whose runs; None for all namespaces.
        port: of /healthz, /readyz and /metrics; 0 takes a free one.
        own_namespace: where the lease is.
    """
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, handlers=[_JsonLines()], force=True)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}"
    lease = Lease(cluster, own_namespace, LEASE, identity, say=say_lines)
    controller = Controller(cluster, namespace, say=say_lines, workers=WORKERS)
    stopping, finished = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        controller.stop()

    def give_up() -> None:
        # Another one may lead already: no orderly end, which could take as long as a request.
        say_lines(event="lease lost")
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with Health(controller, port, lease) as health:
        say_lines(event="started", identity=identity, port=health.port, namespace=namespace or "all")
        if not lease.acquire(stopping):
            return 0
        say_lines(event="leading", identity=identity)
        # It is kept while passes in hand are finished.
        threading.Thread(target=lease.keep, args=(finished, give_up), daemon=True).start()
        controller.run()
        finished.set()
        lease.release()
    say_lines(event="stopped")
    return 0


class _JsonLines(logging.Handler):
    """What libraries have to say, in the form of our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say_lines(event="log", level=record.levelname.lower(), logger=record.name, message=record.getMessage())


class Health:
    """A small server beside the loop. Entered: it answers on `port`, by IPv6 and IPv4."""

    def __init__(self, controller: Controller, port: int, lease: Lease) -> None:
        self.controller, self.lease = controller, lease
        self.registry = CollectorRegistry()
        self.registry.register(_Figures(controller, lease))
        seconds = Histogram("prism_reconcile_seconds", "Duration of one pass.", registry=self.registry)
        controller.counters.seconds = seconds.observe
        self.server = _open_server(port, self._handler())
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
            why = self.why_not_ready()
            return (503, f"{why}\n".encode(), plain) if why else (200, b"ok\n", plain)
        return 404, b"here are /healthz, /readyz and /metrics\n", plain

    def why_not_ready(self) -> str:
        """Empty where all is well. One that waits for the lease is ready too: to take over is what it is there for."""
        if (silent := _age(self.lease.answered)) > SILENT_SECONDS:
            return f"no answer from the API server for {silent:.0f} s"
        if self.controller.is_synced or self.lease.held_since is None:
            return ""
        if (led := _age(self.lease.held_since)) > SILENT_SECONDS:
            return f"leads for {led:.0f} s, and could not list yet: {', '.join(sorted(self.controller.unlisted))}"
        return ""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            timeout = HANDLER_SECONDS

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


class _Server(ThreadingHTTPServer):
    """One thread a connection, of a bounded number."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: deque[Any] = deque()
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the DNS for a name.
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.append(request)
            oldest = self._open.popleft() if len(self._open) > MAX_CONNECTIONS else None
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to say."""


class _DualStackServer(_Server):
    address_family = socket.AF_INET6


def _open_server(port: int, handler: type[BaseHTTPRequestHandler]) -> _Server:
    try:
        return _DualStackServer(("", port), handler)
    except OSError:  # a node without IPv6
        return _Server(("", port), handler)


class _Figures(Collector):
    """Counted where they arise, read when they are asked for."""

    def __init__(self, controller: Controller, lease: Lease) -> None:
        self.controller, self.lease = controller, lease

    def collect(self) -> list[Metric]:
        controller = self.controller
        records = controller.cache.records(controller.kind)
        statuses = [record.status for record in records]
        runs = GaugeMetricFamily("prism_runs", "Runs by phase.", labels=["phase"])
        for phase in PHASES:
            runs.add_metric([phase], sum(status.phase == phase for status in statuses))
        restarts = GaugeMetricFamily("prism_restarts", "Attempts after the first, of the runs that exist.")
        restarts.add_metric([], sum(status.restarts for status in statuses))
        waiting = GaugeMetricFamily("prism_queue_length", "Runs that a pass is due for, now or later.")
        waiting.add_metric([], len(controller.queue))
        leading = GaugeMetricFamily("prism_leading", "1 where this replica holds the lease.")
        leading.add_metric([], self.lease.held_since is not None)
        synced = GaugeMetricFamily("prism_synced", "1 once everything was listed: before that nothing is decided.")
        synced.add_metric([], controller.is_synced)
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
        return [runs, restarts, waiting, leading, synced, *counters]


def _age(since: float) -> float:
    return time.monotonic() - since
