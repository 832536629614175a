"""The launcher in pods of a real control plane: the operator's own Deployment, a CronJob's driver, tokens, logs by the API
server's proxy. The fake has no controllers for these. See test_cluster_runs.py for what is needed.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.commands import kubectl, prism, running
from tests.cluster.kubelet.tokens import MOUNT_PATH, why_no_mounts
from tests.cluster.records import create, end_of, jobs, pods, running_pod, status
from tests.cluster.rig import Rig, eventually
from tests.conftest import made_rig

ROOT = Path(__file__).parents[2]
IMAGE = "registry/prism-operator:0.1.0"
LIFE_SHARE = 0.002
"""A token of 3607 seconds is renewed every 7."""


@pytest.fixture(scope="module", params=["real"])
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: Any) -> Iterator[Rig]:
    if reason := why_no_mounts():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("rig")
    with made_rig(folder, tiny_model, request.param, token_life_share=LIFE_SHARE) as made:
        yield made


@pytest.fixture(scope="module")
def deployed(cluster: Rig) -> Rig:
    """With the operator as k8s/ installs it. Its pods share this machine's ports, so each takes a free one."""
    documents = [one for one in yaml.safe_load_all(kubectl(cluster, "kustomize", str(ROOT / "k8s"))) if one]
    for document in documents:
        if document["kind"] == "Deployment":
            document["spec"]["template"]["spec"]["containers"][0]["args"] += ["--port", "0"]
    path = cluster.folder / "k8s.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    kubectl(cluster, "apply", "--server-side", "--force-conflicts", "-f", str(path))
    wait = ["wait", "--for=condition=Available", "--timeout=60s", "deployment/prism-operator"]
    kubectl(cluster, "-n", "prism-system", *wait)
    eventually(lambda: len(running_operators(cluster)) == 2)
    return cluster


def running_operators(rig: Rig) -> list[str]:
    names = [pod["metadata"]["name"] for pod in rig.server.objects("pods", "prism-system")]
    return [name for name in names if rig.kubelet.pid("prism-system", name)]


def leader(rig: Rig) -> str:
    """The name of the pod that holds the lease; empty where none does."""
    lease = rig.server.object("leases", "prism-operator", "prism-system") or {"spec": {}}
    return str(lease["spec"].get("holderIdentity") or "").rpartition("-")[0]


def test_the_operators_deployment_completes_runs_and_a_killed_leader_is_followed_and_restarted(deployed: Rig) -> None:
    create(deployed, deployed.document("in-cluster"))
    running_pod(deployed, "in-cluster", "plan")
    first = eventually(lambda: leader(deployed))
    deployed.kubelet.kill("prism-system", first, signal.SIGKILL)
    said = end_of(deployed, "in-cluster")
    assert said["phase"] == "Complete", said
    assert said["restarts"] == 0
    assert leader(deployed) != first

    def restarts() -> int:
        pod = deployed.server.object("pods", first, "prism-system")
        assert pod is not None
        return int(pod["status"]["containerStatuses"][0]["restartCount"])

    eventually(lambda: restarts() == 1 and first in running_operators(deployed))
    words = kubectl(deployed, "-n", "prism-system", "logs", first, "--previous")
    assert '"event": "leading"' in words or '"event":"leading"' in words
    kubectl(deployed, "-n", "prism-system", "rollout", "status", "deployment/prism-operator", "--timeout=60s")


def test_a_rolling_restart_of_the_operator_costs_a_run_nothing(deployed: Rig) -> None:
    create(deployed, deployed.document("rolled"))
    running_pod(deployed, "rolled", "plan")
    kubectl(deployed, "-n", "prism-system", "rollout", "restart", "deployment/prism-operator")
    said = end_of(deployed, "rolled")
    assert said["phase"] == "Complete", said
    assert said["restarts"] == 0
    kubectl(deployed, "-n", "prism-system", "rollout", "status", "deployment/prism-operator", "--timeout=90s")


def test_a_pods_token_is_renewed_and_the_operator_goes_on_with_the_new_one(deployed: Rig) -> None:
    name = eventually(lambda: leader(deployed))
    pod = deployed.server.object("pods", name, "prism-system")
    assert pod is not None
    volume = next(
        mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"] if mount["mountPath"] == MOUNT_PATH
    )
    token = deployed.folder / "pods" / pod["metadata"]["uid"] / "volumes" / volume / "token"
    first = token.read_text()
    eventually(lambda: token.read_text() != first, 30)
    assert (token.parent / "namespace").read_text() == "prism-system"
    create(deployed, deployed.document("renewed"))
    assert end_of(deployed, "renewed")["phase"] == "Complete"


def test_logs_by_the_api_servers_proxy_are_followed_cut_and_stamped(deployed: Rig) -> None:
    create(deployed, deployed.document("spoken", groups=2))
    running_pod(deployed, "spoken", "plan")
    with running(deployed, "logs", "spoken", "--follow") as following:
        out, err = following.communicate(timeout=120)
        assert following.returncode == 0, err
    for stage in ("plan", "extract", "reduce"):
        assert re.search(rf"^\S*{stage}\S* ", out, re.MULTILINE), out
    pod = pods(deployed, "spoken", "reduce")[0]["metadata"]["name"]
    whole = kubectl(deployed, "logs", pod, kubeconfig=deployed.as_viewer())
    assert len(whole.splitlines()) > 2
    assert kubectl(deployed, "logs", pod, "--tail=2").splitlines() == whole.splitlines()[-2:]
    assert kubectl(deployed, "logs", pod, "--limit-bytes=10") == whole[:10]
    stamped = kubectl(deployed, "logs", pod, "--timestamps").splitlines()
    assert [line.partition("Z ")[2] for line in stamped] == whole.splitlines()
    assert kubectl(deployed, "logs", pod, "--since-time=2100-01-01T00:00:00Z") == ""


def test_a_scheduled_jobs_pod_submits_the_document_as_the_driver_and_waits(deployed: Rig) -> None:
    document = str(deployed.write(deployed.document("by-night")))
    arguments = ["schedule", document, "--cron", "0 3 * * *", "--image", IMAGE, "--apply"]
    done = prism(deployed, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["configmap/by-night-schedule", "cronjob/by-night-schedule"]
    kubectl(deployed, "create", "job", "--from=cronjob/by-night-schedule", "tonight")
    kubectl(deployed, "wait", "--for=condition=Complete", "--timeout=120s", "job/tonight")
    assert status(deployed, "by-night")["phase"] == "Complete"
    assert jobs(deployed, "by-night") == ["by-night-extract-0-0-0", "by-night-plan-0-0", "by-night-reduce-0-0"]
    manifest = kubectl(deployed, "logs", "job/tonight", "--tail=1").strip()
    assert manifest == status(deployed, "by-night")["manifest"]


def test_a_whole_run_and_all_that_looks_at_it_is_refused_nothing(deployed: Rig) -> None:
    before = len(deployed.server.forbidden())
    document = deployed.write(deployed.document("modest", groups=2, nodesPerGroup=1))
    assert prism(deployed, "submit", str(document)).returncode == 0
    with running(deployed, "watch", "modest") as watching, running(deployed, "wait", "modest") as waiting:
        assert watching.wait(timeout=120) == 0
        assert waiting.wait(timeout=60) == 0
    for kubeconfig in (deployed.as_user(), deployed.as_viewer()):
        for command in (["status", "modest"], ["list"], ["logs", "modest"]):
            done = prism(deployed, *command, kubeconfig=kubeconfig)
            assert done.returncode == 0, done.stderr
    assert prism(deployed, "submit", "--wait", str(document)).returncode == 0
    kubectl(deployed, "delete", "sel", "modest", kubeconfig=deployed.as_user())
    eventually(lambda: not jobs(deployed, "modest"))
    assert deployed.server.forbidden()[before:] == []
