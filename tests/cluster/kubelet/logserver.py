"""The kubelet's own HTTPS, as far as an API server's proxy of pods/log needs it: /containerLogs/{namespace}/{pod}/{container}.

Who asks must have a certificate of the cluster's CA. Knows nothing of processes: what a container's log is, its caller says.
"""

from __future__ import annotations

import contextlib
import http.server
import select
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.certificates import Pair
from tests.cluster.podlogs import PodLogs


@dataclass(frozen=True)
class Log:
    """One container's log."""

    path: Path
    has_ended: Callable[[], bool]


class NoLog(Exception):
    """The kubelet's answer where there is no log to show. `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


FindLog = Callable[[str, str, str, Mapping[str, str]], Log]
"""Namespace, pod, container and query to the log; raises NoLog."""


class LogServer:
    """Serves from `start` to `stop`, at `port` of 127.0.0.1."""

    def __init__(self, logs: PodLogs, find: FindLog, serving: Pair, client_ca: Path) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(serving.certificate, serving.key)
        self.stopping = threading.Event()
        self._http = _Server(("127.0.0.1", 0), _handler(logs, find, self.stopping, context))
        self.port = int(self._http.server_port)

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="logserver", daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


def _handler(
    logs: PodLogs, find: FindLog, stopping: threading.Event, context: ssl.SSLContext
) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            # Here and not at accept: a client that shakes no hands holds up its own thread alone.
            self.request = context.wrap_socket(self.request, server_side=True)
            super().setup()

        def finish(self) -> None:
            super().finish()
            self.connection.close()  # the server itself closes what was there before TLS

        def do_GET(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            parts = [urllib.parse.unquote(part) for part in address.path.strip("/").split("/")]
            query = dict(urllib.parse.parse_qsl(address.query))
            try:
                if len(parts) != 4 or parts[0] != "containerLogs":
                    raise NoLog(404, "here is /containerLogs alone")
                log = find(parts[1], parts[2], parts[3], query)
            except NoLog as refusal:
                body = str(refusal).encode()
                self.send_response(refusal.status)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self._stream(logs.follow(log.path, query, log.has_ended, self._is_alive))

        def _stream(self, pieces: Iterator[bytes]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            with contextlib.suppress(OSError):
                for piece in pieces:
                    if piece:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")

        def _is_alive(self) -> bool:
            """Whether the reader is there: one that has gone makes its connection readable."""
            readable, _, _ = select.select([self.connection], [], [], 0)
            return not readable and not stopping.is_set()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
