"""The test cluster's Job controller and kubelet behave as a real cluster was observed to: its laws, and its surprises."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kubelet.job_controller import JobController
from tests.cluster.kubelet.kubelet import Kubelet
from tests.cluster.kubelet.mirror import Api
from tests.cluster.rig import NODES, eventually
from tests.cluster.server.apiserver import ApiServer

Thing = dict[str, Any]
SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
POLITE = "import signal, time; signal.signal(15, lambda *_: exit({})); print('up', flush=True); time.sleep(60)"
RULES = [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [64, 65]}},
]


@dataclass
class Cluster:
    server: ApiServer
    kubelet: Kubelet
    api: Api
    folder: Path

    def job(self, name: str = "gang") -> Thing:
        return self.api.ask("GET", f"/apis/batch/v1/namespaces/default/jobs/{name}")

    def pods(self, job: str = "gang") -> dict[int, Thing]:
        """Index -> pod; of several with one index the newest."""
        items = self.api.ask("GET", "/api/v1/namespaces/default/pods", labelSelector=f"job-name={job}")["items"]
        items.sort(key=lambda pod: int(pod["metadata"]["resourceVersion"]))
        return {int(pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", 0)): pod for pod in items}

    def conditions(self, job: str = "gang") -> list[str]:
        return [c["type"] for c in self.job(job).get("status", {}).get("conditions", []) if c["status"] == "True"]

    def reason(self, kind: str, job: str = "gang") -> tuple[str, str]:
        found = next(c for c in self.job(job)["status"]["conditions"] if c["type"] == kind)
        return found["reason"], found["message"]

    def run(self, script: str | list[str], name: str = "gang", **settings: Any) -> None:
        self.server.create(gang(script, name, **settings))

    def running(self, num: int = 2, job: str = "gang") -> dict[int, Thing]:
        until(lambda: sum(p["status"]["phase"] == "Running" for p in self.pods(job).values()) == num)
        return self.pods(job)

    def delete(self, pod: Thing, **options: Any) -> None:
        self.api.ask("DELETE", path_of(pod), options or None)

    def log(self, pod: Thing) -> str:
        metadata = pod["metadata"]
        return (self.folder / "logs/default" / f"{metadata['name']}.{metadata['uid']}" / "worker.log").read_text()

    def events(self, reason: str) -> list[str]:
        items = self.api.ask("GET", "/api/v1/namespaces/default/events")["items"]
        return [event["message"] for event in items if event["reason"] == reason]


def gang(script: str | list[str], name: str = "gang", num: int = 2, pod: Thing | None = None, **settings: Any) -> Thing:
    """An Indexed Job; `script` is Python, or one such for each index."""
    scripts = [script] * num if isinstance(script, str) else script
    chooser = f"import os; exec({scripts!r}[int(os.environ['JOB_COMPLETION_INDEX'])])"
    container = {"name": "worker", "image": "prism:1", "command": ["python", "-c", chooser.replace("$", "$$")]}
    container |= (pod or {}).pop("container", {})
    template = {
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [container], **(pod or {})}
    }
    spec = {"completionMode": "Indexed", "completions": num, "parallelism": num, "backoffLimit": 0}
    spec |= {"podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": RULES}, "template": template, **settings}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": "default"}, "spec": spec}


def path_of(pod: Thing) -> str:
    return f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}"


def until(holds: Callable[[], Any]) -> Any:
    return eventually(holds, 15)


def terminated(pod: Thing) -> Thing:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ApiServer(log_folder=tmp_path / "logs") as server:
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        kubelet = Kubelet(kubeconfig, tmp_path / "pods", nodes=NODES, log_folder=tmp_path / "logs", pod_gc_seconds=0.3)
        with JobController(kubeconfig), kubelet:
            yield Cluster(server, kubelet, Api(kubeconfig, "test"), tmp_path)


# How a Job fails.


def test_an_exit_code_with_a_rule_fails_the_job_and_the_end_of_the_log_is_its_termination_message(
    cluster: Cluster,
) -> None:
    policy = {"container": {"terminationMessagePolicy": "FallbackToLogsOnError"}}
    script = "sys = __import__('sys'); print('x' * 4096); print('no such key'); sys.exit(65)"
    cluster.run([SLEEP, script], pod=policy)
    until(lambda: "Failed" in cluster.conditions())
    reason, message = cluster.reason("Failed")
    name = cluster.pods()[1]["metadata"]["name"]
    said = f"Container worker for pod default/{name} failed with exit code 65 matching FailJob rule at index 1"
    assert (reason, message) == ("PodFailurePolicy", said) == cluster.reason("FailureTarget")
    assert cluster.conditions() == ["FailureTarget", "Failed"]
    assert terminated(cluster.pods()[1])["message"].endswith("x\nno such key\n")
    assert len(terminated(cluster.pods()[1])["message"]) <= 2048


def test_a_failed_gang_keeps_the_pod_that_failed_and_deletes_the_survivor(cluster: Cluster) -> None:
    cluster.run([POLITE.format(143), "import sys; sys.exit(1)"])
    until(lambda: "FailureTarget" in cluster.conditions())
    assert cluster.job()["status"]["failed"] == 2  # the survivor counts before it has ended
    until(lambda: "Failed" in cluster.conditions())
    assert cluster.reason("Failed") == ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
    pods = cluster.pods()
    assert list(pods) == [1]
    assert (terminated(pods[1])["exitCode"], terminated(pods[1])["reason"]) == (1, "Error")
    assert not pods[1]["metadata"].get("finalizers")


def test_failed_waits_for_the_last_survivor(cluster: Cluster) -> None:
    cluster.run([DEAF, "import sys, time; time.sleep(0.5); sys.exit(1)"], pod={"terminationGracePeriodSeconds": 2})
    until(lambda: "FailureTarget" in cluster.conditions())
    began = time.monotonic()
    until(lambda: "Failed" in cluster.conditions())
    assert time.monotonic() - began > 1.5
    assert list(cluster.pods()) == [1]


def test_a_plain_deletion_of_a_pod_is_the_backoff_limit(cluster: Cluster) -> None:
    cluster.run(SLEEP)
    cluster.delete(cluster.running()[0])
    until(lambda: "Failed" in cluster.conditions())
    assert cluster.reason("Failed")[0] == "BackoffLimitExceeded"
    until(lambda: not cluster.pods())  # a pod is removed after its end was read, perhaps after the Job has failed


def test_an_eviction_matches_the_first_rule_and_leaves_no_pod(cluster: Cluster) -> None:
    cluster.run(SLEEP)
    name = cluster.running()[1]["metadata"]["name"]
    cluster.kubelet.evict("default", name)
    until(lambda: "Failed" in cluster.conditions())
    said = f"Pod default/{name} has condition DisruptionTarget matching FailJob rule at index 0"
    assert cluster.reason("Failed") == ("PodFailurePolicy", said)
    until(lambda: not cluster.pods())  # a pod is removed after its end was read, perhaps after the Job has failed


def test_a_finalizer_of_the_template_keeps_the_evicted_pod_readable_and_delays_nothing(cluster: Cluster) -> None:
    job = gang(SLEEP)
    job["spec"]["template"]["metadata"] = {"finalizers": ["prism.dev/look"]}
    cluster.server.create(job)
    name = cluster.running()[1]["metadata"]["name"]
    cluster.kubelet.evict("default", name)
    until(lambda: "Failed" in cluster.conditions())
    pods = cluster.pods()
    assert [c["reason"] for c in pods[1]["status"]["conditions"] if c["type"] == "DisruptionTarget"] == [
        "EvictionByEvictionAPI"
    ]
    assert terminated(pods[1])["exitCode"] == 143
    for pod in pods.values():
        assert pod["metadata"]["finalizers"] == ["prism.dev/look"]
        cluster.api.ask("PATCH", path_of(pod), {"metadata": {"finalizers": None}})
    until(lambda: not cluster.pods())


def test_trap_a_an_evicted_pod_still_terminating_hides_behind_its_peers_exit(cluster: Cluster) -> None:
    cluster.run([SLEEP, DEAF])
    pods = cluster.running()
    until(lambda: "deaf" in cluster.log(pods[1]))
    cluster.kubelet.evict("default", pods[1]["metadata"]["name"])
    cluster.kubelet.kill("default", pods[0]["metadata"]["name"], signal.SIGKILL)
    until(lambda: "FailureTarget" in cluster.conditions())
    assert cluster.reason("FailureTarget")[0] == "BackoffLimitExceeded"


def test_trap_b_an_evicted_worker_that_exits_0_counts_as_succeeded_and_its_peer_runs_on(cluster: Cluster) -> None:
    cluster.run([SLEEP, POLITE.format(0)])
    pods = cluster.running()
    until(lambda: "up" in cluster.log(pods[1]))
    cluster.kubelet.evict("default", pods[1]["metadata"]["name"])
    until(lambda: cluster.job()["status"].get("succeeded") == 1)
    time.sleep(0.5)
    assert cluster.conditions() == []
    assert cluster.job()["status"]["active"] == 1
    assert list(cluster.pods()) == [0]


@pytest.mark.parametrize("forced", [{}, {"gracePeriodSeconds": 0}])
def test_trap_c_a_pod_deleted_on_a_lost_node_leaves_the_job_without_any_condition(
    cluster: Cluster, forced: Thing
) -> None:
    cluster.run(SLEEP)
    pods = cluster.running()
    cluster.kubelet.lose_node("node-a")
    cluster.delete(pods[1], **forced)
    until(lambda: cluster.job()["status"].get("terminating") == 1)
    time.sleep(1)
    status = cluster.job()["status"]
    assert (status["active"], status["terminating"]) == (1, 1)
    assert cluster.conditions() == []
    assert cluster.pods()[1]["status"]["phase"] == "Running"


# Nodes.


def test_a_deleted_node_fails_its_pods_as_disrupted_after_a_while(cluster: Cluster) -> None:
    cluster.run(SLEEP)
    pid = cluster.kubelet.pid("default", cluster.running()[0]["metadata"]["name"])
    cluster.kubelet.lose_node("node-a")
    cluster.kubelet.delete_node("node-a")
    until(lambda: "Failed" in cluster.conditions())
    assert cluster.reason("Failed")[0] == "PodFailurePolicy"
    assert "has condition DisruptionTarget matching FailJob rule at index 0" in cluster.reason("Failed")[1]
    assert pid
    assert not is_alive(pid)
    until(lambda: not cluster.pods())


# What waits, and why.


def test_a_job_whose_pods_are_refused_hangs_with_events_and_no_condition(cluster: Cluster) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.ask("PATCH", "/api/v1/namespaces/default", {"metadata": {"labels": label}})
    cluster.run("pass")
    said = until(lambda: cluster.events("FailedCreate"))
    assert said[0].startswith("Error creating: pods ")
    assert "violates PodSecurity" in said[0]
    assert cluster.conditions() == []
    until(lambda: not cluster.pods())  # a pod is removed after its end was read, perhaps after the Job has failed
    cluster.api.ask("PATCH", "/api/v1/namespaces/default", {"metadata": {"labels": {next(iter(label)): None}}})
    until(lambda: "Complete" in cluster.conditions())


# Processes.


def test_nothing_of_the_hosts_environment_reaches_a_pod_but_its_path(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    env = [
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "HELLO", "value": "$(POD)-$$(POD)-$(UNKNOWN)"},
        {"name": "HOME", "value": "/cache/home"},
    ]
    absent = {"name": "ABSENT", "valueFrom": {"secretKeyRef": {"name": "none", "key": "none", "optional": True}}}
    mount = {"env": [*env, absent], "command": ["env"], "volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}
    cluster.run("", num=1, pod={"container": mount, "volumes": [{"name": "cache", "emptyDir": {}}]})
    until(lambda: "Complete" in cluster.conditions())
    pod = cluster.pods()[0]
    said = dict(line.split("=", 1) for line in cluster.log(pod).splitlines())
    name = pod["metadata"]["name"]
    assert said.keys() == {
        "PATH",
        "PRISM_TERMINATION_LOG",
        "RIG_POD_UID",
        "JOB_COMPLETION_INDEX",
        *(v["name"] for v in env),
    }
    assert (said["POD"], said["HELLO"], said["NODE"]) == (name, f"{name}-$(POD)-$(UNKNOWN)", "node-a")
    assert said["HOME"] == str(cluster.folder / "pods" / pod["metadata"]["uid"] / "volumes/cache/home")
    assert said["JOB_COMPLETION_INDEX"] == "0"


def test_no_process_outlives_the_kubelet_not_even_in_a_group_of_its_own(tmp_path: Path) -> None:
    spawn = f"child = subprocess.Popen([sys.executable, '-c', {DEAF!r}], start_new_session=True)"
    script = f"import subprocess, sys; {spawn}; print(child.pid, flush=True)\n{DEAF}"
    with ApiServer(log_folder=tmp_path / "logs") as server:
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        kubelet = Kubelet(kubeconfig, tmp_path / "pods", log_folder=tmp_path / "logs")
        with JobController(kubeconfig), kubelet:
            cluster = Cluster(server, kubelet, Api(kubeconfig, "test"), tmp_path)
            cluster.run(script, num=1)
            pod = cluster.running(1)[0]
            until(lambda: cluster.log(pod).count("deaf") == 2)
            child = int(next(line for line in cluster.log(pod).splitlines() if line.isdigit()))
            pids = [child, kubelet.pid("default", pod["metadata"]["name"]) or 0]
            assert all(map(is_alive, pids))
        until(lambda: not any(map(is_alive, pids)))  # a signal takes effect a moment after it is sent
        # A kubelet that starts anew says that they are lost.
        with JobController(kubeconfig), Kubelet(kubeconfig, tmp_path / "pods", log_folder=tmp_path / "logs"):
            until(lambda: "Failed" in cluster.conditions())
