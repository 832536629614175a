"""A scenario's conversation with a server over plain HTTP: addresses, bodies, accounts; and the list of scenarios.

Knows neither the fake server nor the launcher.
"""

from __future__ import annotations

import base64
import copy
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3
import yaml

Object = dict[str, Any]

OBJECTS = yaml.safe_load(Path(__file__).with_name("objects.yaml").read_text())
_API_GROUPS = {
    "/apis/apiextensions.k8s.io/v1": "customresourcedefinitions",
    "/apis/admissionregistration.k8s.io/v1": "validatingadmissionpolicies validatingadmissionpolicybindings",
    "/apis/authorization.k8s.io/v1": "selfsubjectaccessreviews",
    "/apis/batch/v1": "cronjobs jobs",
    "/apis/coordination.k8s.io/v1": "leases",
    "/apis/kueue.x-k8s.io/v1beta1": "localqueues",
    "/apis/networking.k8s.io/v1": "networkpolicies",
    "/apis/prism.dev/v1alpha1": "selectionruns",
    "/apis/rbac.authorization.k8s.io/v1": "rolebindings roles",
}
PREFIXES = {plural: prefix for prefix, plurals in _API_GROUPS.items() for plural in plurals.split()}
CLUSTER_WIDE = {"customresourcedefinitions", "namespaces", "nodes", "selfsubjectaccessreviews"}
CLUSTER_WIDE |= {"validatingadmissionpolicies", "validatingadmissionpolicybindings"}
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
HEADERS = ("Content-Type", "Warning", "Retry-After", "Transfer-Encoding")
"""What the launcher reads. Transfer-Encoding is recorded of watches alone: elsewhere it depends on the body's length."""
STRICT = "fieldManager=prism&fieldValidation=Strict"
FORCE, NO_FORCE = "fieldManager=prism&force=true", "fieldManager=prism&force=false"
KINDS = {"configmaps": "config_map", "jobs": "job", "leases": "lease", "networkpolicies": "network_policy"}
KINDS |= {"selectionruns": "run", "services": "service"}
"""What the launcher makes: plural -> the body's name in objects.yaml."""
WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Door:
    """How to reach a server. `admin` is its administrator's pool, by certificate or because nobody else is asked for;
    `pool` is for tokens. `compact` makes the server forget the versions so far."""

    url: str
    admin: urllib3.PoolManager
    pool: urllib3.PoolManager
    compact: Callable[[], None]

    @classmethod
    def of(cls, server: Any, kubeconfig: Path) -> Door:
        """Of a server as ApiServer and RealServer are; `kubeconfig` is written."""
        document = yaml.safe_load(server.kubeconfig(kubeconfig).read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        admin, pool = urllib3.PoolManager(retries=False), urllib3.PoolManager(retries=False)
        if certificate := cluster.get("certificate-authority-data"):
            contexts = [ssl.create_default_context(cadata=base64.b64decode(certificate).decode()) for _ in range(2)]
            contexts[0].load_cert_chain(user["client-certificate"], user["client-key"])
            admin, pool = (urllib3.PoolManager(retries=False, ssl_context=context) for context in contexts)
        return cls(cluster["server"], admin, pool, server.compact)


@dataclass(frozen=True)
class Scenario:
    """Some requests that belong together, in a namespace of their own. Recorded in recorded/`topic`/`name`.yaml."""

    topic: str
    name: str
    needed_by: tuple[str, ...]
    play: Callable[[Session], None]


SCENARIOS: dict[str, Scenario] = {}


def recorded(*needed_by: str) -> Callable[[Callable[[Session], None]], Callable[[Session], None]]:
    """Make a function a scenario. `needed_by`: functions that depend on the answers (`kube.cluster.Cluster.get`)."""

    def register(play: Callable[[Session], None]) -> Callable[[Session], None]:
        name, topic = play.__name__.replace("_", "-"), play.__module__.rpartition(".")[2]
        SCENARIOS[name] = Scenario(topic, name, needed_by, play)
        return play

    return register


@dataclass
class Answer:
    status: int
    headers: Object
    body: Any


@dataclass
class Session:
    """One scenario's conversation with a server. `ask` is recorded; `do` prepares, and must succeed."""

    door: Door
    namespace: str
    exchanges: list[Object] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        self.tokens["stranger"] = "no token of this server"
        self.do("POST", self.at("namespaces"), {"metadata": {"name": self.namespace}})
        self.until(lambda: self.send("GET", self.at("serviceaccounts", "default")).status == 200)

    def at(self, plural: str, name: str = "", *, everywhere: bool = False, query: str = "") -> str:
        """An address of this scenario's namespace."""
        scope = "" if everywhere or plural.partition("/")[0] in CLUSTER_WIDE else f"/namespaces/{self.namespace}"
        parts = [PREFIXES.get(plural, "/api/v1") + scope, plural, *([name] if name else [])]
        return "/".join(parts) + (f"?{query}" if query else "")

    def body(self, kind: str, name: str, spec: Object | None = None, **more: Any) -> Object:
        """An object of objects.yaml under a name; `spec` is laid over its spec, `more` over its metadata."""
        found = copy.deepcopy(OBJECTS[kind])
        found["metadata"] = {**found.get("metadata", {}), "name": name, **more}
        if spec is not None:
            found["spec"] = {**found.get("spec", {}), **spec}
        return found

    def ask(
        self, method: str, path: str, body: Any = None, content: str = "application/json", who: str = "admin"
    ) -> Any:
        """One recorded exchange; returns the answer's body."""
        answer = self.send(method, path, body, content, who)
        request = {"method": method, "path": path, "as": who}
        if body is not None:
            request |= {"content type": content, "body": copy.deepcopy(body)}
        shown = {"status": answer.status, "headers": answer.headers, "body": answer.body}
        self.exchanges.append({"request": request, **copy.deepcopy(shown)})
        return answer.body

    def do(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        answer = self.send(method, path, body, content)
        assert answer.status < 300, f"{method} {path}: {answer}"
        return answer.body

    def send(
        self, method: str, path: str, body: Any = None, content: str = "application/json", who: str = "admin"
    ) -> Answer:
        headers = {"Accept": "application/json", "User-Agent": "prism/recorded"}
        if body is not None:
            headers["Content-Type"] = content
        pool = self.door.admin
        if who != "admin":
            headers["Authorization"], pool = f"Bearer {self.tokens[who]}", self.door.pool
        text = None if body is None else json.dumps(body)
        answer = pool.request(method, self.door.url + path, body=text, headers=headers, timeout=WAIT_SECONDS)
        said = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
        if not _is_watch(path):
            said.pop("Transfer-Encoding", None)
        words = answer.data.decode()
        if not said.get("Content-Type", "").startswith("application/json"):
            return Answer(answer.status, said, words)
        if _is_watch(path) and answer.status == 200:
            assert words == "" or words.endswith("\n"), "each event is a line"
            return Answer(answer.status, said, [json.loads(line) for line in words.splitlines()])
        return Answer(answer.status, said, json.loads(words))

    def until(self, holds: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := holds()):
            assert time.monotonic() < deadline, f"{self.namespace}: what it waits for does not come"
            time.sleep(0.1)
        return found

    def account(self, name: str, rules: list[Object]) -> None:
        """A service account with these rights here, by whose name requests can be made from now on."""
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        subject = {"kind": "ServiceAccount", "name": name, "namespace": self.namespace}
        self.do("POST", self.at("serviceaccounts"), {"metadata": {"name": name}})
        self.do("POST", self.at("roles"), {"metadata": {"name": name}, "rules": rules})
        self.do(
            "POST", self.at("rolebindings"), {"metadata": {"name": name}, "roleRef": reference, "subjects": [subject]}
        )
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        made = self.do("POST", self.at("serviceaccounts", f"{name}/token"), asked)
        self.tokens[name] = made["status"]["token"]
        for rule in rules:
            wanted = {"verb": rule["verbs"][0], "group": rule["apiGroups"][0], "resource": rule["resources"][0]}
            self.until(lambda wanted=wanted: self._may(name, wanted))

    def _may(self, who: str, wanted: Object) -> bool:
        plural, _, subresource = wanted["resource"].partition("/")
        attributes = {**wanted, "resource": plural, "subresource": subresource, "namespace": self.namespace}
        answer = self.send(
            "POST", self.at("selfsubjectaccessreviews"), {"spec": {"resourceAttributes": attributes}}, who=who
        )
        return answer.status == 201 and bool(answer.body["status"]["allowed"])


def _is_watch(path: str) -> bool:
    return "watch=true" in path
