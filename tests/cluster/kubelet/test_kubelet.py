"""The test cluster's Job controller and kubelet behave as a real cluster was observed to: its laws, and its surprises."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kubelet.job_controller import JobController
from tests.cluster.kubelet.job_rules import decide, job_to_pod
from tests.cluster.kubelet.kubelet import Kubelet
from tests.cluster.kubelet.mirror import TRIES, Api
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.faults import Request

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


def until(holds: Callable[[], Any], seconds: float = 15.0) -> Any:
    """What it returned once that was true."""
    end = time.monotonic() + seconds
    while not (seen := holds()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.03)
    return seen


def terminated(pod: Thing) -> Thing:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def is_finished(job: Thing) -> bool:
    return any(c["type"] in ("Complete", "Failed") for c in job.get("status", {}).get("conditions", []))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    nodes = {
        "node-a": {"nvidia.com/gpu": "8", "cpu": "64", "memory": "512Gi"},
        "node-b": {"nvidia.com/gpu": "8", "cpu": "64", "memory": "512Gi"},
    }
    with ApiServer(log_folder=tmp_path / "logs") as server:
        kubeconfig = tmp_path / "kubeconfig"
        server.kubeconfig(kubeconfig, namespace="default")
        kubelet = Kubelet(kubeconfig, tmp_path / "pods", nodes=nodes, log_folder=tmp_path / "logs", pod_gc_seconds=0.3)
        with JobController(kubeconfig), kubelet:
            yield Cluster(server, kubelet, Api(kubeconfig, "test"), tmp_path)


# A Job that goes well.


def test_a_job_makes_a_pod_an_index_and_completes_when_all_have(cluster: Cluster) -> None:
    cluster.run(
        "print('rank', os.environ['JOB_COMPLETION_INDEX']); open(os.environ['PRISM_TERMINATION_LOG'], 'w').write('{}')"
    )
    until(lambda: "Complete" in cluster.conditions())
    status = cluster.job()["status"]
    assert cluster.conditions() == ["SuccessCriteriaMet", "Complete"]
    assert cluster.reason("Complete")[0] == "CompletionsReached"
    assert (status["succeeded"], status["completedIndexes"], status.get("active", 0)) == (2, "0-1", 0)
    assert status["startTime"] <= status["completionTime"]
    for index, pod in cluster.pods().items():
        metadata = pod["metadata"]
        assert metadata["name"].startswith(f"gang-{index}-")
        assert metadata["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
        assert metadata["labels"]["batch.kubernetes.io/controller-uid"] == cluster.job()["metadata"]["uid"]
        assert pod["spec"]["hostname"] == f"gang-{index}"
        assert not metadata.get("finalizers")
        assert pod["status"]["phase"] == "Succeeded"
        ended = terminated(pod)
        assert (ended["exitCode"], ended["reason"], ended["message"]) == (0, "Completed", "{}")
        assert cluster.log(pod) == f"rank {index}\n"


# How a Job fails.


def test_an_exit_code_with_a_rule_fails_the_job_and_is_named(cluster: Cluster) -> None:
    cluster.run([SLEEP, "sys = __import__('sys'); print('no such key'); sys.exit(65)"])
    until(lambda: "Failed" in cluster.conditions())
    reason, message = cluster.reason("Failed")
    name = cluster.pods()[1]["metadata"]["name"]
    said = f"Container worker for pod default/{name} failed with exit code 65 matching FailJob rule at index 1"
    assert (reason, message) == ("PodFailurePolicy", said) == cluster.reason("FailureTarget")
    assert cluster.conditions() == ["FailureTarget", "Failed"]


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
    assert not cluster.pods()


def test_an_eviction_matches_the_first_rule_and_leaves_no_pod(cluster: Cluster) -> None:
    cluster.run(SLEEP)
    name = cluster.running()[1]["metadata"]["name"]
    cluster.kubelet.evict("default", name)
    until(lambda: "Failed" in cluster.conditions())
    said = f"Pod default/{name} has condition DisruptionTarget matching FailJob rule at index 0"
    assert cluster.reason("Failed") == ("PodFailurePolicy", said)
    assert not cluster.pods()


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


def test_a_suspended_job_has_no_pods_and_starts_anew_when_it_resumes(cluster: Cluster) -> None:
    cluster.run("import time; time.sleep(1.5)", suspend=True)
    until(lambda: "Suspended" in cluster.conditions())
    assert not cluster.pods()
    assert "startTime" not in cluster.job()["status"]
    path = "/apis/batch/v1/namespaces/default/jobs/gang"
    cluster.api.ask("PATCH", path, {"spec": {"suspend": False}})
    first = {pod["metadata"]["uid"] for pod in cluster.running().values()}
    assert "Suspended" not in cluster.conditions()
    started = cluster.job()["status"]["startTime"]
    cluster.api.ask("PATCH", path, {"spec": {"suspend": True}})
    until(lambda: "Suspended" in cluster.conditions() and not cluster.pods())
    assert cluster.job()["status"]["startTime"] == started  # set anew when it resumes, not cleared before
    assert "failed" not in cluster.job()["status"]  # pods taken away count for nothing
    time.sleep(1)  # times have whole seconds
    cluster.api.ask("PATCH", path, {"spec": {"suspend": False}})
    until(lambda: "Complete" in cluster.conditions())
    assert cluster.job()["status"]["startTime"] > started
    assert not first & {pod["metadata"]["uid"] for pod in cluster.pods().values()}


def test_a_pod_without_room_says_why_and_is_placed_when_room_comes(cluster: Cluster) -> None:
    take = {"resources": {"limits": {"nvidia.com/gpu": "5"}, "requests": {"nvidia.com/gpu": "5"}}}
    cluster.run(SLEEP, pod={"container": take})
    cluster.running()
    cluster.run("pass", "second", num=1, pod={"container": take})

    def held() -> Thing | None:
        conditions = [c for pod in cluster.pods("second").values() for c in pod["status"].get("conditions", [])]
        return next((c for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"), None)

    condition = until(held)
    said = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    assert (condition["reason"], condition["message"]) == ("Unschedulable", said)
    assert until(lambda: cluster.events("FailedScheduling")) == [said]
    cluster.kubelet.kill("default", cluster.pods()[0]["metadata"]["name"])
    until(lambda: "Complete" in cluster.conditions("second"))


def test_a_job_whose_pods_are_refused_hangs_with_events_and_no_condition(cluster: Cluster) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.ask("PATCH", "/api/v1/namespaces/default", {"metadata": {"labels": label}})
    cluster.run("pass")
    said = until(lambda: cluster.events("FailedCreate"))
    assert said[0].startswith("Error creating: pods ")
    assert "violates PodSecurity" in said[0]
    assert cluster.conditions() == []
    assert not cluster.pods()
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
    mount = {"env": env, "command": ["env"], "volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}
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


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"container": {"envFrom": [{"configMapRef": {"name": "run"}}]}}, "envFrom"),
        ({"container": {"command": ["no-such-thing"]}}, "no-such-thing"),
    ],
)
def test_what_these_nodes_cannot_do_fails_loudly(cluster: Cluster, asked: Thing, said: str) -> None:
    cluster.run("pass", num=1, pod=copy.deepcopy(asked))
    until(lambda: "Failed" in cluster.conditions())
    assert said in cluster.pods()[0]["status"]["message"]


def test_no_process_outlives_the_kubelet_not_even_in_a_group_of_its_own(tmp_path: Path) -> None:
    spawn = f"child = subprocess.Popen([sys.executable, '-c', {DEAF!r}], start_new_session=True)"
    script = f"import subprocess, sys; {spawn}; print(child.pid, flush=True)\n{DEAF}"
    with ApiServer(log_folder=tmp_path / "logs") as server:
        kubeconfig = tmp_path / "kubeconfig"
        server.kubeconfig(kubeconfig, namespace="default")
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


# Transient errors of the API server


def test_despite_transient_errors_each_job_ends_as_it_should_and_counts_each_pod_once(cluster: Cluster) -> None:
    kinds = ("429", "500", "409", "410", "reset_before", "reset_after", "drop_watch", "gone_watch")
    cluster.server.faults.rain(dict.fromkeys(kinds, 0.04), seed=1)
    for number in range(4):
        cluster.server.create(gang("pass", f"good-{number}"))
        cluster.server.create(gang(["pass", "import time; time.sleep(0.3); exit(64)"], f"bad-{number}"))
    until(lambda: all(is_finished(job) for job in cluster.server.objects("jobs", "default")), 40)
    cluster.server.faults.clear()
    for job in cluster.server.objects("jobs", "default"):
        status, good = job["status"], job["metadata"]["name"].startswith("good")
        types = [c["type"] for c in status["conditions"]]
        assert types == (["SuccessCriteriaMet", "Complete"] if good else ["FailureTarget", "Failed"])
        # Where the news of a good end comes after that of a bad one, the good pod is a survivor, and counts as failed.
        assert status.get("succeeded", 0) + status.get("failed", 0) == 2
        assert ("failed" in status) is not good
    until(lambda: not any(pod["metadata"].get("finalizers") for pod in cluster.server.objects("pods", "default")))


def test_a_pod_counted_in_a_write_whose_answer_is_lost_is_not_counted_again(cluster: Cluster) -> None:
    def counts_pods(request: Request) -> bool:
        return request.plural == "jobs/status" and "failed" in request.body["status"]

    def asks_of_the_job(request: Request) -> bool:
        written = cluster.server.faults.counts["reset_after"] > 0
        return written and request.user_agent == "rig/job-controller" and request.name == "gang"

    # All further tries of the write, and all of the look whether it was done.
    cluster.server.faults.script([(counts_pods, "reset_after"), *[(asks_of_the_job, "500")] * (2 * TRIES - 1)])
    cluster.run("exit(3)")
    until(lambda: "Failed" in cluster.conditions())
    assert not cluster.server.faults.pending
    assert cluster.job()["status"]["failed"] == 2


# What is pure.


def failed_pod(job: Thing, index: int, code: int, *conditions: str) -> Thing:
    pod = job_to_pod(job, index)
    state = {"terminated": {"exitCode": code, "reason": "Error", "finishedAt": "2026-01-01T00:00:00Z"}}
    status = {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": state}]}
    pod["status"] = {**status, "conditions": [{"type": kind, "status": "True"} for kind in conditions]}
    pod["metadata"] |= {"uid": f"uid-{index}", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return pod


@pytest.mark.parametrize("order", [1, -1])
def test_of_pods_that_fail_in_one_sync_a_rule_wins_over_none_in_either_order(order: int) -> None:
    job = gang("pass")
    job["metadata"]["uid"] = "uid"
    pods = [failed_pod(job, 0, 1), failed_pod(job, 1, 65)][::order]
    decision = decide(job, pods, set(), 0.0)
    assert decision.status["conditions"][0]["reason"] == "PodFailurePolicy"
    assert "exit code 65" in decision.status["conditions"][0]["message"]
