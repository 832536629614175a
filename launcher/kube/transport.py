"""Requests to one API server as one user, and what is done about their failures. Knows no kinds of objects.

The client's typed models are not used: they refuse fields that they do not know, and cost time. Its connections, its
authentication and its configuration are. What a real server answers stands in docs/architecture.md, Kubernetes.
"""

import contextlib
import copy
import json
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from launcher.kube import deep_json
from launcher.kube.credentials import Credentials
from launcher.kube.errors import Starting, Unavailable, client_errors_as_ours, error_of_answer
from launcher.kube.recent_outage import RecentOutage, growing_pause, report_outage
from launcher.resource.object import Object
from prism_job import __version__

REQUEST_SECONDS = 30.0
"""A request that is not answered for so long has failed; a watch may be silent for a little longer than it lasts."""

CONNECT_SECONDS = 5.0
"""An address that does not take a connection for so long is not reached."""

LONGEST_RETRY_SECONDS = 5.0
"""A failed request is retried after a pause that doubles each time, up to this one."""

STARTING_TRIES = 6
"""Of a request that is refused as by a server that has just started, about eight seconds: a user whose request is refused for
longer has no right to it."""

MAX_WARNINGS = 100

UNKNOWN_GROUP = "404 page not found"
"""The whole answer of a server about a group that it does not serve."""

LONGEST_LINE = 2**20
"""Bytes that are kept of a line of a log: a line without an end would fill the memory."""

CUT = "… (the rest of this line is left out)"


class Transport:
    """One API server, as one user.

    Args:
        context: of the kubeconfig; none: its current one, or the pod's own service account.
        tries: how often a request is made that meets a transient error. A reconcile loop retries by itself, and takes 1.
        on_outage: called once a request that keeps failing, with a line for the person who waits.
        timeout_seconds: after so long in all no request is retried.

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
        self.credentials = Credentials(context)
        self.namespace = self.credentials.access.namespace
        self.agent = f"prism/{__version__}"
        self.tries, self.request_seconds, self.on_outage = tries, REQUEST_SECONDS, on_outage
        self.warnings: list[str] = []
        """The newest that the server sent, each once."""
        self.num_requests = self.num_errors = 0
        self.recent_outage = RecentOutage()
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def within(self, seconds: float) -> Self:
        """The same server, by requests that fail unless they are answered in this time; they are counted apart."""
        other = copy.copy(self)
        other.request_seconds, other.num_requests, other.num_errors = seconds, 0, 0
        return other

    def without_retries(self) -> Self:
        """The same server, for a loop that retries by itself."""
        other = copy.copy(self)
        other.tries = 1
        return other

    def close(self) -> None:
        self.credentials.access.pool.clear()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """The answer to a request; transient errors are retried."""
        failures = 0
        while True:
            try:
                response = self._send(method, path, query or {}, body, content_type, self.request_seconds)
                answer = self._read(response, path)
            except Unavailable as error:
                failures += 1
                tries = min(self.tries, STARTING_TRIES) if isinstance(error, Starting) else self.tries
                if failures >= tries or (self._deadline is not None and time.monotonic() >= self._deadline):
                    raise
                report_outage(error, failures, self.on_outage)
                time.sleep(growing_pause(failures, longest_seconds=LONGEST_RETRY_SECONDS))
            else:
                self._note_warnings(response.headers)
                return answer

    def lines(
        self,
        path: str,
        query: Mapping[str, str],
        silence_seconds: float | None,
        opened: Callable[[Callable[[], None]], None] | None = None,
        *,
        may_be_silent: bool = False,
        longest: int | None = None,
    ) -> Iterator[str]:
        """Lines of a streamed response.

        Args:
            silence_seconds: after so long without a byte the connection counts as broken; where it `may_be_silent`, as ended.
            opened: given a function that ends the stream from another thread: its reader then meets Unavailable.
            longest: bytes of a line; see `decoded_lines`.
        """
        import urllib3

        response = self._send("GET", path, query, None, "application/json", silence_seconds)
        if response.status >= 300:
            self._read(response, path)
        if opened:
            opened(response.shutdown)
        ends_stream: tuple[type[Exception], ...] = (urllib3.exceptions.ReadTimeoutError,) if may_be_silent else ()

        def chunks() -> Iterator[bytes]:
            with client_errors_as_ours(path), contextlib.suppress(*ends_stream):
                yield from response.stream(2**16)

        try:
            yield from decoded_lines(chunks(), longest)
        except Unavailable:
            if not path.endswith("/log"):  # a log that is silent for long is opened again
                self.recent_outage.note_failure()
            raise
        finally:
            response.close()

    def refuse(self, code: int, answer: Object, path: str) -> None:
        """Raise what a Status object, or an HTTP status without one, stands for."""
        error = error_of_answer(code, answer, path)
        if self.recent_outage.explains(code, error.what):
            what = f"refused, as by a server that has just started: {error.what}"
            raise Starting(what, where=path, fix=error.fix, code=code, reason=error.reason)
        # A kubelet that does not answer for a pod's log is no sign of an outage of the API server.
        if isinstance(error, Unavailable) and code >= 500 and not path.endswith("/log"):
            self.recent_outage.note_failure()
        raise error

    def _read(self, response: Any, path: str) -> Object:
        """The body of an answer. Raises what a refusal, an error or an answer that breaks off stands for."""
        try:
            with client_errors_as_ours(path):
                data = bytes(response.data)
            answer = _parse(data, response, path)
        except Unavailable:
            self.recent_outage.note_failure()
            raise
        if response.status >= 300:
            self.num_errors += 1
            self.refuse(response.status, answer, path)
        self.recent_outage.note_answer()
        return answer

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        content_type: str,
        silence_seconds: float | None,
    ) -> Any:
        """The response of urllib3 to one request; to a second one where our credentials are refused and others can be read."""
        import urllib3

        # As text: the client would otherwise guess a form from the content type.
        text = json.dumps(body) if body is not None else None
        timeout = urllib3.Timeout(connect=min(self.request_seconds, CONNECT_SECONDS), read=silence_seconds)
        for is_second in (False, True):
            access = self.credentials.access
            headers = {
                "Accept": "application/json",
                "User-Agent": self.agent,
                **({"Content-Type": content_type} if body is not None else {}),
            }
            self.num_requests += 1
            with client_errors_as_ours(path):
                url = access.configuration.host + path
                if given := {name: value for name, value in query.items() if value}:
                    url = f"{url}?{urllib.parse.urlencode(given)}"
                # Read for each request: a token may have been renewed on disk, or by the kubeconfig's own command.
                if token := access.configuration.auth_settings().get("BearerToken"):
                    headers[token["key"]] = token["value"]
                try:
                    response = access.pool.request(
                        method, url, body=text, headers=headers, timeout=timeout, preload_content=False
                    )
                except Exception:
                    self.recent_outage.note_failure()
                    raise
            if response.status != 401 or is_second or not self.credentials.renew(access):
                break
            response.close()
        return response

    def _note_warnings(self, headers: Mapping[str, str]) -> None:
        """A Job whose pods a policy will refuse is created, with no more than a warning."""
        warning = headers.get("Warning")
        if warning and warning not in self.warnings:
            self.warnings.append(warning)
            del self.warnings[:-MAX_WARNINGS]


def _parse(data: bytes, response: Any, path: str) -> Object:
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
        answer = deep_json.loads(data.decode() or "{}")
    except ValueError as error:
        raise Unavailable("an answer was cut off", where=path, fix="try again") from error
    return answer if isinstance(answer, dict) else {"message": str(answer)}


def decoded_lines(chunks: Iterable[bytes], longest: int | None) -> Iterator[str]:
    """The lines, without their ends.

    Args:
        longest: bytes of a line; what comes after them is left out, and `CUT` stands in its place.
    """
    parts: list[bytes] = []
    num_bytes, is_cut = 0, False
    for chunk in chunks:
        for index, piece in enumerate(chunk.split(b"\n")):
            if index:  # a line break stood before this piece
                if not is_cut:
                    yield b"".join(parts).decode(errors="replace")
                parts, num_bytes, is_cut = [], 0, False
            if is_cut:
                continue
            parts.append(piece)
            num_bytes += len(piece)
            if longest is not None and num_bytes > longest:
                # Always at the same byte: after a broken connection the line must look the same.
                yield b"".join(parts)[:longest].decode(errors="replace") + CUT
                parts, is_cut = [], True
    if num_bytes and not is_cut:
        yield b"".join(parts).decode(errors="replace")
