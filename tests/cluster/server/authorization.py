"""Who may do what: RBAC over stored Roles and bindings, and what a SelfSubjectAccessReview answers.

Reads roles through a function that lists stored objects; knows nothing of HTTP or of the store behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Lister = Callable[[str, str | None], list[dict[str, Any]]]
"""`lister("roles", namespace)`: the stored objects of a kind, of one namespace or (None) of all."""


@dataclass(frozen=True)
class User:
    """Whoever asks. No service account: the cluster's administrator, who may do everything."""

    namespace: str = ""
    account: str = ""

    @property
    def name(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{self.account}" if self.account else "kubernetes-admin"

    @property
    def groups(self) -> set[str]:
        if not self.account:
            return {"system:masters", "system:authenticated"}
        return {"system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"}


@dataclass(frozen=True)
class Attempt:
    """One thing that somebody wants to do. `resource` carries its subresource: `jobs/status`."""

    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""


def user_of(authorization: str | None) -> User | None:
    """The user behind an Authorization header: nobody's is the administrator's, `Bearer sa:<namespace>:<name>` a service
    account's, anything else None (not authenticated)."""
    if not authorization:
        return User()
    kind, _, token = authorization.partition(" ")
    parts = token.strip().split(":")
    if kind != "Bearer" or len(parts) != 3 or parts[0] != "sa" or not all(parts):
        return None
    return User(parts[1], parts[2])


def allowed(user: User, attempt: Attempt, lister: Lister) -> bool:
    """Whether some role bound to `user` grants `attempt`."""
    if not user.account:
        return True
    if attempt.group == "authorization.k8s.io" and attempt.resource.startswith("selfsubject"):
        return True
    return any(_grants(rule, attempt) for _, rule in _rules(user, attempt.namespace, lister))


def refusal(user: User, attempt: Attempt) -> str:
    """The API server's words for a 403."""
    plural, _, _ = attempt.resource.partition("/")
    qualified = f"{plural}.{attempt.group}" if attempt.group else plural
    what = f'{qualified} "{attempt.name}"' if attempt.name else qualified
    where = f'in the namespace "{attempt.namespace}"' if attempt.namespace else "at the cluster scope"
    return (
        f'{what} is forbidden: User "{user.name}" cannot {attempt.verb} resource "{attempt.resource}" '
        f'in API group "{attempt.group}" {where}'
    )


def review(user: User, body: dict[str, Any], lister: Lister) -> dict[str, Any]:
    """A SelfSubjectAccessReview with its status. An unknown resource is merely not allowed."""
    asked = body.get("spec", {}).get("resourceAttributes") or {}
    plural, subresource = asked.get("resource", ""), asked.get("subresource", "")
    verb, group, namespace, name = (asked.get(part, "") for part in ("verb", "group", "namespace", "name"))
    attempt = Attempt(verb, group, f"{plural}/{subresource}" if subresource else plural, namespace, name)
    asked = {name: value for name, value in asked.items() if value}
    body = {**body, "spec": {**body.get("spec", {}), "resourceAttributes": asked}}
    if not user.account:
        return {**body, "status": {"allowed": True}}
    by = next((why for why, rule in _rules(user, attempt.namespace, lister) if _grants(rule, attempt)), "")
    return {**body, "status": {"allowed": True, "reason": f"RBAC: allowed by {by}"} if by else {"allowed": False}}


def _rules(user: User, namespace: str, lister: Lister) -> Iterator[tuple[str, dict[str, Any]]]:
    """(by which binding, rule) of all that is bound to `user`, in the cluster and in a namespace."""
    bindings = [("ClusterRoleBinding", "", one) for one in lister("clusterrolebindings", None)]
    if namespace:
        bindings += [("RoleBinding", f"/{namespace}", one) for one in lister("rolebindings", namespace)]
    for kind, place, binding in bindings:
        if subject := _binds(binding, user):
            role = binding["roleRef"]
            by = f'{kind} "{binding["metadata"]["name"]}{place}" of {role["kind"]} "{role["name"]}" to {subject}'
            yield from ((by, rule) for rule in _role(binding, namespace, lister))


def _role(binding: dict[str, Any], namespace: str, lister: Lister) -> list[dict[str, Any]]:
    reference = binding["roleRef"]
    plural = "clusterroles" if reference["kind"] == "ClusterRole" else "roles"
    found = lister(plural, None if plural == "clusterroles" else namespace)
    return next((role.get("rules") or [] for role in found if role["metadata"]["name"] == reference["name"]), [])


def _binds(binding: dict[str, Any], user: User) -> str:
    """The subject of a binding that `user` is; empty for none."""
    for subject in binding.get("subjects") or ():
        kind, name = subject["kind"], subject["name"]
        namespace = subject.get("namespace", binding["metadata"].get("namespace", ""))
        if kind == "ServiceAccount" and (namespace, name) == (user.namespace, user.account):
            return f'ServiceAccount "{name}/{namespace}"'
        if (kind == "User" and name == user.name) or (kind == "Group" and name in user.groups):
            return f'{kind} "{name}"'
    return ""


def _grants(rule: dict[str, Any], attempt: Attempt) -> bool:
    def has(field: str, *values: str) -> bool:
        return bool({"*", *values} & set(rule.get(field) or ()))

    _, _, subresource = attempt.resource.partition("/")
    names = rule.get("resourceNames")
    return (
        has("verbs", attempt.verb)
        and has("apiGroups", attempt.group)
        and has("resources", attempt.resource, *([f"*/{subresource}"] if subresource else []))
        and (not names or attempt.name in names)
    )
