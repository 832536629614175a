"""Runs on a whole cluster of this machine: API server, Job controller, kubelet whose pods are real workers, S3.

What is decided is tested in test_decide.py; here, that it holds when everything is real but the cluster itself. Where
KUBEBUILDER_ASSETS names the binaries of a control plane, the same tests run against that one too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.real import missing_binaries
from tests.cluster.rig import BUCKET, Rig, eventually, rig

ROOT = Path(__file__).parents[1]


def need(server: str) -> bool:
    """Whether a real control plane is asked for; skips where there is none."""
    if server == "real" and (reason := missing_binaries()):
        pytest.skip(f"no real control plane: {reason}")
    return server == "real"


@pytest.fixture(scope="module", params=["fake", "real"])
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: Any) -> Iterator[Rig]:
    """With the custom resource."""
    with rig(tmp_path_factory.mktemp("rig"), tiny_model, real=need(request.param)) as made:
        yield made


@pytest.fixture(scope="module", params=["fake", "real"])
def bare(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: Any) -> Iterator[Rig]:
    """Without the custom resource: records are ConfigMaps."""
    with rig(tmp_path_factory.mktemp("bare"), tiny_model, with_crd=False, real=need(request.param)) as made:
        yield made


def prism(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-m", "launcher.cli", *arguments], {**os.environ, **rig.environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)


@contextlib.contextmanager
def running(rig: Rig, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command, env = [sys.executable, "-m", "launcher.cli", *arguments], {**os.environ, **rig.environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kubectl(rig: Rig, *arguments: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on this machine")
    command = ["kubectl", "--kubeconfig", str(rig.kubeconfig), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(rig: Rig, name: str) -> dict[str, Any]:
    found = rig.server.object("selectionruns", name)
    assert found is not None
    return dict(found.get("status") or {})


def phase(rig: Rig, name: str) -> str:
    return str(status(rig, name).get("phase", ""))


def create(rig: Rig, document: dict[str, Any]) -> None:
    rig.server.create({**document, "metadata": {**document["metadata"], "namespace": "default"}})


def end_of(rig: Rig, name: str, seconds: float = 120.0) -> dict[str, Any]:
    eventually(lambda: phase(rig, name) in ("Complete", "Failed", "Cancelled"), seconds)
    return status(rig, name)


def jobs(rig: Rig, name: str) -> list[str]:
    found = rig.server.objects("jobs", "default")
    return sorted(job["metadata"]["name"] for job in found if job["metadata"]["labels"]["prism.dev/run"] == name)


def pods(rig: Rig, name: str, stage: str) -> list[dict[str, Any]]:
    labels = {"prism.dev/run": name, "prism.dev/stage": stage}
    return [
        pod
        for pod in rig.server.objects("pods", "default")
        if labels.items() <= pod["metadata"].get("labels", {}).items()
    ]


def running_pod(rig: Rig, name: str, stage: str) -> str:
    """The name of a pod of that stage whose process runs."""

    def find() -> str:
        names = [pod["metadata"]["name"] for pod in pods(rig, name, stage)]
        return next((name for name in names if rig.kubelet.pid("default", name)), "")

    return str(eventually(find))


def locally(rig: Rig, name: str) -> bytes:
    """selected.parquet of the same run by `prism run`, with a store and an output of its own."""
    document = rig.document(name)
    document["spec"] |= {"store": f"s3://{BUCKET}/local/store", "output": f"s3://{BUCKET}/local/selections"}
    path = rig.folder / f"{name}-local.yaml"
    path.write_text(yaml.safe_dump(document))
    done = prism(rig, "run", str(path), "-o", "json")
    assert done.returncode == 0, done.stderr
    return rig.get(json.loads(done.stdout)["manifest"].replace("manifest.json", "selected.parquet"))


def test_kubectl_apply_runs_a_selection_and_it_is_the_one_of_prism_run(cluster: Rig) -> None:
    document = cluster.write(cluster.document("applied", groups=2))
    with cluster.operator():
        kubectl(cluster, "apply", "-f", str(document))
        kubectl(cluster, "wait", "--for=condition=Complete", "--timeout=120s", "selectionrun/applied")
        said = status(cluster, "applied")
        listed = kubectl(cluster, "get", "sel", "applied").split()
    assert {"applied", "Complete", "2/2", "4/4"} <= set(listed)
    assert said["observedGeneration"] == 1
    assert said["selected"] == 3
    assert jobs(cluster, "applied") == [
        "applied-extract-0-0-0",
        "applied-extract-1-0-0",
        "applied-plan-0-0",
        "applied-reduce-0-0",
    ]
    selected = cluster.get(said["manifest"].replace("manifest.json", "selected.parquet"))
    assert selected == locally(cluster, "applied")
    reasons = kubectl(cluster, "get", "events", "-o", "jsonpath={.items[*].reason}")
    assert {"Planning", "Extracting", "Reducing", "Complete"} <= set(reasons.split())


def test_without_the_custom_resource_submit_wait_carries_the_run_on_and_says_how_it_ended(bare: Rig) -> None:
    document = str(bare.write(bare.document("alone")))
    refused = prism(bare, "submit", document)
    assert refused.returncode == 1
    assert "add --wait" in refused.stderr
    done = prism(bare, "submit", "--wait", document)
    assert done.returncode == 0, done.stderr
    manifest = done.stdout.strip()
    assert bare.get(manifest.replace("manifest.json", "selected.parquet")) == locally(bare, "alone")
    assert "Complete" in prism(bare, "status", "alone").stdout
    assert json.loads(prism(bare, "list", "-o", "json").stdout)["runs"][0]["phase"] == "Complete"


def test_a_run_again_extracts_what_is_new_and_nothing_where_nothing_is(bare: Rig) -> None:
    document = str(bare.write(bare.document("nightly")))
    first = prism(bare, "submit", "--wait", document, "-o", "json")
    assert first.returncode == 0, first.stderr
    bare.upload(4, "b.jsonl", first=100)
    try:
        more = json.loads(prism(bare, "submit", "--wait", document, "-o", "json").stdout)
        assert (more["units"], more["missing_units"], more["examples"]) == (5, 1, 14)
        assert jobs(bare, "nightly") == ["nightly-extract-0-1-0", "nightly-plan-1-0", "nightly-reduce-1-0"]
        again = json.loads(prism(bare, "submit", "--wait", document, "-o", "json").stdout)
        assert again["missing_units"] == 0
        assert again["manifest"] == more["manifest"]
        assert jobs(bare, "nightly") == ["nightly-plan-2-0", "nightly-reduce-2-0"]
    finally:
        bare.client.delete_object(Bucket=BUCKET, Key="pool/b.jsonl")


def test_another_document_under_the_same_name_is_refused_with_what_differs(bare: Rig) -> None:
    document = bare.document("taken")
    assert prism(bare, "submit", "--wait", str(bare.write(document))).returncode == 0
    document["spec"]["selection"]["budget"]["fraction"] = 0.5
    refused = prism(bare, "submit", "--wait", str(bare.write(document)))
    assert refused.returncode == 3
    assert "spec.selection.budget.fraction: 0.5 here, 0.3 there" in refused.stderr


def test_the_exit_code_says_failed_cancelled_deleted_or_not_finished(bare: Rig) -> None:
    wrong = bare.document("wrong")
    wrong["spec"]["model"]["uri"] = "/nowhere"
    failed = prism(bare, "submit", "--wait", str(bare.write(wrong)))
    assert failed.returncode == 100
    assert "exit code 64: no such model (/nowhere)" in failed.stderr

    document = str(bare.write(bare.document("cancelled")))
    with running(bare, "submit", "--wait", document) as submitting:
        running_pod(bare, "cancelled", "plan")
        assert prism(bare, "cancel", "cancelled").returncode == 0
        assert submitting.wait(timeout=60) == 103
    eventually(lambda: not pods(bare, "cancelled", "plan"))
    assert prism(bare, "retry", "cancelled", "--wait").returncode == 0

    with running(bare, "submit", "--wait", str(bare.write(bare.document("deleted")))) as submitting:
        running_pod(bare, "deleted", "plan")
        bare.server.delete("configmaps", "deleted-prism-record", "default")
        assert submitting.wait(timeout=60) == 102
    eventually(lambda: not jobs(bare, "deleted"))
    assert prism(bare, "wait", "deleted").returncode == 102

    slow = prism(bare, "submit", "--wait", "--timeout", "0.5", str(bare.write(bare.document("slow"))))
    assert slow.returncode == 101
    assert prism(bare, "submit", "--wait", str(bare.write(bare.document("slow")))).returncode == 0


def test_kills_evictions_and_memory_cost_attempts_and_the_run_completes(cluster: Rig) -> None:
    create(cluster, cluster.document("hurt", maxRestarts=5))
    with cluster.operator():
        cluster.kubelet.kill("default", running_pod(cluster, "hurt", "plan"), signal.SIGKILL)
        cluster.kubelet.evict("default", running_pod(cluster, "hurt", "extract"))
        eventually(lambda: "hurt-extract-0-0-1" in jobs(cluster, "hurt"))
        cluster.kubelet.oom_kill("default", running_pod(cluster, "hurt", "extract"))
        said = end_of(cluster, "hurt")
    assert said["phase"] == "Complete", said
    counted = {one["stage"]: (one["restarts"], one["preemptions"]) for one in said["stages"]}
    assert counted == {"plan": (1, 0), "extract": (1, 1), "reduce": (0, 0)}
    assert said["restarts"] == 3


def test_one_group_may_be_gone_for_good(cluster: Rig) -> None:
    """Its share is done by the other, and the run ends with what one group alone selects."""
    document = cluster.document("halved", groups=2, maxRestarts=0)
    create(cluster, document)
    with cluster.operator():
        eventually(lambda: "halved-extract-1-0-0" in jobs(cluster, "halved"))

        def second() -> str:
            found = [
                pod for pod in pods(cluster, "halved", "extract") if pod["metadata"]["labels"]["prism.dev/group"] == "1"
            ]
            names = [pod["metadata"]["name"] for pod in found]
            return next((name for name in names if cluster.kubelet.pid("default", name)), "")

        cluster.kubelet.kill("default", str(eventually(second)), signal.SIGKILL)
        said = end_of(cluster, "halved")
    assert said["phase"] == "Complete", said
    states = {one["group"]: one["state"] for one in said["stages"] if one["stage"] == "extract"}
    assert states == {0: "Succeeded", 1: "Failed"}
    assert said["groups"] == "1/2"


def test_a_world_of_two_pods_writes_what_one_process_writes(cluster: Rig) -> None:
    document = cluster.document("world", nodesPerGroup=2)
    document["spec"]["extraction"]["deepspeed"] = {"stage": 3}
    create(cluster, document)
    with cluster.operator():
        said = end_of(cluster, "world", 180)
    assert said["phase"] == "Complete", said
    assert len(pods(cluster, "world", "extract")) == 2
    assert cluster.server.object("services", "prism-world-0") is not None
    assert said["shards"] == "4/4"
    assert said["selected"] == 3


def test_an_image_that_never_comes_ends_the_run_with_the_reason(cluster: Rig) -> None:
    missing = "registry/no-such-image:1"
    cluster.kubelet.missing_images.add(missing)
    create(cluster, cluster.document("imageless", image=missing, startupTimeoutSeconds=10))
    with cluster.operator():
        eventually(lambda: "ImagePull" in status(cluster, "imageless").get("message", ""), 9)
        said = end_of(cluster, "imageless")
    assert said["phase"] == "Failed"
    failed = next(one for one in said["conditions"] if one["type"] == "Failed")
    assert failed["reason"] == "StartupTimeout"
    assert "ImagePull" in said["message"]
    eventually(lambda: not jobs(cluster, "imageless"))


def test_a_job_that_a_queue_holds_back_is_queued_and_runs_once_let_go(cluster: Rig) -> None:
    """Kueue suspends each Job at its creation; here a script does."""
    create(cluster, cluster.document("queued", queueName="team-a", startupTimeoutSeconds=10))
    with cluster.operator():
        eventually(lambda: jobs(cluster, "queued"))
        patch = ["patch", "job", "queued-plan-0-0", "-p"]
        kubectl(cluster, *patch, '{"spec": {"suspend": true}}')
        eventually(lambda: "waits for Kueue's queue team-a" in status(cluster, "queued").get("message", ""))
        time.sleep(11)  # longer than the startup timeout: waiting in a queue is no failure
        assert phase(cluster, "queued") == "Planning"
        kubectl(cluster, *patch, '{"spec": {"suspend": false}}')
        assert end_of(cluster, "queued")["phase"] == "Complete"


def test_suspend_stops_the_pods_and_resume_goes_on(cluster: Rig) -> None:
    create(cluster, cluster.document("paused"))
    with cluster.operator():
        running_pod(cluster, "paused", "plan")
        kubectl(cluster, "patch", "sel", "paused", "--type=merge", "-p", '{"spec": {"suspend": true}}')
        eventually(lambda: phase(cluster, "paused") == "Suspended")
        eventually(lambda: not pods(cluster, "paused", "plan"))
        kubectl(cluster, "patch", "sel", "paused", "--type=merge", "-p", '{"spec": {"suspend": false}}')
        said = end_of(cluster, "paused")
    assert said["phase"] == "Complete"
    assert said["restarts"] == 0


def test_deleting_a_record_or_its_namespace_ends_its_pods_and_removes_everything(cluster: Rig) -> None:
    cluster.server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "short"}})
    document = cluster.document("gone")
    cluster.server.create({**document, "metadata": {"name": "gone", "namespace": "short"}})
    create(cluster, document)
    with cluster.operator():
        pid = cluster.kubelet.pid("default", running_pod(cluster, "gone", "plan"))
        kubectl(cluster, "delete", "sel", "gone")
        kubectl(cluster, "delete", "namespace", "short", "--timeout=60s")
    assert pid
    for kind in ("jobs", "pods", "configmaps", "networkpolicies"):
        eventually(
            lambda kind=kind: not [one for one in cluster.server.objects(kind) if "gone" in one["metadata"]["name"]]
        )


def test_an_operator_that_is_killed_is_followed_by_the_one_that_waits(cluster: Rig) -> None:
    """Two replicas, as processes; the leader dies without a word in the middle of a run."""
    create(cluster, cluster.document("handed-on"))
    with running(cluster, "operator", "--port", "0") as first:
        eventually(lambda: cluster.server.object("leases", "prism-operator"))
        with running(cluster, "operator", "--port", "0") as second:
            assert second.stderr is not None
            port = json.loads(second.stderr.readline())["port"]
            running_pod(cluster, "handed-on", "plan")
            first.kill()
            said = end_of(cluster, "handed-on")
            assert said["phase"] == "Complete", said
            assert ask(port, "healthz") == "ok\n"
            assert ask(port, "readyz") == "ok\n"
            metrics = ask(port, "metrics")
            assert 'prism_runs{phase="Complete"}' in metrics
            assert "prism_reconcile_seconds_count" in metrics
            second.terminate()
            assert second.wait(timeout=30) == 0
    lease = cluster.server.object("leases", "prism-operator")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == ""


def ask(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_submit_that_is_killed_is_continued_by_the_next(bare: Rig) -> None:
    document = str(bare.write(bare.document("continued")))
    with running(bare, "submit", "--wait", document):
        running_pod(bare, "continued", "extract")
    done = prism(bare, "submit", "--wait", document)
    assert done.returncode == 0, done.stderr
    assert "attached" in done.stderr
    assert jobs(bare, "continued") == ["continued-extract-0-0-0", "continued-plan-0-0", "continued-reduce-0-0"]


def test_the_record_and_all_its_children_go_when_their_time_is_over(cluster: Rig) -> None:
    document = cluster.document("short-lived")
    document["spec"]["ttlSecondsAfterFinished"] = 1
    create(cluster, document)
    with cluster.operator():
        eventually(lambda: cluster.server.object("selectionruns", "short-lived") is None, 120)
        eventually(lambda: not jobs(cluster, "short-lived"))


def test_a_document_that_no_cluster_can_run_is_said_to_be_so_once(cluster: Rig) -> None:
    """Past the schema: an overlay is free-form."""
    document = cluster.document("secretive")
    overlay = {"spec": {"containers": [{"name": "worker", "env": [{"name": "HF_TOKEN", "value": "hf_x"}]}]}}
    document["spec"]["cluster"]["podOverlay"] = overlay
    create(cluster, document)
    with cluster.operator():
        said = end_of(cluster, "secretive")
        version = cluster.server.object("selectionruns", "secretive")["metadata"]["resourceVersion"]
        time.sleep(1)
        assert cluster.server.object("selectionruns", "secretive")["metadata"]["resourceVersion"] == version
    accepted = next(one for one in said["conditions"] if one["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "InvalidSpec")
    assert "HF_TOKEN is a secret" in accepted["message"]
    assert "hf_x" not in json.dumps(said)
    assert not jobs(cluster, "secretive")
