"""How the lists of a pod template are merged (strategic merge patch), and the directives that an overlay may give.

For each list the API's schema names a merge key (x-kubernetes-patch-merge-key); a cluster has no endpoint for it.
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
"""Path of a list -> the field that tells its items apart (x-kubernetes-patch-merge-key in the API's schema)."""

MERGED_STRINGS = ("metadata.finalizers", f"{CLAIM_TEMPLATE}.finalizers")
"""Lists of strings that are merged. Every list that is neither here nor in MERGE_KEYS is replaced as a whole."""

RETAIN_KEYS = ("spec.resourceClaims", "spec.volumes")
"""Lists of the strategy retainKeys: their items have one field of several, a volume its source."""

PATCH, RETAIN = "$patch", "$retainKeys"
ORDER, REMOVE = "$setElementOrder/", "$deleteFromPrimitiveList/"


def identity(item: Any, key: str | None) -> Any:
    return item.get(key) if key else item


def is_directive(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("$")


def given_fields(overlay: Mapping[str, Any]) -> list[str]:
    """Those that it gives; a null removes one, and a directive is none."""
    return [name for name, value in overlay.items() if value is not None and not is_directive(name)]


def inner_path(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
