"""What discovery answers: which groups, versions and kinds are served."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.cluster.server.kinds.resources import BUILTIN_GROUPS, Resource, version_priority

VERBS = ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"]
VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.2", "platform": "linux/amd64"}
VERSION |= {"emulationMajor": "1", "emulationMinor": "36", "minCompatibilityMajor": "1", "minCompatibilityMinor": "35"}


def api_resources(resources: Iterable[Resource], api_version: str) -> dict[str, Any]:
    """The APIResourceList of one group and version."""
    rows = []
    for resource in resources:
        if resource.api_version != api_version:
            continue
        row = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": ["create"] if resource.plural == "selfsubjectaccessreviews" else VERBS,
            "shortNames": list(resource.short_names),
        }
        rows.append({name: value for name, value in row.items() if value != []})
        if resource.has_status:
            base = {"singularName": "", "namespaced": resource.namespaced, "kind": resource.kind}
            rows.append({**base, "name": f"{resource.plural}/status", "verbs": ["get", "patch", "update"]})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": rows}


def api_groups(resources: Iterable[Resource]) -> dict[str, Any]:
    """The APIGroupList of everything but the core group."""
    groups: dict[str, list[str]] = {}
    for resource in resources:
        versions = groups.setdefault(resource.group, [])
        if resource.version not in versions:
            versions.append(resource.version)
    groups.pop("", None)
    rows = []
    for name, versions in groups.items():
        if name not in BUILTIN_GROUPS:
            versions.sort(key=version_priority)
        entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
        rows.append({"name": name, "versions": entries, "preferredVersion": entries[0]})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": rows}


def openapi_index(resources: Iterable[Resource]) -> dict[str, Any]:
    """/openapi/v3: where each group's document lies."""
    places = {f"apis/{r.api_version}" if r.group else f"api/{r.version}" for r in resources}
    return {"paths": {place: {"serverRelativeURL": f"/openapi/v3/{place}"} for place in sorted(places)}}


def openapi_document(resources: Iterable[Resource], api_version: str) -> dict[str, Any]:
    """One group's document, with what kubectl reads in it: that PATCH knows fieldValidation, so the server validates.

    It leaves the request bodies out, so that kubectl takes the merge keys compiled into it and not ours.
    """
    paths = {}
    for resource in resources:
        if resource.api_version != api_version:
            continue
        prefix = f"/apis/{api_version}" if resource.group else f"/api/{api_version}"
        scope = "/namespaces/{namespace}" if resource.namespaced else ""
        gvk = {"group": resource.group, "kind": resource.kind, "version": resource.version}
        parameters = [
            {"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")
        ]
        operation = {
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-group-version-kind": gvk,
        }
        paths[f"{prefix}{scope}/{resource.plural}/{{name}}"] = {"patch": {**operation, "x-kubernetes-action": "patch"}}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.36.2"}, "paths": paths, "components": {}}
