"""The service accounts of a rig and their rights: k8s/rbac.yaml applied, its roles bound as k8s/examples/accounts.yaml does.

The same on the fake and on a real API server; tokens come from the TokenRequest API of both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.cluster.kubelet.mirror import Api

K8S = Path(__file__).parents[2] / "k8s"
OPERATOR_NAMESPACE, RUN_NAMESPACE = "prism-system", "default"
USER, VIEWER = "person", "onlooker"
TOKEN_SECONDS = 7200
AGGREGATION_SECONDS = 30.0
RBAC = "rbac.authorization.k8s.io/v1"

READ, WRITE = ["get", "list", "watch"], ["create", "delete", "deletecollection", "patch", "update"]
OBJECTS = ["configmaps", "persistentvolumeclaims", "pods", "serviceaccounts", "services"]
EDIT_RULES = (
    {"apiGroups": [""], "resources": [*OBJECTS, "events", "pods/log"], "verbs": READ},
    {"apiGroups": [""], "resources": OBJECTS, "verbs": WRITE},
    {"apiGroups": ["batch"], "resources": ["cronjobs", "jobs"], "verbs": READ + WRITE},
)
"""What Kubernetes' own role `edit` grants, as far as anything here asks for it."""


class Server(Protocol):
    """The fake or a real one."""

    def create(self, body: dict[str, Any], *, namespace: str = ...) -> dict[str, Any]: ...
    def kubeconfig(self, path: Path, *, namespace: str = ..., token: str | None = ...) -> Path: ...
    def object(self, plural: str, name: str, namespace: str = ...) -> dict[str, Any] | None: ...


class Accounts:
    """Makes them all at once; a kubeconfig and its token when first asked for.

    Args:
        folder: where the kubeconfigs are written.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._api = Api(server.kubeconfig(folder / "administrator"), "accounts")
        self._kubeconfigs: dict[str, Path] = {}
        for body in (*_installed(), *_driver(), *_people()):
            server.create(body)
        if not self._has_built_in_roles():
            for name, rules in (("edit", EDIT_RULES), ("view", ())):
                server.create(_built_in(name, [*rules, *_aggregated(name)]))
        self._wait_for_aggregation()

    def as_operator(self) -> Path:
        return self._kubeconfig(OPERATOR_NAMESPACE, "prism-operator")

    def as_driver(self) -> Path:
        """For `submit --wait`: who drives a run without an operator."""
        return self._kubeconfig(RUN_NAMESPACE, "prism-driver")

    def as_user(self) -> Path:
        """Has Kubernetes' role `edit` in the namespace of the runs."""
        return self._kubeconfig(RUN_NAMESPACE, USER)

    def as_viewer(self) -> Path:
        """Has Kubernetes' role `view` there."""
        return self._kubeconfig(RUN_NAMESPACE, VIEWER)

    def token(self, namespace: str, account: str, seconds: int = TOKEN_SECONDS) -> str:
        wanted = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds},
        }
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return str(self._api.ask("POST", path, wanted)["status"]["token"])

    def _kubeconfig(self, namespace: str, account: str) -> Path:
        if account not in self._kubeconfigs:
            token, path = self.token(namespace, account), self._folder / f"kubeconfig-{account}"
            self._kubeconfigs[account] = self._server.kubeconfig(path, namespace=namespace, token=token)
        return self._kubeconfigs[account]

    def _has_built_in_roles(self) -> bool:
        return any(role["metadata"]["name"] == "edit" for role in self._cluster_roles())

    def _wait_for_aggregation(self) -> None:
        """A controller adds the rules of k8s/rbac.yaml to `edit` and `view`, a moment after they were made."""
        deadline = time.monotonic() + AGGREGATION_SECONDS
        while True:
            roles = [role for role in self._cluster_roles() if role["metadata"]["name"] in ("edit", "view")]
            if all(any("prism.dev" in rule.get("apiGroups", ()) for rule in role["rules"]) for role in roles):
                return
            assert time.monotonic() < deadline, "the roles edit and view say nothing of prism.dev"
            time.sleep(0.1)

    def _cluster_roles(self) -> list[dict[str, Any]]:
        return list(self._api.ask("GET", f"/apis/{RBAC}/clusterroles")["items"])


def _documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _installed() -> Iterator[dict[str, Any]]:
    """What `kubectl apply -k k8s/` installs, but for the custom resource and the operator's Deployment."""
    yield from _documents(K8S / "namespace.yaml")
    for body in _documents(K8S / "rbac.yaml"):
        cluster_wide = body["kind"].startswith("Cluster")
        yield body if cluster_wide else _moved(body, OPERATOR_NAMESPACE)


def _driver() -> Iterator[dict[str, Any]]:
    """examples/accounts.yaml, in the namespace of the runs."""
    for body in _documents(K8S / "examples" / "accounts.yaml"):
        yield _moved(body, RUN_NAMESPACE)


def _people() -> Iterator[dict[str, Any]]:
    for name, role in ((USER, "edit"), (VIEWER, "view")):
        metadata = {"name": name, "namespace": RUN_NAMESPACE}
        yield {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
        subjects = [{"kind": "ServiceAccount", **metadata}]
        body = {"apiVersion": RBAC, "kind": "RoleBinding", "metadata": metadata}
        yield {**body, "roleRef": reference, "subjects": subjects}


def _moved(body: dict[str, Any], namespace: str) -> dict[str, Any]:
    """As kustomize puts an object into a namespace, and the accounts that it names."""
    moved = {**body, "metadata": {**body["metadata"], "namespace": namespace}}
    if "subjects" in body:
        moved["subjects"] = [{**subject, "namespace": namespace} for subject in body["subjects"]]
    return moved


def _built_in(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"apiVersion": RBAC, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules}


def _aggregated(name: str) -> list[dict[str, Any]]:
    """The rules that k8s/rbac.yaml adds to a role of Kubernetes' own."""
    label = f"rbac.authorization.k8s.io/aggregate-to-{name}"
    roles = [body for body in _documents(K8S / "rbac.yaml") if body["kind"] == "ClusterRole"]
    return [rule for role in roles if label in role["metadata"].get("labels", {}) for rule in role["rules"]]
