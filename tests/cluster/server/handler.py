"""HTTP of our own API server: parses a request, asks who it is and what befalls it, writes the answer. Stores nothing."""

from __future__ import annotations

import contextlib
import http.server
import json
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
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from tests.cluster.server.authorization import Attempt, User, allowed, refusal, review, user_of
from tests.cluster.server.faults import Action, Request
from tests.cluster.server.kinds.discovery import VERSION, api_groups, api_resources, openapi_document, openapi_index
from tests.cluster.server.kinds.resources import BUILTIN_GROUPS, Resource
from tests.cluster.server.kinds.tables import table
from tests.cluster.server.refusals import STALE, ApiError, PageNotFound, about
from tests.cluster.server.store import Object
from tests.cluster.server.writes import as_asked

if TYPE_CHECKING:
    from tests.cluster.server.apiserver import ApiServer

MAX_REQUEST_BYTES = 3 * 1024**2
"""What a server reads at all."""


class HttpServer(http.server.ThreadingHTTPServer):
    """Threads and sockets that all end with it."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], api: ApiServer) -> None:
        self.api, self.stopped = api, threading.Event()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._loop: threading.Thread | None = None
        super().__init__(address, Handler)

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


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer
    deprecation = ""
    """The warning of the deprecated version that the current request is about."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        api = self.server.api
        self.deprecation = ""
        try:
            request = self._parsed(raw)
            if request.path == "/__requests":
                return self._send(200, {"requests": [[*key, number] for key, number in api.requests.items()]})
            word = {"list": "LIST", "watch": "WATCH"}.get(request.verb, request.method)
            with api.store.lock:
                api.requests[word, request.plural] += 1
            self._with_fault(request, api.faults.draw(request))
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
        verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        verb = verbs.get(self.command) or ("watch" if watching else "get" if name else "list")
        return replace(request, verb=verb, resource=resource, namespace=namespace, name=name, subresource=subresource)

    def _with_fault(self, request: Request, action: Action) -> None:
        kind, _, rest = action.partition(":") if isinstance(action, str) else ("", "", "")
        if callable(action):
            action(request)
        elif kind == "delay":
            time.sleep(float(rest or self.server.api.faults.delay_seconds))
        elif kind == "reset_before" or (kind == "reset_after" and request.method == "GET"):
            return self._reset()
        elif kind.isdigit():
            code = int(kind)
            text = STALE if code == 409 else "a fault was injected"
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

    def _answer(self, request: Request, fault: str) -> None:
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
        self.deprecation = request.resource.deprecation
        warnings: list[str] = []
        if request.verb == "watch":
            return self._stream_watch(request, fault)
        if request.subresource == "log":
            pieces = api.read_log(request, self._alive)
            return self._send_bytes(204, b"", "") if pieces is None else self._stream(pieces, "text/plain")
        if request.verb == "list":
            items, metadata = api.reading.list(request)
            return self._send_list(request, items, metadata)
        if request.resource.plural == "selfsubjectaccessreviews":
            with api.store.lock:
                return self._send(201, review(user, request.body, api.lister))
        code = 200
        with api.store.lock:
            if request.verb == "get":
                answer = api.reading.get(request)
            elif request.verb == "create" and request.subresource:
                code, answer = 201, api.subresources.ask(request)
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
            answer = table(request.resource, [answer], {"resourceVersion": answer["metadata"]["resourceVersion"]})
        return self._send(code, answer, warnings)

    def _check_served(self, request: Request) -> None:
        resource = request.kind
        known = {"", *(("status",) if resource.has_status else ()), *resource.subresources}
        if resource.kind and request.subresource in known:
            return
        # What speaks for groups that nobody serves is not that which speaks for the built-in ones.
        if resource.group in BUILTIN_GROUPS:
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
        raise ApiError(403, f"{refusal(user, attempt)}: {unread}", details=about(resource, request.name))

    def _authorise(self, user: User, request: Request) -> None:
        api, resource = self.server.api, request.kind
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
                    raise ApiError(403, refusal(user, attempt), details=about(resource, request.name))

    def _answer_path(self, request: Request) -> None:
        resources, path = self.server.api.resources(), request.path
        if path in ("/healthz", "/readyz", "/livez"):
            return self._send_bytes(200, b"ok", "text/plain; charset=utf-8")
        answer: Object | None = None
        if path == "/version":
            answer = VERSION
        elif path == "/api":
            answer = {"kind": "APIVersions", "versions": ["v1"]}
        elif path == "/apis":
            answer = api_groups(resources)
        elif path == "/openapi/v3":
            answer = openapi_index(resources)
        elif match := re.fullmatch(r"(/openapi/v3)?/(?:api/(v1)|apis/([^/]+/[^/]+))", path):
            version = match[2] or match[3]
            if any(resource.api_version == version for resource in resources):
                answer = (openapi_document if match[1] else api_resources)(resources, version)
        elif match := re.fullmatch(r"/apis/([^/]+)", path):
            found = (group for group in api_groups(resources)["groups"] if group["name"] == match[1])
            answer = next(({"kind": "APIGroup", "apiVersion": "v1", **group} for group in found), None)
        if answer is None:
            if path.startswith(tuple(f"/apis/{group}/" for group in BUILTIN_GROUPS)):
                raise ApiError(404, "the server could not find the requested resource", details={})
            raise PageNotFound
        return self._send(200, answer)

    # Answers

    def _send_list(self, request: Request, items: list[Object], metadata: Object) -> None:
        resource = request.kind
        if "as=Table" in request.accept:
            return self._send(200, table(resource, items, metadata))
        if not resource.custom:
            items = [
                {name: part for name, part in item.items() if name not in ("apiVersion", "kind")} for item in items
            ]
        kind = f"{resource.kind}List"
        return self._send(200, {"kind": kind, "apiVersion": resource.api_version, "metadata": metadata, "items": items})

    def _stream_watch(self, request: Request, fault: str) -> None:
        api, resource = self.server.api, request.kind
        api.reading.selected(request)
        if not re.fullmatch(r"\d*", version := request.query.get("resourceVersion", "")):
            text = f'Invalid value: "{version}": strconv.ParseUint: parsing "{version}": invalid syntax'
            raise ApiError(500, f"resourceVersion: {text}", reason="")
        ends = time.monotonic() + random.uniform(0.02, 0.5) if fault else None

        def lines() -> Iterator[bytes]:
            for event in api.reading.watch(request, self._alive):
                if ends and time.monotonic() > ends:
                    if fault == "drop_watch":
                        raise ConnectionResetError
                    event = ("ERROR", ApiError(410, "too old resource version (a fault was injected)").status)
                if event is None:
                    yield b""
                    continue
                kind, item = event
                if kind in ("ADDED", "MODIFIED", "DELETED"):
                    item = as_asked(resource, item)
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
        for text in filter(None, (self.deprecation, *(warnings or ()))):
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
