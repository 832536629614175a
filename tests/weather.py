"""Bad weather before an S3 server: a proxy (real HTTP) that spoils a seeded share of the requests and counts what it did.

`python -m tests.weather --upstream http://127.0.0.1:5000 --faults 0.2 --seed 1` prints its address and serves until it is
ended; GET /weather on it answers the counts as JSON. In a test: `with Weather(upstream, 0.2, seed=1) as weather: weather.url`.
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
"""503 SlowDown; connection reset before the server was asked; reset after it did what it was asked; answer cut in the middle of
its body; answer late. An answer without a body cannot be cut: it is reset."""

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
"""Headers of one connection, or that this server writes itself."""


class Weather:
    """The proxy. `counts` holds `requests` and each of FAULTS; `paths` what was asked for, as (method, path with query)."""

    def __init__(
        self, upstream: str, faults: float, seed: int, *, delay_seconds: float = 0.2, kinds: tuple[str, ...] = FAULTS
    ) -> None:
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.faults, self.delay_seconds, self.kinds = faults, delay_seconds, kinds
        self.counts = Counter({"requests": 0, **dict.fromkeys(FAULTS, 0)})
        self.paths: list[tuple[str, str]] = []
        self._random, self._lock = random.Random(seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"weather": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def num_faults(self) -> int:
        """Requests whose answer never arrived whole: each must be asked again. Those that were only late are none."""
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

    def __enter__(self) -> Weather:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    weather: Weather

    def _answer(self) -> None:
        if self.path == "/weather":
            self._send(200, [], json.dumps(self.weather.counts).encode())
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self._send(411, [], b"")  # boto3 gives a length wherever it can
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.weather.draw(self.command, self.path)
        if fault == "slow_down":
            self.weather.count(fault)
            self._send(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        elif fault == "reset_before":
            self._reset(fault)
        else:
            status, headers, content = self._ask(body)
            if fault == "reset_after" or (fault == "cut" and (self.command == "HEAD" or len(content) < 2)):
                self._reset("reset_after")
                return
            if fault == "delay":
                self.weather.count(fault)
                time.sleep(self.weather.delay_seconds)
            if fault == "cut":
                self.weather.count(fault)
                self._send(status, headers, content[: len(content) // 2], promised=len(content))
                self.close_connection = True
            else:
                self._send(status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.weather.upstream, timeout=60)
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
        self.weather.count(kind)
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
    weather = Weather(chosen.upstream, chosen.faults, chosen.seed, delay_seconds=chosen.delay_seconds)
    print(weather.url, flush=True)
    try:
        weather.server.serve_forever()
    except KeyboardInterrupt:
        print(json.dumps(weather.counts), flush=True)


if __name__ == "__main__":
    main()
