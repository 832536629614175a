"""What a write makes of an object, and what a watcher or a list sees of it: plain data in, plain data out."""

from __future__ import annotations

import uuid

from tests.cluster.server.faults import Request
from tests.cluster.server.kinds.ownership import from_fields_v1, owned, to_fields_v1
from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.refusals import ApiError
from tests.cluster.server.store import Object, copied, stamp


def as_asked(resource: Resource, item: Object) -> Object:
    return {**item, "apiVersion": resource.api_version, "kind": resource.kind}


def check_type(resource: Resource, body: Object) -> None:
    wanted = (resource.api_version, resource.kind)
    if (body.get("apiVersion", wanted[0]), body.get("kind", wanted[1])) != wanted:
        found = f"{body.get('apiVersion')}, Kind={body.get('kind')}"
        raise ApiError(400, f"the object provided is {found}, which does not match {wanted[0]}, Kind={wanted[1]}")


def typed_body(request: Request) -> Object:
    """The body as it is stored, its type and namespace checked against the address."""
    resource, body = request.kind, request.body
    if not isinstance(body, dict) or not isinstance(body.get("metadata") or {}, dict):
        raise ApiError(400, "the body is no object with metadata")
    if resource.custom and not (body.get("apiVersion") and body.get("kind")):
        raise ApiError(400, "Object 'Kind' is missing in the body")
    check_type(resource, body)
    inside = (body.get("metadata") or {}).get("namespace") or request.namespace
    if resource.namespaced and inside != request.namespace:
        raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
    return {
        **body,
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": dict(body.get("metadata") or {}),
    }


def without_status(resource: Resource, body: Object) -> Object:
    return {name: value for name, value in body.items() if name != "status" or not resource.has_status}


def next_state(request: Request, resource: Resource, body: Object, old: Object | None) -> Object:
    """`body` with what a writer cannot choose: identity, times, and the half that its address does not write."""
    metadata = {name: value for name, value in body["metadata"].items() if name not in _SERVERS_OWN}
    if old is None:
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": stamp()}
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
    return copied({"apiVersion": new.pop("apiVersion"), "kind": new.pop("kind"), **new})


_SERVERS_OWN = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink")
_SERVERS_OWN += ("deletionTimestamp", "deletionGracePeriodSeconds")


def is_same(new: Object, old: Object, *, with_managers: bool = False) -> bool:
    def bare(item: Object) -> Object:
        metadata = {
            name: value for name, value in item["metadata"].items() if name not in ("managedFields", "resourceVersion")
        }
        managers = (
            [{**entry, "time": ""} for entry in item["metadata"].get("managedFields", ())] if with_managers else []
        )
        return {**item, "metadata": {**metadata, "managedFields": managers}}

    return bare(new) == bare(old)


def generation_rises(resource: Resource, new: Object, old: Object | None) -> bool:
    if not resource.custom and not resource.has_status and resource.plural != "networkpolicies":
        return False
    if old is None:
        return resource.plural not in ("namespaces", "nodes", "services", "persistentvolumeclaims", "resourcequotas")
    skipped = {"metadata", "status"} if resource.has_status else {"metadata"}
    parts = [{name: value for name, value in item.items() if name not in skipped} for item in (new, old)]
    return "generation" in old["metadata"] and parts[0] != parts[1]


def same_manager(entry: Object, request: Request, operation: str) -> bool:
    wanted = (request.manager, operation, request.subresource)
    return (entry["manager"], entry["operation"], entry.get("subresource", "")) == wanted


def managers_after(
    request: Request, resource: Resource, new: Object, old: Object | None, applied: Object | None
) -> list[Object]:
    """managedFields after a write: an applier owns what it applied, an updater what it changed; the others lose that."""
    after = owned(resource.schema, new)
    before = owned(resource.schema, old) if old else {}
    changed = {path for path, value in after.items() if before.get(path, ...) != value}
    operation = "Apply" if applied is not None else "Update"
    mine = set(owned(resource.schema, applied)) if applied is not None else set(changed)
    own = {"manager": request.manager, "operation": operation, "apiVersion": resource.api_version, "time": stamp()}
    out = [*(old or {"metadata": {}})["metadata"].get("managedFields", ())]
    place = next((n for n, entry in enumerate(out) if same_manager(entry, request, operation)), len(out))
    for number, entry in enumerate(out):
        paths = from_fields_v1(entry["fieldsV1"])
        if number == place:
            mine |= paths & after.keys() if applied is None else set()
        elif (left := paths & after.keys() - changed) != paths:
            out[number] = {**entry, "fieldsV1": to_fields_v1(left)}
    own |= {"fieldsType": "FieldsV1", "fieldsV1": to_fields_v1(mine)}
    out[place : place + 1] = [{**own, "subresource": request.subresource} if request.subresource else own]
    return [entry for entry in out if entry["fieldsV1"]]
