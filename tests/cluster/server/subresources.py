"""Subresources of pods and service accounts: evictions, bindings, tokens, logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.cluster.podlogs import PodLogs
from tests.cluster.server.faults import Request
from tests.cluster.server.reading import Reading
from tests.cluster.server.refusals import ApiError, conflict, not_found
from tests.cluster.server.store import Object, Store, is_ending, stamp


class Subresources:
    """Args: `delete` deletes the object of a request, as an eviction does."""

    def __init__(self, store: Store, reading: Reading, logs: PodLogs, delete: Callable[[Request], Object]) -> None:
        self.store, self._reading, self.logs, self._delete = store, reading, logs, delete

    def ask(self, request: Request) -> Object:
        """pods/eviction, pods/binding, serviceaccounts/token."""
        resource, body = request.kind, request.body or {}
        item = self.store.get(resource.key, request.namespace, request.name)
        if item is None:
            raise not_found(resource, request.name)
        success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
        if request.subresource == "token":
            token = f"sa:{request.namespace}:{request.name}"
            return {**body, "status": {"token": token, "expirationTimestamp": stamp(3600)}}
        if request.subresource == "binding":
            if item["spec"].get("nodeName"):
                raise conflict(resource, request.name, f"pod {request.name} is already assigned to node")
            if not request.dry_run:
                scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp()}
                status = with_condition(item.get("status", {}), scheduled)
                self.store.commit(
                    resource.key,
                    item,
                    {**item, "spec": {**item["spec"], "nodeName": body["target"]["name"]}, "status": status},
                )
            return success
        options = body.get("deleteOptions") or {}
        done = item.get("status", {}).get("phase") in ("Succeeded", "Failed")
        wanted = options.get("preconditions", {}).get("uid", item["metadata"]["uid"])
        if wanted == item["metadata"]["uid"] and not done and not is_ending(item) and not request.dry_run:
            condition = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting",
                "lastProbeTime": None,
                "lastTransitionTime": stamp(),
            }
            self.store.commit(resource.key, item, {**item, "status": with_condition(item.get("status", {}), condition)})
        self._delete(replace(request, verb="delete", body=options))
        return success

    def read_log(self, request: Request, alive: Callable[[], bool]) -> Iterator[bytes] | None:
        """A container's log in pieces, following it where asked; None where its pod has no node yet."""
        resource, query = request.kind, request.query
        with self.store.lock:
            pod = self._reading.get(request)
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
            raise not_found(resource, node)
        state = next((s.get("state", {}) for s in status.get("containerStatuses", ()) if s["name"] == name), {})
        if "waiting" in state or (status.get("phase", "Pending") == "Pending" and not state):
            why = state.get("waiting", {}).get("reason") or "ContainerCreating"
            raise ApiError(400, f'container "{name}" in pod "{request.name}" is waiting to start: {why}')
        uid = pod["metadata"]["uid"]
        path = self.logs.path(request.namespace, request.name, uid, name)
        return self.logs.follow(path, query, lambda: self.ended_pod(request.namespace, request.name, uid), alive)

    def ended_pod(self, namespace: str, name: str, uid: str) -> bool:
        """Whether this very pod is terminal or gone."""
        with self.store.lock:
            pod = self.store.get(("", "pods"), namespace, name)
            return not pod or pod["metadata"]["uid"] != uid or pod["status"].get("phase") in ("Succeeded", "Failed")


def with_condition(status: Object, condition: Object) -> Object:
    others = [entry for entry in status.get("conditions", ()) if entry["type"] != condition["type"]]
    return {**status, "conditions": [*others, condition]}
