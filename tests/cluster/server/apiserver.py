"""A Kubernetes API server of our own, over real HTTP: it stores objects, tells watchers, judges writes and collects orphans.

It starts nothing and schedules nothing: Jobs and pods come to life through clients of this server. It knows nothing of
PRISM. `python -m tests.cluster.server.apiserver --port 8001 --kubeconfig FILE` serves until it is ended; /__requests counts
what was asked of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from tests.cluster.podlogs import PodLogs
from tests.cluster.server.admission import Admission
from tests.cluster.server.collector import Collector
from tests.cluster.server.faults import Faults, Request, Requests
from tests.cluster.server.handler import HttpServer
from tests.cluster.server.kinds.builtin_rules import builtin_errors, metadata_errors
from tests.cluster.server.kinds.defaults import established, fill_in
from tests.cluster.server.kinds.ownership import from_fields_v1, merge, owned, without
from tests.cluster.server.kinds.resources import BUILTIN, OBJECT_META, Resource, custom_resources
from tests.cluster.server.kinds.rules import rule_errors
from tests.cluster.server.kinds.schemas import Cause, prune, set_defaults, tidied, validate
from tests.cluster.server.kinds.selectors import merge_patch
from tests.cluster.server.reading import Reading
from tests.cluster.server.refusals import (
    STALE,
    ApiError,
    about,
    another_uid,
    conflict,
    forbidden,
    invalid_object,
    not_found,
    other_there,
    ownership_conflict,
    unconditional,
    undecodable,
)
from tests.cluster.server.store import Object, Store, copied, is_ending, owned_by, stamp
from tests.cluster.server.subresources import Subresources
from tests.cluster.server.writes import (
    as_asked,
    check_type,
    generation_rises,
    is_same,
    managers_after,
    next_state,
    same_manager,
    typed_body,
    without_status,
)

MAX_OBJECT_BYTES = 1_500_000
"""What etcd takes."""
METADATA_ALONE = {"type": "object", "properties": {"metadata": OBJECT_META}}
BLOCKING = {f"FieldValue{what}" for what in ("NotSupported", "Required", "TooLong", "TooMany", "TypeInvalid")}
"""What a schema has against an object, so that its rules are not asked any more."""
UNCHECKED = Cause(
    "FieldValueInvalid",
    "<nil>",
    "Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation",
)


class ApiServer:
    """Serves from `with` to its end. `log_folder` is where a kubelet writes what pods/log shows."""

    def __init__(self, *, log_folder: Path | None = None, port: int = 0) -> None:
        self.logs = PodLogs(log_folder or Path("/nonexistent"))
        self.faults, self.requests = Faults(), Requests()
        self.start_seconds = 1.0
        """For so long after an outage all but the administrator are refused: a real server took a second to read its roles."""
        self.started = float("-inf")
        self.store = Store()
        self.reading = Reading(self.store)
        self.drop_watches = self.reading.drop_watches
        self.subresources = Subresources(self.store, self.reading, self.logs, self.do_delete)
        self.admission = Admission(self.store, self.resources)
        self.ended = threading.Event()
        self._http = HttpServer(("127.0.0.1", port), self)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._resources: dict[tuple[str, str, str], Resource] = {(r.group, r.version, r.plural): r for r in BUILTIN}
        self._collector = Collector(self)
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
            return [copied(item) for r in self._find(plural)[:1] for item in self.store.list(r.key, namespace)]

    def object(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        """A copy of one stored object, or None."""
        with self.store.lock:
            resource = self._find(plural)[0]
            return copied(self.store.get(resource.key, namespace if resource.namespaced else "", name))

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
            self._http = HttpServer(("127.0.0.1", port), self)
            self._http.start()

    def read_log(self, request: Request, alive: Callable[[], bool]) -> Iterator[bytes] | None:
        return self.subresources.read_log(request, alive)

    @property
    def is_starting(self) -> bool:
        return time.monotonic() < self.started + self.start_seconds

    def _own(self, verb: str, resource: Resource, namespace: str, name: str, body: Object) -> Request:
        method = {"create": "POST", "update": "PUT", "delete": "DELETE"}[verb]
        return Request(method, "", {}, "test", verb, resource, namespace, name, body=copied(body))

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

    # Writing

    def do_create(self, request: Request, warnings: list[str]) -> Object:
        """Stores a new object."""
        resource, body = request.kind, typed_body(request)
        metadata = body["metadata"]
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                cause = Cause("FieldValueRequired", "metadata.name", "Required value: name or generateName is required")
                raise invalid_object(resource, "", [cause])
            metadata["name"] = metadata["generateName"] + "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
        with self.store.lock:
            self._check_namespace(resource, request.namespace, metadata["name"])
            if self.store.get(resource.key, request.namespace, metadata["name"]):
                text = f'{resource.qualified} "{metadata["name"]}" already exists'
                if is_ending(self.store.get(resource.key, request.namespace, metadata["name"]) or {"metadata": {}}):
                    text = f"object is being deleted: {text}"
                raise ApiError(409, text, reason="AlreadyExists", details=about(resource, metadata["name"]))
            return self._write(request, resource, body, None, warnings)

    def do_update(self, request: Request, warnings: list[str]) -> tuple[Object, bool]:
        """Replaces an object, or its status; makes a Lease that is not there. Says as well whether it was created."""
        resource, body = request.kind, typed_body(request)
        metadata = body["metadata"]
        with self.store.lock:
            old = self.store.get(resource.key, request.namespace, request.name)
            if old is None and resource.plural != "leases":
                raise not_found(resource, request.name)
            if metadata.get("name", request.name) != request.name:
                raise ApiError(400, "the name of the object does not match the name on the URL")
            uid = old["metadata"]["uid"] if old else ""
            if metadata.get("uid", uid) != uid:
                raise conflict(
                    resource, request.name, another_uid(resource, request.namespace, request.name, metadata["uid"], uid)
                )
            if old and not metadata.get("resourceVersion") and (resource.custom or resource.plural == "leases"):
                raise unconditional(resource, request.name)
            return self._write(request, resource, body, old, warnings), old is None

    def do_patch(self, request: Request, warnings: list[str]) -> tuple[Object, bool]:
        """Changes an object by a merge patch or an apply. Says as well whether it was created."""
        resource, patch = request.kind, request.body
        with self.store.lock:
            old = self.store.get(resource.key, request.namespace, request.name)
            if request.content_type == "application/apply-patch+yaml":
                return self._apply(request, resource, patch, old, warnings), old is None
            if old is None:
                raise not_found(resource, request.name)
            live = as_asked(resource, old)
            # A strategic patch without lists is a merge patch; kubectl sends one for a built-in kind.
            strategic = "strategic" in request.content_type and "[" not in json.dumps(patch)
            if request.content_type not in ("application/merge-patch+json", "application/json") and not strategic:
                known = "application/merge-patch+json, application/apply-patch+yaml"
                text = f"the body of the request was in an unknown format - accepted media types include: {known}"
                raise ApiError(415, text)
            if not isinstance(patch, dict):
                raise ApiError(400, "the patch is no object")
            new = merge_patch(live, patch)
            stale = new.get("metadata", {}).get("resourceVersion") not in (None, old["metadata"]["resourceVersion"])
            if stale:
                raise conflict(resource, request.name, STALE)
            if new.get("metadata", {}).get("name") != request.name:
                raise ApiError(400, "the name of the object does not match the name on the URL")
            check_type(resource, new)
            return self._write(request, resource, copied(new), old, warnings), False

    def _apply(
        self, request: Request, resource: Resource, config: Object, old: Object | None, warnings: list[str]
    ) -> Object:
        """Server-side apply: lays `config` over what lives and takes note of who owns what."""
        if not request.query.get("fieldManager"):
            options = Resource("meta.k8s.io", "v1", "patchoptions", "PatchOptions")
            text = "Required value: is required for apply patch"
            raise invalid_object(options, "", [Cause("FieldValueRequired", "fieldManager", text)])
        if not isinstance(config, dict) or not config.get("apiVersion") or not config.get("kind"):
            group, _, version = config.get("apiVersion", "/").rpartition("/")
            raise ApiError(400, f"invalid object type: {group}/{version}, Kind={config.get('kind', '')}")
        check_type(resource, config)
        config = tidied(resource.schema, config) if not resource.custom else copied(config)
        metadata = config.setdefault("metadata", {})
        metadata.setdefault("name", request.name)
        _, unknown = prune(resource.schema, config)
        if unknown:
            what = f"({metadata.get('namespace', '')}/{request.name}; {resource.api_version}, Kind={resource.kind})"
            text = f"failed to create typed patch object {what}: .{unknown[0]}: field not declared in schema"
            raise ApiError(500, text, reason="")
        if old is None:
            if metadata.get("uid"):
                text = f"uid mismatch: the provided object specified uid {metadata['uid']}, and no existing object was found"
                raise conflict(resource, request.name, text)
            self._check_namespace(resource, request.namespace, request.name)
            wanted = without_status(resource, config)
            return self._write(request, resource, wanted, None, warnings, applied=wanted)
        if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            text = f'Invalid value: "{metadata["uid"]}": field is immutable'
            raise invalid_object(resource, request.name, [Cause("FieldValueInvalid", "metadata.uid", text)] * 2)
        self._check_preconditions(resource, metadata, old)
        wanted = without_status(resource, config)
        values, live = owned(resource.schema, wanted), owned(resource.schema, old)
        mine, kept, lost = set(), set(), []
        for entry in old["metadata"].get("managedFields", ()):
            paths = from_fields_v1(entry["fieldsV1"])
            if same_manager(entry, request, "Apply"):
                mine = paths
                continue
            lost += [(path, entry) for path in paths & values.keys() if live.get(path, ...) != values[path]]
            kept |= paths
        if lost and request.query.get("force") not in ("true", "1"):
            raise ownership_conflict(resource, lost)
        new = merge(resource.schema, old, wanted)
        for path in sorted(mine - values.keys() - kept, key=len):
            new = without(resource.schema, new, path)
        return self._write(request, resource, copied(new), old, warnings, applied=wanted)

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
        new = next_state(request, resource, body, old)
        name = new["metadata"]["name"]
        new = self._checked(request, resource, new, old, warnings)
        if not request.subresource:
            self.admission.check(request, resource, new, old, warnings)
        if len(json.dumps(new)) > MAX_OBJECT_BYTES:
            raise ApiError(500, f'etcdserver: request is too large ({resource.qualified} "{name}")')
        if old is not None and is_same(new, old) and applied is None:
            return as_asked(resource, old)
        new["metadata"]["managedFields"] = managers_after(request, resource, new, old, applied)
        if old is not None and is_same(new, old, with_managers=True):
            return as_asked(resource, old)
        if generation_rises(resource, new, old):
            new["metadata"]["generation"] = (old or {"metadata": {}})["metadata"].get("generation", 0) + 1
        if request.dry_run:
            version = {"resourceVersion": old["metadata"]["resourceVersion"]} if old else {}
            return as_asked(resource, {**new, "metadata": {**new["metadata"], **version}})
        seen = self.store.commit(resource.key, old, new)
        held = seen["metadata"].get("finalizers") or seen["metadata"].get("deletionGracePeriodSeconds")
        if is_ending(seen) and not held and resource.plural != "namespaces":
            seen = self.store.commit(resource.key, seen, None)
        self._after(resource, seen, old)
        return as_asked(resource, seen)

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        space = self.store.get(("", "namespaces"), "", namespace)
        if space is None:
            raise ApiError(
                404, f'namespaces "{namespace}" not found', details={"name": namespace, "kind": "namespaces"}
            )
        if is_ending(space):
            text = f"unable to create new content in namespace {namespace} because it is being terminated"
            refusal = forbidden(resource, name, text)
            cause = {"reason": "NamespaceTerminating", "message": f"namespace {namespace} is being terminated"}
            refusal.status["details"]["causes"] = [{**cause, "field": "metadata.namespace"}]
            raise refusal

    def _check_preconditions(self, resource: Resource, metadata: Object, old: Object | None) -> None:
        if old is None:
            return
        version, name = old["metadata"]["resourceVersion"], old["metadata"]["name"]
        if metadata.get("resourceVersion") not in (None, "", version):
            raise conflict(resource, name, STALE)

    def _checked(
        self, request: Request, resource: Resource, new: Object, old: Object | None, warnings: list[str]
    ) -> Object:
        """`new` pruned, with its defaults; raises what a schema and a kind's rules have against it."""
        name, mode = new["metadata"]["name"], request.query.get("fieldValidation", "Warn")
        if resource.custom:
            new["metadata"] = tidied(OBJECT_META, new["metadata"])
        else:
            new = tidied(resource.schema, new)
        new, unknown = prune(resource.schema, new)
        if unknown and mode == "Strict":
            texts = ", ".join(f'unknown field "{place}"' for place in unknown)
            raise undecodable(resource, f"strict decoding error: {texts}")
        if mode != "Ignore":
            warnings += [f'unknown field "{place}"' for place in unknown]
        typed = {"metadata": new["metadata"]} if resource.custom else new
        causes = validate(resource.schema if not resource.custom else METADATA_ALONE, typed)
        if wrong := [cause for cause in causes if cause.reason == "FieldValueTypeInvalid"]:
            raise undecodable(resource, f"json: cannot unmarshal: {wrong[0].message}")
        causes += metadata_errors(resource, new["metadata"])
        if resource.custom:
            set_defaults(resource.custom, new)
            causes += validate(resource.custom, new)
            if any(cause.reason in BLOCKING for cause in causes):
                causes.append(UNCHECKED)
            else:
                causes += rule_errors(resource.custom, new, old)
        elif not causes:
            fill_in(resource, new, old)
            causes += builtin_errors(resource, new, old)
        if causes:
            raise invalid_object(resource, name, causes)
        if old and is_ending(old):
            added = set(new["metadata"].get("finalizers", ())) - set(old["metadata"].get("finalizers", ()))
            if added:
                text = "Forbidden: no new finalizers can be added if the object is being deleted"
                raise invalid_object(resource, name, [Cause("FieldValueForbidden", "metadata.finalizers", text)])
        return new

    def _after(self, resource: Resource, seen: Object, old: Object | None) -> None:
        """What follows from a write: a namespace's service account, a definition's kinds, a quota's figures."""
        name = seen["metadata"]["name"]
        if resource.plural == "namespaces" and old is None:
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
            self.create(account)
        elif resource.plural == "customresourcedefinitions" and resource.group == "apiextensions.k8s.io":
            there = self.store.get(resource.key, "", name)
            if there and not there["status"]["conditions"]:
                self.store.commit(resource.key, there, established(there))
            self.serve(seen)
        for quota in (
            self.store.list(("", "resourcequotas"), seen["metadata"].get("namespace")) if resource.namespaced else ()
        ):
            self.admission.count_quota(quota)

    def serve(self, definition: Object) -> None:
        """Serves what a stored definition defines, and no more what a removed one did."""
        group, plural = definition["spec"]["group"], definition["spec"]["names"]["plural"]
        gone = (
            self.store.get(("apiextensions.k8s.io", "customresourcedefinitions"), "", definition["metadata"]["name"])
            is None
        )
        self._resources = {key: r for key, r in self._resources.items() if (r.group, r.plural) != (group, plural)}
        if not gone:
            self._resources |= {(r.group, r.version, r.plural): r for r in custom_resources(definition)}

    # Deleting

    def do_delete(self, request: Request) -> Object:
        """Deletes one object; answers with it, or with a Status where it is gone already."""
        resource, options = request.kind, {**request.query, **(request.body or {})}
        with self.store.lock:
            item = self.store.get(resource.key, request.namespace, request.name)
            if item is None:
                raise not_found(resource, request.name)
            for name, wanted in (options.get("preconditions") or {}).items():
                if (found := item["metadata"].get(name)) != wanted:
                    raise other_there(resource, request.name, wanted, found)
            policy = options.get("propagationPolicy") or ("Orphan" if resource.plural == "jobs" else "Background")
            if policy not in ("Orphan", "Background"):
                raise ApiError(500, f"this server does not know the propagation policy {policy}")
            grace = options.get("gracePeriodSeconds")
            if not request.dry_run:
                item = self.remove(resource, item, policy=policy, grace_seconds=None if grace is None else int(grace))
            left = self.store.get(resource.key, request.namespace, request.name)
        if left is not None or resource.plural in ("pods", "services"):
            return as_asked(resource, item)
        details = {**about(resource, request.name), "uid": item["metadata"]["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def remove(self, resource: Resource, item: Object, *, policy: str, grace_seconds: int | None = None) -> Object:
        """Deletes `item`, or marks it where finalizers or a pod's grace stand before. The caller holds the lock."""
        metadata = dict(item["metadata"])
        grace, children = 0, self.store.children.get(metadata["uid"], set())
        if resource.plural == "pods":
            grace = item["spec"].get("terminationGracePeriodSeconds", 30) if grace_seconds is None else grace_seconds
            done = item.get("status", {}).get("phase") in ("Succeeded", "Failed")
            grace = 0 if done or not item["spec"].get("nodeName") else grace
        finalizers = metadata.get("finalizers")
        if policy == "Orphan":
            for place in tuple(children):
                child = self.store.get(place[:2], place[2], place[3])
                assert child
                left = [r for r in child["metadata"]["ownerReferences"] if r["uid"] != metadata["uid"]]
                self.store.commit(place[:2], child, owned_by(child, left))
        waits = finalizers or grace or resource.plural == "namespaces"
        if resource.plural == "pods" and not finalizers and not grace:
            item = {**item, "metadata": {**metadata, "deletionGracePeriodSeconds": 0}}
        if not waits:
            seen = self.store.commit(resource.key, item, None)
            self._after(resource, seen, item)
            return seen
        if is_ending(item) and grace >= metadata.get("deletionGracePeriodSeconds", 0):
            return item
        metadata["deletionTimestamp"] = stamp(grace)
        metadata["deletionGracePeriodSeconds"] = grace
        if metadata.get("generation") and not is_ending(item):
            metadata["generation"] += 1
        status = (
            {"status": {**item.get("status", {}), "phase": "Terminating"}} if resource.plural == "namespaces" else {}
        )
        return self.store.commit(resource.key, item, {**item, **status, "metadata": metadata})


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
