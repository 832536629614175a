"""When to try again, and when to report an outage. Makes no requests."""

import random
from collections.abc import Callable

from launcher.kube.errors import ClusterError

OUTAGE_FAILURES = 3
"""Failures in a row, about two seconds of them, that are reported: one broken connection is not."""


def growing_pause(failures: int, *, longest_seconds: float) -> float:
    """Seconds before the next try: 0.4 after the first failure, doubled with each, and up to half less by chance."""
    return random.uniform(0.5, 1.0) * min(longest_seconds, 0.2 * 2.0 ** min(failures, 16))


def report_outage(error: ClusterError, failures: int, report: Callable[[str], None]) -> None:
    """Report an outage, once."""
    if failures == OUTAGE_FAILURES:
        report(f"waiting for the API server: {error.what}")
