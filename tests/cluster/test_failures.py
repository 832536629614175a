"""Runs on a whole cluster while something fails: pods, nodes, operators, the API server. Most workers are stand-ins; see
test_runs.py for what they do.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator

from launcher.resource.names import LEASE
from tests.cluster.commands import ask, deployed, kubectl, need_real, prism, running
from tests.cluster.kubelet.mirror import Refused
from tests.cluster.records import create, end_of, jobs, phase, pods, running_pod, status
from tests.cluster.rig import Rig, eventually

NO_LEASE = {"spec": {"holderIdentity": ""}}


def test_kills_evictions_and_memory_cost_attempts_and_the_run_completes(cluster: Rig) -> None:
    create(cluster, cluster.standin_document("hurt", 1, maxRestarts=5))
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
    document = cluster.standin_document("halved", 1, groups=2, maxRestarts=0)
    create(cluster, document)
    with cluster.operator():
        eventually(lambda: "halved-extract-1-0-0" in jobs(cluster, "halved"))

        def second() -> str:
            found = [pod["metadata"] for pod in pods(cluster, "halved", "extract")]
            names = [it["name"] for it in found if it["labels"]["prism.dev/group"] == "1"]
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


@contextlib.contextmanager
def two_operators(rig: Rig) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str], int]]:
    """Two replicas as processes: the leader, the one that waits, and its port."""
    with running(rig, "operator", "--port", "0") as first:
        eventually(lambda: (rig.server.object("leases", LEASE, "prism-system") or NO_LEASE)["spec"]["holderIdentity"])
        with running(rig, "operator", "--port", "0") as second:
            assert second.stderr is not None
            yield first, second, json.loads(second.stderr.readline())["port"]
            second.terminate()
            assert second.wait(timeout=30) == 0


def test_an_operator_that_is_killed_is_followed_by_the_one_that_waits(cluster: Rig) -> None:
    with two_operators(cluster) as (first, _, port):
        create(cluster, cluster.standin_document("handed-on", 1))
        running_pod(cluster, "handed-on", "plan")
        first.kill()
        said = end_of(cluster, "handed-on")
        assert said["phase"] == "Complete", said
        assert ask(port, "healthz") == ask(port, "readyz") == "ok\n"
        metrics = ask(port, "metrics")
        assert 'prism_runs{phase="Complete"}' in metrics
        assert "prism_reconcile_seconds_count" in metrics
    lease = cluster.server.object("leases", LEASE, "prism-system")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == ""


def test_an_operator_that_is_frozen_is_followed_and_leaves_when_it_wakes(cluster: Rig) -> None:
    with two_operators(cluster) as (first, _, _):
        create(cluster, cluster.standin_document("thawed", 1))
        running_pod(cluster, "thawed", "plan")
        first.send_signal(signal.SIGSTOP)
        said = end_of(cluster, "thawed")
        assert said["phase"] == "Complete", said
        assert said["restarts"] == 0
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=30)
        assert first.returncode == 1
        assert "lease lost" in err


def test_an_outage_of_the_api_server_ends_no_run_and_none_of_the_commands_that_wait(cluster: Rig) -> None:
    assert prism(cluster, "submit", str(cluster.write(cluster.standin_document("outlived", 2)))).returncode == 0
    with (
        deployed(cluster, "operator", "--port", "0"),
        running(cluster, "wait", "outlived") as waiting,
        running(cluster, "watch", "outlived") as watching,
        running(cluster, "logs", "--follow", "outlived") as following,
    ):
        running_pod(cluster, "outlived", "plan")
        with cluster.server.outage():
            time.sleep(3)
        said = end_of(cluster, "outlived")
        assert said["phase"] == "Complete", said
        assert said["restarts"] == 0
        for process in (waiting, watching, following):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, (process.args, err)


def test_a_submit_that_waits_outlives_an_outage_and_is_continued_by_the_next_when_it_is_killed(bare: Rig) -> None:
    document = str(bare.write(bare.standin_document("continued", 2)))
    with running(bare, "submit", "--wait", document) as submitting:
        running_pod(bare, "continued", "plan")
        with bare.server.outage():
            time.sleep(3)
        running_pod(bare, "continued", "extract")
        assert submitting.poll() is None
    done = prism(bare, "submit", "--wait", document)
    assert done.returncode == 0, done.stderr
    assert "attached" in done.stderr
    assert jobs(bare, "continued") == ["continued-extract-0-0-0", "continued-plan-0-0", "continued-reduce-0-0"]


def test_a_run_waits_while_a_quota_leaves_no_job_or_no_pod_and_says_so(cluster: Rig) -> None:
    with quota(cluster, "no-jobs", "count/jobs.batch"), cluster.operator():
        create(cluster, cluster.standin_document("crowded-out"))
        eventually(lambda: "exceeded quota: no-jobs" in status(cluster, "crowded-out").get("message", ""))
        with quota(cluster, "no-pods", "pods"):
            cluster.server.delete("resourcequotas", "no-jobs")
            eventually(lambda: "exceeded quota: no-pods" in status(cluster, "crowded-out").get("message", ""))
            assert phase(cluster, "crowded-out") == "Planning"
        said = end_of(cluster, "crowded-out")
    assert said["phase"] == "Complete", said


@contextlib.contextmanager
def quota(rig: Rig, name: str, resource: str) -> Iterator[None]:
    """Nothing of a resource may be made in the namespace of the runs."""
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name, "namespace": "default"}}
    rig.server.create({**body, "spec": {"hard": {resource: "0"}}})
    try:
        # A controller must have counted first.
        eventually(lambda: "used" in (rig.server.object("resourcequotas", name) or {}).get("status", {}))
        yield
    finally:
        if rig.server.object("resourcequotas", name):
            rig.server.delete("resourcequotas", name)


def test_a_node_that_freezes_costs_a_preemption_and_its_pod_ends_when_it_returns(cluster: Rig) -> None:
    need_real(cluster, "no controller that notices lost nodes")
    create(cluster, cluster.document("frozen", podOverlay={"spec": {"terminationGracePeriodSeconds": 3}}))
    with cluster.operator():
        name = running_pod(cluster, "frozen", "plan")
        pod = cluster.server.object("pods", name)
        assert pod is not None
        node = pod["spec"]["nodeName"]
        cluster.kubelet.lose_node(node, freeze=True)
        try:
            said = end_of(cluster, "frozen", 150)
        finally:
            cluster.kubelet.return_node(node)
        assert said["phase"] == "Complete", said
        counted = {one["stage"]: (one["restarts"], one["preemptions"]) for one in said["stages"]}
        assert counted["plan"] == (0, 1)
        eventually(lambda: name not in [one["metadata"]["name"] for one in pods(cluster, "frozen", "plan")])
    kubectl(cluster, "wait", "--for=condition=Ready", f"node/{node}", "--timeout=30s")


def test_a_pod_of_higher_priority_preempts_a_runs_and_costs_no_restart(cluster: Rig) -> None:
    need_real(cluster, "no preemption in its scheduler")
    urgent = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}}
    cluster.server.create({**urgent, "value": 1000})
    create(cluster, cluster.document("pushed-aside", cpu="10"))
    with cluster.operator():
        name = running_pod(cluster, "pushed-aside", "plan")
        pod = cluster.server.object("pods", name)
        assert pod is not None
        command = ["python", "-c", "import time; time.sleep(600)"]
        container = {"name": "sleep", "image": "python:3", "command": command, "resources": {"requests": {"cpu": "60"}}}
        spec = {
            "priorityClassName": "urgent",
            "nodeSelector": {"kubernetes.io/hostname": pod["spec"]["nodeName"]},
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
        }
        metadata = {"name": "urgent", "namespace": "default"}
        cluster.server.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        try:
            eventually(lambda: cluster.kubelet.pid("default", "urgent"))
            said = end_of(cluster, "pushed-aside")
        finally:
            cluster.server.delete("pods", "urgent")
    assert said["phase"] == "Complete", said
    counted = {one["stage"]: (one["restarts"], one["preemptions"]) for one in said["stages"]}
    assert counted["plan"] == (0, 1)


def test_a_run_whose_jobs_a_policy_denies_says_so_and_fails_after_its_startup_timeout(cluster: Rig) -> None:
    need_real(cluster, "no admission policies")
    jobs_made = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    labels = "object.metadata.labels"
    other = f"!has({labels}) || !('prism.dev/run' in {labels}) || {labels}['prism.dev/run'] != 'denied'"
    validations = [{"expression": other, "message": "runs need a cost centre here"}]
    policy = {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": [jobs_made]}, "validations": validations}
    binding = {"policyName": "no-such-run", "validationActions": ["Deny"]}
    for kind, spec in (("ValidatingAdmissionPolicy", policy), ("ValidatingAdmissionPolicyBinding", binding)):
        body = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": "no-such-run"}}
        cluster.server.create({**body, "spec": spec})
    document = cluster.write(cluster.document("denied", startupTimeoutSeconds=10))
    eventually(lambda: _is_denied(cluster))
    with cluster.operator():
        assert prism(cluster, "submit", str(document)).returncode == 0
        eventually(lambda: "runs need a cost centre here" in status(cluster, "denied").get("message", ""))
        said = end_of(cluster, "denied", 60)
    assert said["phase"] == "Failed", said
    assert "runs need a cost centre here" in said["message"]


def _is_denied(rig: Rig) -> bool:
    """Whether the API server has compiled the policy: it takes a second or two."""
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "x"}]}}
    metadata = {"name": "try", "namespace": "default", "labels": {"prism.dev/run": "denied"}}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
    try:
        rig.server.create({**body, "spec": {"suspend": True, "template": template}})
    except Refused as refusal:
        return "cost centre" in refusal.message
    rig.server.delete("jobs", "try")
    return False
