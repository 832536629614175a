"""An HTTP proxy before an S3 server that spoils a seeded share of the requests and counts them.

`python -m tests.unreliable_proxy --upstream http://127.0.0.1:5000 --faults 0.2 --seed 1` prints its address and serves until
it is ended; GET /counts returns the counts. In a test: `with UnreliableProxy(upstream, 0.2, seed=1) as proxy: proxy.url`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import json
import os
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter

FAULTS = ("slow_down", "reset_before", "reset_after", "cut", "delay")
"""503 SlowDown; connection reset before the server gets the request; reset after it carried it out; response cut in the middle
of its body; response late. A response without a body is reset in place of a cut."""

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
"""Headers that belong to one connection, or that this server writes itself."""


class UnreliableProxy:
    """The proxy. `counts` has `requests` and each of FAULTS; `paths` has (method, path with query) of each request."""

    def __init__(
        self, upstream: str, faults: float, seed: int, *, delay_seconds: float = 0.2, kinds: tuple[str, ...] = FAULTS
    ) -> None:
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.faults, self.delay_seconds, self.kinds = faults, delay_seconds, kinds
        self.counts = Counter({"requests": 0, **dict.fromkeys(FAULTS, 0)})
        self.paths: list[tuple[str, str]] = []
        self._random, self._lock = random.Random(seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def num_faults(self) -> int:
        """Requests whose response never arrived whole, so that each must be retried. Late ones do not count."""
        return sum(self.counts[kind] for kind in FAULTS if kind != "delay")

    def draw(self, method: str, path: str) -> str:
        """What happens to the next request: one of FAULTS, or nothing ("")."""
        with self._lock:
            self.counts["requests"] += 1
            self.paths.append((method, path))
            kinds = [kind for kind in self.kinds if kind != "cut" or method == "GET"] or ["reset_after"]
            return self._random.choice(kinds) if self._random.random() < self.faults else ""

    def count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def __enter__(self) -> UnreliableProxy:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: UnreliableProxy

    def _answer(self) -> None:
        if self.path == "/counts":
            self._send(200, [], json.dumps(self.proxy.counts).encode())
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self._send(411, [], b"")  # boto3 gives a length wherever it can
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.draw(self.command, self.path)
        if fault == "slow_down":
            self.proxy.count(fault)
            self._send(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        elif fault == "reset_before":
            self._reset(fault)
        else:
            status, headers, content = self._ask(body)
            if fault == "reset_after" or (fault == "cut" and (self.command == "HEAD" or len(content) < 2)):
                self._reset("reset_after")
                return
            if fault == "delay":
                self.proxy.count(fault)
                time.sleep(self.proxy.delay_seconds)
            if fault == "cut":
                self.proxy.count(fault)
                self._send(status, headers, content[: len(content) // 2], promised=len(content))
                self.close_connection = True
            else:
                self._send(status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
            connection.request(self.command, self.path, body, kept)
            response = connection.getresponse()
            headers = [pair for pair in response.getheaders() if pair[0].lower() not in HOP_BY_HOP]
            length = response.headers.get("Content-Length")
            if self.command == "HEAD" and length is not None:
                headers.append(("Content-Length", length))
            return response.status, headers, response.read()
        finally:
            connection.close()

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content) if promised is None else promised))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self, kind: str) -> None:
        self.proxy.count(kind)
        # Lingering for no time: the kernel sends RST in place of FIN. Closed by its number, as two files still hold the socket.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.close(self.connection.detach())

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client left: a killed process, say
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="address of the S3 server")
    parser.add_argument("--faults", type=float, required=True, help="share of requests that are spoilt")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--delay-seconds", type=float, default=0.2)
    chosen = parser.parse_args()
    proxy = UnreliableProxy(chosen.upstream, chosen.faults, chosen.seed, delay_seconds=chosen.delay_seconds)
    print(proxy.url, flush=True)
    try:
        proxy.server.serve_forever()
    except KeyboardInterrupt:
        print(json.dumps(proxy.counts), flush=True)


if __name__ == "__main__":
    main()
