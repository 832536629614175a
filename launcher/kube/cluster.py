"""The Kubernetes API in a few verbs: plain dicts in and out, and errors of our own. Knows no run and no stage."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.kube import deep_json
from launcher.kube.errors import Conflict, NotFound, Unavailable, UnknownVersion
from launcher.kube.kinds import PATHS, READABLE_VERSIONS, group_of, path_of
from launcher.kube.transport import LONGEST_LINE, REQUEST_SECONDS, Transport
from launcher.resource.names import API_GROUP, MANAGER, VERSION
from launcher.resource.object import Object

SILENT_WATCH_SECONDS = 150.0
"""A server sends a bookmark each minute: a watch that is silent for so long is broken."""


@dataclass(frozen=True)
class Listing:
    """Objects, and the version from which to watch what comes after."""

    items: list[Object]
    version: str


class Cluster(Transport):
    """Verbs on the objects of one API server."""

    def get(self, kind: str, namespace: str, name: str) -> Object:
        return self.request("GET", self._path(kind, namespace, name))

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
            keep: gives what is kept of each object: thousands of whole ones take hundreds of MB.
        """
        items: list[Object] = []
        query = {"limit": "500", "labelSelector": labels, "fieldSelector": fields}
        path = self._path(kind, namespace)
        while True:
            answer = self.request("GET", path, query=query)
            # Items of a list carry no kind of their own.
            items += [keep({"kind": kind, **item}) for item in answer.get("items") or []]
            version, more = answer["metadata"].get("resourceVersion", ""), answer["metadata"].get("continue")
            if not more:
                return Listing(items, version)
            query["continue"] = more

    def watch(
        self, kind: str, namespace: str | None, version: str, *, labels: str = "", fields: str = "", seconds: int = 240
    ) -> Iterator[tuple[str, Object]]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) from the version of a listing on; ends after `seconds`.

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
        silence_seconds, began = min(SILENT_WATCH_SECONDS, seconds + REQUEST_SECONDS), time.monotonic()
        for line in self.lines(self._path(kind, namespace), query, silence_seconds, may_be_silent=True):
            try:
                event = deep_json.loads(line)
            except ValueError:
                raise Unavailable("a watch was cut off", where=kind, fix="watch again") from None
            if event["type"] == "ERROR":
                self.refuse(int(event["object"].get("code", 500)), event["object"], self._path(kind, namespace))
            yield event["type"], {"kind": kind, **event["object"]}
        if time.monotonic() < began + seconds - 1:  # a server that shuts down ends its watches first
            self.recent_outage.note_failure()

    def apply(self, wanted: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply under our one field manager; returns the object as it is then.

        Raises:
            Conflict: the given uid is not that of the object there.
        """
        metadata = wanted["metadata"]
        query = {"fieldManager": MANAGER, "force": "true", **({"dryRun": "All"} if dry_run else {})}
        path = self._path(wanted["kind"], metadata.get("namespace"), metadata["name"])
        return self.request("PATCH", path, query=query, body=wanted, content_type="application/apply-patch+yaml")

    def create(self, wanted: Object, *, dry_run: bool = False) -> Object:
        """Create an object; unknown fields are refused. Raises Conflict where it exists already."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.request(
            "POST", self._path(wanted["kind"], wanted["metadata"].get("namespace")), query=query, body=wanted
        )

    def replace(self, changed: Object) -> Object:
        """Replace the version of an object that was read. Raises Conflict where that is not the newest."""
        metadata = changed["metadata"]
        return self.request(
            "PUT", self._path(changed["kind"], metadata.get("namespace"), metadata["name"]), body=changed
        )

    def patch(self, kind: str, namespace: str, name: str, change: Object, *, subresource: str = "") -> Object:
        """JSON merge patch. With a resourceVersion in `change.metadata`, raises Conflict where the object is newer."""
        path = self._path(kind, namespace, name) + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": MANAGER}
        return self.request("PATCH", path, query=query, body=change, content_type="application/merge-patch+json")

    def delete(self, kind: str, namespace: str, name: str, *, uid: str = "") -> None:
        """Remove an object, and in the background what it owns. Does nothing where the object, or that uid of it, is gone."""
        # Without a policy the pods of a Job would go on running.
        body = {"propagationPolicy": "Background", **({"preconditions": {"uid": uid}} if uid else {})}
        with contextlib.suppress(NotFound, Conflict):
            self.request("DELETE", self._path(kind, namespace, name), body=body)

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
        silence_seconds: float | None = None,
        opened: Callable[[Callable[[], None]], None] | None = None,
    ) -> Iterator[str]:
        """Lines of a container's log, as they arrive; of a very long one the first `LONGEST_LINE` bytes.

        Args:
            since: no earlier lines; RFC 3339, to whole seconds.
            silence_seconds: a stream that is followed, and silent for so long, counts as broken.
            opened: given a function that ends the stream from another thread: its reader then meets Unavailable.

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
        seconds = silence_seconds if follow else REQUEST_SECONDS
        yield from self.lines(f"{self._path('Pod', namespace, pod)}/log", query, seconds, opened, longest=LONGEST_LINE)

    def may(self, verb: str, group: str, resource: str, namespace: str | None, subresource: str = "") -> bool:
        """Whether we have a right (SelfSubjectAccessReview, which needs no right of its own).

        Shortly after an outage a no may come from a server which has not read its roles yet: the question is repeated for a
        few seconds.
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
            is_allowed = bool(self.request("POST", path, body=review)["status"]["allowed"])
            if is_allowed or not self.recent_outage.is_settling:
                return is_allowed
            time.sleep(0.5)

    def serves_selection_runs(self) -> bool:
        """Whether the custom resource is installed, by discovery, to which everybody has a right."""
        try:
            self.request("GET", f"/apis/{API_GROUP}/{VERSION}")
        except NotFound:  # a server that starts answers 503 until it knows all its kinds
            return False
        return True

    def served_version(self, kind: str) -> str:
        """The version in which to read a kind whose version is discovered: of those that we can read, the server's first.

        Discovered as kubectl does it: the group lists its versions, and each version its kinds. The version that the server
        prefers for the group may not have this kind.

        Raises:
            NotFound: the server does not serve the group, or not this kind of it.
            UnknownVersion: it serves the kind only in versions that we cannot read.
        """
        group, plural, readable = group_of(kind), PATHS[kind][1], READABLE_VERSIONS[kind]
        path = f"/apis/{group}"
        answer, unknown = self.request("GET", path), []
        preferred = answer.get("preferredVersion")
        listed = [*([preferred] if preferred else []), *(answer.get("versions") or ())]
        for version in dict.fromkeys(entry["version"] for entry in listed):
            if not self._serves(f"{path}/{version}", plural):
                continue
            if version in readable:
                return str(version)
            unknown.append(version)
        if not unknown:
            raise NotFound(f"no version of {group} has {plural}", where=path, fix=f"install the {kind} of {group}")
        what = f"{kind} is served as {group}/{', '.join(unknown)}; this version of PRISM reads {', '.join(readable)}"
        raise UnknownVersion(what, where=path, fix="upgrade PRISM")

    def _serves(self, path: str, plural: str) -> bool:
        """Whether the group and version at `path` have a resource."""
        try:
            resources = self.request("GET", path).get("resources") or ()
        except NotFound:
            return False
        return any(resource["name"] == plural for resource in resources)

    def version(self) -> str:
        return str(self.request("GET", "/version")["gitVersion"])

    def _path(self, kind: str, namespace: str | None, name: str = "") -> str:
        """Raises NotFound and UnknownVersion as `served_version` does, for kinds whose version is discovered."""
        return path_of(kind, namespace, name, self.served_version)
