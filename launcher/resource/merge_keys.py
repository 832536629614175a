"""How each list of a pod template is merged by a strategic merge patch, and the directives of such a patch.

The tables are those of the API's schema; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTAINERS = ("spec.containers", "spec.ephemeralContainers", "spec.initContainers")
CLAIM_TEMPLATE = "spec.volumes.ephemeral.volumeClaimTemplate.metadata"

MERGE_KEYS: Mapping[str, str] = {
    "metadata.ownerReferences": "uid",
    **dict.fromkeys(CONTAINERS, "name"),
    **{f"{containers}.env": "name" for containers in CONTAINERS},
    **{f"{containers}.ports": "containerPort" for containers in CONTAINERS},
    **{f"{containers}.volumeDevices": "devicePath" for containers in CONTAINERS},
    **{f"{containers}.volumeMounts": "mountPath" for containers in CONTAINERS},
    "spec.evictionResponders": "name",
    "spec.hostAliases": "ip",
    "spec.imagePullSecrets": "name",
    "spec.resourceClaims": "name",
    "spec.schedulingGates": "name",
    "spec.topologySpreadConstraints": "topologyKey",
    "spec.volumes": "name",
    f"{CLAIM_TEMPLATE}.ownerReferences": "uid",
}
"""Path of a list -> the field that distinguishes its items (x-kubernetes-patch-merge-key in the API's schema)."""

MERGED_STRINGS = ("metadata.finalizers", f"{CLAIM_TEMPLATE}.finalizers")
"""Lists of strings that are merged. Every list that is neither here nor in MERGE_KEYS is replaced as a whole."""

RETAIN_KEYS = ("spec.resourceClaims", "spec.volumes")
"""Lists of the strategy retainKeys: an item has one of several fields, as a volume has one source."""

PATCH, RETAIN = "$patch", "$retainKeys"
ORDER, REMOVE = "$setElementOrder/", "$deleteFromPrimitiveList/"


def identity(item: Any, key: str | None) -> Any:
    """What distinguishes an item of a list: its merge key, or the item itself in a list of strings."""
    return item.get(key) if key else item


def is_directive(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("$")


def given_fields(overlay: Mapping[str, Any]) -> list[str]:
    """Names of the fields that it sets: neither nulls, which remove a field, nor directives."""
    return [name for name, value in overlay.items() if value is not None and not is_directive(name)]


def inner_path(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
