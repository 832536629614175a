"""The kinds that the launcher reads or writes, and their paths at the API server."""

import urllib.parse
from collections.abc import Callable

from launcher.resource.names import API_GROUP, KIND, PLURAL, VERSION

KUEUE = "kueue.x-k8s.io"

DISCOVERED = "{version}"
"""Stands in a path for the version that discovery finds."""

READABLE_VERSIONS = {"LocalQueue": ("v1beta1", "v1beta2"), "Workload": ("v1beta1", "v1beta2")}
"""Kind -> the versions in which we can read it, of kinds whose version is discovered.

Kueue serves v1beta1 alone up to 0.14, both from 0.15 on, and v1beta2 alone from 0.20 on (its release notes of 0.15.0 and
0.20.0). Of a LocalQueue we read metadata.name and status.conditions, of a Workload metadata.labels and status.conditions:
the same in both (apis/kueue/*/localqueue_types.go and workload_types.go of kubernetes-sigs/kueue). In v1beta2 a LocalQueue's
status.flavors is gone and its status.flavorUsage is flavorsUsage; we read neither, and no ClusterQueue. The operator reads
nothing of Kueue: the label kueue.x-k8s.io/queue-name of a Job belongs to no version.
"""

PATHS = {
    KIND: (f"/apis/{API_GROUP}/{VERSION}", PLURAL),
    "ConfigMap": ("/api/v1", "configmaps"),
    "CronJob": ("/apis/batch/v1", "cronjobs"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
    "Event": ("/api/v1", "events"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "LocalQueue": (f"/apis/{KUEUE}/{DISCOVERED}", "localqueues"),
    "Namespace": ("/api/v1", "namespaces"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Node": ("/api/v1", "nodes"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "SelfSubjectAccessReview": ("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews"),
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Workload": (f"/apis/{KUEUE}/{DISCOVERED}", "workloads"),
}
"""Kind -> (path of its group and version, its plural)."""

CLUSTER_WIDE = ("CustomResourceDefinition", "Namespace", "Node", "SelfSubjectAccessReview")


def path_of(kind: str, namespace: str | None, name: str, served_version: Callable[[str], str]) -> str:
    """The path of an object, or of all of a kind; of all namespaces, where none is given.

    Args:
        served_version: gives the version in which to read a kind that is discovered.
    """
    prefix, plural = PATHS[kind]
    if DISCOVERED in prefix:
        prefix = prefix.replace(DISCOVERED, served_version(kind))
    scope = f"/namespaces/{_quoted(namespace)}" if namespace and kind not in CLUSTER_WIDE else ""
    return f"{prefix}{scope}/{plural}{f'/{_quoted(name)}' if name else ''}"


def group_of(kind: str) -> str:
    """The API group of a kind that is in one."""
    return PATHS[kind][0].split("/")[2]


def _quoted(name: str) -> str:
    """As one step of a path, whatever is in it."""
    return name.replace(".", "%2E") if name in (".", "..") else urllib.parse.quote(name, safe="")
