"""Rights of one service account: a role and its binding, on any API server."""

from __future__ import annotations

from typing import Any

RBAC = "rbac.authorization.k8s.io"
ACCOUNT = "somebody"


def grant(server: Any, *rules: tuple[str, list[str], list[str]]) -> str:
    """The token of a service account with these rights in `default`: (API group, resources, verbs)."""
    metadata = {"name": ACCOUNT, "namespace": "default"}
    server.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
    granted = [{"apiGroups": [group], "resources": resources, "verbs": verbs} for group, resources, verbs in rules]
    server.create({"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": metadata, "rules": granted})
    return bind(server, "Role", ACCOUNT)


def bind(server: Any, kind: str, role: str) -> str:
    """The token of the account, after it got a role in `default`."""
    metadata = {"name": role, "namespace": "default"}
    body = {"apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": metadata}
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": "default"}
    server.create({**body, "roleRef": {"apiGroup": RBAC, "kind": kind, "name": role}, "subjects": [subject]})
    return f"sa:default:{ACCOUNT}"
