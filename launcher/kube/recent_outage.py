"""Whether the API server was away a moment ago, so that a refusal may come from one which has just started.

For a second or two after its start a server answers 403 to everybody, until it has read its roles. Makes no requests.
"""

import re
import time

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
