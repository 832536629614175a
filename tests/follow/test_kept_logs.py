"""Laws of `prism logs` for pods that are gone: which of a run's pods are missing, and where their kept lines stand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.follow.kept_log import KeptLog, gone_pods
from launcher.follow.merged_logs import log_lines, prefix_of
from launcher.kube.cluster import Cluster
from launcher.render.attempt import Attempt
from launcher.render.job import job
from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL, STAGE_LABEL
from launcher.resource.record import Record
from tests.follow.log_server import LogServer, pod_of, put
from tests.render.documents import OWNER, run_of
from tests.run_document import run_document


def record(*stages: dict[str, Any], nodes: int = 1) -> Record:
    document = run_document("demo", nodesPerGroup=nodes)
    metadata = {"name": "demo", "namespace": "default", "uid": "u-1"}
    return Record({**document, "metadata": metadata, "status": {"phase": "Reducing", "stages": list(stages)}})


def entry(stage: str, state: str, **fields: Any) -> dict[str, Any]:
    return {"stage": stage, "state": state, "started": True, **fields}


ENDED = entry("plan", "Succeeded")
RESTARTED = entry("extract", "Running", group=1, attempt=2)


@pytest.mark.parametrize(
    ("stages", "there", "gone"),
    [
        ([ENDED], {"plan"}, []),
        ([ENDED], set(), ["plan"]),
        ([entry("plan", "Running")], set(), []),  # its pod may not be there yet
        ([entry("plan", "Stopped", started=False)], set(), []),
        ([ENDED, RESTARTED], {"extract-1.2"}, ["plan", "extract-1", "extract-1.1"]),
        ([ENDED, RESTARTED], {"extract-1.2", "extract-1.1", "plan"}, ["extract-1"]),
        ([entry("reduce", "Failed", attempt=1)], {"reduce"}, ["reduce.1"]),
    ],
)
def test_a_pod_that_the_status_knows_and_the_cluster_does_not_is_gone(
    stages: list[dict[str, Any]], there: set[str], gone: list[str]
) -> None:
    assert gone_pods(record(*stages), there) == gone


def test_only_the_nodes_stage_and_group_asked_for_are_gone() -> None:
    found = record(ENDED, entry("extract", "Succeeded"), entry("extract", "Succeeded", group=1), nodes=2)
    assert gone_pods(found, {"extract-1/0"}, "extract", 1) == ["extract-1/1"]
    assert gone_pods(found, set(), "plan") == ["plan"]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("stage", ["plan", "extract", "reduce"])
def test_the_key_that_a_pod_gets_has_the_prefix_that_it_is_shown_with(stage: str, number: int, nodes: int) -> None:
    """So a log is found, and shown, as if its pod were there."""
    run = run_of(nodesPerGroup=nodes)
    template = job(Attempt(run, stage, 1 if stage == "extract" else 0, 4, number, owner=OWNER))["spec"]["template"]
    variables = {one["name"]: one.get("value") for one in template["spec"]["containers"][0]["env"]}
    key = str(variables["PRISM_LOG"]).replace("$(PRISM_NODE)", "1").replace("$(PRISM_POD)", "pod-x")
    template["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = "1"
    round_key, _, rest = key.partition("/4/")
    assert round_key == "u-1"
    assert rest == f"{prefix_of(template)}/pod-x.log"
    log = KeptLog.of({"key": rest, "path": os.devnull, "modified": 0}, 4)
    assert log is not None
    labels = template["metadata"]["labels"]
    assert (labels[STAGE_LABEL], labels[GROUP_LABEL]) == (log.stage, str(log.group))
    assert (labels[ROUND_LABEL], labels[ATTEMPT_LABEL]) == (str(log.order[0]), str(log.order[2]))


def test_a_dry_run_names_no_log() -> None:
    template = job(Attempt(run_of(), "plan"))["spec"]["template"]
    assert "PRISM_LOG" not in {one["name"] for one in template["spec"]["containers"][0]["env"]}


def kept(folder: Path, key: str, content: bytes, tail: int | None = None) -> KeptLog:
    path = folder / key.replace("/", "_")
    path.write_bytes(content)
    log = KeptLog.of({"key": key, "path": str(path), "modified": 0}, 0, tail)
    assert log is not None
    return log


def test_kept_logs_stand_where_their_pods_stood(server: LogServer, tmp_path: Path) -> None:
    put(server, pod_of("reduce"), "terminated", "r")
    put(server, pod_of("extract", attempt=1), "terminated", "second")
    gone = [
        kept(tmp_path, "extract-0/a.log", b"first\n"),
        kept(tmp_path, "extract-0.2/b.log", b"third, \xff, without an end"),
        kept(tmp_path, "plan/c.log", b"p1\np2\n"),
    ]
    found = list(log_lines(Cluster(), "default", "demo", follow=False, kept=gone))
    assert found == [
        ("plan", "p1"),
        ("plan", "p2"),
        ("extract-0", "first"),
        ("extract-0.1", "second"),
        ("extract-0.2", "third, \ufffd, without an end"),
        ("reduce", "r"),
    ]


def test_kept_logs_come_before_those_that_are_followed(server: LogServer, tmp_path: Path) -> None:
    put(server, pod_of("reduce"), "terminated", "r")
    gone = [kept(tmp_path, "plan/a.log", b"p1\np2\n", tail=1)]
    lines = log_lines(Cluster(), "default", "demo", follow=True, is_over=lambda: True, kept=gone)
    assert list(lines) == [("plan", "p2"), ("reduce", "r")]


@pytest.mark.parametrize("key", ["plan.log", "../x/y.log", "other/pod.log", "plan/\x1b/pod.log"])
def test_an_object_that_is_no_pods_log_is_ignored(key: str) -> None:
    assert KeptLog.of({"key": key, "path": os.devnull, "modified": 0}, 0) is None
