"""Runs on a whole cluster of this machine: API server, Job controller, kubelet whose pods are real workers, S3.

What is decided is tested in test_decide.py; here, that it holds when everything is real but the cluster itself. Where
KUBEBUILDER_ASSETS names the binaries of a control plane, the same tests run against that one too.
"""

from __future__ import annotations

import json
import re
import time

import yaml

from tests.cluster.commands import ROOT, kubectl, prism, running, shell
from tests.cluster.real import RealServer
from tests.cluster.records import create, end_of, jobs, phase, pods, running_pod, status
from tests.cluster.rig import BUCKET, Rig, eventually


def locally(rig: Rig, name: str) -> bytes:
    """selected.parquet of the same run by `prism run`, with a store and an output of its own."""
    document = rig.document(name)
    document["spec"] |= {"store": f"{rig.place}/local/store", "output": f"{rig.place}/local/selections"}
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
    assert {"applied", "Complete", "4/4"} <= set(listed)
    assert {"1/2", "2/2"} & set(listed)  # a group that is done has seen to every unit; the other may be late
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


def test_the_commands_of_the_readme_work_as_they_stand(cluster: Rig) -> None:
    """With a small document in the place of the demo's. The fake control plane has no Deployments, so there the first line is
    what the rig did."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## On a cluster")[1]
    install, *commands, demo = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0].splitlines()
    assert (install.split("#")[0].strip(), demo.split("#")[0].strip()) == ("kubectl apply -k k8s/", "make cluster-demo")
    if cluster.is_real:
        kubectl(cluster, "apply", "-k", str(ROOT / "k8s"))
    document = cluster.folder / "examples/sums/cluster.yaml"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(yaml.safe_dump(cluster.document("sums")))
    with cluster.operator():
        said = shell(cluster, "\n".join(commands), kubeconfig=cluster.as_driver())
    assert "selectionrun.prism.dev/sums condition met" in said
    assert status(cluster, "sums")["manifest"] in said.splitlines(), "what submit --wait prints"
    assert "default/sums: Complete" in said.split(status(cluster, "sums")["manifest"])[1], "what watch prints"


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
    if isinstance(bare.server, RealServer):
        assert bare.server.forbidden() == []  # the fake keeps no audit log


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
    document = bare.standin_document("taken")
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

    document = str(bare.write(bare.standin_document("cancelled")))
    bare.let_hang("cancelled", "plan")
    with running(bare, "submit", "--wait", document) as submitting:
        running_pod(bare, "cancelled", "plan")
        assert prism(bare, "cancel", "cancelled").returncode == 0
        assert submitting.wait(timeout=60) == 103
    eventually(lambda: not pods(bare, "cancelled", "plan"))
    assert prism(bare, "retry", "cancelled", "--wait").returncode == 0

    bare.let_hang("deleted", "plan")
    with running(bare, "submit", "--wait", str(bare.write(bare.standin_document("deleted")))) as submitting:
        running_pod(bare, "deleted", "plan")
        bare.server.delete("configmaps", "deleted-prism-record", "default")
        assert submitting.wait(timeout=60) == 102
    eventually(lambda: not jobs(bare, "deleted"))
    assert prism(bare, "wait", "deleted").returncode == 102

    slow = prism(bare, "submit", "--wait", "--timeout", "0.5", str(bare.write(bare.standin_document("slow", 1))))
    assert slow.returncode == 101
    assert prism(bare, "submit", "--wait", str(bare.write(bare.standin_document("slow", 1)))).returncode == 0


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


def test_a_job_that_a_queue_holds_back_is_queued_and_runs_once_let_go(cluster: Rig) -> None:
    """Kueue suspends each Job at its creation; here a script does."""
    create(cluster, cluster.standin_document("queued", queueName="team-a", startupTimeoutSeconds=10))
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
    create(cluster, cluster.standin_document("paused"))
    cluster.let_hang("paused", "plan")
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
    document = cluster.standin_document("gone")
    cluster.let_hang("gone", "plan")
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


def test_the_record_and_all_its_children_go_when_their_time_is_over(cluster: Rig) -> None:
    document = cluster.standin_document("short-lived")
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
