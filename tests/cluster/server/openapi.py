"""What kinds there are and how their fields behave: discovery, schemas, validation, merging by keys, and field ownership.

Built-in kinds take their schema from the official client's models, custom ones from their definition; from there on both are
the same to us. Nothing here knows of HTTP, of stored objects or of who asks: plain data in, plain data out.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import celpy
import kubernetes.client as models
from celpy.celtypes import BoolType

Json = Any
Schema = dict[str, Any]
Path = tuple[str, ...]
"""A field's place, its elements spelled as in managedFields: `f:spec`, `k:{"name":"worker"}`, `v:"finalizer"`."""


def _words(text: str) -> list[str]:
    return text.split()


ANY: Schema = {"x-kubernetes-preserve-unknown-fields": True}
QUANTITY: Schema = {"x-kubernetes-int-or-string": True, "x-quantity": True}
NOT_OWNED = {
    *((f"f:{name}",) for name in ("apiVersion", "kind", "metadata")),
    *(
        ("f:metadata", f"f:{name}")
        for name in _words(
            "name namespace uid resourceVersion generation creationTimestamp deletionTimestamp selfLink"
            " deletionGracePeriodSeconds managedFields generateName"
        )
    ),
}
"""Fields that no manager owns."""


class Cause(NamedTuple):
    """One thing wrong with an object, as a Status lists it."""

    reason: str
    field: str
    message: str


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


# The built-in kinds

LIST_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        _words("containers initContainers ephemeralContainers volumes env imagePullSecrets secrets schedulingGates"),
        ("name",),
    ),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "hostAliases": ("ip",),
    "podIPs": ("ip",),
    "ownerReferences": ("uid",),
    "conditions": ("type",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "V1Container.ports": ("containerPort", "protocol"),
    "V1ServiceSpec.ports": ("port", "protocol"),
}
"""Lists that merge by key, by field name, or by model and field where the name alone is not enough."""
KEY_DEFAULTS = {"protocol": "TCP"}
ATOMIC_MODELS = set(
    _words(
        "V1LabelSelector V1NodeSelector V1NodeSelectorTerm V1ObjectReference V1LocalObjectReference V1SecretKeySelector"
        " V1Subject V1ConfigMapKeySelector V1ObjectFieldSelector V1ResourceFieldSelector V1OwnerReference V1RoleRef"
    )
)
ATOMIC_FIELDS = {"V1PodSpec.nodeSelector", "V1ServiceSpec.selector"}
QUANTITIES = set(_words("limits requests hard used capacity allocatable overhead sizeLimit divisor"))
MICRO_TIMES = {"acquireTime", "renewTime", "eventTime", "lastObservedTime"}
"""Times that a server reads with six digits after the point, or not at all."""
TIMES = {
    "seconds": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"),
    "micro": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)"),
}
SCALARS: dict[str, Schema] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "bytes": {"type": "string"},
    "datetime": {"type": "string", "x-time": "seconds"},
    "object": ANY,
    "V1JSONSchemaProps": {"type": "object", **ANY},
}


def _schema_of_type(name: str) -> Schema:
    if name in SCALARS:
        return SCALARS[name]
    if match := re.fullmatch(r"List\[(.*)\]", name):
        return {"type": "array", "items": _schema_of_type(match[1])}
    if match := re.fullmatch(r"Dict\[str, (.*)\]", name):
        return {"type": "object", "additionalProperties": _schema_of_type(match[1])}
    return _schema_of_model(name)


@functools.cache
def _schema_of_model(name: str) -> Schema:
    model = getattr(models, name)
    properties: dict[str, Schema] = {}
    required = []
    for attribute, type_name in model.openapi_types.items():
        json_name = model.attribute_map[attribute]
        if json_name in QUANTITIES:
            properties[json_name] = (
                {"type": "object", "additionalProperties": QUANTITY} if type_name.startswith("Dict") else QUANTITY
            )
            continue
        schema = _schema_of_type(type_name)
        if json_name in MICRO_TIMES:
            schema = {"type": "string", "x-time": "micro"}
        keys = LIST_KEYS.get(f"{name}.{json_name}") or LIST_KEYS.get(json_name)
        if schema.get("type") == "array" and json_name == "finalizers":
            schema = {**schema, "x-kubernetes-list-type": "set"}
        elif schema.get("type") == "array" and keys and schema["items"].get("properties"):
            schema = {**schema, "x-kubernetes-list-map-keys": list(keys), "x-kubernetes-list-type": "map"}
            if name == "V1JobStatus":
                schema["x-kubernetes-list-type"] = "atomic"
        elif f"{name}.{json_name}" in ATOMIC_FIELDS:
            schema = {**schema, "x-kubernetes-map-type": "atomic"}
        properties[json_name] = schema
        if attribute in model.model_fields and model.model_fields[attribute].is_required():
            required.append(json_name)
    if name == "V1JobSpec":
        properties.pop("scheduling", None)
    out: Schema = {"type": "object", "properties": properties, "required": required}
    if name in ATOMIC_MODELS:
        out["x-kubernetes-map-type"] = "atomic"
    return out


OBJECT_META = _schema_of_model("V1ObjectMeta")


def _builtin(group: str, version: str, lines: str) -> Iterator[Resource]:
    for line in lines.strip().splitlines():
        plural, kind, *rest = line.split()
        marks = dict(mark.split("=") for mark in rest if "=" in mark)
        model = {"Event": "CoreV1Event"}.get(kind, f"V1{kind}")
        yield Resource(
            group,
            version,
            plural,
            kind,
            namespaced="cluster" not in rest,
            short_names=tuple(marks.get("short", "").split(",")) if "short" in marks else (),
            has_status="status" in rest,
            schema=_schema_of_model(model) if hasattr(models, model) else ANY,
            singular=kind.lower(),
            subresources=tuple(marks.get("sub", "").split(",")) if "sub" in marks else (),
        )


BUILTIN: tuple[Resource, ...] = (
    *_builtin(
        "",
        "v1",
        """
        namespaces Namespace cluster status short=ns
        nodes Node cluster status short=no
        pods Pod status short=po sub=log,eviction,binding
        services Service status short=svc
        configmaps ConfigMap short=cm
        secrets Secret
        serviceaccounts ServiceAccount short=sa sub=token
        persistentvolumeclaims PersistentVolumeClaim status short=pvc
        events Event short=ev
        resourcequotas ResourceQuota status short=quota
        """,
    ),
    *_builtin(
        "admissionregistration.k8s.io",
        "v1",
        "validatingadmissionpolicies ValidatingAdmissionPolicy cluster status"
        "\nvalidatingadmissionpolicybindings ValidatingAdmissionPolicyBinding cluster",
    ),
    *_builtin("apps", "v1", "deployments Deployment status short=deploy"),
    *_builtin("authorization.k8s.io", "v1", "selfsubjectaccessreviews SelfSubjectAccessReview cluster"),
    *_builtin("batch", "v1", "jobs Job status\ncronjobs CronJob status short=cj"),
    *_builtin(
        "apiextensions.k8s.io", "v1", "customresourcedefinitions CustomResourceDefinition cluster status short=crd,crds"
    ),
    *_builtin("coordination.k8s.io", "v1", "leases Lease"),
    *_builtin("networking.k8s.io", "v1", "networkpolicies NetworkPolicy short=netpol"),
    *_builtin(
        "rbac.authorization.k8s.io",
        "v1",
        "roles Role\nrolebindings RoleBinding\nclusterroles ClusterRole cluster"
        "\nclusterrolebindings ClusterRoleBinding cluster",
    ),
)


BUILTIN_GROUPS = {resource.group for resource in BUILTIN}


def custom_resources(definition: dict[str, Any]) -> list[Resource]:
    """The resources, one a served version, that a CustomResourceDefinition adds."""
    spec = definition["spec"]
    out = []
    for version in spec["versions"]:
        schema = version.get("schema", {}).get("openAPIV3Schema", {"type": "object", **ANY})
        whole = {
            **schema,
            "properties": {**schema.get("properties", {}), "metadata": OBJECT_META, **_TYPE_META},
        }
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
            )
        )
    return out


_TYPE_META: dict[str, Schema] = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}


# Discovery

VERBS = _words("delete deletecollection get list patch create update watch")
VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.2",
    "emulationMajor": "1",
    "emulationMinor": "36",
    "minCompatibilityMajor": "1",
    "minCompatibilityMinor": "35",
    "platform": "linux/amd64",
}


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


# Schemas: unknown fields, defaults, validation


def _keeps_unknown(schema: Schema) -> bool:
    return bool(schema.get("x-kubernetes-preserve-unknown-fields")) or not schema


def prune(schema: Schema, value: Json, where: str = "") -> tuple[Json, list[str]]:
    """`value` without the fields that `schema` does not know, and where those were."""
    if isinstance(value, dict) and schema.get("type") == "object":
        known, more, unknown, out = schema.get("properties", {}), schema.get("additionalProperties"), [], {}
        for name, child in value.items():
            place = f"{where}.{name}" if where else name
            if name in known or isinstance(more, dict):
                out[name], found = prune(known.get(name) or more or {}, child, place)
                unknown += found
            elif _keeps_unknown(schema) or more is True:
                out[name] = child
            else:
                unknown.append(place)
        return (out, unknown) if unknown else (value, [])
    if isinstance(value, list) and schema.get("type") == "array":
        pairs = [prune(schema.get("items", {}), item, f"{where}[{place}]") for place, item in enumerate(value)]
        unknown = [name for _, found in pairs for name in found]
        return ([item for item, _ in pairs] if unknown else value), unknown
    return value, []


def set_defaults(schema: Schema, value: Json) -> None:
    """Writes the defaults of a structural schema into `value`, in place. A null where none is allowed gives way to one."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            absent = name not in value or (value[name] is None and not child.get("nullable"))
            if absent and child.get("default") is not None:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                set_defaults(child, value[name])
    elif isinstance(value, list):
        for item in value:
            set_defaults(schema.get("items", {}), item)


def _type_of(value: Json) -> str:
    names = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    return names[type(value)]


def _shown(value: Json) -> str:
    return json.dumps(value) if isinstance(value, (str, int, float, bool)) else json.dumps(_type_of(value))


def validate(schema: Schema, value: Json, where: str = "") -> list[Cause]:
    """What is wrong with `value`, in the API server's words."""
    bad: list[Cause] = []

    def invalid(text: str, reason: str = "FieldValueInvalid") -> None:
        bad.append(Cause(reason, where or "<nil>", text))

    if value is None:
        if not schema.get("nullable") and schema.get("type"):
            invalid(
                f'Invalid value: "null": {where} in body must be of type {schema["type"]}: "null"',
                "FieldValueTypeInvalid",
            )
        return bad
    wanted, kind = schema.get("type"), _type_of(value)
    if schema.get("x-kubernetes-int-or-string"):
        if kind not in ("integer", "string") and not (schema.get("x-quantity") and kind == "number"):
            invalid(
                f'Invalid value: "{kind}": {where} in body must be of type integer,string: "{kind}"',
                "FieldValueTypeInvalid",
            )
        return bad
    fits = kind == wanted or (wanted == "number" and kind == "integer")
    fits = fits or (wanted == "integer" and kind == "number" and float(value).is_integer())
    if wanted and not fits:
        invalid(f'Invalid value: "{kind}": {where} in body must be of type {wanted}: "{kind}"', "FieldValueTypeInvalid")
        return bad
    if "enum" in schema and value not in schema["enum"]:
        options = ", ".join(json.dumps(option) for option in schema["enum"])
        invalid(f"Unsupported value: {_shown(value)}: supported values: {options}", "FieldValueNotSupported")
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
            text = "greater than" if schema.get("exclusiveMinimum") else "greater than or equal to"
            invalid(f"Invalid value: {value}: {where} in body should be {text} {low}")
        if high is not None and value > high:
            invalid(f"Invalid value: {value}: {where} in body should be less than or equal to {high}")
    elif kind == "string":
        if len(value) > schema.get("maxLength", len(value)):
            invalid(f"Too long: may not be more than {schema['maxLength']} bytes", "FieldValueTooLong")
        if len(value) < schema.get("minLength", 0):
            invalid(
                f"Invalid value: {_shown(value)}: {where} in body should be at least {schema['minLength']} chars long"
            )
            return bad
        kind_of_time = schema.get("x-time") or ("seconds" if schema.get("format") == "date-time" else "")
        if kind_of_time and not TIMES[kind_of_time].fullmatch(value):
            reason = "FieldValueTypeInvalid" if "x-time" in schema else "FieldValueInvalid"
            invalid(f"Invalid value: {_shown(value)}: {where} in body must be of type date-time", reason)
        if "pattern" in schema and not re.search(schema["pattern"], value):
            invalid(f"Invalid value: {_shown(value)}: {where} in body should match '{schema['pattern']}'")
    elif kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            invalid(f"Too many: {len(value)}: must have at most {schema['maxItems']} items", "FieldValueTooMany")
        if len(value) < schema.get("minItems", 0):
            invalid(f"Invalid value: {len(value)}: {where} in body should have at least {schema['minItems']} items")
        for place, item in enumerate(value):
            bad += validate(schema.get("items", {}), item, f"{where}[{place}]")
        keys = _list_keys(schema)
        names = (
            [json.dumps([item.get(key) for key in keys]) for item in value if isinstance(item, dict)] if keys else []
        )
        if schema.get("x-kubernetes-list-type") == "set":
            names = [json.dumps(item) for item in value]
        for name in sorted({name for name in names if names.count(name) > 1}):
            invalid(f"Duplicate value: {name}", "FieldValueDuplicate")
    elif kind == "object":
        for name in schema.get("required", ()):
            if name not in value:
                bad.append(Cause("FieldValueRequired", f"{where}.{name}" if where else name, "Required value"))
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, child in value.items():
            part = known.get(name) or (more if isinstance(more, dict) else {})
            if name in known:
                place = f"{where}.{name}" if where else name
            else:
                place = f"{where}[{name}]" if _keeps_unknown(schema) else f"{where}.{name}"
            bad += validate(part, child, place)
    return bad


# Rules in CEL (x-kubernetes-validations)


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    functions = {"_==_": _equal, "_!=_": lambda left, right: BoolType(not _equal(left, right))}
    return environment.program(environment.compile(rule), functions=functions)


def _equal(left: Any, right: Any) -> BoolType:
    """Equality as the server's CEL has it: values of two kinds are unequal, where celpy finds no overload."""
    try:
        return BoolType(left == right)
    except TypeError:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, BoolType) for value in (left, right))
        return BoolType(numbers and float(left) == float(right))


def _in_cel(schema: Schema, value: Json) -> Any:
    return celpy.json_to_cel(_typed(schema, value))


def _typed(schema: Schema, value: Json) -> Json:
    """`value` with each field that the schema calls a number as one, though JSON wrote it as an integer."""
    if isinstance(value, dict):
        return {name: _typed(_child(schema, name), child) for name, child in value.items()}
    if isinstance(value, list):
        return [_typed(schema.get("items", {}), item) for item in value]
    return float(value) if schema.get("type") == "number" and isinstance(value, int) else value


def rule_errors(schema: Schema, value: Json, old: Json = None, where: str = "") -> list[Cause]:
    """The rules that `value` breaks. `old` is None at creation: rules that speak of oldSelf are then left out.

    A part that did not change is not judged again: what was accepted once stays acceptable (ratcheting).
    """
    if value is None or (old is not None and value == old):
        return []
    bad, names = [], {}
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = re.search(r"\boldSelf\b", rule["rule"])
        if transition and old is None:
            continue
        names = names or {"self": _in_cel(schema, value), **({} if old is None else {"oldSelf": _in_cel(schema, old)})}
        try:
            holds, message = bool(_program(rule["rule"]).evaluate(names)), rule.get("message")
        except celpy.CELEvalError as err:
            why = str(err.args[0]).partition(" (in activation")[0]
            holds, message = False, f"{rule['rule']}: evaluation error: {why}"
        if not holds:
            place = (where + rule.get("fieldPath", "")).lstrip(".") or "<nil>"
            text = message or f"failed rule: {rule['rule']}"
            openings = {"FieldValueForbidden": "Forbidden", "FieldValueRequired": "Required value"}
            shown = "" if isinstance(value, dict | list) else f": {_shown(value)}"
            opening = openings.get(rule.get("reason", ""), f"Invalid value{shown}")
            bad.append(Cause(rule.get("reason", "FieldValueInvalid"), place, f"{opening}: {text}"))
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, child in schema.get("properties", {}).items():
            if name in value:
                bad += rule_errors(child, value[name], before.get(name), f"{where}.{name}")
    elif isinstance(value, list):
        keys = _list_keys(schema)
        olds = {_item_name(keys, item): item for item in (old or ()) if keys}
        for place, item in enumerate(value):
            bad += rule_errors(schema.get("items", {}), item, olds.get(_item_name(keys, item)), f"{where}[{place}]")
    return bad


def policy_holds(expression: str, value: Json) -> bool:
    """Whether an object passes a rule of a ValidatingAdmissionPolicy."""
    return bool(_program(expression).evaluate({"object": celpy.json_to_cel(value)}))


# Merging, and who owns which field


def _list_keys(schema: Schema) -> tuple[str, ...]:
    return tuple(schema.get("x-kubernetes-list-map-keys", ())) if schema.get("x-kubernetes-list-type") == "map" else ()


def _item_name(keys: tuple[str, ...], item: Json) -> str:
    values = {key: item.get(key, KEY_DEFAULTS.get(key)) for key in sorted(keys)} if isinstance(item, dict) else item
    return "k:" + json.dumps(values, separators=(",", ":"))


def _child(schema: Schema, name: str) -> Schema:
    more = schema.get("additionalProperties")
    return schema.get("properties", {}).get(name) or (more if isinstance(more, dict) else {})


def _granular(schema: Schema) -> bool:
    return schema.get("x-kubernetes-map-type") != "atomic"


def field_values(schema: Schema, value: Json, path: Path = ()) -> dict[Path, Json]:
    """The places that `value` fills, with what stands there: leaves, and each item of a list that merges."""
    if isinstance(value, dict) and value and _granular(schema):
        out: dict[Path, Json] = {}
        for name, child in value.items():
            out.update(field_values(_child(schema, name), child, (*path, f"f:{name}")))
        return out
    if isinstance(value, list) and value and (keys := _list_keys(schema)):
        out = {}
        for item in value:
            place = (*path, _item_name(keys, item))
            out[place] = None
            out.update(field_values(schema.get("items", {}), item, place))
        return out
    if isinstance(value, list) and value and schema.get("x-kubernetes-list-type") == "set":
        return {(*path, "v:" + json.dumps(item)): item for item in value}
    return {path: value}


def owned(schema: Schema, value: Json) -> dict[Path, Json]:
    """`field_values` less what no manager owns."""
    return {
        path: found
        for path, found in field_values(schema, value).items()
        if path not in NOT_OWNED and path[:2] not in NOT_OWNED
    }


def without(schema: Schema, value: Json, path: Path) -> Json:
    """`value` without what stands at `path`. A map or list that becomes empty by it goes too."""
    element, rest = path[0], path[1:]
    if isinstance(value, dict):
        name = element[2:]
        if name not in value:
            return value
        child = without(_child(schema, name), value[name], rest) if rest else None
        left = {key: item for key, item in value.items() if key != name}
        return left if child in (None, {}, []) else {**left, name: child}
    if isinstance(value, list) and element.startswith("v:"):
        return [item for item in value if item != json.loads(element[2:])]
    if isinstance(value, list):
        keys, out = _list_keys(schema), []
        for item in value:
            if _item_name(keys, item) != element:
                out.append(item)
            elif rest:
                out.append(without(schema.get("items", {}), item, rest))
        return out
    return value


def merge(schema: Schema, live: Json, patch: Json) -> Json:
    """What is applied laid over `live`, lists by their keys. A null means nothing."""
    if isinstance(patch, dict):
        live = live if isinstance(live, dict) and _granular(schema) else {}
        given = {name: value for name, value in patch.items() if value is not None}
        return live | {name: merge(_child(schema, name), live.get(name), value) for name, value in given.items()}
    if isinstance(patch, list):
        keys = _list_keys(schema)
        if keys and all(isinstance(item, dict) for item in patch):
            return _merge_items(schema, keys, live or [], patch)
        if schema.get("x-kubernetes-list-type") == "set":
            return [*(live or []), *(item for item in patch if item not in (live or []))]
        return copy.deepcopy(patch)
    return patch


def _merge_items(schema: Schema, keys: tuple[str, ...], live: list[Json], patch: list[Json]) -> list[Json]:
    wanted = {_item_name(keys, item): item for item in patch}
    items = {_item_name(keys, item): item for item in live}
    merged = {name: merge(schema.get("items", {}), items.get(name), item) for name, item in wanted.items()}
    shared = [name for name in items if name in wanted]
    if shared == [name for name in wanted if name in items]:
        return [merged.get(name, item) for name, item in items.items()] + [merged[n] for n in wanted if n not in items]
    return [*merged.values(), *(item for name, item in items.items() if name not in wanted)]


def to_fields_v1(paths: Iterable[Path]) -> dict[str, Any]:
    """Paths as a managedFields entry writes them."""
    out: dict[str, Any] = {}
    for path in sorted(paths):
        node = out
        for element in path:
            node = node.setdefault(element, {})
        if path and path[-1].startswith("k:"):
            node["."] = {}
    return out


def from_fields_v1(fields: dict[str, Any], path: Path = ()) -> set[Path]:
    """The paths of a managedFields entry."""
    if not fields:
        return {path} if path else set()
    return set().union(
        *({path} if name == "." else from_fields_v1(child, (*path, name)) for name, child in fields.items())
    )


def path_text(path: Path) -> str:
    """A path as messages show it: `.spec.containers[name="worker"].image`."""
    out = ""
    for element in path:
        if element.startswith("f:"):
            out += f".{element[2:]}"
        elif element.startswith("v:"):
            out += f"[={element[2:]}]"
        else:
            out += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(element[2:]).items()) + "]"
    return out


# What built-in kinds fill in and refuse

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_DATA_BYTES = 1_048_576
_SUFFIXES = {"m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


def quantity(text: Json) -> Decimal:
    """A resource quantity as a number: `500m`, `2Gi`, `1e3`. Raises ValueError for what is none."""
    match = re.fullmatch(r"([+-]?[0-9.]+)(?:([kMGTPE])i|([mkMGTPE])|[eE]([+-]?\d+))?", str(text))
    if not match:
        raise ValueError(f"{text!r} is no quantity")
    number, binary, decimal, exponent = match.groups()
    if binary:
        return Decimal(number) * 1024 ** (_SUFFIXES[binary] // 3)
    return Decimal(number).scaleb(_SUFFIXES[decimal] if decimal else int(exponent or 0))


def tidied(schema: Schema, value: Json) -> Json:
    """`value` without nulls, quantities as text, times in UTC: how a typed server reads JSON."""
    if schema.get("x-quantity"):
        return value if value is None else str(value)
    if (kind := schema.get("x-time")) and isinstance(value, str) and TIMES[kind].fullmatch(value):
        form = "%Y-%m-%dT%H:%M:%SZ" if kind == "seconds" else "%Y-%m-%dT%H:%M:%S.%fZ"
        return datetime.fromisoformat(value).astimezone(UTC).strftime(form)
    if isinstance(value, dict):
        return {name: tidied(_child(schema, name), child) for name, child in value.items() if child is not None}
    if isinstance(value, list):
        return [tidied(schema.get("items", {}), item) for item in value]
    return value


def metadata_errors(resource: Resource, metadata: dict[str, Any]) -> list[Cause]:
    """What is wrong with a name."""
    bad = []
    name = metadata.get("name", "")
    strict = resource.plural in ("namespaces", "services") and not resource.group
    free = resource.group == "rbac.authorization.k8s.io"
    pattern, longest = (LABEL, 63) if strict else (SUBDOMAIN, 253)
    if not free and (not pattern.fullmatch(name) or len(name) > longest):
        kind = "an RFC 1123 label" if strict else "a lowercase RFC 1123 subdomain"
        text = (
            f"Invalid value: {json.dumps(name)}: {kind} must consist of lower case alphanumeric characters, '-' or '.',"
        )
        text += " and must start and end with an alphanumeric character"
        text += f" (e.g. 'example.com', regex used for validation is '{pattern.pattern}')"
        bad.append(Cause("FieldValueInvalid", "metadata.name", text))
    return bad


def fill_in(resource: Resource, new: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Writes a built-in kind's defaults into `new`, in place; doing it twice changes nothing."""
    plural, spec = resource.plural, new.get("spec", {})
    if plural == "pods":
        _fill_in_pod(spec)
        spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
        spec.setdefault("priority", 0)
        for why in ("not-ready", "unreachable"):
            wanted = {"key": f"node.kubernetes.io/{why}", "operator": "Exists", "effect": "NoExecute"}
            if old is None and not any(one.get("key") == wanted["key"] for one in spec.get("tolerations", ())):
                spec.setdefault("tolerations", []).append({**wanted, "tolerationSeconds": 300})
        spec.setdefault("enableServiceLinks", True)
        spec.setdefault("serviceAccountName", "default")
        spec["serviceAccount"] = spec["serviceAccountName"]
        new.setdefault("status", {}).setdefault("phase", "Pending")
        new["status"].setdefault("qosClass", _quality_of_service(spec))
    elif plural == "jobs":
        _fill_in_job(new, old)
        new.setdefault("status", {})
    elif plural == "cronjobs":
        new.setdefault("status", {})
        job = spec.get("jobTemplate", {})
        job.setdefault("metadata", {})
        job.get("spec", {}).get("template", {}).setdefault("metadata", {})
        for name, value in (("concurrencyPolicy", "Allow"), ("suspend", False), ("successfulJobsHistoryLimit", 3)):
            spec.setdefault(name, value)
        spec.setdefault("failedJobsHistoryLimit", 1)
        _fill_in_pod(spec.get("jobTemplate", {}).get("spec", {}).get("template", {}).get("spec", {}))
    elif plural == "services":
        spec.setdefault("type", "ClusterIP")
        spec.setdefault("sessionAffinity", "None")
        spec.setdefault("clusterIPs", ["None"])  # a headless one: others would be given an address
        spec.setdefault("internalTrafficPolicy", "Cluster")
        spec.setdefault("ipFamilies", ["IPv4"])
        spec.setdefault("ipFamilyPolicy", "SingleStack")
        new.setdefault("status", {"loadBalancer": {}})
    elif plural == "events":
        new.setdefault("eventTime", None)
        new.setdefault("reportingInstance", "")
    elif plural == "secrets":
        new.setdefault("type", "Opaque")
    elif plural == "namespaces":
        new["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = new["metadata"]["name"]
        new.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        new.setdefault("status", {}).setdefault("phase", "Active")
    elif plural == "customresourcedefinitions":
        _fill_in_definition(new)


def _quality_of_service(spec: dict[str, Any]) -> str:
    """BestEffort where nothing is asked for, Guaranteed where all CPU and memory is, else Burstable."""
    parts = [container.get("resources", {}) for container in spec.get("containers", [])]
    if not any(part.get("requests") or part.get("limits") for part in parts):
        return "BestEffort"
    whole = all({"cpu", "memory"} <= part.get("limits", {}).keys() for part in parts)
    return "Guaranteed" if whole and all(part["limits"] == part["requests"] for part in parts) else "Burstable"


def _fill_in_pod(spec: dict[str, Any]) -> None:
    for name, value in (
        ("restartPolicy", "Always"),
        ("dnsPolicy", "ClusterFirst"),
        ("schedulerName", "default-scheduler"),
    ):
        spec.setdefault(name, value)
    spec.setdefault("securityContext", {})
    spec.setdefault("terminationGracePeriodSeconds", 30)
    for container in (*spec.get("initContainers", []), *spec.get("containers", [])):
        image = container.get("image", "")
        latest = image.endswith(":latest") or ":" not in image.rpartition("/")[2]
        container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        resources = container.setdefault("resources", {})
        if "limits" in resources:
            resources["requests"] = {**resources["limits"], **resources.get("requests", {})}
        for port in container.get("ports", []):
            port.setdefault("protocol", "TCP")
        for entry in container.get("env", []):
            if reference := entry.get("valueFrom", {}).get("fieldRef"):
                reference.setdefault("apiVersion", "v1")
    for volume in spec.get("volumes", []):
        for source in ("configMap", "secret", "projected", "downwardAPI"):
            if source in volume:
                volume[source].setdefault("defaultMode", 420)


def _fill_in_job(job: dict[str, Any], old: dict[str, Any] | None) -> None:
    spec, metadata = job.setdefault("spec", {}), job["metadata"]
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("manualSelector", False)
    for name, value in (("parallelism", 1), ("backoffLimit", 6), ("completionMode", "NonIndexed"), ("suspend", False)):
        spec.setdefault(name, value)
    spec.setdefault("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        for condition in rule.get("onPodConditions", []):
            condition.setdefault("status", "True")
    template = spec.get("template", {})
    _fill_in_pod(template.get("spec", {}))
    if old is None and not spec.get("manualSelector"):
        uid, name = metadata["uid"], metadata["name"]
        labels = template.setdefault("metadata", {}).setdefault("labels", {})
        for prefix in ("batch.kubernetes.io/", ""):
            labels.setdefault(f"{prefix}controller-uid", uid)
            labels.setdefault(f"{prefix}job-name", name)
        spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})


def _fill_in_definition(definition: dict[str, Any]) -> None:
    spec = definition.get("spec", {})
    names = spec.get("names", {})
    names.setdefault("singular", names.get("kind", "").lower())
    names.setdefault("listKind", names.get("kind", "") + "List")
    spec.setdefault("conversion", {"strategy": "None"})
    stored = [version["name"] for version in spec.get("versions", []) if version.get("storage")]
    nameless = {"plural": "", "kind": ""}
    definition.setdefault("status", {"acceptedNames": nameless, "conditions": None, "storedVersions": stored})


def established(definition: dict[str, Any]) -> dict[str, Any]:
    """A definition as it is once its kind is served."""
    since, names = definition["metadata"]["creationTimestamp"], definition["spec"]["names"]
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": since}
        for kind, reason, message in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        )
    ]
    return {**definition, "status": {**definition["status"], "acceptedNames": names, "conditions": conditions}}


def builtin_errors(resource: Resource, new: dict[str, Any], old: dict[str, Any] | None) -> list[Cause]:
    """What a built-in kind's own rules have against `new`, its schema apart."""
    plural, spec = resource.plural, new.get("spec", {})
    if plural == "jobs":
        return _job_errors(new) + (_job_changes(spec, old["spec"]) if old else [])
    if plural == "pods":
        return _pod_errors(spec, "spec")
    if plural == "events":
        return _event_errors(new)
    if plural == "configmaps" and sum(len(text.encode()) for text in new.get("data", {}).values()) > MAX_DATA_BYTES:
        return [Cause("FieldValueTooLong", "[]", f"Too long: may not be more than {MAX_DATA_BYTES} bytes")]
    return []


def _event_errors(event: dict[str, Any]) -> list[Cause]:
    bad, about = [], event.get("involvedObject", {}).get("namespace", "")
    if about != event["metadata"]["namespace"] and (about or event["metadata"]["namespace"] != "default"):
        text = f"Invalid value: {json.dumps(about)}: does not match event.namespace"
        bad.append(Cause("FieldValueInvalid", "involvedObject.namespace", text))
    return bad


def _pod_errors(spec: dict[str, Any], where: str) -> list[Cause]:
    bad, volumes = [], {volume.get("name") for volume in spec.get("volumes", [])}
    for kind in ("initContainers", "containers"):
        for place, container in enumerate(spec.get(kind, [])):
            spot = f"{where}.{kind}[{place}]"
            for index, mount in enumerate(container.get("volumeMounts", [])):
                if mount.get("name") not in volumes:
                    text = f"Not found: {json.dumps(mount.get('name'))}"
                    bad.append(Cause("FieldValueNotFound", f"{spot}.volumeMounts[{index}].name", text))
            limits = container.get("resources", {}).get("limits", {})
            for name, amount in container.get("resources", {}).get("requests", {}).items():
                if "/" in name and quantity(amount) != quantity(limits.get(name, 0)):
                    text = f"Invalid value: {json.dumps(amount)}: must be equal to {name} limit of {limits.get(name)}"
                    bad.append(Cause("FieldValueInvalid", f"{spot}.resources.requests", text))
    return bad


def _job_errors(job: dict[str, Any]) -> list[Cause]:
    spec, name, where = job["spec"], job["metadata"]["name"], "spec.template.spec"
    pod = spec["template"].get("spec", {})
    bad = _pod_errors(pod, where)
    indexed = spec["completionMode"] == "Indexed"
    hostname = f"{name}-{max(spec.get('completions', 1) - 1, 0)}" if indexed else name
    if len(hostname) > 63 or (indexed and not LABEL.fullmatch(hostname)):
        text = f"Invalid value: {json.dumps(name)}: will not able to create pod with invalid DNS label: {hostname}"
        bad.append(Cause("FieldValueInvalid", "metadata.name", text))
    if "podFailurePolicy" in spec:
        bad += _failure_policy_errors(spec, pod)
    return bad


def _failure_policy_errors(spec: dict[str, Any], pod: dict[str, Any]) -> list[Cause]:
    bad = []

    def invalid(where: str, text: str, reason: str = "FieldValueInvalid") -> None:
        bad.append(Cause(reason, where, text))

    if pod.get("restartPolicy") != "Never":
        text = (
            f'Invalid value: "{pod.get("restartPolicy")}": only "Never" is supported when podFailurePolicy is specified'
        )
        invalid("spec.template.spec.restartPolicy", text)
    if spec["podReplacementPolicy"] != "Failed":
        text = f'Unsupported value: "{spec["podReplacementPolicy"]}": supported values: "Failed"'
        invalid("spec.podReplacementPolicy", text, "FieldValueNotSupported")
    names = {container.get("name") for kind in ("containers", "initContainers") for container in pod.get(kind, [])}
    rules = spec["podFailurePolicy"].get("rules", [])
    for place, rule in enumerate(rules):
        where = f"spec.podFailurePolicy.rules[{place}]"
        codes = rule.get("onExitCodes")
        if not codes:
            continue
        values, spot = codes.get("values", []), f"{where}.onExitCodes"
        if codes.get("containerName") and codes["containerName"] not in names:
            text = "must be one of the container or initContainer names in the pod template"
            invalid(f"{spot}.containerName", f"Invalid value: {json.dumps(codes['containerName'])}: {text}")
        if codes.get("operator") == "In" and 0 in values:
            invalid(f"{spot}.values[{values.index(0)}]", "Invalid value: 0: must not be 0 for the In operator")
        if values != sorted(values):
            shown = json.dumps(values, separators=(",", ":"))
            invalid(f"{spot}.values", f"Invalid value: {shown}: must be ordered")
    return bad


def _job_changes(new: dict[str, Any], old: dict[str, Any]) -> list[Cause]:
    fixed = _words(
        "selector template podFailurePolicy completionMode backoffLimitPerIndex managedBy successPolicy completions"
    )
    if new.get("completionMode") == "Indexed" and new.get("completions") == new.get("parallelism"):
        fixed.remove("completions")
    if old.get("suspend"):
        new, old = ({**part, "template": _unschedulable(part["template"])} for part in (new, old))
    return [
        Cause("FieldValueInvalid", f"spec.{name}", f"Invalid value: {json.dumps(new.get(name))}: field is immutable")
        for name in fixed
        if new.get(name) != old.get(name)
    ]


def _unschedulable(template: dict[str, Any]) -> dict[str, Any]:
    """A template without what may change while its Job is suspended: where its pods go."""
    free = ("nodeSelector", "affinity", "tolerations", "schedulingGates")
    return {"spec": {name: value for name, value in template.get("spec", {}).items() if name not in free}}


# Tables, for kubectl get


def _age(timestamp: str | None) -> str:
    if not timestamp:
        return "<unknown>"
    then = datetime.fromisoformat(timestamp)
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    if seconds < 120:
        return f"{seconds}s"
    return f"{seconds // 60}m"


def json_path(value: Json, path: str) -> Json:
    """What stands at a printer column's jsonPath, which names fields only; None if nothing does."""
    for name in path.strip(".").split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def table(resource: Resource, items: list[dict[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    """The Table of `items`, with the metadata of each."""
    age = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
    listed = resource.columns or (age,)
    columns = [{"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}]
    for column in listed:
        entry = {"name": column["name"], "type": column["type"], "format": column.get("format", "")}
        columns.append({**entry, "description": column.get("description", ""), "priority": column.get("priority", 0)})
    rows = []
    for item in items:
        found = [json_path(item, column["jsonPath"]) for column in listed]
        cells = [
            _age(value) if column["type"] == "date" else value for column, value in zip(listed, found, strict=True)
        ]
        part = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
        rows.append({"cells": [item["metadata"]["name"], *cells], "object": part})
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": columns,
        "rows": rows,
    }
