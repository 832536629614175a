"""How the rig's controllers see and ask an API server: requests, a mirror of each kind (list, then watch), a work queue.

Knows nothing of what the objects mean. Survives transient errors (429, 5xx, a dead connection, 410).
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config

Key = tuple[str, str]
"""Namespace and name; the namespace of a Node is empty."""
Thing = dict[str, Any]
"""An API object. What a mirror hands out is shared: copy it before changing it."""
Anything = TypeVar("Anything", bound=Hashable)

TRIES = 6
WATCH_SECONDS = 300
MAX_PAUSE_SECONDS = 1.0


class Refused(Exception):
    """The API server said no, and would say so again: 403, 404, 409, 422. `status` is the HTTP status."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class Unreachable(Exception):
    """No answer after all tries."""


def key_of(thing: Thing) -> Key:
    return thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def uid_of(thing: Thing) -> str:
    return str(thing["metadata"]["uid"])


def stamp(seconds: float) -> str:
    """A time in the API's form, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Api:
    """One API server, asked as user agent `rig/<name>`."""

    def __init__(self, kubeconfig: Path, name: str) -> None:
        settings = client.Configuration()
        config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings)
        self._url = str(settings.host).rstrip("/")
        self._pool = client.ApiClient(settings).rest_client.pool_manager
        self._headers = {"User-Agent": f"rig/{name}", "Accept": "application/json"}
        for token in settings.auth_settings().values():
            self._headers[token["key"]] = token["value"]
        self.name = name
        self.stopping = threading.Event()

    def ask(self, method: str, path: str, body: Thing | None = None, **query: str | int) -> Thing:
        """The answer as an object. Transient errors are retried for about two seconds.

        Raises:
            Refused: by the API server, for good.
            Unreachable: no try succeeded.
        """
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        for attempt in range(TRIES):
            if attempt and self.stopping.wait(0.05 * 2**attempt):
                break
            try:
                answer = self._pool.request(
                    method,
                    f"{self._url}{path}" + (f"?{urlencode(query)}" if query else ""),
                    body=None if body is None else json.dumps(body),
                    headers={**self._headers, "Content-Type": kind},
                    retries=False,
                    timeout=urllib3.Timeout(connect=2, read=15),
                )
            except urllib3.exceptions.HTTPError as error:
                why = repr(error)
                continue
            if answer.status == 429 or answer.status >= 500:
                why = f"{answer.status}: {answer.data[:200]!r}"
                continue
            if answer.status >= 400:
                raise _refusal(answer)
            said: Thing = json.loads(answer.data) if answer.data else {}
            return said
        else:
            raise Unreachable(f"{method} {path}: {why}")
        raise Unreachable(f"{method} {path}: stopping")

    def is_ready(self) -> bool:
        """What /readyz says now; False where nobody answers."""
        try:
            answer = self._pool.request(
                "GET", f"{self._url}/readyz", headers=self._headers, retries=False, timeout=urllib3.Timeout(5)
            )
        except urllib3.exceptions.HTTPError:
            return False
        return bool(answer.status == 200)

    def watch(self, path: str, version: str, opened: Callable[[Any], None]) -> Iterator[Thing]:
        """The events after `version`, until the server ends them. `opened` gets the open answer, to cut it short."""
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": WATCH_SECONDS}
        answer = self._pool.request(
            "GET",
            f"{self._url}{path}?{urlencode({**query, 'allowWatchBookmarks': 'true'})}",
            headers=self._headers,
            retries=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=2, read=WATCH_SECONDS + 30),
        )
        try:
            opened(answer)
            if answer.status >= 400:
                raise Refused(answer.status, "watch", answer.data[:200].decode(errors="replace"))
            rest = b""
            while chunk := answer.read1(2**16):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines if line.strip())
        finally:
            answer.close()


def _refusal(answer: Any) -> Refused:
    """An unknown API group is answered in plain text."""
    try:
        said = json.loads(answer.data)
    except ValueError:
        return Refused(answer.status, "", answer.data[:200].decode(errors="replace"))
    return Refused(answer.status, str(said.get("reason")), str(said.get("message")))


class Mirror:
    """What one kind looks like now: list, watch, and list again after any end of the watch.

    `changed` is called with each object that came, changed or went, from the mirror's own thread or that of `put`.
    """

    def __init__(self, api: Api, path: str, changed: Callable[[Thing], None]) -> None:
        self._api, self._path, self._changed = api, path, changed
        self._objects: dict[Key, Thing] = {}
        self._gone: dict[str, None] = {}  # uids, so that an answer that comes late raises no ghost
        self._lock = threading.Lock()
        self._answer: Any = None
        self.synced = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{api.name} {path}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After `api.stopping` was set."""
        if self._answer is not None:
            with contextlib.suppress(ValueError):  # it has just ended by itself
                self._answer.shutdown()
        if self._thread.is_alive():
            self._thread.join(5)

    def get(self, key: Key) -> Thing | None:
        with self._lock:
            return self._objects.get(key)

    def all(self) -> list[Thing]:
        with self._lock:
            return list(self._objects.values())

    def put(self, thing: Thing) -> None:
        """What an answer to a write showed: seen at once, before the watch brings it."""
        if "resourceVersion" not in thing.get("metadata", {}) or thing.get("kind") == "Status":
            return
        with self._lock:
            before = self._objects.get(key_of(thing))
            if uid_of(thing) in self._gone or (before is not None and _version(before) >= _version(thing)):
                return
            self._objects[key_of(thing)] = thing
        self._changed(thing)

    def _drop(self, thing: Thing) -> None:
        with self._lock:
            self._gone[uid_of(thing)] = None
            if len(self._gone) > 10_000:
                self._gone.pop(next(iter(self._gone)))
            before = self._objects.get(key_of(thing))
            if before is not None and uid_of(before) == uid_of(thing):
                del self._objects[key_of(thing)]
        self._changed(thing)

    def _run(self) -> None:
        pause = 0.05
        while not self._api.stopping.is_set():
            started = time.monotonic()
            try:
                self._list_and_watch()
            except (Refused, Unreachable, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                if pause >= MAX_PAUSE_SECONDS:
                    print(f"rig/{self._api.name}: {self._path}: {error!r}", file=sys.stderr)
            # A watch that lived was good; one that ends at once must not become a busy loop.
            pause = 0.05 if time.monotonic() - started > 2 else min(2 * pause, MAX_PAUSE_SECONDS)
            self._api.stopping.wait(pause)

    def _list_and_watch(self) -> None:
        listed = self._api.ask("GET", self._path)
        version = listed["metadata"]["resourceVersion"]
        items = listed.get("items") or []
        present = {uid_of(item) for item in items}
        for thing in self.all():
            if uid_of(thing) not in present and _version(thing) <= int(version):
                self._drop(thing)
        for item in items:
            self.put(item)
        self.synced.set()
        for event in self._api.watch(self._path, version, self._opened):
            if event["type"] == "ERROR":
                return
            if event["type"] == "DELETED":
                self._drop(event["object"])
            elif event["type"] != "BOOKMARK":
                self.put(event["object"])

    def _opened(self, answer: Any) -> None:
        self._answer = answer
        if self._api.stopping.is_set():
            answer.shutdown()


def _version(thing: Thing) -> int:
    return int(thing["metadata"]["resourceVersion"])


class Queue(Generic[Anything]):
    """Keys to look at, each once, the earliest asked time winning. One thread works it off, so no key meets itself."""

    def __init__(self) -> None:
        self._due: dict[Anything, float] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def add(self, key: Anything, after_seconds: float = 0.0) -> None:
        due = time.monotonic() + after_seconds
        with self._changed:
            if due < self._due.get(key, float("inf")):
                self._due[key] = due
                self._changed.notify()

    def get(self) -> Anything | None:
        """The next key once its time has come; None after `stop`."""
        with self._changed:
            while not self._stopped:
                key = min(self._due, key=self._due.__getitem__, default=None)
                left = None if key is None else self._due[key] - time.monotonic()
                if key is not None and left is not None and left <= 0:
                    del self._due[key]
                    return key
                self._changed.wait(left)
        return None

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Controller:
    """One thread that brings one key after another to what it should be. A subclass says how, in `sync`."""

    def __init__(self, kubeconfig: Path, name: str) -> None:
        self.api = Api(kubeconfig, name)
        self.queue: Queue[Key] = Queue()
        self.mirrors: list[Mirror] = []
        self._setbacks: dict[Key, int] = {}
        self._events: dict[tuple[str, str, str], tuple[str, int]] = {}
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def mirror(self, path: str, changed: Callable[[Thing], None]) -> Mirror:
        self.mirrors.append(Mirror(self.api, path, changed))
        return self.mirrors[-1]

    def sync(self, key: Key) -> None:
        raise NotImplementedError

    def start(self) -> None:
        for mirror in self.mirrors:
            mirror.start()
        for mirror in self.mirrors:
            if not mirror.synced.wait(30):
                raise Unreachable(f"rig/{self.api.name}: the API server lists nothing")
        self._thread.start()

    def stop(self) -> None:
        self.api.stopping.set()
        self.queue.stop()
        if self._thread.is_alive():
            self._thread.join(20)
        for mirror in self.mirrors:
            mirror.stop()

    def _run(self) -> None:
        while (key := self.queue.get()) is not None:
            try:
                self.sync(key)
                self._setbacks.pop(key, None)
            except (Refused, Unreachable) as error:
                # 409 and 404 are the normal course: the mirror was a moment behind.
                setbacks = self._setbacks[key] = self._setbacks.get(key, 0) + 1
                if setbacks > 5:
                    print(f"rig/{self.api.name}: {key}: {error}", file=sys.stderr)
                self.queue.add(key, min(0.05 * 2**setbacks, 5.0))
            except Exception:  # our own mistake: loud, and the other keys go on
                traceback.print_exc()
                self.queue.add(key, 5.0)

    def tell(self, about: Thing, kind: str, reason: str, message: str, *, warning: bool = False) -> None:
        """An Event; the same one again counts up. Events may get lost."""
        same = (uid_of(about), reason, message)
        name, count = self._events.get(same, (f"{about['metadata']['name']}.{uuid.uuid4().hex[:16]}", 0))
        namespace = about["metadata"].get("namespace") or "default"
        path, now = f"/api/v1/namespaces/{namespace}/events", stamp(time.time())
        involved = {"kind": kind, "apiVersion": "batch/v1" if kind == "Job" else "v1", "uid": uid_of(about)}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {**involved, "namespace": about["metadata"].get("namespace"), "name": key_of(about)[1]},
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message,
            "count": count + 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": self.api.name},
            "reportingComponent": self.api.name,
        }
        try:
            if count:
                self.api.ask("PATCH", f"{path}/{name}", {"count": count + 1, "lastTimestamp": now})
            else:
                self.api.ask("POST", path, event)
            self._events[same] = (name, count + 1)
        except (Refused, Unreachable):
            self._events.pop(same, None)


def owned_by(thing: Thing) -> Mapping[str, Any] | None:
    """The owner reference of the controller, if there is one."""
    return next((o for o in thing["metadata"].get("ownerReferences") or [] if o.get("controller")), None)
