"""One request, parsed; and which requests go wrong, and how. Knows no stored object."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.cluster.server.kinds.resources import Resource


@dataclass(frozen=True)
class Request:
    """One request, parsed. `verb` is the API's word (create, list, watch…), `method` HTTP's."""

    method: str
    path: str
    query: dict[str, str]
    user_agent: str
    verb: str = ""
    resource: Resource | None = None
    namespace: str = ""
    name: str = ""
    subresource: str = ""
    body: Any = None
    content_type: str = ""
    accept: str = ""

    @property
    def kind(self) -> Resource:
        """The resource of a request for one."""
        assert self.resource
        return self.resource

    @property
    def plural(self) -> str:
        """`jobs`, `jobs/status`; the path where no resource is asked for."""
        if not self.resource:
            return self.path
        return f"{self.resource.plural}/{self.subresource}" if self.subresource else self.resource.plural

    @property
    def dry_run(self) -> bool:
        inside = self.body.get("dryRun") if isinstance(self.body, dict) and self.verb.startswith("delete") else None
        return bool(self.query.get("dryRun") or inside)

    @property
    def manager(self) -> str:
        return self.query.get("fieldManager") or self.user_agent.partition("/")[0] or "unknown"


Predicate = Callable[[Request], bool] | dict[str, str] | None
Action = str | Callable[[Request], Any]


def _matches(predicate: Predicate, request: Request) -> bool:
    if predicate is None:
        return True
    if callable(predicate):
        return predicate(request)
    return all(getattr(request, name) == value for name, value in predicate.items())


class Faults:
    """Which requests go wrong, and how. An action is one of KINDS, or a function called before the request is served.

    `rain` spoils a seeded share of requests; `script` names single ones: each entry is used once, by the first request that
    it fits. `counts` says what was done.
    """

    KINDS = ("429", "500", "503", "409", "410", "reset_before", "reset_after", "delay", "drop_watch", "gone_watch")
    """409 only for PUT and PATCH; reset_after: done, but the answer is lost; the watch kinds end a watch within about a second,
    by a closed connection or an ERROR event of 410. A delay may say its seconds: `delay:0.5`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """No faults from here on."""
        with self._lock:
            self._shares: dict[str, float] = {}
            self._only: str | Predicate = None
            self._script: list[tuple[Predicate, Action]] = []
            self._random = random.Random(0)
            self.delay_seconds, self.retry_after_seconds = 0.2, 1

    def rain(
        self, shares: dict[str, float], *, seed: int = 0, only: str | Predicate = None, delay_seconds: float = 0.2
    ) -> None:
        """Each kind in `shares` befalls that share of requests. `only`: the user agents that begin so, or a predicate."""
        if unknown := {kind for kind in shares if kind.partition(":")[0] not in self.KINDS}:
            raise ValueError(f"{sorted(unknown)} are no faults; there are {', '.join(self.KINDS)}")
        with self._lock:
            self._shares, self._only, self._random = dict(shares), only, random.Random(seed)
            self.delay_seconds = delay_seconds

    def script(self, entries: list[tuple[Predicate, Action]]) -> None:
        """Adds entries to those still waiting for their request. Raises ValueError for an action that is none."""
        for _, action in entries:
            if isinstance(action, str) and action.partition(":")[0] not in self.KINDS:
                raise ValueError(f"{action!r} is no fault; there are {', '.join(self.KINDS)}")
        with self._lock:
            self._script += entries

    @property
    def pending(self) -> int:
        """Scripted entries that no request has met yet."""
        return len(self._script)

    def draw(self, request: Request) -> Action:
        """What befalls this request; "" for nothing."""
        with self._lock:
            for place, (predicate, action) in enumerate(self._script):
                if _matches(predicate, request):
                    del self._script[place]
                    self.counts[action if isinstance(action, str) else "call"] += 1
                    return action
            if not self._shares or not self._meant(request):
                return ""
            point = self._random.random()
            for kind, share in self._shares.items():
                if _applies(kind, request):
                    if point < share:
                        self.counts[kind] += 1
                        return kind
                    point -= share
            return ""

    def _meant(self, request: Request) -> bool:
        if isinstance(self._only, str):
            return request.user_agent.startswith(self._only)
        return _matches(self._only, request)


def _applies(kind: str, request: Request) -> bool:
    if kind == "409":
        return request.method in ("PUT", "PATCH")
    return request.verb == "watch" if kind.endswith("_watch") else True


class Requests(Counter[tuple[str, str]]):
    """Requests served, by (LIST, WATCH or the HTTP method, plural with subresource)."""

    def reset(self) -> None:
        self.clear()

    def writes(self, plural: str = "") -> int:
        """POST, PUT, PATCH and DELETE, of one plural or of all."""
        methods = ("POST", "PUT", "PATCH", "DELETE")
        return sum(n for (method, name), n in self.items() if method in methods and plural in ("", name))
