"""Laws of `prism watch`: what its rows say of a status and of the pods' events, and that it ends with the run."""

from __future__ import annotations

import io
import json
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.follow import run_view, watch, watch_screen
from launcher.follow.run_view import Row, RunView, changes, line_of
from launcher.follow.watch import watch_run
from launcher.follow.watch_screen import LiveTable, PlainLines, table_of
from launcher.kube.cluster import Cluster
from launcher.operator.executor import write_status
from launcher.resource.document import parse_for_cluster
from launcher.resource.record import Record, config_map_record
from launcher.resource.status import StageStatus, Status
from tests.cluster.kueue import kueue, suspended_job, workload
from tests.cluster.server.refusals import ApiError
from tests.follow.log_server import LogServer, pod_of, put, turn
from tests.run_document import run_document

DOCUMENT = json.dumps(run_document())


def stage(name: Any, group: int = 0, state: Any = "Running", **more: Any) -> StageStatus:
    return StageStatus(stage=name, group=group, state=state, **more)


def view_of(*stages: StageStatus, **status: Any) -> RunView:
    return RunView(Status(phase="Extracting", stages=stages, **status))


def progress(
    done: int, total: int, rank: int | None = None, *, tokens: int = 0, seconds: float = 2.0, stage: str = "extract"
) -> str:
    event = {"event": "progress", "stage": stage, "done": done, "total": total, "tokens": tokens, "seconds": seconds}
    return json.dumps({**event, **({"rank": rank} if rank is not None else {})})


def shard(unit: str, rows: int) -> str:
    return json.dumps({"event": "shard", "kind": "candidates", "unit": unit, "rows": rows, "bytes": 1})


def row(view: RunView, place: str) -> Row:
    return next(one for one in view.rows() if one.label.strip() == place)


def test_progress_of_ranks_and_nodes_is_summed() -> None:
    view = view_of(stage("plan", state="Succeeded"), stage("extract"))
    view.take_line("extract-0/0", progress(1, 40, 0, tokens=10))
    view.take_line("extract-0/0", progress(6, 40, 0, tokens=60))
    view.take_line("extract-0/0", progress(5, 40, 1, tokens=50, seconds=1.5))
    view.take_line("extract-0/1", progress(9, 40, 2, tokens=90))
    found = row(view, "extract")
    assert (found.done, found.total) == (20, 40)
    assert found.text == "20/40 examples, 10/s, 100 tokens/s, 0:02 left"


def test_groups_share_one_total_and_follow_their_sum() -> None:
    view = view_of(stage("plan", state="Succeeded"), stage("extract"), stage("extract", 1))
    view.take_line("extract-0", progress(10, 40))
    view.take_line("extract-1", progress(20, 40))
    assert [one.label for one in view.rows()] == ["plan", "extract", "  group 0", "  group 1", "reduce"]
    assert (row(view, "extract").done, row(view, "extract").total) == (30, 40)
    assert row(view, "group 1").text.startswith("20 examples, 10/s")


def test_rows_of_an_earlier_attempt_are_subtracted_from_the_total() -> None:
    view = view_of(stage("extract", attempt=1))
    view.take_line("extract-0", progress(17, 40))
    for unit in ("a", "b", "a"):
        view.take_line("extract-0", shard(unit, 8))
    view.take_line("extract-0.1", progress(4, 40))
    view.take_line("extract-0.1", shard("c", 4))
    found = row(view, "extract")
    assert (found.done, found.total, found.attempt) == (4, 24, 1)


def test_a_unit_of_pairs_and_its_audit_rows_are_subtracted_once() -> None:
    view = view_of(stage("extract", attempt=1))
    for kind, extractor in (("targets", "own"), ("sums", "audit"), ("candidates", "own"), ("candidates", "audit")):
        event = {"event": "shard", "kind": kind, "extractor": extractor, "unit": kind[0] + "1", "rows": 16, "bytes": 1}
        view.take_line("extract-0", json.dumps(event | ({"unit": "pairs"} if kind in ("targets", "sums") else {})))
    view.take_line("extract-0.1", progress(0, 100))
    assert row(view, "extract").total == 100 - 3 * 16


def test_a_new_round_counts_from_zero() -> None:
    view = view_of(stage("extract"))
    view.take_line("extract-0", progress(17, 40))
    view.take_status(Status(phase="Extracting", round=1, stages=(stage("extract"),)))
    assert (row(view, "extract").done, row(view, "extract").text) == (0, "starting")


def test_rows_show_why_a_stage_waits_or_how_it_ended() -> None:
    view = view_of(
        stage("plan", state="Succeeded"),
        stage("extract", state="Pending", message="Unschedulable: 0/3 nodes have\n8 nvidia.com/gpu"),
        units=9,
        missing_units=4,
        examples=100,
        pairs=7,
    )
    assert row(view, "plan").text == "100 examples, 7 pairs; 4 of 9 units to extract"
    assert row(view, "extract").text == "Unschedulable: 0/3 nodes have 8 nvidia.com/gpu"
    assert row(view, "reduce").state == "Waiting"
    view.take_status(
        Status(phase="Reducing", missing_units=0, stages=(stage("reduce", state="Succeeded"),), selected=4)
    )
    assert row(view, "extract").text == "the store holds every unit"
    assert row(view, "reduce").text == "4 examples selected"


def test_before_the_first_batch_a_row_shows_what_is_loading() -> None:
    view = view_of(stage("extract"))
    assert row(view, "extract").text == "starting"
    view.take_line("extract-0", json.dumps({"event": "loading", "model": "m", "device": "cuda:0"}))
    assert row(view, "extract").text == "loading m on cuda:0"


def test_an_ignored_file_is_noted_once() -> None:
    view = view_of(stage("plan"))
    for _ in range(2):
        view.take_line("plan", json.dumps({"event": "ignored", "uri": "s3://b/x\x1b[2J", "reason": "no"}))
    assert view.take_notes() == ["plan: ignored s3://b/x\\x1b[2J: no"]
    assert view.take_notes() == []


def test_the_view_stays_small_whatever_pods_write(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_UNITS", "MAX_RANKS", "MAX_ENTRIES"):
        monkeypatch.setattr(run_view, name, 5)
    view = view_of(stage("extract"))
    for number in range(20):
        for prefix in ("extract-0", f"extract-{number}"):
            for event in (
                {"event": "progress", "done": 1, "total": 9, "rank": number},
                {"event": "shard", "unit": f"u{number}", "rows": 1},
                {"event": "loading", "model": "m", "device": "d"},
                {"event": "ignored", "uri": f"s3://b/{number}", "reason": "no"},
            ):
                view.take_line(prefix, json.dumps(event))
    reports = view._reports
    for table in (reports.progress, reports.written, reports.loading, reports.notes):
        assert len(table) <= 5
    assert max(map(len, (*reports.progress.values(), *reports.written.values()))) == 5
    assert row(view, "extract").text


def test_a_status_cannot_move_the_cursor() -> None:
    view = RunView(Status(phase="Extracting", groups="1/2\x1b[2J", shards="\x9b1\n2", message="\x1b]0;owned\x07"))
    assert view.headline().isprintable()


anything = st.one_of(
    st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([None, True, 10**400, [], {}, "\x1b[2J\n", [[1]]])
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from(["progress", "shard", "loading", "ignored", "done"]),
    st.dictionaries(
        st.sampled_from(["done", "total", "tokens", "seconds", "rank", "rows", "unit", "model", "uri", "reason"]),
        anything,
    ),
)
def test_rows_can_be_shown_whatever_a_pod_writes(name: str, fields: dict[str, Any]) -> None:
    view = view_of(stage("extract"), stage("extract", 1))
    for line in (json.dumps({"event": name, **fields}), "[" * 3000, '{"event": 3}', "Traceback…"):
        view.take_line("extract-0", line)
        view.take_line("not a prefix", line)
    assert all("\x1b" not in line_of(one) and "\n" not in line_of(one) for one in view.rows())


def test_changes_are_reported_once() -> None:
    waits = view_of(stage("extract", state="Pending", message="no node"))
    runs = view_of(stage("extract"))
    before = waits.rows()
    assert changes([], before) == ["extract: Pending; no node"]
    assert changes(before, before) == []
    runs.take_line("extract-0", progress(1, 2))
    after = runs.rows()
    assert [line.partition(";")[0] for line in changes(before, after)] == ["extract: Running"]
    runs.take_line("extract-0", progress(2, 2))
    assert changes(after, runs.rows()) == []


def test_plain_lines_report_progress_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    screen = PlainLines(said.append)
    view = view_of(stage("extract"))
    view.take_line("extract-0", progress(1, 4))
    screen.draw("ns/demo", view)
    screen.draw("ns/demo", view)
    assert [line.partition(";")[0] for line in said] == ["extract: Running", "ns/demo: Extracting"]
    monkeypatch.setattr(watch_screen, "LINE_INTERVAL_SECONDS", 0.0)
    screen.draw("ns/demo", view)
    assert said[-1].startswith("extract: Running; 1/4 examples")


def test_the_table_has_all_rows_and_interprets_no_markup() -> None:
    from rich.console import Console

    view = view_of(stage("extract", state="Pending", message="[red]x[/red]"), stage("extract", 1))
    view.take_line("extract-1", progress(20, 40))
    console = Console(file=io.StringIO(), width=100)
    console.print(table_of("ns/[b]demo", view))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ns/[b]demo  Extracting" in text
    assert "[red]x[/red]" in text
    assert "━" in text
    assert len(text.splitlines()) == 6


def test_a_live_table_is_redrawn_and_stays_at_its_end() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, height=5, force_terminal=True)
    view = view_of(stage("plan", state="Succeeded"), *(stage("extract", group) for group in range(8)))
    view.take_line("plan", json.dumps({"event": "ignored", "uri": "[b]x", "reason": "no"}))
    with LiveTable(console) as screen:
        screen.draw("ns/demo", view)
        view.take_status(Status(phase="Complete", stages=view.status.stages))
        screen.draw("ns/demo", view, last=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ignored [b]x: no" in text
    assert "group 7" in text.rpartition("Complete")[2]


class Watched:
    """A run of which only record and pods exist, and a watch of it in a thread."""

    def __init__(self) -> None:
        self.cluster = Cluster(tries=3)
        wanted = config_map_record(parse_for_cluster(DOCUMENT, "test"), DOCUMENT, "default")
        self.record = Record({"kind": "ConfigMap", **self.cluster.create(wanted)})
        self.found: list[Record | None] = []
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        self.found.append(watch_run(Cluster(), self.record))

    def become(self, phase: Any, *stages: StageStatus, **more: Any) -> None:
        there = Record({"kind": "ConfigMap", **self.cluster.get("ConfigMap", "default", self.record.metadata["name"])})
        write_status(self.cluster, there, Status(phase=phase, stages=stages, **more))

    def end(self) -> Record | None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.found[0]


def test_a_watch_follows_status_and_logs_to_the_end(
    server: LogServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_screen, "LINE_INTERVAL_SECONDS", 0.0)
    watched = Watched()
    watched.become("Extracting", stage("plan", state="Succeeded"), stage("extract"), units=4, missing_units=2)
    name = put(server, pod_of("extract"), "running", progress(12, 48))
    err, deadline = "", time.monotonic() + 15
    while "12/48 examples" not in err and time.monotonic() < deadline:
        time.sleep(0.1)
        err += capsys.readouterr().err
    assert "extract: Running; 12/48 examples" in err
    turn(server, name, "terminated")
    watched.become("Complete", stage("reduce", state="Succeeded"), message="4 examples selected", selected=4)
    ended = watched.end()
    assert ended is not None
    assert ended.status.phase == "Complete"
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "default/demo: Complete; 4 examples selected"


def test_a_watch_shows_what_kueue_says_once_though_the_record_changes_before_and_after(
    server: LogServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "KUEUE_SECONDS", 0.1)
    kueue(server, "v1beta1", "v1beta2", kind="Workload")
    watched, held = Watched(), stage("plan", state="Queued", message="waits for Kueue's queue team-a")
    watched.become("Planning", held)
    no_room = (
        "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor plain, 50m more needed"
    )
    reason = {"type": "QuotaReserved", "status": "False", "reason": "WaitingForQuota", "message": no_room}
    workload(server, suspended_job(server, "demo-plan-0-0"), reason)
    err, deadline = "", time.monotonic() + 15
    while no_room not in err and time.monotonic() < deadline:
        time.sleep(0.1)
        err += capsys.readouterr().err
    watched.become("Planning", held, restarts=1)
    time.sleep(1)
    watched.become("Cancelled", held.model_copy(update={"state": "Stopped"}))
    assert watched.end() is not None
    err += capsys.readouterr().err
    assert err.count(f"plan: Queued; waits for Kueue's queue team-a: {no_room}\n") == 1, err


def test_a_watch_ends_when_the_record_is_deleted(server: LogServer) -> None:
    watched = Watched()
    time.sleep(0.3)
    server.delete("configmaps", watched.record.metadata["name"])
    assert watched.end() is None


def test_without_the_right_to_read_logs_the_status_is_shown(
    server: LogServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Any) -> None:
        raise ApiError(403, "pods is forbidden")

    server.faults.script([({"plural": "pods", "verb": "list"}, refuse)] * 3)
    watched = Watched()
    time.sleep(0.5)
    watched.become("Cancelled")
    ended = watched.end()
    assert ended is not None
    assert "default/demo (no bars: pods is forbidden): Cancelled" in capsys.readouterr().err
