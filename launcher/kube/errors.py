"""The errors of a request to the API server: what an answer, or the lack of one, means. Makes no requests."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any


class ClusterError(Exception):
    """The API server refused a request, or did not answer. `code` is the HTTP status, 0 where there was no answer."""

    def __init__(self, what: str, *, where: str, fix: str, code: int = 0, reason: str = "") -> None:
        self.what, self.where, self.fix, self.code, self.reason = what, where, fix, code, reason
        super().__init__(f"{where}: {what}")


class NotFound(ClusterError):
    """No such object, or no such kind."""


class UnknownVersion(ClusterError):
    """The kind is served only in versions that we cannot read."""


class Conflict(ClusterError):
    """The object has changed, exists already, or a field belongs to another manager."""


class Gone(ClusterError):
    """The resourceVersion to watch from is too old: list again."""


class Refused(ClusterError):
    """The request is wrong, or not allowed: the same request is refused again."""


class NoCluster(Refused):
    """There is no kubeconfig, or none that can be read, and we are in no pod."""


class Unavailable(ClusterError):
    """A transient error: no answer, or one that asks to try again later."""


class Starting(Unavailable):
    """A refusal that may come from a server which has just started."""


LONGEST_MESSAGE = 500
"""Characters of a message. An API server answers a refused pod template with a dump of all of it."""

PERMANENT = re.compile("field not declared in schema|failed calling webhook")
"""Answers with status 500 that another try does not change."""

IMMUTABLE_UID = "metadata.uid: Invalid value"


def error_of_answer(code: int, answer: dict[str, Any], path: str) -> ClusterError:
    """The error that a Status object stands for, or an HTTP status without one."""
    message = str(answer.get("message") or answer.get("reason") or f"HTTP {code}")
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"
    reason = str(answer.get("reason", ""))
    families: dict[int, tuple[type[ClusterError], str]] = {
        404: (NotFound, "check name and namespace"),
        409: (Conflict, "it was changed at the same time, or exists already: run the command again"),
        410: (Gone, "run the command again"),
    }
    if code == 404 and not reason:  # no Status object: the whole group is unknown
        message = f"the API server does not serve this kind: {message}"
        families[404] = (NotFound, "install it: kubectl apply -k k8s/")
    if code == 422 and IMMUTABLE_UID in message:  # an apply onto another object of the same name
        families[422] = (Conflict, "it was changed at the same time, or exists already: run the command again")
    # The server answers 500 each time to an apply with a field that the schema lacks, and where a webhook does not answer:
    # somebody has to repair that.
    is_permanent = (400 <= code < 500 and code not in (408, 429)) or bool(PERMANENT.search(message))
    fixes = {401: "log in again", 403: "ask for the right to do this"}
    refused = (Refused, fixes.get(code, "correct the field that the message names"))
    family, fix = families.get(code, refused if is_permanent else (Unavailable, "try again later"))
    return family(message, where=path, fix=fix, code=code, reason=reason)


@contextlib.contextmanager
def client_errors_as_ours(path: str) -> Iterator[None]:
    """Turn errors of urllib3, of sockets and of reading credentials into a ClusterError."""
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
    """The system's own text ('Connection refused') where there is one, else the client's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)
