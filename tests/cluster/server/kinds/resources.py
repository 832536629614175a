"""Which kinds there are, and their schemas: built-in ones from the JSON schemas of kubernetes-validate, custom ones from their
definition. From there on both are the same to us."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.server.kinds.schemas import ANY, QUANTITY, Schema


@dataclass(frozen=True, eq=False)
class Resource:
    """One kind that is served. `schema` covers the whole object; `columns` are a definition's additionalPrinterColumns."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    has_status: bool = False
    schema: Schema = field(default_factory=dict)
    custom: Schema | None = None
    columns: tuple[dict[str, Any], ...] = ()
    singular: str = ""
    subresources: tuple[str, ...] = ()
    deprecation: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """`jobs.batch`, `pods`: how messages name a resource."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def key(self) -> tuple[str, str]:
        """Where its objects are stored."""
        return self.group, self.plural


SCHEMAS = "kubernetes-json-schema/v1.36.0-local/_definitions.json"
META = "io.k8s.apimachinery.pkg.apis.meta.v1"
OF_ITS_OWN: dict[str, Schema] = {
    f"{META}.Time": {"type": "string", "x-time": "seconds"},
    f"{META}.MicroTime": {"type": "string", "x-time": "micro"},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": QUANTITY,
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"x-kubernetes-int-or-string": True},
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps": {"type": "object", **ANY},
}
"""Definitions that a server reads in a way that their JSON schema does not state."""


@functools.cache
def _definitions() -> dict[str, Schema]:
    return dict(json.loads((importlib.resources.files("kubernetes_validate") / SCHEMAS).read_text())["$defs"])


@functools.cache
def _defined(name: str) -> Schema:
    return OF_ITS_OWN.get(name) or _structural(_definitions()[name])


def _structural(schema: Schema) -> Schema:
    """A JSON schema as a custom resource would state it: no references, and a null means that a field is absent."""
    if "$ref" in schema:
        return _defined(schema["$ref"].rpartition("/")[2])
    kinds = schema.get("type")
    out = {name: value for name, value in schema.items() if name == "required" or name.startswith("x-kubernetes-")}
    out["type"] = kinds[0] if isinstance(kinds, list) else kinds
    if "properties" in schema:
        out["properties"] = {name: _structural(part) for name, part in schema["properties"].items()}
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            out[name] = _structural(schema[name])
    has_fields = schema.keys() & {"properties", "additionalProperties"}
    return out if out["type"] != "object" or has_fields else {"type": "object", **ANY}


OBJECT_META = _defined(f"{META}.ObjectMeta")


@functools.cache
def _schema_of(group: str, version: str, kind: str) -> Schema:
    wanted = {"group": group, "kind": kind, "version": version}
    for name, definition in _definitions().items():
        if wanted in definition.get("x-kubernetes-group-version-kind", ()):
            return _defined(name)
    raise KeyError(f"{SCHEMAS} has no {wanted}")


def _builtin() -> Iterator[Resource]:
    for line in BUILTIN_KINDS.strip().splitlines():
        api_version, plural, kind, *rest = line.split()
        group, _, version = api_version.rpartition("/")
        marks = {name: tuple(found.split(",")) for name, _, found in (mark.partition("=") for mark in rest)}
        yield Resource(
            *(group, version, plural, kind),
            namespaced="cluster" not in marks,
            short_names=marks.get("short", ()),
            has_status="status" in marks,
            schema=_schema_of(group, version, kind),
            singular=kind.lower(),
            subresources=marks.get("sub", ()),
        )


BUILTIN_KINDS = """
v1 namespaces Namespace cluster status short=ns
v1 nodes Node cluster status short=no
v1 pods Pod status short=po sub=log,eviction,binding
v1 services Service status short=svc
v1 configmaps ConfigMap short=cm
v1 secrets Secret
v1 serviceaccounts ServiceAccount short=sa sub=token
v1 persistentvolumeclaims PersistentVolumeClaim status short=pvc
v1 events Event short=ev
v1 resourcequotas ResourceQuota status short=quota
admissionregistration.k8s.io/v1 validatingadmissionpolicies ValidatingAdmissionPolicy cluster status
admissionregistration.k8s.io/v1 validatingadmissionpolicybindings ValidatingAdmissionPolicyBinding cluster
apps/v1 deployments Deployment status short=deploy
authorization.k8s.io/v1 selfsubjectaccessreviews SelfSubjectAccessReview cluster
batch/v1 jobs Job status
batch/v1 cronjobs CronJob status short=cj
apiextensions.k8s.io/v1 customresourcedefinitions CustomResourceDefinition cluster status short=crd,crds
coordination.k8s.io/v1 leases Lease
networking.k8s.io/v1 networkpolicies NetworkPolicy short=netpol
rbac.authorization.k8s.io/v1 roles Role
rbac.authorization.k8s.io/v1 rolebindings RoleBinding
rbac.authorization.k8s.io/v1 clusterroles ClusterRole cluster
rbac.authorization.k8s.io/v1 clusterrolebindings ClusterRoleBinding cluster
"""
BUILTIN = tuple(_builtin())
BUILTIN_GROUPS = {resource.group for resource in BUILTIN}


def custom_resources(definition: dict[str, Any]) -> list[Resource]:
    """The resources, one a served version, that a CustomResourceDefinition adds."""
    spec = definition["spec"]
    out = []
    for version in spec["versions"]:
        if not version["served"]:
            continue
        schema = version.get("schema", {}).get("openAPIV3Schema", {"type": "object", **ANY})
        whole = {**schema, "properties": {**schema.get("properties", {}), "metadata": OBJECT_META, **_TYPE_META}}
        out.append(
            Resource(
                spec["group"],
                version["name"],
                spec["names"]["plural"],
                spec["names"]["kind"],
                namespaced=spec["scope"] == "Namespaced",
                short_names=tuple(spec["names"].get("shortNames", ())),
                has_status="status" in version.get("subresources", {}),
                schema=whole,
                custom=schema,
                columns=tuple(version.get("additionalPrinterColumns", ())),
                singular=spec["names"].get("singular", spec["names"]["kind"].lower()),
                deprecation=_deprecation(spec, version),
            )
        )
    return out


def version_priority(name: str) -> tuple[int, int, int]:
    """Sorts as the server lists versions: v2, v1, v1beta2, v1beta1, v1alpha1, then all other names."""
    match = re.fullmatch(r"v([1-9]\d*)(?:(alpha|beta)([1-9]\d*))?", name)
    if match is None:
        return 3, 0, 0
    return ("", "beta", "alpha").index(match[2] or ""), -int(match[1]), -int(match[3] or 0)


def _deprecation(spec: dict[str, Any], version: dict[str, Any]) -> str:
    """The warning that the server sends with each answer about a version; empty if the version is not deprecated."""
    if not version.get("deprecated"):
        return ""
    if given := version.get("deprecationWarning"):
        return str(given)
    others = [other["name"] for other in spec["versions"] if other["served"] and not other.get("deprecated")]
    kind = spec["names"]["kind"]
    text = f"{spec['group']}/{version['name']} {kind} is deprecated"
    return f"{text}; use {spec['group']}/{min(others, key=version_priority)} {kind}" if others else text


_TYPE_META: dict[str, Schema] = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
