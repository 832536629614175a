"""`prism doctor`: what stands in the way of runs on a cluster, asked before it costs anybody a night. Changes nothing.

Here are the general checks: server, kind, operator, rights. What one run needs is asked in doctor_run.py; its buckets are
tried by a Job of their own (probe.py), the only thing that is made, and it is removed again.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from typing import Any

from launcher.doctor.bucket_probe import try_buckets
from launcher.doctor.findings import Finding, error, looked, ok, warning
from launcher.doctor.rights import check_rights
from launcher.doctor.run_checks import examine_run
from launcher.follow.run_tables import age_text
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Refused, Unavailable
from launcher.operator.leader_election import DURATION_SECONDS
from launcher.resource.crd import crd
from launcher.resource.names import API_GROUP, LEASE, OPERATOR_NAMESPACE, PLURAL, VERSION
from launcher.resource.timestamps import parse_time
from prism_job.spec.document import SelectionRun

OLDEST, NEWEST = 29, 37
"""Minor versions of Kubernetes 1 that our objects are checked against."""


def examine(cluster: Cluster, namespace: str, run: SelectionRun | None, *, probe: bool) -> list[Finding]:
    """All checks, in the order in which a run would meet their subjects.

    Args:
        run: a checked document; None: only what concerns every run.
        probe: let a Job of the run's image try its addresses; takes a minute, or as long as a pod needs to start.
    """
    try:
        findings = [_server(cluster.version())]
    except Refused as refused:
        findings = [warning("server", f"reached, but its version is not told: {refused.what}", "none needed")]
    except Unavailable as gone:
        return [error("server", gone.what, gone.fix)]
    except ClusterError as failed:
        findings = [warning("server", failed.what, failed.fix)]
    try:
        has_kind = cluster.serves_selection_runs()
    except ClusterError as failed:
        return [*findings, error("kind", failed.what, failed.fix)]
    findings += looked("namespace", lambda: _namespace(cluster, namespace))
    findings += looked("kind", lambda: _kind(cluster, has_kind))
    may_have_operator = False
    if has_kind:
        leases, hidden = _leases(cluster, namespace)
        findings += _operator(leases, hidden)
        # What may not be looked at may be there: only where it is seen that nobody leads, rights that are missing are errors.
        may_have_operator = bool(hidden) or any(_is_alive(lease) for lease in leases)
    findings += looked("rights", lambda: check_rights(cluster, namespace, has_kind, may_have_operator))
    if run is not None:
        findings += examine_run(cluster, namespace, run)
        if probe:
            findings += try_buckets(cluster, namespace, run)
    return findings


def _server(version: str) -> Finding:
    match = re.match(r"v?1\.(\d+)", version)
    if match is None:
        return warning("server", f"version {version}", f"PRISM is tested with Kubernetes 1.{OLDEST} to 1.{NEWEST}")
    if int(match[1]) < OLDEST:
        return error("server", f"version {version} is too old", f"it takes Kubernetes 1.{OLDEST} or later")
    if int(match[1]) > NEWEST:
        return warning(
            "server", f"version {version}", f"newer than 1.{NEWEST}, the last that PRISM was checked against"
        )
    return ok("server", f"version {version}")


def _namespace(cluster: Cluster, namespace: str) -> Iterator[Finding]:
    """Most people may not read namespaces: only where one is surely missing that is said."""
    with contextlib.suppress(Refused):
        if cluster.find("Namespace", "", namespace) is None:
            yield error("namespace", f"there is no namespace {namespace}", f"kubectl create namespace {namespace}")


def _kind(cluster: Cluster, has_kind: bool) -> Iterator[Finding]:
    """The installed definition may be that of another version of PRISM: what it does not know, it drops or refuses."""
    if not has_kind:
        fix = "none needed for `prism submit --wait`, which keeps runs in ConfigMaps; else: kubectl apply -k k8s/"
        yield warning("kind", "SelectionRun is not installed", fix)
        return
    served = f"{PLURAL}.{API_GROUP}/{VERSION} is served"
    try:
        there = cluster.find("CustomResourceDefinition", "", f"{PLURAL}.{API_GROUP}") or {}
    except Refused:
        yield ok("kind", f"{served}; its definition may not be read")
        return
    lacking = sorted(_fields(crd()) - _fields(there))
    if lacking:
        shown = ", ".join(lacking[:5]) + (" …" if len(lacking) > 5 else "")
        yield warning(
            "kind", f"{served}, without {len(lacking)} field(s) of this version: {shown}", "kubectl apply -k k8s/"
        )
    else:
        yield ok("kind", served)


def _fields(definition: dict[str, Any]) -> set[str]:
    """'spec.cluster.image', every field of our version."""
    versions = definition.get("spec", {}).get("versions") or ()
    schema = next((one.get("schema", {}).get("openAPIV3Schema") for one in versions if one["name"] == VERSION), None)
    return set(_paths(schema or {}, ""))


def _paths(schema: dict[str, Any], path: str) -> Iterator[str]:
    for name, inner in (schema.get("properties") or {}).items():
        here = f"{path}.{name}".lstrip(".")
        yield here
        yield from _paths(inner, here)
    if "items" in schema:
        yield from _paths(schema["items"], f"{path}[]")


def _operator(leases: list[dict[str, Any]], hidden: dict[str, str]) -> Iterator[Finding]:
    """Alive is whoever renewed the operator's Lease a moment ago. Our clock may differ from its: a minute is allowed."""
    fix = "see `kubectl -n prism-system get pods`; without one, `prism submit --wait` drives the run itself"
    if not leases and hidden:
        places = ", ".join(f"{place}: {why}" for place, why in hidden.items())
        yield warning("operator", f"whether one is there is not known; its Lease {LEASE} was not read ({places})", fix)
    elif not leases:
        yield warning("operator", f"no Lease {LEASE} is seen", fix)
    for lease in leases:
        spec, where = lease["spec"], f"{lease['metadata']['namespace']}/{LEASE}"
        renewed = spec.get("renewTime")
        if not spec.get("holderIdentity") or not renewed:
            yield warning("operator", f"{where}: nobody leads", fix)
            continue
        age = age_text(parse_time(renewed), datetime.datetime.now(datetime.UTC))
        if _is_alive(lease):
            yield ok("operator", f"{where}: {spec['holderIdentity']} leads, renewed {age} ago")
        else:
            yield warning("operator", f"{where}: {spec['holderIdentity']} was last heard of {age} ago", fix)


def _is_alive(lease: dict[str, Any]) -> bool:
    spec = lease["spec"]
    if not spec.get("holderIdentity") or not spec.get("renewTime"):
        return False
    age = datetime.datetime.now(datetime.UTC) - parse_time(spec["renewTime"])
    return age.total_seconds() <= 4 * DURATION_SECONDS


def _leases(cluster: Cluster, namespace: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(the operator's Leases; the namespaces in which none could be looked for, and why)."""
    with contextlib.suppress(ClusterError):
        return cluster.list("Lease", None, fields=f"metadata.name={LEASE}").items, {}
    found, hidden = [], {}
    for place in dict.fromkeys((OPERATOR_NAMESPACE, namespace)):
        try:
            lease = cluster.find("Lease", place, LEASE)
        except Refused:
            hidden[place] = "you may not look"
        except ClusterError as failed:
            hidden[place] = failed.what
        else:
            found += [lease] if lease else []
    return found, hidden
