"""Bad weather, waited out: what is asked again, how often, how long apart; and how many retries there were. Not: what is asked.

The only retries there are: boto3's own are switched off, so that their number and their span are the ones written here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from prism_job.errors import TransientError

TRIES = 10
"""The first and nine more. With a fifth of all answers bad, ten bad ones in a row come once in ten million requests."""

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 8.0
"""A wait begins at the first figure and doubles up to the second; as much again is added at random, so that ranks which failed
together do not come back together. Nine waits: 40 s at least, 80 s at most, 60 s in the mean."""

LONGEST_SECONDS = 120.0
"""No try begins after this long: a peer that takes requests and stays silent (30 s each) is asked three or four times."""

Answer = TypeVar("Answer")


def with_retries(ask: Callable[[], Answer], given_up: threading.Event | None = None) -> Answer:
    """What `ask` returns, asked again after TransientError. Any other error passes at once: the same request would fail alike.

    `given_up`, once set, ends the waiting.

    Raises:
        TransientError: the last one, with the number of tries and the seconds they took in its words.
    """
    given_up = given_up or threading.Event()
    started = time.monotonic()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        wait=tenacity.wait_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
        + tenacity.wait_random_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS),
        stop=tenacity.stop_any(
            tenacity.stop_after_attempt(TRIES),
            tenacity.stop_after_delay(LONGEST_SECONDS),
            tenacity.stop_when_event_set(given_up),
        ),
        sleep=tenacity.sleep_using_event(given_up),
        before_sleep=lambda _: _retries.add(),
        reraise=True,
    )
    try:
        return retrying(ask)
    except TransientError as error:
        tries, seconds = retrying.statistics["attempt_number"], time.monotonic() - started
        what = f"{error.what} ({tries} tries in {seconds:.0f} s)"
        raise TransientError(what, where=error.where, fix=error.fix) from error


def num_retries() -> int:
    """Requests of this process that had to be asked again, so far."""
    return _retries.total


class _Tally:
    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.total += 1


_retries = _Tally()
