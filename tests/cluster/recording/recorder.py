"""What an API server answers to requests that the launcher makes: asked over plain HTTP, trimmed, recorded in recorded/*.json.

`python -m tests.cluster.recording.recorder` records all scenarios anew from a real control plane (KUBEBUILDER_ASSETS names its
binaries); with `--table` it prints recorded/README.md. Which requests there are stands in scenarios.py; that the fake
answers alike is tested in tests/cluster/recording/test_recorded.py. Knows neither the fake nor the launcher.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import json
import re
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3
import yaml

Object = dict[str, Any]

FOLDER = Path(__file__).parent / "recorded"
OBJECTS = yaml.safe_load((Path(__file__).with_name("objects.yaml")).read_text())
PREFIXES = {
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
    "cronjobs": "/apis/batch/v1",
    "jobs": "/apis/batch/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "localqueues": "/apis/kueue.x-k8s.io/v1beta1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "selectionruns": "/apis/prism.dev/v1alpha1",
    "selfsubjectaccessreviews": "/apis/authorization.k8s.io/v1",
    "validatingadmissionpolicies": "/apis/admissionregistration.k8s.io/v1",
    "validatingadmissionpolicybindings": "/apis/admissionregistration.k8s.io/v1",
}
CLUSTER_WIDE = {
    "customresourcedefinitions",
    "namespaces",
    "nodes",
    "selfsubjectaccessreviews",
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
}
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
HEADERS = ("Content-Type", "Warning", "Retry-After", "Transfer-Encoding")
"""What the launcher reads. Transfer-Encoding is recorded of watches alone: elsewhere it depends on the body's length."""
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
    """Some requests that belong together, in a namespace of their own. `name` is the record's, too."""

    name: str
    says: str
    needed_by: tuple[str, ...]
    play: Callable[[Session], None]


SCENARIOS: dict[str, Scenario] = {}


def recorded(*needed_by: str) -> Callable[[Callable[[Session], None]], Callable[[Session], None]]:
    """Make a function a scenario. `needed_by`: functions that depend on the answers (`kube.cluster.Cluster.get`)."""

    def register(play: Callable[[Session], None]) -> Callable[[Session], None]:
        name, says = play.__name__.replace("_", "-"), " ".join((play.__doc__ or "").split())
        SCENARIOS[name] = Scenario(name, says, needed_by, play)
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


def play(scenario: Scenario, door: Door) -> list[Object]:
    """The exchanges of a scenario with the server behind `door`, trimmed."""
    session = Session(door, scenario.name)
    session.start()
    scenario.play(session)
    return trimmed(session.exchanges)


START = Scenario(
    "after-a-start",
    "From its first connection until it is ready an API server refuses what is allowed, and does not know its own addresses.",
    ("kube.transport.Transport.refuse", "kube.cluster.Cluster.serves_selection_runs", "kube.cluster.Cluster.may"),
    lambda session: None,
)
"""No conversation, but every kind of answer that several requests get, asked again and again while a server starts."""


def play_start(server: Any, door: Door, *, stay_seconds: float = 0.0) -> list[Object]:
    """One exchange for each kind of answer while a server starts. Several starts, if need be.

    Args:
        stay_seconds: how long to go on asking once the server's `outage` says that it is over.
    """
    session = Session(door, START.name)
    session.start()
    session.account("driver", [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list"]}])
    editor = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"}
    driver = {"kind": "ServiceAccount", "name": "driver", "namespace": session.namespace}
    binding = {"metadata": {"name": "editor"}, "roleRef": editor, "subjects": [driver]}
    session.do("POST", session.at("rolebindings"), binding)
    seen: dict[tuple[str, int, str], Object] = {}
    for _ in range(10):
        with contextlib.ExitStack() as stack:
            threads, ended = [], threading.Event()
            for path in (session.at("jobs"), "/apis/prism.dev/v1alpha1", "/version", "/readyz"):
                threads.append(threading.Thread(target=_poll, args=(session, path, seen, ended)))
            stack.callback(lambda threads=threads: [thread.join() for thread in threads])
            stack.callback(ended.set)
            with server.outage():
                for thread in threads:
                    thread.start()
            time.sleep(stay_seconds)
        if all(any(words in text for _, _, text in seen) for words in ("RBAC: ", "HTTP paths", "cannot get path")):
            break
    return [seen[key] for key in sorted(seen)]


def _poll(session: Session, path: str, seen: dict[tuple[str, int, str], Object], ended: threading.Event) -> None:
    while not ended.wait(0.01):
        asking = Session(session.door, session.namespace, tokens=session.tokens)
        try:
            asking.ask("GET", path, who="driver")
        except urllib3.exceptions.HTTPError:
            continue
        exchange = trimmed(asking.exchanges)[0]
        if exchange["status"] != 200:
            seen[path, exchange["status"], json.dumps(exchange["body"])] = exchange


def prepare(door: Door) -> None:
    """What all scenarios find: the custom resource, served."""
    session = Session(door, "default")
    session.do("POST", session.at("customresourcedefinitions"), OBJECTS["definition"])
    session.until(lambda: session.send("GET", session.at("selectionruns")).status == 200)
    session.until(lambda: "selectionruns" in str(session.send("GET", "/apis/prism.dev/v1alpha1").body))


# Trimming: what differs from server to server, or from try to try, gives way to a placeholder; the same to the same

UID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIMES = {"creationTimestamp", "deletionTimestamp", "lastTransitionTime", "expirationTimestamp"}
"""Fields that the server's clock fills. Other times are ours, and compared as they are."""
BUILD = {"gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"}
"""Of /version: how the binary was built."""
LONGEST_TEXT = 400


def trimmed(exchanges: list[Object]) -> list[Object]:
    """managedFields go; uids, versions, times and continue tokens become placeholders; a dump of an object is cut."""
    uids: dict[str, str] = {}
    versions: dict[str, str] = {}

    def text_of(text: str) -> str:
        text = re.sub(r"RBAC: \[?clusterrole.*not found\]?", "RBAC: <the roles that are not read yet> not found", text)
        text = text.splitlines()[-1] if text.startswith("[+]") else text  # what of /readyz is not ready
        text = UID.sub(lambda match: uids.setdefault(match[0], f"<uid {len(uids) + 1}>"), text)
        text = re.sub(r"(too old resource version: \d+) \(\d+\)", r"\1 (<newest version>)", text)
        text = re.sub(r"continue=[^&]{20,}", "continue=<token>", text)
        text = re.sub(r"resourceVersion=\d\d+", "resourceVersion=<version>", text)
        text = re.sub(r"(?<= at )\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", text)
        text = re.sub(r"(cannot be handled as a \w+: )(json: cannot unmarshal|parsing time).*", r"\1<Go's words>", text)
        if len(text) > LONGEST_TEXT:
            text = re.sub(
                r"Invalid value: \S*\{.*\}(?=: )", "Invalid value: <cut: the whole object>", text, flags=re.DOTALL
            )
        return text if len(text) <= 10 * LONGEST_TEXT else f"{text[:100]}<cut: {len(text)} characters>"

    def walk(value: Any, name: str = "", *, of_list: bool = False) -> Any:
        if isinstance(value, list):
            return [walk(item, name) for item in value]
        if isinstance(value, str):
            if name in TIMES:
                return "<time>"
            if name == "continue" and value:
                return "<token>"
            if name == "resourceVersion" and value not in ("", "0", "1"):
                return "<newest version>" if of_list else versions.setdefault(value, f"<version {len(versions) + 1}>")
            return text_of(value)
        if name == "tolerationSeconds":
            return "<seconds>"  # of a pod that sets none: a setting of the server
        if not isinstance(value, dict):
            return value
        kind = str(value.get("kind", ""))
        listed = kind.endswith("List") or of_list or value.get("type") == "BOOKMARK"
        out = {}
        for key in sorted(value):
            if key in ("managedFields", "storageVersionHash") or (key in BUILD and "gitVersion" in value):
                continue
            goes_on = listed and key in ("metadata", "resourceVersion", "object")
            out[key] = walk(value[key], key, of_list=goes_on)
        return out

    return [walk(exchange) for exchange in exchanges]


# Files


def path_of(scenario: Scenario) -> Path:
    return FOLDER / f"{scenario.name}.json"


def read(scenario: Scenario) -> Object:
    return dict(json.loads(path_of(scenario).read_text()))


def write(scenario: Scenario, exchanges: list[Object], version: str) -> None:
    record = {
        "says": scenario.says,
        "needed by": ", ".join(scenario.needed_by),
        "recorded from": version,
        "exchanges": exchanges,
    }
    path_of(scenario).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def table() -> str:
    """Markdown: what is recorded, how it is answered, and who needs it."""
    rows = []
    for name, scenario in sorted({**SCENARIOS, START.name: START}.items()):
        exchanges = read(scenario)["exchanges"]
        codes = ", ".join(str(code) for code in sorted({exchange["status"] for exchange in exchanges}))
        functions = ", ".join(f"`{one}`" for one in scenario.needed_by)
        rows.append(f"| [{name}]({name}.json) | {len(exchanges)} | {codes} | {functions} |")
    return "\n".join(["| record | exchanges | answers | needed by, in launcher/ |", "|---|---|---|---|", *rows])


def main() -> None:
    from tests.cluster.real import RealServer
    from tests.cluster.recording import scenarios  # noqa: F401  (registers them)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="names of scenarios; none: all")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    with tempfile.TemporaryDirectory() as folder, RealServer(Path(folder)) as server:
        door = Door.of(server, Path(folder) / "recording")
        prepare(door)
        version = str(door.admin.request("GET", f"{door.url}/version").json()["gitVersion"])
        for name in sorted({*(options.only or SCENARIOS)} & SCENARIOS.keys()):
            write(SCENARIOS[name], play(SCENARIOS[name], door), version)
            print(name, flush=True)
        if not options.only or START.name in options.only:
            write(START, play_start(server, door), version)


if __name__ == "__main__":
    # As the module that the scenarios import, not as a second one of the name __main__.
    from tests.cluster.recording import recorder

    recorder.main()
