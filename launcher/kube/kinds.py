"""The kinds that the launcher reads or writes, and their paths at the API server."""

import urllib.parse
from collections.abc import Callable

from launcher.resource.names import API_GROUP, KIND, PLURAL, VERSION

KUEUE = "kueue.x-k8s.io"

PREFERRED = "{version}"
"""Stands in a path for the version of its group that the server prefers."""

PATHS = {
    KIND: (f"/apis/{API_GROUP}/{VERSION}", PLURAL),
    "ConfigMap": ("/api/v1", "configmaps"),
    "CronJob": ("/apis/batch/v1", "cronjobs"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
    "Event": ("/api/v1", "events"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "LocalQueue": (f"/apis/{KUEUE}/{PREFERRED}", "localqueues"),
    "Namespace": ("/api/v1", "namespaces"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Node": ("/api/v1", "nodes"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "SelfSubjectAccessReview": ("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews"),
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
}
"""Kind -> (path of its group and version, its plural)."""

CLUSTER_WIDE = ("CustomResourceDefinition", "Namespace", "Node", "SelfSubjectAccessReview")


def path_of(kind: str, namespace: str | None, name: str, preferred_version: Callable[[str], str]) -> str:
    """The path of an object, or of all of a kind; of all namespaces, where none is given.

    Args:
        preferred_version: gives the version of a group that the server prefers.
    """
    prefix, plural = PATHS[kind]
    if PREFERRED in prefix:
        prefix = prefix.replace(PREFERRED, preferred_version(prefix.split("/")[2]))
    scope = f"/namespaces/{_quoted(namespace)}" if namespace and kind not in CLUSTER_WIDE else ""
    return f"{prefix}{scope}/{plural}{f'/{_quoted(name)}' if name else ''}"


def _quoted(name: str) -> str:
    """As one step of a path, whatever is in it."""
    return name.replace(".", "%2E") if name in (".", "..") else urllib.parse.quote(name, safe="")
