"""`prism doctor`: checks that a cluster is ready for runs: server, namespace, custom resource, operator, rights.

What one run needs is checked in run_checks.py, its buckets in bucket_probe.py.
"""

import contextlib
import datetime
import re
from collections.abc import Iterator
from typing import Any

from launcher.doctor.bucket_probe import try_buckets
from launcher.doctor.findings import Finding, error, ok, run_check, warning
from launcher.doctor.rights import check_rights
from launcher.doctor.run_checks import examine_run
from launcher.follow.run_tables import age_text
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Refused, Unavailable
from launcher.operator.leader_election import DURATION_SECONDS
from launcher.resource.crd import crd
from launcher.resource.names import API_GROUP, LEASE, OPERATOR_NAMESPACE, PLURAL, VERSION
from launcher.resource.status import parse_time
from prism_job.spec.document import SelectionRun

OLDEST_MINOR, NEWEST_MINOR = 29, 37
"""Versions of Kubernetes 1 that our objects are validated against."""


def examine(cluster: Cluster, namespace: str, run: SelectionRun | None, *, probe: bool) -> list[Finding]:
    """All findings, in the order in which a run would meet the problems.

    Args:
        run: a valid document; None: only what concerns every run.
        probe: test the buckets with a Job of the run's image; takes as long as a pod needs to start.
    """
    try:
        findings = [_check_server(cluster.version())]
    except Refused as refused:
        findings = [warning("server", f"reachable, but its version may not be read: {refused.what}", "none needed")]
    except Unavailable as unavailable:
        return [error("server", unavailable.what, unavailable.fix)]
    except ClusterError as failed:
        findings = [warning("server", failed.what, failed.fix)]
    try:
        has_custom_resource = cluster.serves_selection_runs()
    except ClusterError as failed:
        return [*findings, error("kind", failed.what, failed.fix)]
    findings += run_check("namespace", lambda: _check_namespace(cluster, namespace))
    findings += run_check("kind", lambda: _check_custom_resource(cluster, has_custom_resource))
    may_have_operator = False
    if has_custom_resource:
        leases, hidden = _leases(cluster, namespace)
        findings += _check_operator(leases, hidden)
        # Missing rights are errors only if there is surely no operator: a Lease that we may not read may exist.
        may_have_operator = bool(hidden) or any(_is_alive(lease) for lease in leases)
    findings += run_check("rights", lambda: check_rights(cluster, namespace, has_custom_resource, may_have_operator))
    if run is not None:
        findings += examine_run(cluster, namespace, run)
        if probe:
            findings += try_buckets(cluster, namespace, run)
    return findings


def _check_server(version: str) -> Finding:
    match = re.match(r"v?1\.(\d+)", version)
    if match is None:
        fix = f"PRISM is tested with Kubernetes 1.{OLDEST_MINOR} to 1.{NEWEST_MINOR}"
        return warning("server", f"version {version}", fix)
    if int(match[1]) < OLDEST_MINOR:
        return error("server", f"version {version} is too old", f"upgrade to Kubernetes 1.{OLDEST_MINOR} or later")
    if int(match[1]) > NEWEST_MINOR:
        fix = f"newer than 1.{NEWEST_MINOR}, the latest that PRISM is tested with"
        return warning("server", f"version {version}", fix)
    return ok("server", f"version {version}")


def _check_namespace(cluster: Cluster, namespace: str) -> Iterator[Finding]:
    """Most people may not read namespaces: reports only one that is surely missing."""
    with contextlib.suppress(Refused):
        if cluster.find("Namespace", "", namespace) is None:
            yield error("namespace", f"namespace {namespace} does not exist", f"kubectl create namespace {namespace}")


def _check_custom_resource(cluster: Cluster, has_custom_resource: bool) -> Iterator[Finding]:
    """The installed CRD may belong to another version of PRISM, which drops or refuses unknown fields."""
    if not has_custom_resource:
        fix = "none needed for `prism submit --wait`, which keeps runs in ConfigMaps; else: kubectl apply -k k8s/"
        yield warning("kind", "SelectionRun is not installed", fix)
        return
    served = f"{PLURAL}.{API_GROUP}/{VERSION} is served"
    try:
        installed = cluster.find("CustomResourceDefinition", "", f"{PLURAL}.{API_GROUP}") or {}
    except Refused:
        yield ok("kind", f"{served}; its definition may not be read by you")
        return
    missing = sorted(_fields(crd()) - _fields(installed))
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        what = f"{served}, but lacks {len(missing)} field(s) of this version: {shown}"
        yield warning("kind", what, "kubectl apply -k k8s/")
    else:
        yield ok("kind", served)


def _fields(definition: dict[str, Any]) -> set[str]:
    """Every field of our version, such as 'spec.cluster.image'."""
    versions = definition.get("spec", {}).get("versions") or ()
    schema = next((it.get("schema", {}).get("openAPIV3Schema") for it in versions if it["name"] == VERSION), None)
    return set(_paths(schema or {}, ""))


def _paths(schema: dict[str, Any], path: str) -> Iterator[str]:
    for name, child in (schema.get("properties") or {}).items():
        child_path = f"{path}.{name}".lstrip(".")
        yield child_path
        yield from _paths(child, child_path)
    if "items" in schema:
        yield from _paths(schema["items"], f"{path}[]")


def _check_operator(leases: list[dict[str, Any]], hidden: dict[str, str]) -> Iterator[Finding]:
    """An operator is alive if its Lease was renewed recently; a minute allows for clocks that differ."""
    fix = "check `kubectl -n prism-system get pods`; without an operator, `prism submit --wait` drives the run itself"
    if not leases and hidden:
        reasons = ", ".join(f"{it}: {why}" for it, why in hidden.items())
        what = f"it is not known whether one runs: its Lease {LEASE} could not be read ({reasons})"
        yield warning("operator", what, fix)
    elif not leases:
        yield warning("operator", f"none: there is no Lease {LEASE}", fix)
    for lease in leases:
        spec, where = lease["spec"], f"{lease['metadata']['namespace']}/{LEASE}"
        if not spec.get("holderIdentity") or not spec.get("renewTime"):
            yield warning("operator", f"{where}: no operator leads", fix)
            continue
        age = age_text(parse_time(spec["renewTime"]), datetime.datetime.now(datetime.UTC))
        if _is_alive(lease):
            yield ok("operator", f"{where}: {spec['holderIdentity']} leads, Lease renewed {age} ago")
        else:
            yield warning("operator", f"{where}: {spec['holderIdentity']} last renewed its Lease {age} ago", fix)


def _is_alive(lease: dict[str, Any]) -> bool:
    spec = lease["spec"]
    if not spec.get("holderIdentity") or not spec.get("renewTime"):
        return False
    age = datetime.datetime.now(datetime.UTC) - parse_time(spec["renewTime"])
    return age.total_seconds() <= 4 * DURATION_SECONDS


def _leases(cluster: Cluster, namespace: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(the operator's Leases; namespace -> why none could be read there)."""
    with contextlib.suppress(ClusterError):
        return cluster.list("Lease", None, fields=f"metadata.name={LEASE}").items, {}
    found, hidden = [], {}
    for candidate in dict.fromkeys((OPERATOR_NAMESPACE, namespace)):
        try:
            lease = cluster.find("Lease", candidate, LEASE)
        except Refused:
            hidden[candidate] = "you may not read it"
        except ClusterError as failed:
            hidden[candidate] = failed.what
        else:
            found += [lease] if lease else []
    return found, hidden
