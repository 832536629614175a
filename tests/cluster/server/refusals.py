"""What an API server of our own says no with, in a real one's words. Plain data in, exceptions out."""

from __future__ import annotations

from typing import Any

from tests.cluster.server.kinds.ownership import Path, path_text
from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.kinds.schemas import Cause

Object = dict[str, Any]


REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed"}
REASONS |= {409: "Conflict", 410: "Expired", 415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests"}
REASONS |= {500: "InternalError", 503: "ServiceUnavailable"}


class ApiError(Exception):
    """An answer that is no success. `status` is the body that says so; a `reason` of "" is left out."""

    def __init__(self, code: int, message: str, *, reason: str | None = None, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        reason = REASONS.get(code, "") if reason is None else reason
        given = {"reason": reason} if reason else {}
        given |= {} if details is None else {"details": details}
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
        self.status: Object = {**status, **given, "code": code}


class PageNotFound(Exception):
    """What no part of the server serves: 404 in plain text."""


def invalid_object(resource: Resource, name: str, causes: list[Cause]) -> ApiError:
    texts = list(dict.fromkeys(f"{cause.field}: {cause.message}" for cause in causes))
    text = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    qualified = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    listed = [{"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes]
    details = {**about(resource, name), "kind": resource.kind, "causes": listed}
    return ApiError(422, f'{qualified} "{name}" is invalid: {text}', details=details)


def about(resource: Resource, name: str) -> Object:
    found = {"name": name, "group": resource.group, "kind": resource.plural}
    return {key: value for key, value in found.items() if value}


def not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(404, f'{resource.qualified} "{name}" not found', details=about(resource, name))


def conflict(resource: Resource, name: str, text: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {text}'
    return ApiError(409, message, details=about(resource, name))


def unconditional(resource: Resource, name: str) -> ApiError:
    message = "Invalid value: 0: must be specified for an update"
    error = invalid_object(resource, name, [Cause("FieldValueInvalid", "metadata.resourceVersion", message)])
    error.status["details"]["kind"] = resource.plural
    error.status["message"] = f'{resource.qualified} "{name}" is invalid: metadata.resourceVersion: {message}'
    return error


def another_uid(resource: Resource, namespace: str, name: str, wanted: str, found: str) -> str:
    key = f"/registry/{resource.plural}/{namespace}/{name}"
    uids = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
    return f"StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: {uids}"


def other_there(resource: Resource, name: str, wanted: str, found: str) -> ApiError:
    """A deletion that means another object of that name. Names the kind, not the resource."""
    text = f"the UID in the precondition ({wanted}) does not match the UID in record ({found})."
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    message = f'Operation cannot be fulfilled on {kind} "{name}": {text} The object might have been deleted and then recreated'
    return ApiError(409, message, details={**about(resource, name), "kind": resource.kind})


def undecodable(resource: Resource, text: str) -> ApiError:
    kind = resource.kind
    return ApiError(400, f'{kind} in version "{resource.version}" cannot be handled as a {kind}: {text}')


def forbidden(resource: Resource, name: str, text: str) -> ApiError:
    return ApiError(403, f'{resource.qualified} "{name}" is forbidden: {text}', details=about(resource, name))


TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. "
    "You can start a new list without the continue parameter, or use the continue token in this response to retrieve "
    "the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that "
    "were created, modified, or deleted between the time the first chunk was returned and now may show up in the list."
)
STALE = "the object has been modified; please apply your changes to the latest version and try again"


def ownership_conflict(resource: Resource, lost: list[tuple[Path, Object]]) -> ApiError:
    causes, by_manager = [], {}
    for path, entry in sorted(lost, key=lambda pair: pair[0]):
        who = f'"{entry["manager"]}"'
        if "subresource" in entry:
            who += f' with subresource "{entry["subresource"]}"'
        if entry["operation"] == "Update":
            who += f" using {entry['apiVersion']}"
        field = path_text(path)
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
