"""Runs on a whole cluster while something fails: pods, nodes, operators, the API server. See test_cluster_runs.py."""

from __future__ import annotations

import json
import signal

from tests.cluster.commands import ask, prism, running
from tests.cluster.records import create, end_of, jobs, pods, running_pod, status
from tests.cluster.rig import Rig, eventually


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


def test_an_operator_that_is_killed_is_followed_by_the_one_that_waits(cluster: Rig) -> None:
    """Two replicas, as processes; the leader dies without a word in the middle of a run."""
    create(cluster, cluster.document("handed-on"))
    with running(cluster, "operator", "--port", "0") as first:
        eventually(lambda: cluster.server.object("leases", "prism-operator", "prism-system"))
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
    lease = cluster.server.object("leases", "prism-operator", "prism-system")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == ""


def test_a_submit_that_is_killed_is_continued_by_the_next(bare: Rig) -> None:
    document = str(bare.write(bare.document("continued")))
    with running(bare, "submit", "--wait", document):
        running_pod(bare, "continued", "extract")
    done = prism(bare, "submit", "--wait", document)
    assert done.returncode == 0, done.stderr
    assert "attached" in done.stderr
    assert jobs(bare, "continued") == ["continued-extract-0-0-0", "continued-plan-0-0", "continued-reduce-0-0"]
