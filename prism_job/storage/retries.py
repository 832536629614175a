"""Retries after transient errors: how often, how long apart, and how many there were. Does not know the requests.

There are no other retries: boto3's own are switched off, so that these limits hold.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from prism_job.errors import TransientError

MAX_TRIES = 10
"""With a fifth of all requests failing, ten failures in a row come once in ten million requests."""

FIRST_WAIT_SECONDS = 0.25
MAX_WAIT_SECONDS = 8.0
"""Waits double from the first to the second; up to as much again is added at random, so that ranks which failed together
do not retry together. Nine waits take 40 to 80 s."""

MAX_SECONDS = 120.0
"""No try begins later than this: a server that accepts requests and never answers (30 s each) gets three or four."""

Response = TypeVar("Response")


def with_retries(request: Callable[[], Response], cancelled: threading.Event | None = None) -> Response:
    """Call `request` until it raises no TransientError, or `cancelled` is set. Other errors pass: they would come again.

    Raises TransientError: the last one, with the number of tries and the seconds they took in its text.
    """
    cancelled = cancelled or threading.Event()
    started = time.monotonic()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        wait=tenacity.wait_exponential(FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS)
        + tenacity.wait_random_exponential(FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS),
        stop=tenacity.stop_any(
            tenacity.stop_after_attempt(MAX_TRIES),
            tenacity.stop_after_delay(MAX_SECONDS),
            tenacity.stop_when_event_set(cancelled),
        ),
        sleep=tenacity.sleep_using_event(cancelled),
        before_sleep=lambda _: _retries.add(),
        reraise=True,
    )
    try:
        return retrying(request)
    except TransientError as error:
        tries, seconds = retrying.statistics["attempt_number"], time.monotonic() - started
        what = f"{error.what} ({tries} tries in {seconds:.0f} s)"
        raise TransientError(what, where=error.where, fix=error.fix) from error


def num_retries() -> int:
    """Retries of this process so far."""
    return _retries.total


class _Tally:
    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.total += 1


_retries = _Tally()
