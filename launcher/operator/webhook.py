"""The webhook on the end of a run: its body, and one POST. Does not decide when it is sent, and does not repeat it.

Only who installs the operator names the address. A document cannot: its author could make the operator send requests to
addresses of the cluster.
"""

import hashlib
import hmac
import json
import urllib.parse
from typing import Any

import urllib3

from launcher.resource.object import Object
from launcher.resource.record import Record
from launcher.resource.status import parse_time
from prism_job import __version__

TIMEOUT_SECONDS = 10.0
"""For the connection, and for each part of the answer."""

SIGNATURE, DELIVERY = "X-Prism-Signature-256", "X-Prism-Delivery"


class Webhook:
    """One address.

    Args:
        url: http:// or https://. An https certificate is checked against the system's authorities, or SSL_CERT_FILE.
        secret: key of the signature; empty: the requests are not signed.

    Raises:
        ValueError: not such an address.
    """

    def __init__(self, url: str, secret: str = "", *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError("it begins with https:// or http://, names a host, and has no user and no password")
        self.url, self.secret = url, secret.encode()
        timeout = urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds)
        self.pool = urllib3.PoolManager(cert_reqs="CERT_REQUIRED", timeout=timeout, retries=False)

    def post(self, body: bytes, delivery: str) -> str:
        """One request; redirects are not followed. Returns why it failed; empty where the answer is 2xx."""
        headers = {"Content-Type": "application/json", "User-Agent": f"prism/{__version__}", DELIVERY: delivery}
        if self.secret:
            headers[SIGNATURE] = f"sha256={hmac.new(self.secret, body, hashlib.sha256).hexdigest()}"
        try:
            answer = self.pool.request(
                "POST", self.url, body=body, headers=headers, redirect=False, preload_content=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return str(error)
        answer.close()
        return "" if 200 <= answer.status < 300 else f"HTTP status {answer.status}"


def delivery_id(record: Record) -> str:
    """The same for each repetition: a receiver that has seen it may ignore the request."""
    return f"{record.uid}-{record.status.round}"


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
