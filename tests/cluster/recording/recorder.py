"""Records what an API server answers to the requests of the scenarios, in recorded/TOPIC/NAME.yaml.

`python -m tests.cluster.recording.recorder` records all scenarios anew from a real control plane, or only the ones named;
KUBEBUILDER_ASSETS names the folder of its binaries. test_recorded.py tests that our own API server answers alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import urllib3
import yaml

from tests.cluster.real import RealServer
from tests.cluster.recording import scenarios
from tests.cluster.recording.session import OBJECTS, SCENARIOS, Door, Object, Scenario, Session
from tests.cluster.recording.trimming import trimmed

FOLDER = Path(__file__).parent / "recorded"
assert scenarios.__name__, "imported so that its scenarios are registered"


def play(scenario: Scenario, door: Door) -> list[Object]:
    """The exchanges of a scenario with the server behind `door`, trimmed. Of a request only its first line is kept."""
    session = Session(door, scenario.name)
    session.start()
    scenario.play(session)
    return [_as_recorded(exchange) for exchange in trimmed(session.exchanges)]


def _as_recorded(exchange: Object) -> Object:
    request = exchange["request"]
    line = [request["method"], request["path"], "as", request["as"], *filter(None, [request.get("content type")])]
    return {"request": " ".join(line), **{part: exchange[part] for part in ("status", "headers", "body")}}


START = Scenario(
    "server",
    "after-a-start",
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
    return [_as_recorded(seen[key]) for key in sorted(seen)]


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


def path_of(scenario: Scenario) -> Path:
    return FOLDER / scenario.topic / f"{scenario.name}.yaml"


def read(scenario: Scenario) -> list[Object]:
    return list(yaml.load(path_of(scenario).read_text(), yaml.CSafeLoader)["exchanges"])


def write(scenario: Scenario, exchanges: list[Object], version: str) -> None:
    record = {"recorded from": version, "exchanges": json.loads(json.dumps(exchanges))}
    text = yaml.safe_dump(record, default_flow_style=None, width=120, sort_keys=False, allow_unicode=True)
    path_of(scenario).parent.mkdir(exist_ok=True)
    path_of(scenario).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="names of scenarios; none: all")
    options = parser.parse_args()
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
    main()
