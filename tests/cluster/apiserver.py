"""A Kubernetes API server of our own, over real HTTP: it stores objects, tells watchers, judges writes and collects orphans.

It starts nothing and schedules nothing: Jobs and pods come to life through clients of this server. It knows nothing of
PRISM. `python -m tests.cluster.apiserver --port 8001 --kubeconfig FILE` serves until it is ended; /__requests counts what was
asked of it.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import heapq
import http.server
import itertools
import json
import marshal
import random
import re
import select
import socket
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import openapi, podsecurity
from tests.cluster.authorization import Attempt, User, allowed, refusal, review, user_of
from tests.cluster.openapi import Cause, Resource

Object = dict[str, Any]
Place = tuple[str, str, str, str]
"""Where an object lies: group, plural, namespace (empty for those of the cluster), name."""

FIRST_VERSION = 1000
"""Versions start here, so that '1' is one that a server has long forgotten."""
HISTORY = 20_000
"""Changes of one kind that can still be watched."""
MAX_OBJECT_BYTES, MAX_REQUEST_BYTES = 1_500_000, 3 * 1024**2
"""What etcd takes, and what the server reads at all."""
COLLECT_AFTER_SECONDS = 0.1
BLOCKING = {f"FieldValue{what}" for what in ("NotSupported", "Required", "TooLong", "TooMany", "TypeInvalid")}
"""What a schema has against an object, so that its rules are not asked any more."""
UNCHECKED = Cause(
    "FieldValueInvalid",
    "<nil>",
    "Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation",
)
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


class ApiError(Exception):
    """An answer that is no success. `status` is the body that says so; a `reason` of "" is left out."""

    def __init__(self, code: int, message: str, *, reason: str | None = None, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        reason = REASONS.get(code, "") if reason is None else reason
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            **({"reason": reason} if reason else {}),
            **({} if details is None else {"details": details}),
            "code": code,
        }


class PageNotFound(Exception):
    """What no part of the server serves: 404 in plain text."""


def _invalid(resource: Resource, name: str, causes: list[Cause]) -> ApiError:
    texts = list(dict.fromkeys(f"{cause.field}: {cause.message}" for cause in causes))
    text = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    qualified = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    listed = [{"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes]
    details = {**_about(resource, name), "kind": resource.kind, "causes": listed}
    return ApiError(422, f'{qualified} "{name}" is invalid: {text}', details=details)


def _about(resource: Resource, name: str) -> Object:
    found = {"name": name, "group": resource.group, "kind": resource.plural}
    return {key: value for key, value in found.items() if value}


def _not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(404, f'{resource.qualified} "{name}" not found', details=_about(resource, name))


def _conflict(resource: Resource, name: str, text: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {text}'
    return ApiError(409, message, details=_about(resource, name))


def _unconditional(resource: Resource, name: str) -> ApiError:
    message = "Invalid value: 0: must be specified for an update"
    error = _invalid(resource, name, [Cause("FieldValueInvalid", "metadata.resourceVersion", message)])
    error.status["details"]["kind"] = resource.plural
    error.status["message"] = f'{resource.qualified} "{name}" is invalid: metadata.resourceVersion: {message}'
    return error


def _another_uid(resource: Resource, request: Request, wanted: str, found: str) -> str:
    key = f"/registry/{resource.plural}/{request.namespace}/{request.name}"
    uids = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
    return f"StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: {uids}"


def _other_there(resource: Resource, name: str, wanted: str, found: str) -> ApiError:
    """A deletion that means another object of that name. Names the kind, not the resource."""
    text = f"the UID in the precondition ({wanted}) does not match the UID in record ({found})."
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    message = f'Operation cannot be fulfilled on {kind} "{name}": {text} The object might have been deleted and then recreated'
    return ApiError(409, message, details={**_about(resource, name), "kind": resource.kind})


def _undecodable(resource: Resource, text: str) -> ApiError:
    kind = resource.kind
    return ApiError(400, f'{kind} in version "{resource.version}" cannot be handled as a {kind}: {text}')


def _forbidden(resource: Resource, name: str, text: str) -> ApiError:
    return ApiError(403, f'{resource.qualified} "{name}" is forbidden: {text}', details=_about(resource, name))


def _stamp(after_seconds: float = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=after_seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _copy(value: Any) -> Any:
    return marshal.loads(marshal.dumps(value))


# What is asked


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
        """Fine weather."""
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


# What is stored


@dataclass(frozen=True)
class Change:
    """One change of one object: `new` is its last state where `kind` is DELETED."""

    version: int
    kind: str
    new: Object
    old: Object | None


class Store:
    """Objects by place, a history of changes a kind, and who owns whom. The caller holds `lock`; objects are never changed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.version = FIRST_VERSION
        self.oldest = FIRST_VERSION
        self.forgotten: dict[tuple[str, str], int] = {}
        self.objects: dict[tuple[str, str], dict[tuple[str, str], Object]] = {}
        self.history: dict[tuple[str, str], list[Change]] = {}
        self.changed: dict[tuple[str, str], threading.Condition] = {}
        self.places: dict[str, Place] = {}
        self.children: dict[str, set[Place]] = {}
        self.listeners: list[Callable[[Place, Object | None, Object | None], None]] = []

    def condition(self, key: tuple[str, str]) -> threading.Condition:
        """Told of each change of a kind."""
        return self.changed.setdefault(key, threading.Condition(self.lock))

    def get(self, key: tuple[str, str], namespace: str, name: str) -> Object | None:
        return self.objects.get(key, {}).get((namespace, name))

    def list(self, key: tuple[str, str], namespace: str | None = None) -> list[Object]:
        """A kind's objects by namespace and name; of one namespace, or (None) of all."""
        found = self.objects.get(key, {})
        return [found[place] for place in sorted(found) if namespace in (None, place[0])]

    def commit(self, key: tuple[str, str], old: Object | None, new: Object | None) -> Object:
        """Stores `new` (None: removes `old`) under the next version, and tells watchers. Returns what they saw."""
        self.version += 1
        seen = new if new is not None else old
        assert seen is not None
        seen = {**seen, "metadata": {**seen["metadata"], "resourceVersion": str(self.version)}}
        metadata = seen["metadata"]
        place = (*key, metadata.get("namespace", ""), metadata["name"])
        for reference in (old or {}).get("metadata", {}).get("ownerReferences", ()):
            siblings = self.children.get(reference["uid"], set())
            siblings.discard(place)
            if not siblings:
                self.children.pop(reference["uid"], None)
        stored = self.objects.setdefault(key, {})
        if new is None:
            del stored[place[2:]]
            self.places.pop(metadata["uid"], None)
        else:
            stored[place[2:]] = seen
            self.places[metadata["uid"]] = place
            for reference in metadata.get("ownerReferences", ()):
                self.children.setdefault(reference["uid"], set()).add(place)
        kind = "DELETED" if new is None else "MODIFIED" if old else "ADDED"
        changes = self.history.setdefault(key, [])
        changes.append(Change(self.version, kind, seen, old))
        if len(changes) > 2 * HISTORY:
            self.forgotten[key] = changes[HISTORY - 1].version
            del changes[:HISTORY]
        self.condition(key).notify_all()
        for listener in self.listeners:
            listener(place, old, None if new is None else seen)
        return seen


class _Collector:
    """Deletes what has lost its owner, what lies in a namespace that ends, and instances of a definition that goes."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.store = server, server.store
        self._due: list[tuple[float, int, str, Any]] = []
        self._count = itertools.count()
        self._wake = threading.Condition(self.store.lock)
        self._ended = False
        self.store.listeners.append(self._see)
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()

    def _later(self, kind: str, what: Any) -> None:
        heapq.heappush(self._due, (time.monotonic() + COLLECT_AFTER_SECONDS, next(self._count), kind, what))
        self._wake.notify()

    def _see(self, place: Place, old: Object | None, new: Object | None) -> None:
        before, after = (old or {}).get("metadata", {}), (new or {}).get("metadata", {})
        if after.get("ownerReferences") and after.get("ownerReferences") != before.get("ownerReferences"):
            self._later("child", place)
        if new is None:
            for child in self.store.children.get(before["uid"], ()):
                self._later("child", child)
            for reference in before.get("ownerReferences", ()):
                if owner := self.store.places.get(reference["uid"]):
                    self._later("owner", owner)
            if place[2] and (space := self.store.get(("", "namespaces"), "", place[2])) and _ending(space):
                self._later("namespace", place[2])
        elif "deletionTimestamp" in after and "deletionTimestamp" not in before:
            kind = "namespace" if place[1] == "namespaces" else "owner"
            self._later(kind, place if kind == "owner" else place[3])

    def _run(self) -> None:
        with self._wake:
            while not self._ended:
                if not self._due:
                    self._wake.wait()
                elif (wait := self._due[0][0] - time.monotonic()) > 0:
                    self._wake.wait(wait)
                else:
                    _, _, kind, what = heapq.heappop(self._due)
                    with contextlib.suppress(ApiError):
                        getattr(self, f"_{kind}")(what)

    def _get(self, place: Place) -> Object | None:
        return self.store.get(place[:2], place[2], place[3])

    def _delete(self, place: Place, policy: str = "Background") -> None:
        item = self._get(place)
        resource = self.server.resource_at(place[:2])
        if item and resource and not _ending(item):
            self.server.remove(resource, item, policy=policy)

    def _child(self, place: Place) -> None:
        item = self._get(place)
        references = item["metadata"].get("ownerReferences", []) if item else []
        if not item or not references:
            return
        present = []
        for reference in references:
            owner = self.store.places.get(reference["uid"])
            if owner and owner[2] in ("", place[2]):
                present.append(reference)
        if not present:
            self._delete(place)
        elif len(present) < len(references):
            self.store.commit(place[:2], item, _owned_by(item, present))

    def _owner(self, place: Place) -> None:
        item = self._get(place)
        if not item or not _ending(item) or "foregroundDeletion" not in item["metadata"].get("finalizers", ()):
            return
        uid, blocked = item["metadata"]["uid"], False
        for child in tuple(self.store.children.get(uid, ())):
            self._delete(child, "Foreground" if self._has_children(child) else "Background")
            left = self._get(child)
            blocked |= bool(left) and any(
                reference["uid"] == uid and reference.get("blockOwnerDeletion")
                for reference in (left or {})["metadata"].get("ownerReferences", ())
            )
        if not blocked:
            self._release(place, item, "foregroundDeletion")

    def _has_children(self, place: Place) -> bool:
        item = self._get(place)
        return bool(item and self.store.children.get(item["metadata"]["uid"]))

    def _release(self, place: Place, item: Object, finalizer: str) -> None:
        left = [name for name in item["metadata"].get("finalizers", ()) if name != finalizer]
        metadata = {name: value for name, value in item["metadata"].items() if name != "finalizers"}
        new = {**item, "metadata": {**metadata, **({"finalizers": left} if left else {})}}
        seen = self.store.commit(place[:2], item, new)
        if not left and not metadata.get("deletionGracePeriodSeconds"):
            self.store.commit(place[:2], seen, None)

    def _namespace(self, name: str) -> None:
        space = self.store.get(("", "namespaces"), "", name)
        if not space or not _ending(space):
            return
        inside = [(*key, *place) for key, found in self.store.objects.items() for place in found if place[0] == name]
        for place in inside:
            self._delete(place)
        if not any(self._get(place) for place in inside):
            self.store.commit(("", "namespaces"), space, None)


def _owned_by(item: Object, references: list[Object]) -> Object:
    metadata = {name: value for name, value in item["metadata"].items() if name != "ownerReferences"}
    return {**item, "metadata": {**metadata, **({"ownerReferences": references} if references else {})}}


def _ending(item: Object) -> bool:
    return "deletionTimestamp" in item["metadata"]


# Selectors and patches


def _label_test(selector: str) -> Callable[[Object], bool]:
    tests: list[Callable[[dict[str, str]], bool]] = []
    for term in re.findall(r"[^,(]+(?:\([^)]*\))?", selector):
        term = term.strip()
        if match := re.fullmatch(r"(\S+)\s+(in|notin)\s*\(([^)]*)\)", term):
            name, operator, listed = match.groups()
            values = {value.strip() for value in listed.split(",")}
            tests.append(lambda labels, n=name, v=values, o=operator: (labels.get(n) in v) == (o == "in"))
        elif match := re.fullmatch(r"(.+?)\s*(!=|==|=)\s*(.*)", term):
            name, operator, value = match.groups()
            tests.append(lambda labels, n=name, v=value, o=operator: (labels.get(n) == v) == (o != "!="))
        elif term.startswith("!"):
            absent = term.lstrip("! ")
            tests.append(lambda labels, n=absent: n not in labels)
        elif term:
            tests.append(lambda labels, n=term: n in labels)
    return lambda item: all(test(item["metadata"].get("labels", {})) for test in tests)


SELECTABLE = {
    "pods": ("spec.", "status.phase", "status.podIP", "status.nominatedNodeName"),
    "events": ("involvedObject.", "reason", "type", "source", "reportingComponent", "regarding."),
    "jobs": ("status.successful",),
    "namespaces": ("status.phase",),
    "secrets": ("type",),
    "nodes": ("spec.unschedulable",),
}


def _unselectable(resource: Resource, field: str) -> str:
    if resource.plural == "jobs":
        return f'field label "{field}" not supported for Job'
    if resource.custom or resource.plural in SELECTABLE:
        return f"field label not supported: {field}"
    return f'"{field}" is not a known field selector: only "metadata.name", "metadata.namespace"'


def _field_test(resource: Resource, selector: str) -> Callable[[Object], bool]:
    terms = []
    for term in filter(None, selector.split(",")):
        match = re.fullmatch(r"\s*(.+?)\s*(!=|==|=)\s*(.*?)\s*", term)
        known = (
            "metadata.name",
            "metadata.namespace",
            *(SELECTABLE.get(resource.plural, ()) if not resource.custom else ()),
        )
        if not match or not any(match[1] == name or (name[-1] == "." and match[1].startswith(name)) for name in known):
            raise ApiError(400, _unselectable(resource, match[1] if match else term))
        terms.append(match.groups())

    def test(item: Object) -> bool:
        for path, operator, value in terms:
            found = openapi.json_path(item, f".{path}")
            text = str(found).lower() if isinstance(found, bool) else "" if found is None else str(found)
            if (text == value) != (operator != "!="):
                return False
        return True

    return test


def _merge_patch(live: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    out = dict(live) if isinstance(live, dict) else {}
    for name, value in patch.items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = _merge_patch(out.get(name), value)
    return out


def _as_asked(resource: Resource, item: Object) -> Object:
    return {**item, "apiVersion": resource.api_version, "kind": resource.kind}


# The server


class ApiServer:
    """Serves from `with` to its end. `log_folder` is where a kubelet writes what pods/log shows."""

    def __init__(self, *, log_folder: Path | None = None, port: int = 0) -> None:
        self.log_folder = log_folder
        self.faults, self.requests = Faults(), Requests()
        self.bookmark_seconds = 10.0
        self.start_seconds = 1.0
        """For so long after an outage all but the administrator are refused: a real server took a second to read its roles."""
        self.started = float("-inf")
        self._watch_age = 0
        self.store = Store()
        self.ended = threading.Event()
        self._log_times: dict[Path, list[datetime]] = {}
        self._http = _HttpServer(("127.0.0.1", port), self)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._resources: dict[tuple[str, str, str], Resource] = {
            (r.group, r.version, r.plural): r for r in openapi.BUILTIN
        }
        self._collector = _Collector(self)
        for name in ("default", "kube-system", "kube-public", "kube-node-lease"):
            self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def __enter__(self) -> ApiServer:
        self._collector.start()
        self._http.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.drop_watches()
        self._http.stop()
        self._collector.close()

    def kubeconfig(self, path: Path, *, namespace: str = "default", token: str | None = None) -> Path:
        """Writes a kubeconfig for this server; `token`: `sa:<namespace>:<name>` to ask as that service account."""
        user = {"token": token} if token else {}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "user", "namespace": namespace}}],
        }
        path.write_text(yaml.safe_dump(document))
        return path

    # For tests: the same verbs, without HTTP

    def objects(self, plural: str, namespace: str | None = None) -> list[Object]:
        """Copies of what is stored of a kind; `plural` may carry its group (`jobs.batch`)."""
        with self.store.lock:
            return [_copy(item) for r in self._find(plural)[:1] for item in self.store.list(r.key, namespace)]

    def object(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        """A copy of one stored object, or None."""
        with self.store.lock:
            resource = self._find(plural)[0]
            return _copy(self.store.get(resource.key, namespace if resource.namespaced else "", name))

    def create(self, body: Object, *, namespace: str = "default") -> Object:
        """Creates `body` as the administrator would, or raises ApiError."""
        resource = self._resource_of(body)
        place = body["metadata"].get("namespace", namespace) if resource.namespaced else ""
        request = self._own("create", resource, place, body["metadata"].get("name", ""), body)
        return self.do_create(request, [])

    def update(self, body: Object, *, subresource: str = "") -> Object:
        """Replaces an object (or its status) with `body`."""
        resource, metadata = self._resource_of(body), body["metadata"]
        request = self._own("update", resource, metadata.get("namespace", ""), metadata["name"], body)
        return self.do_update(replace(request, subresource=subresource), [])[0]

    def delete(self, plural: str, name: str, namespace: str = "default", *, grace_seconds: int | None = None) -> None:
        """Deletes one object, children in the background."""
        resource = self._find(plural)[0]
        body = {"propagationPolicy": "Background"} | (
            {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        )
        self.do_delete(self._own("delete", resource, namespace if resource.namespaced else "", name, body))

    def drop_watches(self) -> None:
        """Ends all watches that run now, by closing their connections."""
        with self.store.lock:
            self._watch_age += 1
            for condition in self.store.changed.values():
                condition.notify_all()

    def compact(self) -> None:
        """Forgets all changes so far: watching or paging from any version seen yet ends in 410."""
        with self.store.lock:
            self.store.version += 1
            self.store.oldest = self.store.version
            self.store.forgotten |= {key: changes[-1].version for key, changes in self.store.history.items()}
            self.store.history.clear()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Connections are refused, running ones cut; what is stored stays."""
        port = self._http.server_port
        self.drop_watches()
        self._http.stop()
        try:
            yield
        finally:
            self.started = time.monotonic()
            self._http = _HttpServer(("127.0.0.1", port), self)
            self._http.start()

    @property
    def is_starting(self) -> bool:
        return time.monotonic() < self.started + self.start_seconds

    def _own(self, verb: str, resource: Resource, namespace: str, name: str, body: Object) -> Request:
        method = {"create": "POST", "update": "PUT", "delete": "DELETE"}[verb]
        return Request(method, "", {}, "test", verb, resource, namespace, name, body=_copy(body))

    # Kinds

    def resources(self) -> list[Resource]:
        with self.store.lock:
            return list(self._resources.values())

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        return self._resources.get((group, version, plural))

    def resource_at(self, key: tuple[str, str]) -> Resource | None:
        return next((r for r in self._resources.values() if r.key == key), None)

    def _find(self, plural: str) -> list[Resource]:
        found = [r for r in self._resources.values() if plural in (r.plural, r.qualified)]
        if not found:
            raise KeyError(f"no kind {plural} is served")
        return found

    def _resource_of(self, body: Object) -> Resource:
        for resource in self._resources.values():
            if (resource.api_version, resource.kind) == (body["apiVersion"], body["kind"]):
                return resource
        raise ApiError(404, f"no kind {body['kind']} in {body['apiVersion']} is served")

    def lister(self, plural: str, namespace: str | None) -> list[Object]:
        """Stored roles and bindings, for the authoriser."""
        return self.store.list(("rbac.authorization.k8s.io", plural), namespace)

    # Reading

    def do_get(self, request: Request) -> Object:
        """One object."""
        resource = request.resource
        assert resource
        item = self.store.get(resource.key, request.namespace, request.name)
        if item is None:
            raise _not_found(resource, request.name)
        return _as_asked(resource, item)

    def selected(self, request: Request) -> Callable[[Object], bool]:
        """Whether an object is among those that the request selects."""
        resource = request.resource
        assert resource
        by_label = _label_test(request.query.get("labelSelector", ""))
        by_field = _field_test(resource, request.query.get("fieldSelector", ""))
        space, name = request.namespace, request.name

        def test(item: Object) -> bool:
            metadata = item["metadata"]
            if (space and metadata.get("namespace", "") != space) or (name and metadata["name"] != name):
                return False
            return by_label(item) and by_field(item)

        return test

    def do_list(self, request: Request) -> tuple[list[Object], Object]:
        """The objects selected, and the list's metadata."""
        resource = request.resource
        assert resource
        with self.store.lock:
            test = self.selected(request)
            items = [item for item in self.store.list(resource.key, request.namespace or None) if test(item)]
            metadata: Object = {"resourceVersion": str(self.store.version)}
            if token := request.query.get("continue"):
                start = json.loads(base64.urlsafe_b64decode(token + "=="))
                if 0 < start["rv"] < self.store.oldest:
                    refusal = ApiError(410, _TOO_OLD)
                    refusal.status["metadata"] = {"continue": _token(-1, start["start"])}
                    raise refusal
                if start["rv"] > 0:
                    metadata["resourceVersion"] = str(start["rv"])
                after = start["start"].rstrip("\0").split("/")
                items = [item for item in items if _page_key(item)[-len(after) :] > after]
            limit = int(request.query.get("limit") or 0)
            if limit and len(items) > limit:
                last = _page_key(items[limit - 1])
                after = "/".join(last[1:] if request.namespace or not resource.namespaced else last)
                metadata["continue"] = _token(int(metadata["resourceVersion"]), f"{after}\0")
                if not (request.query.get("labelSelector") or request.query.get("fieldSelector")):
                    metadata["remainingItemCount"] = len(items) - limit
                items = items[:limit]
            elif resource.custom:
                metadata["continue"] = ""
        return [_as_asked(resource, item) for item in items], metadata

    def watch(self, request: Request, alive: Callable[[], bool]) -> Iterator[tuple[str, Object] | None]:
        """Changes as (ADDED | MODIFIED | DELETED | BOOKMARK | ERROR, object), until the time asked for is over.

        Raises ConnectionResetError where watches are dropped. Yields None now and then, so that the caller can look about.
        """
        resource, query = request.resource, request.query
        assert resource
        test, key = self.selected(request), resource.key
        ends = time.monotonic() + float(query.get("timeoutSeconds") or random.uniform(1800, 3600))
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        initial = query.get("sendInitialEvents") in ("true", "1")
        with self.store.lock:
            age, condition = self._watch_age, self.store.condition(key)
            text = query.get("resourceVersion", "")
            ready: list[tuple[str, Object]] = []
            if text in ("", "0") or initial:
                ready = [("ADDED", item) for item in self.store.list(key) if test(item)]
                seen = self.store.version
            else:
                seen = int(text)
                if seen < max(self.store.oldest, self.store.forgotten.get(key, 0)):
                    yield "ERROR", ApiError(410, f"too old resource version: {seen} ({self.store.oldest})").status
                    return
        yield from ready
        if initial:
            yield "BOOKMARK", _bookmark(resource, seen, {"k8s.io/initial-events-end": "true"})
        marked = time.monotonic()
        while alive():
            ready = []
            with self.store.lock:
                changes = self.store.history.get(key, [])
                fresh = bisect.bisect_right(changes, seen, key=lambda change: change.version)
                now = time.monotonic()
                if fresh == len(changes) and now < ends and age == self._watch_age:
                    condition.wait(min(ends - now, 1.0))
                    changes = self.store.history.get(key, [])
                    fresh = bisect.bisect_right(changes, seen, key=lambda change: change.version)
                if age != self._watch_age:
                    raise ConnectionResetError("watches are dropped")
                if seen < self.store.forgotten.get(key, 0):
                    ready = [("ERROR", ApiError(410, f"too old resource version: {seen} ({self.store.oldest})").status)]
                for change in changes[fresh:]:
                    if event := _seen_through(test, change):
                        left = event == "DELETED" and change.kind != "DELETED"
                        ready.append((event, _at_version(change) if left else change.new))
                seen = changes[-1].version if changes else seen
                latest = self.store.version
            for event in ready:
                yield event
                if event[0] == "ERROR":
                    return
            if bookmarks and time.monotonic() > marked + self.bookmark_seconds:
                marked = time.monotonic()
                yield "BOOKMARK", _bookmark(resource, max(seen, latest), {})
            if time.monotonic() >= ends:
                return
            yield None

    # Writing

    def do_create(self, request: Request, warnings: list[str]) -> Object:
        """Stores a new object."""
        resource, body = request.resource, _typed_body(request)
        assert resource
        metadata = body["metadata"]
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                cause = Cause("FieldValueRequired", "metadata.name", "Required value: name or generateName is required")
                raise _invalid(resource, "", [cause])
            metadata["name"] = metadata["generateName"] + "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
        with self.store.lock:
            self._check_namespace(resource, request.namespace, metadata["name"])
            if self.store.get(resource.key, request.namespace, metadata["name"]):
                text = f'{resource.qualified} "{metadata["name"]}" already exists'
                if _ending(self.store.get(resource.key, request.namespace, metadata["name"]) or {"metadata": {}}):
                    text = f"object is being deleted: {text}"
                raise ApiError(409, text, reason="AlreadyExists", details=_about(resource, metadata["name"]))
            return self._write(request, resource, body, None, warnings)

    def do_update(self, request: Request, warnings: list[str]) -> tuple[Object, bool]:
        """Replaces an object, or its status; makes a Lease that is not there. Says as well whether it was created."""
        resource, body = request.resource, _typed_body(request)
        assert resource
        metadata = body["metadata"]
        with self.store.lock:
            old = self.store.get(resource.key, request.namespace, request.name)
            if old is None and resource.plural != "leases":
                raise _not_found(resource, request.name)
            if metadata.get("name", request.name) != request.name:
                raise ApiError(400, "the name of the object does not match the name on the URL")
            uid = old["metadata"]["uid"] if old else ""
            if metadata.get("uid", uid) != uid:
                raise _conflict(resource, request.name, _another_uid(resource, request, metadata["uid"], uid))
            if old and not metadata.get("resourceVersion") and (resource.custom or resource.plural == "leases"):
                raise _unconditional(resource, request.name)
            return self._write(request, resource, body, old, warnings), old is None

    def do_patch(self, request: Request, warnings: list[str]) -> tuple[Object, bool]:
        """Changes an object by a merge patch or an apply. Says as well whether it was created."""
        resource, patch = request.resource, request.body
        assert resource
        with self.store.lock:
            old = self.store.get(resource.key, request.namespace, request.name)
            if request.content_type == "application/apply-patch+yaml":
                return self._apply(request, resource, patch, old, warnings), old is None
            if old is None:
                raise _not_found(resource, request.name)
            live = _as_asked(resource, old)
            # A strategic patch without lists is a merge patch; kubectl sends one for a built-in kind.
            strategic = "strategic" in request.content_type and "[" not in json.dumps(patch)
            if request.content_type not in ("application/merge-patch+json", "application/json") and not strategic:
                known = "application/merge-patch+json, application/apply-patch+yaml"
                text = f"the body of the request was in an unknown format - accepted media types include: {known}"
                raise ApiError(415, text)
            if not isinstance(patch, dict):
                raise ApiError(400, "the patch is no object")
            new = _merge_patch(live, patch)
            stale = new.get("metadata", {}).get("resourceVersion") not in (None, old["metadata"]["resourceVersion"])
            if stale:
                raise _conflict(resource, request.name, _STALE)
            if new.get("metadata", {}).get("name") != request.name:
                raise ApiError(400, "the name of the object does not match the name on the URL")
            _check_type(resource, new)
            return self._write(request, resource, _copy(new), old, warnings), False

    def _apply(
        self, request: Request, resource: Resource, config: Object, old: Object | None, warnings: list[str]
    ) -> Object:
        """Server-side apply: lays `config` over what lives and takes note of who owns what."""
        if not request.query.get("fieldManager"):
            options = Resource("meta.k8s.io", "v1", "patchoptions", "PatchOptions")
            text = "Required value: is required for apply patch"
            raise _invalid(options, "", [Cause("FieldValueRequired", "fieldManager", text)])
        if not isinstance(config, dict) or not config.get("apiVersion") or not config.get("kind"):
            group, _, version = config.get("apiVersion", "/").rpartition("/")
            raise ApiError(400, f"invalid object type: {group}/{version}, Kind={config.get('kind', '')}")
        _check_type(resource, config)
        config = openapi.tidied(resource.schema, config) if not resource.custom else _copy(config)
        metadata = config.setdefault("metadata", {})
        metadata.setdefault("name", request.name)
        _, unknown = openapi.prune(resource.schema, config)
        if unknown:
            what = f"({metadata.get('namespace', '')}/{request.name}; {resource.api_version}, Kind={resource.kind})"
            text = f"failed to create typed patch object {what}: .{unknown[0]}: field not declared in schema"
            raise ApiError(500, text, reason="")
        if old is None:
            if metadata.get("uid"):
                text = f"uid mismatch: the provided object specified uid {metadata['uid']}, and no existing object was found"
                raise _conflict(resource, request.name, text)
            self._check_namespace(resource, request.namespace, request.name)
            wanted = _without_status(resource, config)
            return self._write(request, resource, wanted, None, warnings, applied=wanted)
        if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            text = f'Invalid value: "{metadata["uid"]}": field is immutable'
            raise _invalid(resource, request.name, [Cause("FieldValueInvalid", "metadata.uid", text)] * 2)
        self._check_preconditions(resource, metadata, old)
        wanted = _without_status(resource, config)
        values, live = openapi.owned(resource.schema, wanted), openapi.owned(resource.schema, old)
        mine, kept, lost = set(), set(), []
        for entry in old["metadata"].get("managedFields", ()):
            paths = openapi.from_fields_v1(entry["fieldsV1"])
            if _same_manager(entry, request, "Apply"):
                mine = paths
                continue
            lost += [(path, entry) for path in paths & values.keys() if live.get(path, ...) != values[path]]
            kept |= paths
        if lost and request.query.get("force") not in ("true", "1"):
            raise _ownership_conflict(resource, lost)
        new = openapi.merge(resource.schema, old, wanted)
        for path in sorted(mine - values.keys() - kept, key=len):
            new = openapi.without(resource.schema, new, path)
        return self._write(request, resource, _copy(new), old, warnings, applied=wanted)

    def _write(
        self,
        request: Request,
        resource: Resource,
        body: Object,
        old: Object | None,
        warnings: list[str],
        *,
        applied: Object | None = None,
    ) -> Object:
        """Judges `body` and makes it the object's next state: the one door of all writes."""
        self._check_preconditions(resource, body["metadata"], old)
        new = _next_state(request, resource, body, old)
        name = new["metadata"]["name"]
        new = self._checked(request, resource, new, old, warnings)
        if not request.subresource:
            self._admit(request, resource, new, old, warnings)
        if len(json.dumps(new)) > MAX_OBJECT_BYTES:
            raise ApiError(500, f'etcdserver: request is too large ({resource.qualified} "{name}")')
        if old is not None and _same(new, old) and applied is None:
            return _as_asked(resource, old)
        new["metadata"]["managedFields"] = _managers(request, resource, new, old, applied)
        if old is not None and _same(new, old, with_managers=True):
            return _as_asked(resource, old)
        if _generation_rises(resource, new, old):
            new["metadata"]["generation"] = (old or {"metadata": {}})["metadata"].get("generation", 0) + 1
        if request.dry_run:
            version = {"resourceVersion": old["metadata"]["resourceVersion"]} if old else {}
            return _as_asked(resource, {**new, "metadata": {**new["metadata"], **version}})
        seen = self.store.commit(resource.key, old, new)
        held = seen["metadata"].get("finalizers") or seen["metadata"].get("deletionGracePeriodSeconds")
        if _ending(seen) and not held and resource.plural != "namespaces":
            seen = self.store.commit(resource.key, seen, None)
        self._after(resource, seen, old)
        return _as_asked(resource, seen)

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        space = self.store.get(("", "namespaces"), "", namespace)
        if space is None:
            raise ApiError(
                404, f'namespaces "{namespace}" not found', details={"name": namespace, "kind": "namespaces"}
            )
        if _ending(space):
            text = f"unable to create new content in namespace {namespace} because it is being terminated"
            refusal = _forbidden(resource, name, text)
            cause = {"reason": "NamespaceTerminating", "message": f"namespace {namespace} is being terminated"}
            refusal.status["details"]["causes"] = [{**cause, "field": "metadata.namespace"}]
            raise refusal

    def _check_preconditions(self, resource: Resource, metadata: Object, old: Object | None) -> None:
        if old is None:
            return
        version, name = old["metadata"]["resourceVersion"], old["metadata"]["name"]
        if metadata.get("resourceVersion") not in (None, "", version):
            raise _conflict(resource, name, _STALE)

    def _checked(
        self, request: Request, resource: Resource, new: Object, old: Object | None, warnings: list[str]
    ) -> Object:
        """`new` pruned, with its defaults; raises what a schema and a kind's rules have against it."""
        name, mode = new["metadata"]["name"], request.query.get("fieldValidation", "Warn")
        if resource.custom:
            new["metadata"] = openapi.tidied(openapi.OBJECT_META, new["metadata"])
        else:
            new = openapi.tidied(resource.schema, new)
        new, unknown = openapi.prune(resource.schema, new)
        if unknown and mode == "Strict":
            texts = ", ".join(f'unknown field "{place}"' for place in unknown)
            raise _undecodable(resource, f"strict decoding error: {texts}")
        if mode != "Ignore":
            warnings += [f'unknown field "{place}"' for place in unknown]
        typed = {"metadata": new["metadata"]} if resource.custom else new
        causes = openapi.validate(resource.schema if not resource.custom else _METADATA_ALONE, typed)
        if wrong := [cause for cause in causes if cause.reason == "FieldValueTypeInvalid"]:
            raise _undecodable(resource, f"json: cannot unmarshal: {wrong[0].message}")
        causes += openapi.metadata_errors(resource, new["metadata"])
        if resource.custom:
            openapi.set_defaults(resource.custom, new)
            causes += openapi.validate(resource.custom, new)
            if any(cause.reason in BLOCKING for cause in causes):
                causes.append(UNCHECKED)
            else:
                causes += openapi.rule_errors(resource.custom, new, old)
        elif not causes:
            openapi.fill_in(resource, new, old)
            causes += openapi.builtin_errors(resource, new, old)
        if causes:
            raise _invalid(resource, name, causes)
        if old and _ending(old):
            added = set(new["metadata"].get("finalizers", ())) - set(old["metadata"].get("finalizers", ()))
            if added:
                text = "Forbidden: no new finalizers can be added if the object is being deleted"
                raise _invalid(resource, name, [Cause("FieldValueForbidden", "metadata.finalizers", text)])
        return new

    def _admit(
        self, request: Request, resource: Resource, new: Object, old: Object | None, warnings: list[str]
    ) -> None:
        """Pod security, service accounts and quota, as admission judges them."""
        if not resource.namespaced:
            return
        name, space = new["metadata"]["name"], request.namespace
        labels = (self.store.get(("", "namespaces"), "", space) or {"metadata": {}})["metadata"].get("labels", {})
        level = labels.get("pod-security.kubernetes.io/enforce")
        pod = _pod_spec_in(resource, new)
        judged = level == "restricted" and pod and (old is None or _pod_spec_in(resource, old) != pod)
        if judged and (found := podsecurity.violations(pod or {})):
            text = f'PodSecurity "restricted:latest": {", ".join(found)}'
            if resource.plural == "pods":
                raise _forbidden(resource, name, f"violates {text}")
            warnings.append(f"would violate {text}")
        if old is not None:
            return
        if resource.plural == "pods":
            account = new["spec"]["serviceAccountName"]
            if not self.store.get(("", "serviceaccounts"), space, account):
                text = f'error looking up service account {space}/{account}: serviceaccount "{account}" not found'
                raise _forbidden(resource, name, text)
        self._check_policies(resource, new, space)
        self._check_quota(resource, new, space)

    def _check_policies(self, resource: Resource, new: Object, namespace: str) -> None:
        """ValidatingAdmissionPolicies on what is created, as far as a rule speaks of the object alone."""
        group = "admissionregistration.k8s.io"
        policies = {one["metadata"]["name"]: one for one in self.store.list((group, "validatingadmissionpolicies"))}
        space = self.store.get(("", "namespaces"), "", namespace) or {}
        for binding in self.store.list((group, "validatingadmissionpolicybindings")):
            name, chosen = binding["metadata"]["name"], binding["spec"].get("matchResources", {})
            wanted = chosen.get("namespaceSelector", {}).get("matchLabels", {})
            policy = policies.get(binding["spec"]["policyName"])
            if not policy or not wanted.items() <= space["metadata"].get("labels", {}).items():
                continue
            rules = policy["spec"]["matchConstraints"]["resourceRules"]
            if not any(resource.plural in rule["resources"] and resource.group in rule["apiGroups"] for rule in rules):
                continue
            for rule in policy["spec"]["validations"]:
                if openapi.policy_holds(rule["expression"], new):
                    continue
                by = f"ValidatingAdmissionPolicy '{policy['metadata']['name']}' with binding '{name}'"
                text = f"{by} denied request: {rule.get('message') or 'failed expression: ' + rule['expression']}"
                named, about = new["metadata"]["name"], _about(resource, new["metadata"]["name"])
                message = f'{resource.qualified} "{named}" is forbidden: {text}'
                raise ApiError(422, message, details={**about, "causes": [{"message": text}]})

    def _check_quota(self, resource: Resource, new: Object, namespace: str) -> None:
        for quota in self.store.list(("", "resourcequotas"), namespace):
            hard = quota.get("spec", {}).get("hard", {})
            missing = [entry for entry in hard if resource.plural == "pods" and _unsaid(entry, new)]
            if missing:
                silent = ",".join(container["name"] for container in new["spec"]["containers"])
                listed = "; ".join(f"{entry} for: {silent}" for entry in missing)
                text = f"failed quota: {quota['metadata']['name']}: must specify {listed}"
                raise _forbidden(resource, new["metadata"]["name"], text)
            asked = {entry: _charge(entry, resource, new) for entry in hard}
            used = {entry: self._used(entry, namespace) for entry in hard if asked[entry]}
            over = [entry for entry in used if used[entry] + asked[entry] > openapi.quantity(hard[entry])]
            if over:
                parts = [
                    f"{word}: " + ",".join(f"{entry}={_plain(amounts[entry])}" for entry in over)
                    for word, amounts in (("requested", asked), ("used", used), ("limited", hard))
                ]
                text = f"exceeded quota: {quota['metadata']['name']}, {', '.join(parts)}"
                raise _forbidden(resource, new["metadata"]["name"], text)

    def _used(self, entry: str, namespace: str) -> Decimal:
        return sum(
            (
                _charge(entry, resource, item)
                for resource in {r.key: r for r in self._resources.values() if r.namespaced}.values()
                for item in self.store.list(resource.key, namespace)
            ),
            Decimal(0),
        )

    def _after(self, resource: Resource, seen: Object, old: Object | None) -> None:
        """What follows from a write: a namespace's service account, a definition's kinds, a quota's figures."""
        name = seen["metadata"]["name"]
        if resource.plural == "namespaces" and old is None:
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
            self.create(account)
        elif resource.plural == "customresourcedefinitions" and resource.group == "apiextensions.k8s.io":
            there = self.store.get(resource.key, "", name)
            if there and not there["status"]["conditions"]:
                self.store.commit(resource.key, there, openapi.established(there))
            self.serve(seen)
        for quota in (
            self.store.list(("", "resourcequotas"), seen["metadata"].get("namespace")) if resource.namespaced else ()
        ):
            self._count_quota(quota)

    def _count_quota(self, quota: Object) -> None:
        hard, namespace = quota.get("spec", {}).get("hard", {}), quota["metadata"]["namespace"]
        status = {"hard": hard, "used": {entry: _plain(self._used(entry, namespace)) for entry in hard}}
        if quota.get("status") != status:
            self.store.commit(("", "resourcequotas"), quota, {**quota, "status": status})

    def serve(self, definition: Object) -> None:
        """Serves what a stored definition defines, and no more what a removed one did."""
        group, plural = definition["spec"]["group"], definition["spec"]["names"]["plural"]
        gone = (
            self.store.get(("apiextensions.k8s.io", "customresourcedefinitions"), "", definition["metadata"]["name"])
            is None
        )
        self._resources = {key: r for key, r in self._resources.items() if (r.group, r.plural) != (group, plural)}
        if not gone:
            self._resources |= {(r.group, r.version, r.plural): r for r in openapi.custom_resources(definition)}

    # Deleting

    def do_delete(self, request: Request) -> Object:
        """Deletes one object; answers with it, or with a Status where it is gone already."""
        resource, options = request.resource, {**request.query, **(request.body or {})}
        assert resource
        with self.store.lock:
            item = self.store.get(resource.key, request.namespace, request.name)
            if item is None:
                raise _not_found(resource, request.name)
            for name, wanted in (options.get("preconditions") or {}).items():
                if (found := item["metadata"].get(name)) != wanted:
                    raise _other_there(resource, request.name, wanted, found)
            default = "Orphan" if resource.plural == "jobs" else "Background"
            policy = options.get("propagationPolicy") or ("Orphan" if options.get("orphanDependents") else default)
            grace = options.get("gracePeriodSeconds")
            if not request.dry_run:
                item = self.remove(resource, item, policy=policy, grace_seconds=None if grace is None else int(grace))
            left = self.store.get(resource.key, request.namespace, request.name)
        if left is not None or resource.plural in ("pods", "services"):
            return _as_asked(resource, item)
        details = {**_about(resource, request.name), "uid": item["metadata"]["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def remove(self, resource: Resource, item: Object, *, policy: str, grace_seconds: int | None = None) -> Object:
        """Deletes `item`, or marks it where finalizers or a pod's grace stand before. The caller holds the lock."""
        metadata = dict(item["metadata"])
        grace, children = 0, self.store.children.get(metadata["uid"], set())
        if resource.plural == "pods":
            grace = item["spec"].get("terminationGracePeriodSeconds", 30) if grace_seconds is None else grace_seconds
            done = item.get("status", {}).get("phase") in ("Succeeded", "Failed")
            grace = 0 if done or not item["spec"].get("nodeName") else grace
        finalizers = list(metadata.get("finalizers", ()))
        if policy == "Orphan":
            for place in tuple(children):
                child = self.store.get(place[:2], place[2], place[3])
                assert child
                left = [r for r in child["metadata"]["ownerReferences"] if r["uid"] != metadata["uid"]]
                self.store.commit(place[:2], child, _owned_by(child, left))
        elif policy == "Foreground" and "foregroundDeletion" not in finalizers and not _ending(item):
            finalizers.append("foregroundDeletion")
        waits = bool(finalizers or grace or (resource.plural == "namespaces"))
        if resource.plural == "pods" and not finalizers and not grace:
            item = {**item, "metadata": {**metadata, "deletionGracePeriodSeconds": 0}}
        if not waits:
            seen = self.store.commit(resource.key, item, None)
            self._after(resource, seen, item)
            return seen
        if _ending(item) and grace >= metadata.get("deletionGracePeriodSeconds", 0):
            return item
        metadata["deletionTimestamp"] = _stamp(grace)
        metadata["deletionGracePeriodSeconds"] = grace
        if finalizers:
            metadata["finalizers"] = list(dict.fromkeys(finalizers))
        if metadata.get("generation") and not _ending(item):
            metadata["generation"] += 1
        status = (
            {"status": {**item.get("status", {}), "phase": "Terminating"}} if resource.plural == "namespaces" else {}
        )
        return self.store.commit(resource.key, item, {**item, **status, "metadata": metadata})

    # Subresources of pods and service accounts

    def do_subresource(self, request: Request) -> Object:
        """pods/eviction, pods/binding, serviceaccounts/token."""
        resource, body = request.resource, request.body or {}
        assert resource
        item = self.store.get(resource.key, request.namespace, request.name)
        if item is None:
            raise _not_found(resource, request.name)
        success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
        if request.subresource == "token":
            token = f"sa:{request.namespace}:{request.name}"
            return {**body, "status": {"token": token, "expirationTimestamp": _stamp(3600)}}
        if request.subresource == "binding":
            if item["spec"].get("nodeName"):
                raise _conflict(resource, request.name, f"pod {request.name} is already assigned to node")
            if not request.dry_run:
                scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": _stamp()}
                status = _with_condition(item.get("status", {}), scheduled)
                self.store.commit(
                    resource.key,
                    item,
                    {**item, "spec": {**item["spec"], "nodeName": body["target"]["name"]}, "status": status},
                )
            return success
        options = body.get("deleteOptions") or {}
        done = item.get("status", {}).get("phase") in ("Succeeded", "Failed")
        wanted = options.get("preconditions", {}).get("uid", item["metadata"]["uid"])
        if wanted == item["metadata"]["uid"] and not done and not _ending(item) and not request.dry_run:
            condition = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting",
                "lastProbeTime": None,
                "lastTransitionTime": _stamp(),
            }
            self.store.commit(
                resource.key, item, {**item, "status": _with_condition(item.get("status", {}), condition)}
            )
        self.do_delete(replace(request, verb="delete", body=options))
        return success

    def read_log(self, request: Request, alive: Callable[[], bool]) -> Iterator[bytes] | None:
        """A container's log in pieces, following it where asked; None where its pod has no node yet."""
        resource, query = request.resource, request.query
        assert resource
        with self.store.lock:
            pod = self.do_get(request)
        names = [container["name"] for container in pod["spec"]["containers"]]
        names += [container["name"] for container in pod["spec"].get("initContainers", ())]
        name = query.get("container") or names[0]
        if name not in names:
            raise ApiError(400, f"container {name} is not valid for pod {request.name}")
        status = pod.get("status", {})
        node = pod["spec"].get("nodeName")
        if not node:
            return None
        if not self.store.get(("", "nodes"), "", node):
            raise _not_found(resource, node)
        state = next((s.get("state", {}) for s in status.get("containerStatuses", ()) if s["name"] == name), {})
        if "waiting" in state or (status.get("phase", "Pending") == "Pending" and not state):
            why = state.get("waiting", {}).get("reason") or "ContainerCreating"
            raise ApiError(400, f'container "{name}" in pod "{request.name}" is waiting to start: {why}')
        uid = pod["metadata"]["uid"]
        place = (self.log_folder or Path("/nonexistent")) / request.namespace / f"{request.name}.{uid}" / f"{name}.log"
        return _follow(self, place, request, uid, alive)

    def times_of(self, place: Path, num_lines: int) -> list[datetime]:
        """When each line of a log was first read by anybody: a line has the same time whenever it is asked for."""
        with self.store.lock:
            times = self._log_times.setdefault(place, [])
            times += [datetime.now(UTC)] * (num_lines - len(times))
            return times

    def ended_pod(self, namespace: str, name: str, uid: str) -> bool:
        """Whether this very pod is terminal or gone."""
        with self.store.lock:
            pod = self.store.get(("", "pods"), namespace, name)
            return not pod or pod["metadata"]["uid"] != uid or pod["status"].get("phase") in ("Succeeded", "Failed")


_METADATA_ALONE = {"type": "object", "properties": {"metadata": openapi.OBJECT_META}}
_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. "
    "You can start a new list without the continue parameter, or use the continue token in this response to retrieve "
    "the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that "
    "were created, modified, or deleted between the time the first chunk was returned and now may show up in the list."
)
_STALE = "the object has been modified; please apply your changes to the latest version and try again"


def _token(version: int, start: str) -> str:
    """Where the next page begins, and at which version; -1: at the newest, whatever changed since."""
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": start})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _page_key(item: Object) -> list[str]:
    return [item["metadata"].get("namespace", ""), item["metadata"]["name"]]


def _bookmark(resource: Resource, version: int, annotations: dict[str, str]) -> Object:
    """An object of that kind, empty but for its version."""
    metadata: Object = {"resourceVersion": str(version), **({"annotations": annotations} if annotations else {})}
    empty: dict[str, Object] = {
        "jobs": {"spec": {"template": {"metadata": {}, "spec": {"containers": None}}}, "status": {}},
        "pods": {"spec": {"containers": None}, "status": {}},
    }
    parts = empty.get(resource.plural, {})
    return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata, **parts}


def _at_version(change: Change) -> Object:
    """An object as it was before a change, at the change's version."""
    assert change.old is not None
    return {**change.old, "metadata": {**change.old["metadata"], "resourceVersion": str(change.version)}}


def _seen_through(test: Callable[[Object], bool], change: Change) -> str:
    """What a watcher with this selector sees of a change."""
    after = change.kind != "DELETED" and test(change.new)
    before = change.old is not None and test(change.old)
    return {(True, True): "MODIFIED", (True, False): "ADDED", (False, True): "DELETED"}.get((after, before), "")


def _check_type(resource: Resource, body: Object) -> None:
    wanted = (resource.api_version, resource.kind)
    if (body.get("apiVersion", wanted[0]), body.get("kind", wanted[1])) != wanted:
        found = f"{body.get('apiVersion')}, Kind={body.get('kind')}"
        raise ApiError(400, f"the object provided is {found}, which does not match {wanted[0]}, Kind={wanted[1]}")


def _typed_body(request: Request) -> Object:
    """The body as it is stored, its type and namespace checked against the address."""
    resource, body = request.resource, request.body
    assert resource
    if not isinstance(body, dict) or not isinstance(body.get("metadata") or {}, dict):
        raise ApiError(400, "the body is no object with metadata")
    if resource.custom and not (body.get("apiVersion") and body.get("kind")):
        raise ApiError(400, "Object 'Kind' is missing in the body")
    _check_type(resource, body)
    inside = (body.get("metadata") or {}).get("namespace") or request.namespace
    if resource.namespaced and inside != request.namespace:
        raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
    return {
        **body,
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": dict(body.get("metadata") or {}),
    }


def _without_status(resource: Resource, body: Object) -> Object:
    return {name: value for name, value in body.items() if name != "status" or not resource.has_status}


def _next_state(request: Request, resource: Resource, body: Object, old: Object | None) -> Object:
    """`body` with what a writer cannot choose: identity, times, and the half that its address does not write."""
    metadata = {name: value for name, value in body["metadata"].items() if name not in _SERVERS_OWN}
    if old is None:
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": _stamp()}
        new = {**body, "metadata": metadata}
        if resource.has_status:
            new.pop("status", None)
    else:
        before = old["metadata"]
        metadata |= {name: before[name] for name in _SERVERS_OWN if name in before}
        if request.subresource == "status":
            new = {**old, "metadata": {**before}}
            if "status" in body:
                new["status"] = body["status"]
        else:
            new = {**body, "metadata": metadata}
            if resource.has_status:
                new.pop("status", None)
                new |= {"status": old["status"]} if "status" in old else {}
    if resource.namespaced:
        new["metadata"]["namespace"] = request.namespace
    return _copy({"apiVersion": new.pop("apiVersion"), "kind": new.pop("kind"), **new})


_SERVERS_OWN = (
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
)


def _same(new: Object, old: Object, *, with_managers: bool = False) -> bool:
    def bare(item: Object) -> Object:
        metadata = {
            name: value for name, value in item["metadata"].items() if name not in ("managedFields", "resourceVersion")
        }
        managers = (
            [{**entry, "time": ""} for entry in item["metadata"].get("managedFields", ())] if with_managers else []
        )
        return {**item, "metadata": {**metadata, "managedFields": managers}}

    return bare(new) == bare(old)


def _generation_rises(resource: Resource, new: Object, old: Object | None) -> bool:
    if not resource.custom and not resource.has_status and resource.plural != "networkpolicies":
        return False
    if old is None:
        return resource.plural not in ("namespaces", "nodes", "services", "persistentvolumeclaims", "resourcequotas")
    skipped = {"metadata", "status"} if resource.has_status else {"metadata"}
    parts = [{name: value for name, value in item.items() if name not in skipped} for item in (new, old)]
    return "generation" in old["metadata"] and parts[0] != parts[1]


def _same_manager(entry: Object, request: Request, operation: str) -> bool:
    wanted = (request.manager, operation, request.subresource)
    return (entry["manager"], entry["operation"], entry.get("subresource", "")) == wanted


def _managers(
    request: Request, resource: Resource, new: Object, old: Object | None, applied: Object | None
) -> list[Object]:
    """managedFields after a write: an applier owns what it applied, an updater what it changed; the others lose that."""
    after = openapi.owned(resource.schema, new)
    before = openapi.owned(resource.schema, old) if old else {}
    changed = {path for path, value in after.items() if before.get(path, ...) != value}
    operation = "Apply" if applied is not None else "Update"
    mine = set(openapi.owned(resource.schema, applied)) if applied is not None else set(changed)
    own = {"manager": request.manager, "operation": operation, "apiVersion": resource.api_version, "time": _stamp()}
    out = [*(old or {"metadata": {}})["metadata"].get("managedFields", ())]
    place = next((n for n, entry in enumerate(out) if _same_manager(entry, request, operation)), len(out))
    for number, entry in enumerate(out):
        paths = openapi.from_fields_v1(entry["fieldsV1"])
        if number == place:
            mine |= paths & after.keys() if applied is None else set()
        elif (left := paths & after.keys() - changed) != paths:
            out[number] = {**entry, "fieldsV1": openapi.to_fields_v1(left)}
    own |= {"fieldsType": "FieldsV1", "fieldsV1": openapi.to_fields_v1(mine)}
    out[place : place + 1] = [{**own, "subresource": request.subresource} if request.subresource else own]
    return [entry for entry in out if entry["fieldsV1"]]


def _ownership_conflict(resource: Resource, lost: list[tuple[openapi.Path, Object]]) -> ApiError:
    causes, by_manager = [], {}
    for path, entry in sorted(lost, key=lambda pair: pair[0]):
        who = f'"{entry["manager"]}"'
        if "subresource" in entry:
            who += f' with subresource "{entry["subresource"]}"'
        if entry["operation"] == "Update":
            who += f" using {entry['apiVersion']}"
        field = openapi.path_text(path)
        causes.append({"reason": "FieldManagerConflict", "message": f"conflict with {who}", "field": field})
        by_manager.setdefault(who, []).append(field)
    if len(causes) == 1:
        listed = f"{causes[0]['message']}: {causes[0]['field']}"
    else:
        listed = "\n".join(
            "\n- ".join([f"conflicts with {who}:", *fields]) for who, fields in sorted(by_manager.items())
        )
    plural = "s" if len(causes) > 1 else ""
    return ApiError(409, f"Apply failed with {len(causes)} conflict{plural}: {listed}", details={"causes": causes})


def _pod_spec_in(resource: Resource, item: Object) -> Object | None:
    spec = item.get("spec", {})
    if resource.plural == "pods":
        return spec
    if resource.plural == "cronjobs":
        spec = spec.get("jobTemplate", {}).get("spec", {})
    return spec.get("template", {}).get("spec") if resource.plural in ("jobs", "cronjobs", "deployments") else None


def _charge(entry: str, resource: Resource, item: Object) -> Decimal:
    """What one object takes of a quota's entry."""
    if entry.startswith("count/"):
        return Decimal(entry == f"count/{resource.qualified}")
    if resource.plural != "pods":
        return Decimal(entry == resource.plural and not resource.group)
    if item.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return Decimal(0)
    if entry == "pods":
        return Decimal(1)
    part, name = _quota_entry(entry)
    amounts = [c.get("resources", {}).get(part, {}).get(name, 0) for c in item["spec"]["containers"]]
    return sum((openapi.quantity(amount) for amount in amounts), Decimal(0))


def _quota_entry(entry: str) -> tuple[str, str]:
    """`limits.cpu` is (limits, cpu); a bare `cpu` counts requests."""
    part, _, name = entry.partition(".")
    return (part, name) if part in ("requests", "limits") else ("requests", entry)


def _unsaid(entry: str, pod: Object) -> bool:
    """Whether a quota's entry binds what some container of the pod leaves open."""
    part, name = _quota_entry(entry)
    containers = pod["spec"]["containers"]
    return name in ("cpu", "memory") and any(name not in c.get("resources", {}).get(part, {}) for c in containers)


def _plain(amount: Any) -> str:
    if not isinstance(amount, Decimal):
        return str(amount)
    return f"{amount.normalize():f}" if amount == amount.to_integral() else f"{amount * 1000:.0f}m"


def _with_condition(status: Object, condition: Object) -> Object:
    others = [entry for entry in status.get("conditions", ()) if entry["type"] != condition["type"]]
    return {**status, "conditions": [*others, condition]}


def _follow(server: ApiServer, place: Path, request: Request, uid: str, alive: Callable[[], bool]) -> Iterator[bytes]:
    """Whole lines; the last one as it is, where it has no end. A line keeps the time at which it was first read."""
    query, number, position = request.query, 0, 0
    since = datetime.fromisoformat(query["sinceTime"]) if query.get("sinceTime") else None
    tail = query.get("tailLines")
    while True:
        ended = server.ended_pod(request.namespace, request.name, uid)
        text = b""
        if place.exists():
            with place.open("rb") as file:
                file.seek(position)
                text = file.read()
        following = query.get("follow") in ("true", "1")
        if following and not ended:
            text = text[: text.rfind(b"\n") + 1]
        position += len(text)
        lines = list(enumerate(text.splitlines(keepends=True), number))
        number += len(lines)
        times = server.times_of(place, number)
        if tail is not None:
            lines, tail = lines[len(lines) - min(int(tail), len(lines)) :], None
        if since is not None:
            lines = [(line, words) for line, words in lines if times[line] >= since]
        stamps = query.get("timestamps") in ("true", "1")
        out = b"".join(
            (f"{times[line]:%Y-%m-%dT%H:%M:%S.%f}000Z ".encode() if stamps else b"") + it for line, it in lines
        )
        yield out
        if not following or not alive() or (ended and not text):
            return
        if not text:
            time.sleep(0.05)


# HTTP


class _HttpServer(http.server.ThreadingHTTPServer):
    """Threads and sockets that all end with it."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], api: ApiServer) -> None:
        self.api, self.stopped = api, threading.Event()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._loop: threading.Thread | None = None
        super().__init__(address, _Handler)

    def start(self) -> None:
        self._loop = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="apiserver", daemon=True
        )
        self._loop.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        with self._lock:
            self._open[request] = thread
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()

    def stop(self) -> None:
        self.stopped.set()
        if self._loop:
            self.shutdown()
            self._loop.join()
        self.server_close()
        with self._lock:
            left = dict(self._open)
        for sock in left:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in left.values():
            thread.join(10)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        api = self.server.api
        try:
            request = self._parsed(raw)
            if request.path == "/__requests":
                return self._send(200, {"requests": [[*key, number] for key, number in api.requests.items()]})
            word = {"list": "LIST", "watch": "WATCH"}.get(request.verb, request.method)
            with api.store.lock:
                api.requests[word, request.plural] += 1
            self._with_weather(request, api.faults.draw(request))
        except ApiError as err:
            self._fail(err)
        except PageNotFound:
            self._send_bytes(404, b"404 page not found\n", "text/plain; charset=utf-8")
        except OSError:
            raise
        except Exception as err:
            traceback.print_exc()
            self._fail(ApiError(500, f"Internal error occurred: {err!r}"))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _parsed(self, raw: bytes) -> Request:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        content_type = self.headers.get("Content-Type", "").partition(";")[0].strip()
        if len(raw) > MAX_REQUEST_BYTES:
            text = f"Request entity too large: limit is {MAX_REQUEST_BYTES}"
            raise ApiError(413, text, reason="RequestEntityTooLarge")
        if "protobuf" in content_type or "cbor" in content_type:
            raise ApiError(
                415, f"this server reads no {content_type}; kubectl sends JSON where it is given a file (-f)"
            )
        try:
            body = (yaml.safe_load if "yaml" in content_type and raw[:1] != b"{" else json.loads)(raw) if raw else None
        except (ValueError, yaml.YAMLError) as err:
            raise ApiError(400, f"the body cannot be read: {err}") from err
        request = Request(
            self.command,
            parts.path.rstrip("/") or "/",
            query,
            self.headers.get("User-Agent", ""),
            body=body,
            content_type=content_type,
            accept=self.headers.get("Accept", ""),
        )
        words = [urllib.parse.unquote(word) for word in parts.path.strip("/").split("/")]
        if words[:2] == ["api", "v1"] and len(words) > 2:
            group, version, rest = "", "v1", words[2:]
        elif words[0] == "apis" and len(words) > 3:
            group, version, rest = words[1], words[2], words[3:]
        else:
            return request
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        # Who may not ask for it is told so before anybody learns whether it is served at all.
        resource = self.server.api.find(group, version, rest[0]) or Resource(group, version, rest[0], "")
        name, subresource = (*rest[1:3], "", "")[:2]
        watching = query.get("watch") in ("true", "1")
        verbs = {
            "POST": "create",
            "PUT": "update",
            "PATCH": "patch",
            "DELETE": "delete",
        }
        verb = verbs.get(self.command) or ("watch" if watching else "get" if name else "list")
        return replace(request, verb=verb, resource=resource, namespace=namespace, name=name, subresource=subresource)

    def _with_weather(self, request: Request, action: Action) -> None:
        kind, _, rest = action.partition(":") if isinstance(action, str) else ("", "", "")
        if callable(action):
            action(request)
        elif kind == "delay":
            time.sleep(float(rest or self.server.api.faults.delay_seconds))
        elif kind == "reset_before" or (kind == "reset_after" and request.method == "GET"):
            return self._reset()
        elif kind.isdigit():
            code = int(kind)
            text = _STALE if code == 409 else "the server is in bad weather"
            wait = self.server.api.faults.retry_after_seconds
            details = {"retryAfterSeconds": wait} if code in (429, 503) and wait is not None else {}
            return self._fail(ApiError(code, text, details=details))
        if kind == "reset_after":
            self.wfile, kept = _Nowhere(), self.wfile
            try:
                self._answer(request, "")
            except ApiError:
                pass
            finally:
                self.wfile = kept
            return self._reset()
        return self._answer(request, kind)

    def _answer(self, request: Request, weather: str) -> None:
        api = self.server.api
        user = user_of(self.headers.get("Authorization"))
        if user is None:
            raise ApiError(401, "Unauthorized")
        if api.is_starting and request.user_agent.startswith("prism"):
            self._refuse_while_starting(user, request)
        if request.resource is None:
            return self._answer_path(request)
        self._authorise(user, request)
        self._check_served(request)
        warnings: list[str] = []
        if request.verb == "watch":
            return self._stream_watch(request, weather)
        if request.subresource == "log":
            pieces = api.read_log(request, self._alive)
            return self._send_bytes(204, b"", "") if pieces is None else self._stream(pieces, "text/plain")
        if request.verb == "list":
            items, metadata = api.do_list(request)
            return self._send_list(request, items, metadata)
        if request.resource.plural == "selfsubjectaccessreviews":
            with api.store.lock:
                return self._send(201, review(user, request.body, api.lister))
        code = 200
        with api.store.lock:
            if request.verb == "get":
                answer = api.do_get(request)
            elif request.verb == "create" and request.subresource:
                code, answer = 201, api.do_subresource(request)
            elif request.verb == "create":
                code, answer = 201, api.do_create(request, warnings)
            elif request.verb == "update":
                answer, created = api.do_update(request, warnings)
                code = 201 if created else 200
            elif request.verb == "patch":
                answer, created = api.do_patch(request, warnings)
                code = 201 if created else 200
            else:
                answer = api.do_delete(request)
        if "as=Table" in request.accept and request.verb == "get":
            answer = self._table(request, [answer], {"resourceVersion": answer["metadata"]["resourceVersion"]})
        return self._send(code, answer, warnings)

    def _check_served(self, request: Request) -> None:
        resource = request.resource
        assert resource
        known = {"", *(("status",) if resource.has_status else ()), *resource.subresources}
        if resource.kind and request.subresource in known:
            return
        # What speaks for groups that nobody serves is not that which speaks for the built-in ones.
        if resource.group in openapi.BUILTIN_GROUPS:
            raise ApiError(404, "the server could not find the requested resource", details={})
        raise PageNotFound

    def _refuse_while_starting(self, user: User, request: Request) -> None:
        """As a server does that has not read its roles yet: each client that is not the rig's own."""
        resource, unread = request.resource, 'RBAC: clusterrole.rbac.authorization.k8s.io "prism-operator" not found'
        if resource is None and request.path.startswith("/apis/"):
            # What a definition adds is served a little later than what is built in.
            text = "the request has been made before all known HTTP paths have been installed, please try again"
            raise ApiError(503, text, details={"retryAfterSeconds": 5})
        if resource is None:
            raise ApiError(403, f'forbidden: User "{user.name}" cannot get path "{request.path}"', details={})
        attempt = Attempt(request.verb, resource.group, request.plural, request.namespace, request.name)
        raise ApiError(403, f"{refusal(user, attempt)}: {unread}", details=_about(resource, request.name))

    def _authorise(self, user: User, request: Request) -> None:
        api, resource = self.server.api, request.resource
        assert resource
        verbs = [request.verb]
        with api.store.lock:
            if "apply-patch" in request.content_type and not api.store.get(
                resource.key, request.namespace, request.name
            ):
                verbs.append("create")
            # A namespace counts as a thing within itself.
            space = request.namespace or (request.name if resource.plural == "namespaces" else "")
            for verb in verbs:
                attempt = Attempt(verb, resource.group, request.plural, space, request.name)
                if not allowed(user, attempt, api.lister):
                    raise ApiError(403, refusal(user, attempt), details=_about(resource, request.name))

    def _answer_path(self, request: Request) -> None:
        resources, path = self.server.api.resources(), request.path
        if path in ("/healthz", "/readyz", "/livez"):
            return self._send_bytes(200, b"ok", "text/plain; charset=utf-8")
        answer: Object | None = None
        if path == "/version":
            answer = openapi.VERSION
        elif path == "/api":
            answer = {"kind": "APIVersions", "versions": ["v1"]}
        elif path == "/apis":
            answer = openapi.api_groups(resources)
        elif path == "/openapi/v3":
            answer = openapi.openapi_index(resources)
        elif match := re.fullmatch(r"(/openapi/v3)?/(?:api/(v1)|apis/([^/]+/[^/]+))", path):
            version = match[2] or match[3]
            if any(resource.api_version == version for resource in resources):
                answer = (openapi.openapi_document if match[1] else openapi.api_resources)(resources, version)
        elif match := re.fullmatch(r"/apis/([^/]+)", path):
            found = (group for group in openapi.api_groups(resources)["groups"] if group["name"] == match[1])
            answer = next(({"kind": "APIGroup", "apiVersion": "v1", **group} for group in found), None)
        if answer is None:
            if path.startswith(tuple(f"/apis/{group}/" for group in openapi.BUILTIN_GROUPS)):
                raise ApiError(404, "the server could not find the requested resource", details={})
            raise PageNotFound
        return self._send(200, answer)

    # Answers

    def _table(self, request: Request, items: list[Object], metadata: Object) -> Object:
        assert request.resource
        return openapi.table(request.resource, items, metadata, include=request.query.get("includeObject", "Metadata"))

    def _send_list(self, request: Request, items: list[Object], metadata: Object) -> None:
        resource = request.resource
        assert resource
        if "as=Table" in request.accept:
            return self._send(200, self._table(request, items, metadata))
        if not resource.custom:
            items = [
                {name: part for name, part in item.items() if name not in ("apiVersion", "kind")} for item in items
            ]
        kind = f"{resource.kind}List"
        return self._send(200, {"kind": kind, "apiVersion": resource.api_version, "metadata": metadata, "items": items})

    def _stream_watch(self, request: Request, weather: str) -> None:
        api, resource = self.server.api, request.resource
        assert resource
        api.selected(request)
        if not re.fullmatch(r"\d*", version := request.query.get("resourceVersion", "")):
            text = f'Invalid value: "{version}": strconv.ParseUint: parsing "{version}": invalid syntax'
            raise ApiError(500, f"resourceVersion: {text}", reason="")
        ends = time.monotonic() + random.uniform(0.02, 0.5) if weather else None

        def alive() -> bool:
            return self._alive()

        def lines() -> Iterator[bytes]:
            for event in api.watch(request, alive):
                if ends and time.monotonic() > ends:
                    if weather == "drop_watch":
                        raise ConnectionResetError
                    event = ("ERROR", ApiError(410, "too old resource version (bad weather)").status)
                if event is None:
                    yield b""
                    continue
                kind, item = event
                if kind in ("ADDED", "MODIFIED", "DELETED"):
                    item = _as_asked(resource, item)
                yield json.dumps({"type": kind, "object": item}).encode() + b"\n"
                if kind == "ERROR":
                    return

        self._stream(lines(), "application/json")

    def _stream(self, pieces: Iterator[bytes], content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for piece in pieces:
                if piece:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if self.server.stopped.is_set():
                raise ConnectionResetError
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self._reset()

    def _alive(self) -> bool:
        """Whether the client still listens. It sends nothing while it waits, so anything to read is its end."""
        if self.server.stopped.is_set():
            return False
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return not ready or bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _fail(self, err: ApiError) -> None:
        wait = err.status.get("details", {}).get("retryAfterSeconds") if err.code in (429, 503) else None
        headers = {} if wait is None else {"Retry-After": str(wait)}
        self._send_bytes(err.code, json.dumps(err.status).encode(), "application/json", headers)

    def _send(self, code: int, answer: Object, warnings: list[str] | None = None) -> None:
        self._send_bytes(code, json.dumps(answer).encode(), "application/json", warnings=warnings or [])

    def _send_bytes(
        self,
        code: int,
        payload: bytes,
        content_type: str,
        headers: dict[str, str] | None = None,
        warnings: list[str] | None = None,
    ) -> None:
        self.send_response(code)
        if content_type:
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        for text in warnings or ():
            self.send_header("Warning", f"299 - {json.dumps(text)}")
        self._headers_buffer.append(b"\r\n")
        self.wfile.write(b"".join(self._headers_buffer) + payload)
        self._headers_buffer = []

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.close()


class _Nowhere:
    """Where a lost answer goes."""

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--kubeconfig", type=Path)
    parser.add_argument("--logs", type=Path)
    options = parser.parse_args()
    with ApiServer(log_folder=options.logs, port=options.port) as server, contextlib.suppress(KeyboardInterrupt):
        if options.kubeconfig:
            server.kubeconfig(options.kubeconfig)
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
