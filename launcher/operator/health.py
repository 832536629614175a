"""The operator's HTTP server: /healthz, /readyz and /metrics."""

import contextlib
import socket
import socketserver
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from prometheus_client import generate_latest

from launcher.operator.controller import Controller
from launcher.operator.leader_election import Lease
from launcher.operator.metrics import metrics_registry

HUNG_SECONDS = 300.0
"""A pass that takes longer hangs: /healthz fails, and the kubelet restarts the operator."""

SILENT_SECONDS = 60.0
"""Without an answer to the lease, or a full list of every kind, for this long /readyz fails; nothing is restarted."""

HANDLER_SECONDS, MAX_CONNECTIONS = 10.0, 32
"""A connection that sends nothing for this long is closed. Beyond this number the oldest connection is closed."""


class Health:
    """Entered: a server in a thread of its own answers on `port`, by IPv6 and IPv4.

    Args:
        port: 0 takes a free one.
    """

    def __init__(self, controller: Controller, port: int, lease: Lease) -> None:
        self.controller, self.lease = controller, lease
        self.registry = metrics_registry(controller, lease)
        self.server = _open_server(port, self._handler())
        self.port = self.server.server_address[1]

    def __enter__(self) -> Self:
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
        return 404, b"paths: /healthz, /readyz, /metrics\n", plain

    def why_not_ready(self) -> str:
        """Empty where all is well. A replica that waits for the lease is ready too: it is there to take over."""
        if (silent := _age(self.lease.answered)) > SILENT_SECONDS:
            return f"no answer from the API server for {silent:.0f} s"
        informer = self.controller.informer
        if informer.is_synced or self.lease.held_since is None:
            return ""
        if (led := _age(self.lease.held_since)) > SILENT_SECONDS:
            return f"leads for {led:.0f} s, and could not list yet: {', '.join(sorted(informer.unlisted))}"
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
        # HTTPServer's own asks the DNS for a name, which may take long.
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
        """A client that went away is not worth a log line."""


class _DualStackServer(_Server):
    address_family = socket.AF_INET6


def _open_server(port: int, handler: type[BaseHTTPRequestHandler]) -> _Server:
    try:
        return _DualStackServer(("", port), handler)
    except OSError:  # a node without IPv6
        return _Server(("", port), handler)


def _age(since: float) -> float:
    return time.monotonic() - since
