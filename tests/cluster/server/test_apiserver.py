"""What the rig's API server does beyond single answers, which test_recorded.py compares with a real one's: collecting what has
lost its owner, ending pods, faults on demand, and what kubectl needs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3.exceptions
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from tests.cluster.recording.session import OBJECTS
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer

PLURAL = "selectionruns"
Kubectl = Callable[..., str]
"""A generous bound: what it waits for takes tenths of a second."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    before = threading.active_count()
    with ApiServer(log_folder=tmp_path / "logs") as server:
        yield server
    eventually(lambda: threading.active_count() <= before, 15)


@pytest.fixture
def core(server: ApiServer, tmp_path: Path) -> Iterator[client.CoreV1Api]:
    with config.new_client_from_config(str(server.kubeconfig(tmp_path / "admin.yaml"))) as api:
        yield client.CoreV1Api(api)


def made(kind: str, name: str, *, owner: str = "", **spec: Any) -> dict[str, Any]:
    """An object of recording/objects.yaml; `owner` is the uid of its owner, `spec` is laid over its spec."""
    body = copy.deepcopy(OBJECTS[kind])
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner, "blockOwnerDeletion": True}
    owned = {"ownerReferences": [reference]} if owner else {}
    body["metadata"] = {**body.get("metadata", {}), "name": name, "namespace": "default", **owned}
    return {**body, "spec": {**body["spec"], **spec}} if "spec" in body else body


# Deletion and owners


def test_deleting_a_job_without_a_policy_leaves_its_pods_running(server: ApiServer, core: client.CoreV1Api) -> None:
    batch = client.BatchV1Api(core.api_client)
    for policy, left in ((None, ["worker"]), ("Background", [])):
        uid = server.create(made("job", "gang"))["metadata"]["uid"]
        server.create(made("pod", "worker", owner=uid))
        batch.delete_namespaced_job("gang", "default", **({"propagation_policy": policy} if policy else {}))
        marker = server.create(
            made("config_map", f"marker-{policy}".lower(), owner="11111111-0000-0000-0000-000000000000")
        )
        eventually(lambda m=marker: not server.object("configmaps", m["metadata"]["name"]), 15)
        assert [item["metadata"]["name"] for item in server.objects("pods")] == left
        if left:
            assert not core.read_namespaced_pod("worker", "default").metadata.owner_references
            server.delete("pods", "worker")


# Faults


def test_the_same_seed_spoils_the_same_requests_and_only_those_meant(server: ApiServer, core: client.CoreV1Api) -> None:
    def spoiled(count: int) -> list[tuple[int, int]]:
        server.faults.rain({"500": 0.3, "409": 0.2}, seed=7, only="prism")
        out = []
        for place in range(count):
            try:
                core.create_namespaced_config_map("default", made("config_map", f"c{place}"), dry_run="All")
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


@pytest.fixture
def kubectl(server: ApiServer, tmp_path: Path) -> Kubectl:
    """Runs kubectl, its caches in a folder of its own."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    command = ["kubectl", "--kubeconfig", str(server.kubeconfig(tmp_path / "kubectl.yaml"))]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "check": False}
    options["env"] = {**os.environ, "HOME": str(tmp_path), "KUBECACHEDIR": str(tmp_path / "cache")}

    def call(*words: str, given: Any = None, code: int = 0) -> str:
        done = subprocess.run([*command, *words], input=json.dumps(given) if given else None, **options)
        assert done.returncode == code, done.stdout + done.stderr
        return str(done.stdout + done.stderr)

    return call


def run(**spec: Any) -> dict[str, Any]:
    return made("run", "first", **spec)


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


def test_kubectl_wait_refuses_a_status_of_an_older_generation(kubectl: Kubectl, server: ApiServer) -> None:
    server.create(OBJECTS["definition"])
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
            client.CoreV1Api(api).create_namespaced_config_map("default", made("config_map", "settings"))
        assert ["POST", "configmaps", 1] in http.request("GET", f"{url}/__requests").json()["requests"]
        http.clear()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
