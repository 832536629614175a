"""The webhook on the end of a run: its body, and one POST. Does not decide when it is sent, and does not repeat it.

Only who installs the operator names the address. A document cannot: its author could make the operator send requests to
addresses of the cluster.
"""

import contextlib
import hashlib
import hmac
import http.client
import json
import socket
import ssl
import threading
import urllib.parse
from dataclasses import dataclass
from typing import Any

from launcher.resource.object import Object
from launcher.resource.record import Record
from launcher.resource.status import parse_time
from prism_job import __version__

TIMEOUT_SECONDS = 10.0
"""For the whole request, from the look-up of the name to the end of the answer's head."""

SIGNATURE, DELIVERY = "X-Prism-Signature-256", "X-Prism-Delivery"
TOO_MANY_REQUESTS = 429


@dataclass(frozen=True)
class Failure:
    """Why a request failed. Never names the address: its path is often what gives the right to post there."""

    error: str
    is_outage: bool
    """No answer, or one that says that the receiver is not well: another end would fare no better now."""


class Webhook:
    """One address.

    Args:
        url: http:// or https://. An https certificate is checked against the system's authorities, or SSL_CERT_FILE.
        secret: key of the signature; empty: the requests are not signed.

    Raises:
        ValueError: not such an address, or a secret with white space around it.
    """

    def __init__(self, url: str, secret: str = "", *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        parts = _split(url)
        if parts is None:
            raise ValueError(
                "it begins with https:// or http://, names a host, a port from 1 to 65535 if any, no user and no password, "
                "and has no white space (a newline at its end?) and only ASCII characters"
            )
        if secret != secret.strip() or not secret.isprintable():
            raise ValueError("PRISM_WEBHOOK_SECRET has white space around it (a newline at its end?) or is no text")
        self.is_https, self.host = parts.scheme == "https", parts.hostname or ""
        self.port = parts.port or (443 if self.is_https else 80)
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.secret, self.timeout_seconds = secret.encode(), timeout_seconds

    def post(self, body: bytes, delivery: str) -> Failure | None:
        """One request; redirects are not followed. None where the answer is 2xx."""
        headers = {"Content-Type": "application/json", "User-Agent": f"prism/{__version__}", DELIVERY: delivery}
        if self.secret:
            headers[SIGNATURE] = f"sha256={hmac.new(self.secret, body, hashlib.sha256).hexdigest()}"
        request = _Request(self.connection(), self.target, body, headers)
        request.start()
        request.join(self.timeout_seconds)
        request.stop()
        if request.status is None:
            return Failure(request.error or f"no answer within {self.timeout_seconds:g} s", is_outage=True)
        if 200 <= request.status < 300:
            return None
        is_outage = request.status >= 500 or request.status == TOO_MANY_REQUESTS
        return Failure(f"HTTP status {request.status}", is_outage)

    def connection(self) -> http.client.HTTPConnection:
        """Not connected yet."""
        if self.is_https:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout_seconds, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_seconds)


class _Request(threading.Thread):
    """One request in a thread of its own: a socket's timeout bounds neither the look-up of a name, nor the tries of all its
    addresses, nor an answer that comes byte by byte."""

    def __init__(
        self, connection: http.client.HTTPConnection, target: str, body: bytes, headers: dict[str, str]
    ) -> None:
        super().__init__(name="webhook request", daemon=True)
        self.connection, self.target, self.body, self.headers = connection, target, body, headers
        self.status: int | None = None
        self.error = ""
        self.is_stopped = False

    def run(self) -> None:
        try:
            self.connection.connect()
            if not self.is_stopped:
                self.connection.request("POST", self.target, self.body, self.headers)
                status = self.connection.getresponse().status
                self.status = None if self.is_stopped else status  # `stop` would make an unfinished head a whole one
        except OSError as error:  # names the host at most
            self.error = str(error)
        except http.client.HTTPException as error:  # its text is the receiver's
            self.error = f"not an answer of HTTP ({type(error).__name__})"
        finally:
            self.connection.close()

    def stop(self) -> None:
        """Wakes the thread where it waits for the answer. Before that, each of its steps ends by itself."""
        self.is_stopped = True
        if self.is_alive() and (connected := self.connection.sock):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def _split(url: str) -> urllib.parse.SplitResult | None:
    """None: not an address that can be posted to."""
    if not (url.isascii() and url.isprintable()) or " " in url:  # urlsplit would drop a newline
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        (parts.hostname or "").encode("idna")
        has_port = parts.port != 0
    except ValueError:
        return None
    return (
        parts if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and has_port else None
    )


def delivery_id(record: Record) -> str:
    """The same for each repetition: a receiver that has seen it may ignore the request.

    With the time of the end: a round whose document is rejected ends again if a later version of the operator runs it.
    """
    status = record.status
    ended = int(parse_time(status.completion_time).timestamp()) if status.completion_time else 0
    return f"{record.uid}-{status.round}-{ended}"


def body_of(record: Record) -> bytes:
    """The end of a run as JSON (docs/cluster.md). Every key is always there; null: it has no value."""
    return json.dumps(end_of(record), ensure_ascii=False).encode()


def end_of(record: Record) -> Object:
    status = record.status
    condition = status.condition("Complete" if status.phase == "Complete" else "Failed")
    seconds: float | None = None
    if status.start_time and status.completion_time:
        seconds = (parse_time(status.completion_time) - parse_time(status.start_time)).total_seconds()
    folders = (status.manifest or "").split("/")
    facts: dict[str, Any] = {
        "event": "RunEnded",
        "name": record.name,
        "namespace": record.namespace,
        "uid": record.uid,
        "round": status.round,
        "phase": status.phase,
        "reason": condition.reason if condition else None,
        "message": status.message,
        "manifest": status.manifest,
        "selectionId": folders[-2] if len(folders) > 1 else None,
        "selected": status.selected,
        "candidates": status.examples,
        "startTime": status.start_time,
        "completionTime": status.completion_time,
        "durationSeconds": None if seconds is None else int(seconds),
        "gpuHours": round(status.gpu_hours, 4),
        "gpu": status.gpu,
        "price": status.price,
    }
    return facts
