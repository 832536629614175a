"""The Kubernetes API: plain dicts in and out, a few verbs, and errors of our own. The only module that imports `kubernetes`.

Knows no run and no stage. The client's typed models are passed over: they refuse fields that they do not know, and cost time;
its connection, its authentication and its configuration are used. What it must mind was measured on a real server
(KUBERNETES.md).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import socket
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.kube.outage import Outage
from launcher.resource.record import GROUP, KIND, MANAGER, PLURAL, VERSION

Object = dict[str, Any]

KUEUE = "kueue.x-k8s.io"

PATHS = {
    KIND: (f"/apis/{GROUP}/{VERSION}", PLURAL),
    "ConfigMap": ("/api/v1", "configmaps"),
    "CronJob": ("/apis/batch/v1", "cronjobs"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
    "Event": ("/api/v1", "events"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "LocalQueue": (f"/apis/{KUEUE}/{{version}}", "localqueues"),
    "Namespace": ("/api/v1", "namespaces"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Node": ("/api/v1", "nodes"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "SelfSubjectAccessReview": ("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews"),
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
}
"""Kind -> (path of its group and version, its name in addresses). `{version}`: the one that the server prefers."""

CLUSTER_WIDE = ("CustomResourceDefinition", "Namespace", "Node", "SelfSubjectAccessReview")

REQUEST_SECONDS = 30.0
"""A request that is not answered for so long has failed; a watch is told to end, and listens a little longer."""

QUIET_WATCH_SECONDS = 150.0
"""A server sends a bookmark each minute: a watch that is silent for so long has nobody at its other end."""

CONNECT_SECONDS = 5.0
"""An address that does not take a connection for so long is not reached."""

LONGEST_RETRY_SECONDS = 5.0
"""A request that failed is made again after a pause that doubles each time, up to this one."""

OUTAGE_FAILURES = 3
"""Failures in a row, one or two seconds, that are worth a line: one broken connection is not."""

STARTING_TRIES = 6
"""Of a request that is refused as by a server that has just started, about seven seconds: one that is refused so for longer
has no right."""

RELOAD_SECONDS = 10.0
"""Credentials that are refused are read again, but no more often than this."""

UNKNOWN_GROUP = "404 page not found"
"""All that a server says of a group that it does not serve."""

LONGEST_MESSAGE = 500
"""A refused pod template is answered by a dump of all of it."""

LONGEST_LINE = 2**20
"""Bytes of a log's line that are read: one without an end would fill the memory."""

CUT = "… (the rest of this line is left out)"

PERMANENT = re.compile("field not declared in schema|failed calling webhook")
"""Answers of 500 that another try does not change."""

IMMUTABLE_UID = "metadata.uid: Invalid value"

MAX_WARNINGS = 100

DEEPEST = 200
"""Levels that are read of a document which nests deeper than Python can. The server takes 10,000, Python about 1,000."""

KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
        if hasattr(socket, name)
    ),
]
"""A peer that is gone without a word is noticed after one and a half minutes."""


class ClusterError(Exception):
    """The API server said no, or nothing. `code` is the HTTP status, 0 where there was no answer."""

    def __init__(self, what: str, *, where: str, fix: str, code: int = 0, reason: str = "") -> None:
        self.what, self.where, self.fix, self.code, self.reason = what, where, fix, code, reason
        super().__init__(f"{where}: {what}")


class NotFound(ClusterError):
    """No such object."""


class Conflict(ClusterError):
    """It changed meanwhile, exists already, or a field belongs to another manager."""


class Gone(ClusterError):
    """The resourceVersion to watch from is too old: list again."""


class Refused(ClusterError):
    """The request is wrong, or not allowed: the same one is refused again."""


class Unavailable(ClusterError):
    """No answer, or one that says: later."""


class Starting(Unavailable):
    """A refusal that may be that of a server which has just started."""


@dataclass(frozen=True)
class _Access:
    """Server, credentials and connections, as they were read together."""

    configuration: Any
    pool: Any
    namespace: str


@dataclass(frozen=True)
class Listing:
    """Objects, and the version from which to watch what comes after."""

    items: list[Object]
    version: str


class Cluster:
    """One API server, as one user.

    Args:
        context: of the kubeconfig; none: its current one, or the pod's own service account.
        tries: how often a request is made that meets a transient error. A reconcile loop retries by itself, and takes 1.
        on_outage: called once a request that goes on failing, with a line that says what is waited for.
        timeout_seconds: after so long in all no request is made again.

    Raises:
        Refused: no kubeconfig and not in a pod, or one that cannot be read.
    """

    def __init__(
        self,
        context: str | None = None,
        *,
        tries: int = 1,
        on_outage: Callable[[str], None] = lambda _: None,
        timeout_seconds: float | None = None,
    ) -> None:
        from prism_job import __version__

        self.context, self.file = context, os.environ.get("KUBECONFIG")
        self.access = _access(self.context, self.file)
        self.namespace = self.access.namespace
        self.agent = f"prism/{__version__}"
        self.tries, self.seconds, self.on_outage = tries, REQUEST_SECONDS, on_outage
        self.warnings: list[str] = []
        """The newest that the server sent, each once."""
        self.num_requests = self.num_errors = 0
        self._reading, self._was_read = threading.Lock(), time.monotonic() - RELOAD_SECONDS
        self._outage = Outage()
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def within(self, seconds: float) -> Cluster:
        """The same server, by requests that fail unless they are answered so soon; counted apart."""
        other = copy.copy(self)
        other.seconds, other.num_requests, other.num_errors = seconds, 0, 0
        return other

    def without_retries(self) -> Cluster:
        """The same server, for a loop that retries by itself."""
        other = copy.copy(self)
        other.tries = 1
        return other

    def get(self, kind: str, namespace: str, name: str) -> Object:
        return self._json("GET", self._path(kind, namespace, name))

    def find(self, kind: str, namespace: str, name: str) -> Object | None:
        """None where there is no such object, or no such kind."""
        try:
            return self.get(kind, namespace, name)
        except NotFound:
            return None

    def list(
        self,
        kind: str,
        namespace: str | None,
        *,
        labels: str = "",
        fields: str = "",
        keep: Callable[[Object], Object] = lambda found: found,
    ) -> Listing:
        """All of a kind, page by page.

        Args:
            namespace: None for all namespaces.
            keep: what is kept of each object: thousands of whole ones take hundreds of MB.
        """
        items: list[Object] = []
        query = {"limit": "500", "labelSelector": labels, "fieldSelector": fields}
        path = self._path(kind, namespace)
        while True:
            answer = self._json("GET", path, query=query)
            # Items of a list carry no kind of their own.
            items += [keep({"kind": kind, **item}) for item in answer.get("items") or []]
            version, more = answer["metadata"].get("resourceVersion", ""), answer["metadata"].get("continue")
            if not more:
                return Listing(items, version)
            query["continue"] = more

    def watch(
        self, kind: str, namespace: str | None, version: str, *, labels: str = "", fields: str = "", seconds: int = 240
    ) -> Iterator[tuple[str, Object]]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) from a listing's version on; ends quietly after `seconds`.

        Raises:
            Gone: list again.
            Unavailable: the connection broke before the time was over.
        """
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        quiet_seconds, began = min(QUIET_WATCH_SECONDS, seconds + REQUEST_SECONDS), time.monotonic()
        for line in self._lines(self._path(kind, namespace), query, quiet_seconds, may_be_quiet=True):
            try:
                event = _loads(line)
            except ValueError:
                raise Unavailable("a watch was cut off", where=kind, fix="watch again") from None
            if event["type"] == "ERROR":
                self._refuse(int(event["object"].get("code", 500)), event["object"], self._path(kind, namespace))
            yield event["type"], {"kind": kind, **event["object"]}
        if time.monotonic() < began + seconds - 1:  # a server that goes away ends its watches first
            self._outage.note_failure()

    def apply(self, wanted: Object, *, dry_run: bool = False, force: bool = True) -> Object:
        """Server-side apply under our one field manager; the object as it is then.

        Raises:
            Conflict: another manager holds a field, and `force` is off; or the uid given is not that of the object there.
        """
        metadata = wanted["metadata"]
        query = {"fieldManager": MANAGER, "force": str(force).lower(), **({"dryRun": "All"} if dry_run else {})}
        path = self._path(wanted["kind"], metadata.get("namespace"), metadata["name"])
        return self._json("PATCH", path, query=query, body=wanted, content_type="application/apply-patch+yaml")

    def create(self, wanted: Object, *, dry_run: bool = False) -> Object:
        """Make an object that must not be there yet; unknown fields are refused. Raises Conflict where it is there."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self._json(
            "POST", self._path(wanted["kind"], wanted["metadata"].get("namespace")), query=query, body=wanted
        )

    def replace(self, changed: Object) -> Object:
        """Put an object in place of the version that it was read at. Raises Conflict where that is not the newest."""
        metadata = changed["metadata"]
        return self._json("PUT", self._path(changed["kind"], metadata.get("namespace"), metadata["name"]), body=changed)

    def patch(self, kind: str, namespace: str, name: str, change: Object, *, subresource: str = "") -> Object:
        """JSON merge patch. A resourceVersion within `change.metadata` makes it refuse a newer object (Conflict)."""
        path = self._path(kind, namespace, name) + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": MANAGER}
        return self._json("PATCH", path, query=query, body=change, content_type="application/merge-patch+json")

    def delete(self, kind: str, namespace: str, name: str, *, uid: str = "") -> None:
        """Remove an object, and in the background what it owns. Nothing happens where it, or that uid of it, is gone."""
        # Without a policy the pods of a Job would be left running.
        body = {"propagationPolicy": "Background", **({"preconditions": {"uid": uid}} if uid else {})}
        with contextlib.suppress(NotFound, Conflict):
            self._json("DELETE", self._path(kind, namespace, name), body=body)

    def log_lines(
        self,
        namespace: str,
        pod: str,
        container: str,
        *,
        follow: bool,
        timestamps: bool = False,
        tail: int | None = None,
        since: str = "",
        quiet_seconds: float | None = None,
        opened: Callable[[Callable[[], None]], None] | None = None,
    ) -> Iterator[str]:
        """Lines of a container's log, as they come; one of more than `LONGEST_LINE` bytes in pieces.

        Args:
            since: no earlier lines; RFC 3339, to whole seconds.
            quiet_seconds: a stream that is followed, and says nothing for so long, counts as broken.
            opened: told how to end the stream from another thread: its reader then meets Unavailable.

        Raises:
            NotFound: no such pod. Refused: it has not started. Unavailable: the connection broke.
        """
        query = {
            "container": container,
            "follow": str(follow).lower(),
            "timestamps": str(timestamps).lower(),
            "sinceTime": since,
            **({"tailLines": str(tail)} if tail is not None else {}),
        }
        seconds = quiet_seconds if follow else REQUEST_SECONDS
        yield from self._lines(f"{self._path('Pod', namespace, pod)}/log", query, seconds, opened, longest=LONGEST_LINE)

    def may(self, verb: str, group: str, resource: str, namespace: str | None, subresource: str = "") -> bool:
        """Whether we are allowed to (SelfSubjectAccessReview, which needs no right of its own).

        Shortly after an outage a no may be that of a server which has not read its roles yet: it is asked again, for a few
        seconds.
        """
        attributes = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
        if namespace:
            attributes["namespace"] = namespace
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "metadata": {},
            "spec": {"resourceAttributes": attributes},
        }
        path = self._path("SelfSubjectAccessReview", None)
        while True:
            is_allowed = bool(self._json("POST", path, body=review)["status"]["allowed"])
            if is_allowed or not self._outage.is_settling:
                return is_allowed
            time.sleep(0.5)

    def serves_selection_runs(self) -> bool:
        """Whether the custom resource is installed. Asked by discovery, which everybody may."""
        try:
            self._json("GET", f"/apis/{GROUP}/{VERSION}")
        except NotFound:  # a server that starts answers 503 until it knows all its kinds
            return False
        return True

    def preferred_version(self, group: str) -> str:
        """The version of a group that the API server prefers. Raises NotFound where it does not serve the group."""
        return str(self._json("GET", f"/apis/{group}")["preferredVersion"]["version"])

    def version(self) -> str:
        return str(self._json("GET", "/version")["gitVersion"])

    def close(self) -> None:
        self.access.pool.clear()

    def _path(self, kind: str, namespace: str | None, name: str = "") -> str:
        """Raises NotFound where the version of a group has to be asked for, and nobody serves it."""
        prefix, _ = PATHS[kind]
        version = self.preferred_version(prefix.split("/")[2]) if "{version}" in prefix else ""
        return _path(kind, namespace, name, version)

    def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        for attempt in range(self.tries):
            try:
                response = self._send(method, path, query or {}, body, content_type, self.seconds)
                answer = self._read(response, path)
            except Unavailable as error:
                tries = min(self.tries, STARTING_TRIES) if isinstance(error, Starting) else self.tries
                if attempt + 1 >= tries or (self._deadline is not None and time.monotonic() >= self._deadline):
                    raise
                if attempt + 1 == OUTAGE_FAILURES:
                    self.on_outage(f"waiting for the API server: {error.what}")
                time.sleep(random.uniform(0.5, 1.0) * min(LONGEST_RETRY_SECONDS, 0.3 * 2**attempt))
            else:
                self._note_warnings(response.headers)
                return answer
        raise AssertionError("tries is at least 1")

    def _read(self, response: _Response, path: str) -> Object:
        """The body of an answer. Raises what a refusal, an error or an answer that breaks off means."""
        try:
            with _translated(path):
                data = response.read()
            answer = _parse(data, response, path)
        except Unavailable:
            self._outage.note_failure()
            raise
        if response.status >= 300:
            self.num_errors += 1
            self._refuse(response.status, answer, path)
        self._outage.note_answer()
        return answer

    def _refuse(self, code: int, answer: Object, path: str) -> None:
        """Raise what a Status object, or an HTTP status without one, means."""
        error = _error_of(code, answer, path)
        if self._outage.explains(code, error.what):
            what = f"refused, as by a server that has just started: {error.what}"
            raise Starting(what, where=path, fix=error.fix, code=code, reason=error.reason)
        # A kubelet that does not answer for a pod's log says nothing of the API server.
        if isinstance(error, Unavailable) and code >= 500 and not path.endswith("/log"):
            self._outage.note_failure()
        raise error

    def _lines(
        self,
        path: str,
        query: Mapping[str, str],
        seconds: float | None,
        opened: Callable[[Callable[[], None]], None] | None = None,
        *,
        may_be_quiet: bool = False,
        longest: int | None = None,
    ) -> Iterator[str]:
        """Lines of an answer that goes on.

        Args:
            seconds: of silence after which the connection counts as broken; or, where it `may_be_quiet`, as ended.
            longest: bytes of a line; what comes after them is left out, and a mark says so.
        """
        import urllib3

        response = self._send("GET", path, query, None, "application/json", seconds)
        if response.status >= 300:
            self._read(response, path)
        if opened:
            opened(response.response.shutdown)
        quiet: tuple[type[Exception], ...] = (urllib3.exceptions.ReadTimeoutError,) if may_be_quiet else ()
        parts: list[bytes] = []
        num_bytes, is_cut = 0, False
        try:
            with _translated(path), contextlib.suppress(*quiet):
                for chunk in response.response.stream(2**16):
                    for place, piece in enumerate(chunk.split(b"\n")):
                        if place:  # a line break stood before this piece
                            if not is_cut:
                                yield b"".join(parts).decode(errors="replace")
                            parts, num_bytes, is_cut = [], 0, False
                        if is_cut:
                            continue
                        parts.append(piece)
                        num_bytes += len(piece)
                        if longest is not None and num_bytes > longest:
                            # Always at the same byte: after a broken connection it must look the same.
                            yield b"".join(parts)[:longest].decode(errors="replace") + CUT
                            parts, is_cut = [], True
            if num_bytes and not is_cut:
                yield b"".join(parts).decode(errors="replace")
        except Unavailable:
            if not path.endswith("/log"):  # a log that is silent for long is opened anew
                self._outage.note_failure()
            raise
        finally:
            response.response.close()

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        content_type: str,
        seconds: float | None,
    ) -> Any:
        """One request; two where our credentials are refused, and others are there by now."""
        # As text: the client would otherwise guess a form from the content type.
        text = json.dumps(body) if body is not None else None
        for is_second in (False, True):
            access = self.access
            headers = {
                "Accept": "application/json",
                "User-Agent": self.agent,
                **({"Content-Type": content_type} if body is not None else {}),
            }
            self.num_requests += 1
            with _translated(path):
                url = access.configuration.host + path
                if asked := {name: value for name, value in query.items() if value}:
                    url = f"{url}?{urllib.parse.urlencode(asked)}"
                # Asked for each time: a token may have been renewed on disk, or by the kubeconfig's own command.
                if token := access.configuration.auth_settings().get("BearerToken"):
                    headers[token["key"]] = token["value"]
                timeout = _timeout((min(self.seconds, CONNECT_SECONDS), seconds))
                try:
                    response = access.pool.request(
                        method, url, body=text, headers=headers, timeout=timeout, preload_content=False
                    )
                except Exception:
                    self._outage.note_failure()
                    raise
            if response.status != 401 or is_second or not self._log_in_again(access):
                break
            response.close()
        return _Response(response)

    def _log_in_again(self, refused: _Access) -> bool:
        """Read the credentials anew. False where that was done a moment ago, or they cannot be read."""
        with self._reading:
            if self.access is not refused:
                return True  # by another thread
            if time.monotonic() < self._was_read + RELOAD_SECONDS:
                return False
            self._was_read = time.monotonic()
            try:
                self.access = _access(self.context, self.file)
            except Refused:
                return False
            return True

    def _note_warnings(self, headers: Mapping[str, str]) -> None:
        """A Job whose pods a policy will refuse is made, with a warning alone."""
        warning = headers.get("Warning")
        if warning and warning not in self.warnings:
            self.warnings.append(warning)
            del self.warnings[:-MAX_WARNINGS]


@dataclass(frozen=True)
class _Response:
    response: Any

    @property
    def status(self) -> int:
        return int(self.response.status)

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers  # type: ignore[no-any-return]

    def read(self) -> bytes:
        return bytes(self.response.data)


def _timeout(pair: Sequence[float | None]) -> Any:
    import urllib3

    return urllib3.Timeout(connect=pair[0], read=pair[1])


def _access(context: str | None, file: str | None) -> _Access:
    """Server and credentials as they are on disk now, or as the kubeconfig's own command gives them."""
    import urllib3
    from kubernetes.client import configuration as settings
    from kubernetes.client import rest

    configuration = settings.Configuration()
    namespace = _load(configuration, context, file)
    configuration.retries = False  # our own, counted; urllib3's would not say so
    if not configuration.verify_ssl:  # the person's own choice, in the kubeconfig; urllib3 would warn at every request
        warnings.filterwarnings("ignore", category=urllib3.exceptions.InsecureRequestWarning)
    # Its pool knows certificates and proxies; the rest of the client changes from version to version.
    pool = rest.RESTClientObject(configuration).pool_manager
    pool.connection_pool_kw["socket_options"] = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEP_ALIVE]
    return _Access(configuration, pool, namespace)


def _load(configuration: Any, context: str | None, file: str | None) -> str:
    """Fill in server and credentials; the namespace that they come with.

    Args:
        file: what KUBECONFIG names; the client looks at it once, when it is imported.
    """
    import pathlib

    from kubernetes import config

    account = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    try:
        try:
            config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
        except config.ConfigException:
            if context or not account.exists():
                raise
            config.load_incluster_config(client_configuration=configuration)
            return account.read_text().strip()
        contexts, current = config.list_kube_config_contexts(config_file=file)
        chosen = next((one for one in contexts if one["name"] == context), current) if context else current
        return str((chosen.get("context") or {}).get("namespace") or "default")
    except (config.ConfigException, OSError) as error:
        fix = "set KUBECONFIG, or see that `kubectl get pods` works here"
        raise Refused(f"no cluster to talk to: {error}", where="kubeconfig", fix=fix) from error


def _path(kind: str, namespace: str | None, name: str = "", version: str = "") -> str:
    prefix, plural = PATHS[kind]
    prefix = prefix.replace("{version}", version)
    place = f"/namespaces/{_quoted(namespace)}" if namespace and kind not in CLUSTER_WIDE else ""
    return f"{prefix}{place}/{plural}{f'/{_quoted(name)}' if name else ''}"


def _quoted(name: str) -> str:
    """As one step of an address, whatever is in it."""
    return name.replace(".", "%2E") if name in (".", "..") else urllib.parse.quote(name, safe="")


def _parse(data: bytes, response: _Response, path: str) -> Object:
    """An answer in JSON; of an error in another form, its first line. An unknown group is answered in plain text."""
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if content_type and not content_type.endswith("json"):
        lines = data.decode(errors="replace").strip().splitlines() if content_type == "text/plain" else []
        if (response.status < 300 and data) or (response.status == 404 and lines != [UNKNOWN_GROUP]):
            fix = "check the server's address in the kubeconfig; a proxy may answer in its place"
            what = f"this is no answer of a Kubernetes API: HTTP {response.status}, {content_type}"
            raise Unavailable(what, where=path, fix=fix)
        return {"message": lines[0]} if lines else {}
    try:
        answer = _loads(data.decode() or "{}")
    except ValueError as error:
        raise Unavailable("an answer was cut off", where=path, fix="try again") from error
    return answer if isinstance(answer, dict) else {"message": str(answer)}


def _loads(text: str) -> Any:
    """JSON of any depth. Below `DEEPEST` levels of what Python cannot read there is null: one object stops no list."""
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(_cut_off(text))


_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]')


def _cut_off(text: str) -> str:
    """JSON with null in place of all that lies deeper than `DEEPEST` levels."""
    parts, depth, place = [], 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth == DEEPEST + 1:
                parts.append(text[place : token.start()])
        elif token[0] in "]}":
            if depth == DEEPEST + 1:
                parts.append("null")
                place = token.end()
            depth -= 1
    return "".join((*parts, text[place:]))


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """The client lets urllib3's errors through, which are none of its own; and those of reading credentials."""
    import urllib3
    from kubernetes.config import ConfigException

    try:
        yield
    except ConfigException as error:
        what = f"the credentials cannot be read: {error}"[:LONGEST_MESSAGE]
        raise Unavailable(what, where=path, fix="log in again") from error
    except urllib3.exceptions.SSLError as error:
        what = f"the API server's certificate is not trusted: {error}"[:LONGEST_MESSAGE]
        raise Refused(what, where=path, fix="check server and certificate-authority in the kubeconfig") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        fix = "check that the API server is up and reachable from here"
        what = f"no answer from the API server: {_reason(error)}"[:LONGEST_MESSAGE]
        raise Unavailable(what, where=path, fix=fix) from error


def _reason(error: BaseException) -> str:
    """'Connection refused', where the system says so; else the client's own words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _error_of(code: int, answer: Object, path: str) -> ClusterError:
    """What a Status object, or an HTTP status without one, means."""
    said = str(answer.get("message") or answer.get("reason") or f"HTTP {code}")
    said = said if len(said) <= LONGEST_MESSAGE else f"{said[:LONGEST_MESSAGE]}…"
    reason = str(answer.get("reason", ""))
    kinds: dict[int, tuple[type[ClusterError], str]] = {
        404: (NotFound, "check name and namespace"),
        409: (Conflict, "read it again"),
        410: (Gone, "list again"),
    }
    if code == 404 and not reason:  # no Status object: the whole group is unknown
        said, kinds[404] = (
            f"the API server does not serve this kind: {said}",
            (NotFound, "install it: kubectl apply -k k8s/"),
        )
    if code == 422 and IMMUTABLE_UID in said:  # an apply onto another object that has taken the place
        kinds[422] = (Conflict, "read it again")
    # An apply with a field that the schema lacks is answered 500, for ever.
    # So is a webhook that does not answer, which somebody has to see to.
    permanent = (400 <= code < 500 and code not in (408, 429)) or bool(PERMANENT.search(said))
    fixes = {401: "log in again", 403: "ask for the right to do this"}
    refused = (Refused, fixes.get(code, "correct what it names"))
    family, fix = kinds.get(code, refused if permanent else (Unavailable, "try again later"))
    return family(said, where=path, fix=fix, code=code, reason=reason)
