"""Which rights a run needs, and which of them we lack: the role prism-driver of k8s/rbac.yaml."""

from collections.abc import Iterator

from launcher.doctor.findings import Finding, error, ok, warning
from launcher.kube.cluster import Cluster
from launcher.resource.names import API_GROUP, PLURAL

RIGHTS: tuple[tuple[str, str, str, str], ...] = (
    ("batch", "jobs", "", "get list watch create patch delete"),
    ("", "pods", "", "get list watch"),
    ("", "pods", "log", "get"),
    ("", "configmaps", "", "get create patch"),
    ("", "services", "", "get create patch"),
    ("networking.k8s.io", "networkpolicies", "", "get create patch"),
    ("", "events", "", "list create"),
)
"""(group, resource, subresource, verbs) of whatever drives a run."""

RIGHTS_WITH_CUSTOM_RESOURCE = (
    (API_GROUP, PLURAL, "", "get list watch create patch delete"),
    (API_GROUP, PLURAL, "status", "patch"),
)
RIGHTS_WITH_CONFIG_MAPS = (("", "configmaps", "", "list watch delete"),)
"""Without the custom resource, a ConfigMap is the record."""

OPTIONAL = ("events", "pods/log")
"""A run succeeds without them: events explain why a Job has no pods, logs show bars."""


def missing_rights(cluster: Cluster, namespace: str, has_custom_resource: bool) -> list[tuple[str, list[str]]]:
    """(resource, verbs) that driving a run needs and we lack."""
    found = []
    of_record = RIGHTS_WITH_CUSTOM_RESOURCE if has_custom_resource else RIGHTS_WITH_CONFIG_MAPS
    for group, resource, subresource, verbs in RIGHTS + of_record:
        missing = [verb for verb in verbs.split() if not cluster.may(verb, group, resource, namespace, subresource)]
        if missing:
            found.append((f"{resource}/{subresource}".rstrip("/"), missing))
    return found


def check_rights(
    cluster: Cluster, namespace: str, has_custom_resource: bool, may_have_operator: bool
) -> Iterator[Finding]:
    """One finding per resource with missing verbs; a single `ok` if nothing is missing."""
    missing = missing_rights(cluster, namespace, has_custom_resource)
    if not missing:
        yield ok("rights", f"you may drive runs in {namespace}")
    fix = "bind the role prism-driver (k8s/rbac.yaml, k8s/examples/accounts.yaml)"
    for resource, verbs in missing:
        what = f"you may not {', '.join(verbs)} {resource} in {namespace}"
        if resource in OPTIONAL:
            yield warning("rights", what, fix)
        elif may_have_operator and resource != PLURAL:
            what = f"{what}; an operator does this for your runs"
            yield warning("rights", what, f"none needed with an operator; else {fix}")
        else:
            yield error("rights", what, fix)
