"""Outages of the API server: when to try again and when to report one, and whether a refusal may come from a server that
has just started. For a second or two it then answers 403 to everybody, until it has read its roles. Makes no requests.
"""

import random
import re
import time
from collections.abc import Callable

from launcher.kube.errors import ClusterError

SETTLE_SECONDS = 30.0
"""For so long after a failure, and until the server has answered, a refusal counts as transient."""

ANSWERED_SECONDS = 3.0
"""So long after its first answer a server that has started has read all its roles; it took a real one half a second."""

AUTHORIZER = re.compile(r'User "[^"]*" cannot ')
"""In each refusal of an authorizer. A quota, a policy or a webhook refuses otherwise, and only once the roles are read."""

NO_DISCOVERY = re.compile(r'^forbidden: User "(?!system:anonymous")[^"]*" cannot get path ')
"""The refusal of a path that is no resource. The launcher reads only discovery and the version so, which every user who has
logged in may read: a server that refuses even that has just started."""


class RecentOutage:
    """What is known of the last outage. What one thread notes, all use."""

    def __init__(self) -> None:
        self._failed = float("-inf")
        self._answered: float | None = None

    def note_failure(self) -> None:
        """No answer, or one that shows that the server itself is not well."""
        self._failed, self._answered = time.monotonic(), None

    def note_answer(self) -> None:
        """The server did what it was asked."""
        if self._answered is None:
            self._answered = time.monotonic()

    @property
    def is_settling(self) -> bool:
        """Whether the server was away a moment ago, and may not have read its roles yet."""
        now = time.monotonic()
        return now < self._failed + SETTLE_SECONDS and (
            self._answered is None or now < self._answered + ANSWERED_SECONDS
        )

    def explains(self, code: int, message: str) -> bool:
        """Whether a refusal may come from a server which has just started."""
        if code == 401 or (code == 403 and AUTHORIZER.search(message)):
            return self.is_settling or bool(NO_DISCOVERY.search(message))
        return False


OUTAGE_FAILURES = 3
"""Failures in a row, about two seconds of them, that are reported: one broken connection is not."""


def growing_pause(failures: int, *, longest_seconds: float) -> float:
    """Seconds before the next try: 0.4 after the first failure, doubled with each, and up to half less by chance."""
    return random.uniform(0.5, 1.0) * min(longest_seconds, 0.2 * 2.0 ** min(failures, 16))


def report_outage(error: ClusterError, failures: int, report: Callable[[str], None]) -> None:
    """Report an outage, once."""
    if failures == OUTAGE_FAILURES:
        report(f"waiting for the API server: {error.what}")
