"""Whether an API server has been away a moment ago, so that a refusal may be that of one which has just started.

For a second or two after its start a server answers 403 to everybody, until it has read its roles. Does not make requests.
"""

from __future__ import annotations

import re
import time

SETTLE_SECONDS = 30.0
"""For so long after a failure, and until the server has answered, a refusal is taken for a transient one."""

ANSWERED_SECONDS = 3.0
"""So long after its first answer a server that has started has read all its roles; it took a real one half a second."""

AUTHORIZER = re.compile(r'User "[^"]*" cannot ')
"""What an authorizer says. A quota, a policy or a webhook says something else, and does so after it: that is no start."""

NO_DISCOVERY = re.compile(r'^forbidden: User "(?!system:anonymous")[^"]*" cannot get path ')
"""The refusal of a path that is no resource. Only the version and what is served are asked for so, which everybody may see who
has logged in: a server that refuses even that has just started."""


class Outage:
    """What is known of the last one. One thread's news are of use to all."""

    def __init__(self) -> None:
        self._failed = float("-inf")
        self._answered: float | None = None

    def note_failure(self) -> None:
        """No answer, or one that says that the server itself is not well."""
        self._failed, self._answered = time.monotonic(), None

    def note_answer(self) -> None:
        """It did what it was asked."""
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
        """Whether a refusal may be that of a server which has just started."""
        if code == 401 or (code == 403 and AUTHORIZER.search(message)):
            return self.is_settling or bool(NO_DISCOVERY.search(message))
        return False
