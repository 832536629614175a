"""What the rig's API server does beyond single answers, which test_recorded.py compares with a real one's: collecting what has
lost its owner, ending pods, faults on demand, logs, and what kubectl needs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3.exceptions
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from tests.cluster.recording.session import OBJECTS
from tests.cluster.server.apiserver import ApiServer

PLURAL = "selectionruns"
MERGE = {"_content_type": "application/merge-patch+json"}
SOON_SECONDS = 15
"""A generous bound: what it waits for takes tenths of a second."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    before = threading.active_count()
    with ApiServer(log_folder=tmp_path / "logs") as server:
        yield server
    _until(lambda: threading.active_count() <= before, "threads are left behind")


@pytest.fixture
def api(server: ApiServer, tmp_path: Path) -> Iterator[client.ApiClient]:
    with config.new_client_from_config(str(server.kubeconfig(tmp_path / "admin.yaml"))) as api:
        yield api


@pytest.fixture
def core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


@pytest.fixture
def batch(api: client.ApiClient) -> client.BatchV1Api:
    return client.BatchV1Api(api)


@pytest.fixture
def custom(server: ApiServer, api: client.ApiClient) -> client.CustomObjectsApi:
    server.create(OBJECTS["definition"])
    return client.CustomObjectsApi(api)


def _until(holds: Callable[[], Any], text: str) -> None:
    ends = time.monotonic() + SOON_SECONDS
    while not holds():
        assert time.monotonic() < ends, text
        time.sleep(0.02)


def _refused(call: Callable[[], Any], code: int, text: str = "") -> ApiException:
    with pytest.raises(ApiException) as caught:
        call()
    assert caught.value.status == code, caught.value.body
    assert text in json.loads(caught.value.body)["message"]
    return caught.value


def made(kind: str, name: str, *, owner: str = "", **spec: Any) -> dict[str, Any]:
    """An object of recording/objects.yaml; `owner` is the uid of a ConfigMap, `spec` is laid over its spec."""
    body = copy.deepcopy(OBJECTS[kind])
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner, "blockOwnerDeletion": True}
    owned = {"ownerReferences": [reference]} if owner else {}
    body["metadata"] = {**body.get("metadata", {}), "name": name, "namespace": "default", **owned}
    return {**body, "spec": {**body["spec"], **spec}} if "spec" in body else body


def run(**spec: Any) -> dict[str, Any]:
    return made("run", "first", **spec)


def pod(name: str = "worker", *, owner: str = "", **spec: Any) -> dict[str, Any]:
    return made("pod", name, owner=owner, **spec)


def config_map(name: str = "settings", *, owner: str = "") -> dict[str, Any]:
    return made("config_map", name, owner=owner)


def placed(server: ApiServer, body: dict[str, Any]) -> dict[str, Any]:
    """A pod on a node."""
    if server.object("nodes", "node-0") is None:
        server.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-0"}})
    return server.create({**body, "spec": {**body["spec"], "nodeName": "node-0"}})


# Watches


def test_a_fault_ends_a_watch_with_410_or_a_cut_connection(core: client.CoreV1Api, server: ApiServer) -> None:
    server.faults.script([({"verb": "watch"}, "gone_watch"), ({"verb": "watch"}, "drop_watch")])
    answer = core.list_namespaced_config_map("default", watch=True, _preload_content=False, timeout_seconds=30)
    events = [json.loads(line) for line in answer.read().splitlines()]
    assert (events[-1]["type"], events[-1]["object"]["code"]) == ("ERROR", 410)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.list_namespaced_config_map("default", watch=True, _preload_content=False, timeout_seconds=30).read()


# Deletion and owners


def test_deleting_a_job_without_a_policy_leaves_its_pods_running(
    server: ApiServer, batch: client.BatchV1Api, core: client.CoreV1Api
) -> None:
    for policy, left in ((None, ["worker"]), ("Background", [])):
        uid = server.create(made("job", "gang"))["metadata"]["uid"]
        server.create(pod(owner=uid))
        batch.delete_namespaced_job("gang", "default", **({"propagation_policy": policy} if policy else {}))
        marker = server.create(config_map(f"marker-{policy}".lower(), owner="11111111-0000-0000-0000-000000000000"))
        _until(lambda m=marker: not server.object("configmaps", m["metadata"]["name"]), "the collector sleeps")
        assert [item["metadata"]["name"] for item in server.objects("pods")] == left
        if left:
            assert not core.read_namespaced_pod("worker", "default").metadata.owner_references
            server.delete("pods", "worker")


def test_children_follow_their_owner_and_a_config_map_can_own(server: ApiServer, core: client.CoreV1Api) -> None:
    uid = server.create(config_map("owner"))["metadata"]["uid"]
    child = server.create(made("job", "gang", owner=uid))["metadata"]["uid"]
    server.create(config_map("grandchild", owner=child))
    core.delete_namespaced_config_map("owner", "default")
    _until(lambda: not server.objects("jobs") and not server.objects("configmaps"), "children stay")


def test_a_child_of_an_owner_that_never_was_is_collected_at_once(server: ApiServer) -> None:
    server.create(config_map(owner="11111111-0000-0000-0000-000000000000"))
    _until(lambda: not server.objects("configmaps"), "the orphan stays")


def test_a_pod_on_a_node_ends_when_its_kubelet_says_so(server: ApiServer, core: client.CoreV1Api) -> None:
    server.create(pod("waiting"))
    core.delete_namespaced_pod("waiting", "default")
    assert server.object("pods", "waiting") is None
    placed(server, pod(terminationGracePeriodSeconds=7))
    core.delete_namespaced_pod("worker", "default")
    metadata = core.read_namespaced_pod("worker", "default").metadata
    assert metadata.deletion_timestamp
    assert metadata.deletion_grace_period_seconds == 7
    core.delete_namespaced_pod("worker", "default", grace_period_seconds=0)
    assert server.object("pods", "worker") is None


def test_a_finalizer_keeps_a_forced_pod_until_it_is_stripped(server: ApiServer, core: client.CoreV1Api) -> None:
    body = pod()
    body["metadata"]["finalizers"] = ["prism.dev/read"]
    placed(server, body)
    core.delete_namespaced_pod("worker", "default", grace_period_seconds=0)
    assert core.read_namespaced_pod("worker", "default").metadata.deletion_timestamp
    more = {"metadata": {"finalizers": ["prism.dev/read", "prism.dev/more"]}}
    _refused(lambda: core.patch_namespaced_pod("worker", "default", more, **MERGE), 422, "no new finalizers")
    core.patch_namespaced_pod("worker", "default", {"metadata": {"finalizers": None}}, **MERGE)
    assert server.object("pods", "worker") is None


# Logs


def test_a_log_is_followed_until_its_pod_has_ended(server: ApiServer, core: client.CoreV1Api, tmp_path: Path) -> None:
    body = placed(server, pod())

    def read(**options: Any) -> Any:
        return core.read_namespaced_pod_log("worker", "default", _preload_content=False, **options)

    _refused(read, 400, 'container "worker" in pod "worker" is waiting to start: ContainerCreating')
    server.update({**body, "status": {"phase": "Running"}}, subresource="status")
    log = tmp_path / "logs" / "default" / f"worker.{body['metadata']['uid']}" / "worker.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\n")
    assert read(tail_lines=1).data == b"two\n"

    def go_on() -> None:
        with log.open("a") as file:
            file.write("three\n")
        current = server.object("pods", "worker")
        server.update({**current, "status": {"phase": "Succeeded"}}, subresource="status")

    timer = threading.Timer(0.3, go_on)
    timer.start()
    assert b"".join(read(follow=True).stream()) == b"one\ntwo\nthree\n"
    timer.join()


# Faults


def test_a_lost_answer_was_carried_out(server: ApiServer, core: client.CoreV1Api) -> None:
    server.faults.script([({"verb": "create"}, "reset_after"), ({"verb": "create"}, "reset_before")])
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.create_namespaced_config_map("default", config_map("done"))
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.create_namespaced_config_map("default", config_map("undone"))
    assert [item["metadata"]["name"] for item in server.objects("configmaps")] == ["done"]


def test_the_same_seed_spoils_the_same_requests_and_only_those_meant(
    server: ApiServer, core: client.CoreV1Api, tmp_path: Path
) -> None:
    def spoiled(count: int) -> list[tuple[int, int]]:
        server.faults.rain({"500": 0.3, "409": 0.2}, seed=7, only="prism")
        out = []
        for place in range(count):
            try:
                core.create_namespaced_config_map("default", config_map(f"c{place}"), dry_run="All")
            except ApiException as err:
                out.append((place, err.status))
        return out

    assert spoiled(20) == []
    core.api_client.user_agent = "prism/1"
    first = spoiled(60)
    assert 0 < len(first) < 60
    assert {code for _, code in first} == {500}
    assert spoiled(60) == first


# kubectl


class Kubectl:
    """kubectl against one server, its caches in a folder of its own."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.folder = folder
        self.command = ["kubectl", "--kubeconfig", str(server.kubeconfig(folder / "kubectl.yaml"))]
        self.environment = {**os.environ, "HOME": str(folder), "KUBECACHEDIR": str(folder / "cache")}

    def __call__(self, *words: str, given: Any = None, code: int = 0) -> str:
        text = json.dumps(given) if given is not None else None
        done = subprocess.run(
            [*self.command, *words],
            input=text,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.command, *words], stdout=subprocess.PIPE, text=True, env=self.environment)


@pytest.fixture
def kubectl(server: ApiServer, tmp_path: Path) -> Kubectl:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    return Kubectl(server, tmp_path)


def test_kubectl_applies_gets_patches_waits_and_deletes(kubectl: Kubectl, server: ApiServer) -> None:
    assert "created" in kubectl("apply", "-f", "-", given=OBJECTS["definition"])
    kubectl("wait", "--for=condition=Established", "crd/selectionruns.prism.dev", "--timeout=10s")
    assert "created" in kubectl("apply", "-f", "-", given=run())
    assert "unchanged" in kubectl("apply", "-f", "-", given=run())
    assert "configured" in kubectl("apply", "-f", "-", given=run(suspend=True))
    assert "serverside-applied" in kubectl("apply", "--server-side", "-f", "-", given=run(suspend=True))
    assert 'unknown field "spec.colour"' in kubectl("apply", "-f", "-", given=run(colour="red"), code=1)
    status = json.dumps({"status": {"phase": "Done", "conditions": [{"type": "Complete", "status": "True"}]}})
    kubectl("patch", "sel", "first", "--type=merge", "--subresource=status", "-p", status)
    header, row = kubectl("get", "sel").splitlines()
    assert header.split() == ["NAME", "PHASE", "AGE"]
    assert row.split()[:2] == ["first", "Done"]
    assert json.loads(kubectl("get", "sel", "first", "-o", "json"))["spec"]["suspend"]
    kubectl("wait", "--for=condition=Complete", "sel/first", "--timeout=10s")
    assert "deleted" in kubectl("delete", "sel", "first")
    assert server.objects(PLURAL) == []


def test_kubectl_wait_refuses_a_status_that_speaks_of_an_older_generation(
    kubectl: Kubectl, custom: Any, server: ApiServer
) -> None:
    server.create(run())
    complete = [{"type": "Complete", "status": "True"}]
    state = {**server.object(PLURAL, "first"), "status": {"observedGeneration": 1, "conditions": complete}}
    server.update(state, subresource="status")
    kubectl("wait", "--for=condition=Complete", "sel/first", "--timeout=10s")
    kubectl("patch", "sel", "first", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    kubectl("wait", "--for=condition=Complete", "sel/first", "--timeout=1s", code=1)


def test_it_runs_as_a_process_of_its_own_and_counts_its_requests(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.cluster.server.apiserver", "--kubeconfig", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        http = urllib3.PoolManager()
        with config.new_client_from_config(str(tmp_path / "config.yaml")) as api:
            client.CoreV1Api(api).create_namespaced_config_map("default", config_map())
        assert ["POST", "configmaps", 1] in http.request("GET", f"{url}/__requests").json()["requests"]
        http.clear()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
