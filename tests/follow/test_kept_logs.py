"""Laws of `prism logs` for pods that are gone: which of a run's pods are missing, and where their kept lines stand."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import main
from launcher.follow.logs.gone_pods import gone_pods
from launcher.follow.logs.merged_logs import log_lines, prefix_of
from launcher.kube.cluster import Cluster
from launcher.local.stages import stream_verb
from launcher.render.attempt import Attempt
from launcher.render.job import job
from launcher.resource.crd import crd
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


@pytest.mark.usefixtures("job_packages")
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("stage", ["plan", "extract", "reduce"])
def test_the_key_that_a_pod_gets_has_the_prefix_that_it_is_shown_with(
    tmp_path: Path, stage: str, number: int, nodes: int
) -> None:
    """So a log is found, and shown, as if its pod were there."""
    from prism_job.logs.kept_logs import put_log, read_logs
    from prism_job.storage.folder import LocalFolder

    run = run_of(nodesPerGroup=nodes)
    template = job(Attempt(run, stage, 1 if stage == "extract" else 0, 4, number, owner=OWNER))["spec"]["template"]
    variables = {one["name"]: one.get("value") for one in template["spec"]["containers"][0]["env"]}
    key = str(variables["PRISM_LOG"]).replace("$(PRISM_NODE)", "1").replace("$(PRISM_POD)", "pod-x")
    template["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = "1"
    round_key, _, rest = key.partition("/4/")
    assert round_key == "u-1"
    assert rest == f"{prefix_of(template)}/pod-x.log"
    put_log(str(tmp_path), "demo", key, b"line\n")
    (log,) = read_logs(LocalFolder(str(tmp_path)), "demo", round_key="u-1/4", stage=stage)
    assert log["pod"] == prefix_of(template)


def test_a_dry_run_names_no_log() -> None:
    template = job(Attempt(run_of(), "plan"))["spec"]["template"]
    assert "PRISM_LOG" not in {one["name"] for one in template["spec"]["containers"][0]["env"]}


def test_logs_of_gone_pods_come_after_those_of_pods_that_exist(server: LogServer) -> None:
    put(server, pod_of("reduce"), "terminated", "r")
    put(server, pod_of("extract", attempt=1), "terminated", "second")
    found = list(log_lines(Cluster(), "default", "demo", follow=False, gone=[("plan", "p1"), ("extract-0", "first")]))
    assert found == [("extract-0.1", "second"), ("reduce", "r"), ("plan", "p1"), ("extract-0", "first")]


@pytest.mark.parametrize("follow", [False, True])
def test_no_line_of_a_pod_that_exists_waits_for_the_bucket(server: LogServer, follow: bool) -> None:
    put(server, pod_of("reduce"), "terminated", "r")
    has_seen = threading.Event()

    def gone() -> Iterator[tuple[str, str]]:
        assert has_seen.wait(30)  # a bucket that answers only then
        yield "plan", "p1"

    lines = log_lines(Cluster(), "default", "demo", follow=follow, is_over=lambda: True, gone=gone())
    assert next(lines) == ("reduce", "r")
    has_seen.set()
    assert list(lines) == [("plan", "p1")]


JOB = """
import json, sys
print(json.dumps({"event": "log", "round": "u-1/0", "pod": "plan", "lines": json.loads(sys.argv[1])}), flush=True)
print(json.dumps(json.loads(sys.argv[2])), flush=True)
sys.exit("error" in sys.argv[2])
"""
DONE = {"event": "done"}
REFUSED = {"event": "failed", "error": "access denied", "where": "s3://there", "fix": "ask for it"}


def logs(
    capsys: pytest.CaptureFixture[str], lines: list[str], end: dict[str, Any], *options: str
) -> tuple[int, list[str], str]:
    """`prism logs demo` where the job's verb says this. Its exit code, lines and notes."""
    job = [sys.executable, "-c", JOB, json.dumps(lines), json.dumps(end)]
    with pytest.raises(SystemExit) as ended:
        main(["logs", "demo", *options], job=job)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out.splitlines(), said.err


def put_record(server: LogServer, *stages: dict[str, Any]) -> None:
    server.create(crd())
    run = record(*stages).object
    created = server.create(run)
    server.update({**created, "status": {**run["status"], "phase": "Complete"}}, subresource="status")


STRANGE = "\x1b[31mred\x1b[0m\ttab\u202e\r"


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_a_kept_line_is_printed_as_the_same_line_of_a_pod_that_exists(
    server: LogServer, capsys: pytest.CaptureFixture[str], follow: list[str]
) -> None:
    put_record(server, ENDED, entry("reduce", "Succeeded"))
    put(server, pod_of("reduce"), "terminated", STRANGE)
    code, lines, _ = logs(capsys, [STRANGE], DONE, *follow)
    assert code == 0
    assert sorted(lines) == [f"{stage} \\x1b[31mred\\x1b[0m\ttab\\u202e\\x0d" for stage in ("plan", "reduce")]


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_kept_logs_that_cannot_be_read_are_a_note_and_an_error_only_where_nothing_was_printed(
    server: LogServer, capsys: pytest.CaptureFixture[str], follow: list[str]
) -> None:
    put_record(server, ENDED, entry("reduce", "Succeeded"))
    put(server, pod_of("reduce"), "terminated", "r")
    code, lines, notes = logs(capsys, [], REFUSED, *follow)
    assert (code, lines) == (0, ["reduce r"])
    assert "kept logs cannot be read: access denied (s3://there); ask for it" in notes
    server.delete("pods", "demo-reduce-0-0-0")
    code, lines, notes = logs(capsys, [], REFUSED, *follow)
    assert (code, lines) == (1, [])
    assert "kept logs cannot be read: access denied" in notes


def test_the_verb_waits_for_a_slow_reader_so_that_one_log_is_in_memory(tmp_path: Path) -> None:
    code = """
import json, pathlib, sys
for number in range(9):
    print(json.dumps({"event": "log", "number": number, "text": "x" * 2**20}), flush=True)
    pathlib.Path(sys.argv[2]).write_text(str(number))
"""
    said = tmp_path / "said"
    events = stream_verb("logs", [str(said)], job=[sys.executable, "-c", code])
    assert [next(events)["number"] for _ in range(3)] == [0, 1, 2]
    assert int(said.read_text() or 0) <= 2
    assert [event["number"] for event in itertools.islice(events, 5)] == [3, 4, 5, 6, 7]
    events.close()
