"""Logs of a whole run after its pods: real workers keep them in the bucket, and `prism logs` finds them there."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.cluster.commands import ROOT, environment, prism
from tests.cluster.records import create, end_of, pods
from tests.cluster.rig import BUCKET, Rig, eventually


def delete_pods(rig: Rig, name: str, *stages: str) -> None:
    for stage in stages:
        for pod in pods(rig, name, stage):
            rig.server.delete("pods", pod["metadata"]["name"])
        eventually(lambda stage=stage: not pods(rig, name, stage))


def test_logs_are_the_same_after_half_and_after_all_pods_are_deleted_and_after_the_run_is(cluster: Rig) -> None:
    document = cluster.document("kept", groups=2)
    create(cluster, document)
    with cluster.operator():
        said = end_of(cluster, "kept")
    assert said["phase"] == "Complete", said
    before = prism(cluster, "logs", "kept")
    assert before.returncode == 0, before.stderr
    assert before.stderr == ""
    lines = sorted(before.stdout.splitlines())
    prefixes = {line.split()[0] for line in lines}
    assert prefixes == {"plan", "extract-0", "extract-1", "reduce"}

    delete_pods(cluster, "kept", "plan", "reduce")
    half = prism(cluster, "logs", "kept")
    assert sorted(half.stdout.splitlines()) == lines
    assert half.stderr.startswith(f"gone: plan, reduce; their logs come from {cluster.place}/selections/kept/logs/")
    assert len(half.stderr.splitlines()) == 1
    order = [line.split()[0] for line in half.stdout.splitlines()]
    assert list(dict.fromkeys(order)) == ["extract-0", "extract-1", "plan", "reduce"]
    refused = without_credentials(cluster, "logs", "kept")
    assert refused.returncode == 0
    assert sorted(refused.stdout.splitlines()) == [line for line in lines if line.startswith("extract")]
    assert "kept logs cannot be read: no S3 credentials" in refused.stderr

    delete_pods(cluster, "kept", "extract")
    for arguments in (["logs", "kept"], ["logs", "kept", "-f"]):
        found = prism(cluster, *arguments)
        assert (found.returncode, sorted(found.stdout.splitlines())) == (0, lines), found.stderr
    last = prism(cluster, "logs", "kept", "--stage", "extract", "--group", "1", "--tail", "1")
    assert last.stdout.startswith('extract-1 {"event": "done"')
    assert len(last.stdout.splitlines()) == 1

    refused = without_credentials(cluster, "logs", "kept")
    assert refused.returncode == 1
    assert "kept logs cannot be read: no S3 credentials" in refused.stderr
    assert f"({cluster.place}/selections/kept/logs/" in refused.stderr
    assert "set AWS_ACCESS_KEY_ID" in refused.stderr

    cluster.server.delete("selectionruns", "kept", "default")
    eventually(lambda: cluster.server.object("selectionruns", "kept") is None)
    assert prism(cluster, "logs", "kept").returncode == 102
    gone = prism(cluster, "logs", "kept", "--kept", document["spec"]["output"])
    assert (gone.returncode, sorted(gone.stdout.splitlines())) == (0, lines), gone.stderr
    assert prism(cluster, "logs", "never", "--kept", document["spec"]["output"]).returncode == 102


def without_credentials(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in environment(rig, rig.as_user()).items() if not key.startswith("AWS_")}
    env |= {"AWS_ENDPOINT_URL": rig.environment["AWS_ENDPOINT_URL"], "AWS_EC2_METADATA_DISABLED": "true"}
    env |= {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)


def test_each_node_of_a_world_and_a_failed_stage_keep_their_logs_and_nothing_stumbles_over_them(cluster: Rig) -> None:
    document = cluster.document("nodes", nodesPerGroup=2)
    wrong = cluster.document("wrong")
    wrong["spec"]["model"]["uri"] = "/nowhere"
    create(cluster, document)
    create(cluster, wrong)
    with cluster.operator():
        assert end_of(cluster, "nodes")["phase"] == "Complete"
        assert "exit code 64: no such model (/nowhere)" in end_of(cluster, "wrong")["message"]
    delete_pods(cluster, "nodes", "plan", "extract", "reduce")
    delete_pods(cluster, "wrong", "plan")
    found = prism(cluster, "logs", "nodes")
    assert {line.split()[0] for line in found.stdout.splitlines()} == {"plan", "extract-0/0", "extract-0/1", "reduce"}
    assert "no such model" in prism(cluster, "logs", "wrong").stdout

    store, output = document["spec"]["store"], document["spec"]["output"]
    pruned = prism(cluster, "store", "prune", store, "--keep", output, "--older-than", "0", "--yes")
    assert pruned.returncode == 0, pruned.stderr
    kept = cluster.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{output.removeprefix(f's3://{BUCKET}/')}/nodes/logs/")
    assert kept["KeyCount"] == 4
