"""Laws of `prism logs`: each line of each pod once and in order, whatever happens to connections, pods and the API server."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.follow.logs import merged_logs
from launcher.follow.logs.merged_logs import log_lines, prefix_of
from launcher.follow.logs.pod_log import MAX_TRIES
from launcher.kube.cluster import Cluster
from launcher.kube.errors import Refused
from launcher.kube.transport import CUT
from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL
from tests.cluster.grants import grant
from tests.cluster.rig import eventually
from tests.cluster.server.faults import Request
from tests.follow.log_server import LogServer, Pod, pod_of, put, turn


class Follower:
    """Follows in a thread of its own; `until` waits for lines."""

    def __init__(self, **options: Any) -> None:
        self.over = threading.Event()
        self.found: list[tuple[str, str]] = []
        self.failed: list[Exception] = []
        self.lines = log_lines(Cluster(), "default", "demo", follow=True, is_over=self.over.is_set, **options)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for line in self.lines:
                self.found.append(line)
        except Exception as error:
            self.failed.append(error)

    def until(self, num: int) -> None:
        eventually(lambda: len(self.found) >= num, 20)

    def end(self) -> list[tuple[str, str]]:
        """The run is over: all that was read."""
        self.over.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert not self.failed
        return self.found


def printed(**options: Any) -> list[str]:
    """The lines of `prism logs` without --follow."""
    return [line for _, line in log_lines(Cluster(), "default", "demo", follow=False, **options)]


def lines_of(follow: bool, num: int) -> list[str]:
    """All lines that there are, by either way."""
    if not follow:
        return printed()
    follower = Follower()
    follower.until(num)
    return [line for _, line in follower.end()]


@pytest.mark.parametrize(
    ("pod", "prefix"),
    [
        (pod_of("plan"), "plan"),
        (pod_of("reduce", attempt=2), "reduce.2"),
        (pod_of("extract", group=3), "extract-3"),
        (pod_of("extract", attempt=1), "extract-0.1"),
        (pod_of("extract", attempt=1, node=2), "extract-0.1/2"),
        (pod_of("extract", node=0), "extract-0/0"),
    ],
)
def test_a_prefix_says_stage_group_attempt_and_node(pod: Pod, prefix: str) -> None:
    assert prefix_of(pod) == prefix


def test_without_follow_pods_are_printed_by_stage_and_attempt(server: LogServer) -> None:
    put(server, pod_of("reduce"), "running", "r")
    put(server, pod_of("extract", attempt=1), "running", "second")
    put(server, pod_of("extract"), "terminated", "first")
    put(server, pod_of("extract", group=1), "terminated", "other group")
    put(server, pod_of("plan"), "terminated", "p1", "p2")
    put(server, pod_of("plan", run="another"), "terminated", "not ours")
    put(server, pod_of("reduce", attempt=1), "waiting")
    found = list(log_lines(Cluster(), "default", "demo", follow=False))
    assert found == [
        ("plan", "p1"),
        ("plan", "p2"),
        ("extract-0", "first"),
        ("extract-1", "other group"),
        ("extract-0.1", "second"),
        ("reduce", "r"),
    ]


def test_stage_group_tail_and_timestamps_are_respected(server: LogServer) -> None:
    put(server, pod_of("plan"), "terminated", "p")
    put(server, pod_of("extract"), "terminated", "a", "b", "c")
    put(server, pod_of("extract", group=1), "terminated", "d")
    assert printed(stage="plan") == ["p"]
    assert printed(stage="extract", group=0, tail=2) == ["b", "c"]
    assert printed(group=1, timestamps=True) == ["2026-03-01T00:00:00.001000000Z d"]


def test_follow_finds_late_pods_new_attempts_and_later_stages(server: LogServer) -> None:
    late = put(server, pod_of("plan"), "waiting")
    follower = Follower()
    time.sleep(0.3)
    server.say(late, "p")
    turn(server, late, "running")
    follower.until(1)
    server.say(late, "p, later")
    follower.until(2)
    turn(server, late, "terminated")
    put(server, pod_of("extract"), "terminated", "first")
    follower.until(3)
    put(server, pod_of("extract", attempt=1), "terminated", "second")
    follower.until(4)
    assert follower.end() == [("plan", "p"), ("plan", "p, later"), ("extract-0", "first"), ("extract-0.1", "second")]


def test_the_last_lines_of_an_ended_run_are_read(server: LogServer) -> None:
    name = put(server, pod_of("reduce"), "running", "a")
    follower = Follower()
    follower.until(1)
    follower.over.set()
    time.sleep(0.5)
    server.say(name, "last line")
    turn(server, name, "terminated")
    assert follower.end() == [("reduce", "a"), ("reduce", "last line")]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("follow", [False, True])
def test_a_broken_connection_neither_loses_nor_repeats_a_line(server: LogServer, follow: bool, at_once: bool) -> None:
    name = put(server, pod_of("plan"), "running")
    # Equal lines, equal times: only their number tells how many there are.
    lines = ["same", "same", *map(str, range(20)), "same", "same", ""]
    server.say(name, *lines, at_once=at_once)
    turn(server, name, "terminated")
    # At once: a stream that breaks earlier each time brings nothing new.
    server.cuts = [0, 1, 5, 3, 7, 30, 20] if not at_once else [0, 1, 5, 7, 12]
    assert lines_of(follow, len(lines)) == lines
    assert any("sinceTime" in query for query in server.asked)


def test_tail_is_counted_once_across_reconnections(server: LogServer) -> None:
    put(server, pod_of("plan"), "terminated", *map(str, range(9)))
    server.cuts = [0, 1, 2]
    assert printed(tail=3) == ["6", "7", "8"]


def test_a_silent_stream_is_reopened(server: LogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.follow.logs.pod_log.MAX_SILENCE_SECONDS", 0.2)
    name = put(server, pod_of("plan"), "running", "a")
    follower = Follower()
    follower.until(1)
    time.sleep(0.6)
    server.say(name, "b")
    follower.until(2)
    turn(server, name, "terminated")
    assert follower.end() == [("plan", "a"), ("plan", "b")]
    assert len(server.asked) >= 3


def test_a_deleted_pod_ends_only_its_own_stream(server: LogServer) -> None:
    gone = put(server, pod_of("extract"), "running", "a")
    stays = put(server, pod_of("extract", group=1), "running", "b")
    follower = Follower()
    follower.until(2)
    server.delete("pods", gone, grace_seconds=0)
    time.sleep(0.3)
    server.say(stays, "c")
    turn(server, stays, "terminated")
    follower.until(3)
    assert sorted(follower.end()) == [("extract-0", "a"), ("extract-1", "b"), ("extract-1", "c")]


def test_transient_errors_are_retried(server: LogServer) -> None:
    name = put(server, pod_of("plan"), "running", "a")
    server.faults.rain({"500": 0.2, "reset_before": 0.2, "drop_watch": 0.5, "gone_watch": 0.2}, seed=3)
    follower = Follower()
    follower.until(1)
    with server.outage():
        server.say(name, "b")
    server.compact()
    other = put(server, pod_of("reduce"), "running", "c")
    follower.until(3)
    server.faults.clear()  # of a pod that has ended only so many tries in a row may fail: the tests after this one
    for each in (name, other):
        turn(server, each, "terminated")
    assert sorted(follower.end()) == [("plan", "a"), ("plan", "b"), ("reduce", "c")]


def test_failures_while_a_pod_ran_do_not_count_against_its_end(server: LogServer) -> None:
    name = put(server, pod_of("plan"), "waiting")
    server.faults.script([({"subresource": "log"}, "503")] * (MAX_TRIES + 3))
    server.say(name, "a")
    turn(server, name, "running")
    follower = Follower()
    eventually(lambda: server.faults.pending <= 2, 20)
    turn(server, name, "terminated")
    follower.until(1)
    assert follower.end() == [("plan", "a")]


def test_a_log_that_cannot_be_read_is_reported_and_skipped(server: LogServer) -> None:
    put(server, pod_of("plan"), "terminated", "lost with its node")
    put(server, pod_of("reduce"), "terminated", "r")

    def is_plan(request: Request) -> bool:
        return request.subresource == "log" and "plan" in request.name

    server.faults.script([(is_plan, "500")] * 20)
    found = list(log_lines(Cluster(), "default", "demo", follow=False))
    assert [prefix for prefix, _ in found] == ["plan", "reduce"]
    assert found[0][1].startswith("(the rest of this log cannot be read")


@pytest.mark.parametrize("follow", [False, True])
def test_missing_rights_to_read_logs_are_an_error(
    server: LogServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    put(server, pod_of("plan"), "running", "a")
    token = grant(server, ("", ["pods"], ["list", "watch"]))
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "reader", token=token)))
    with pytest.raises(Refused, match="pods/log"):
        list(log_lines(Cluster(), "default", "demo", follow=follow))


@pytest.mark.parametrize("follow", [False, True])
def test_pods_with_invalid_labels_are_read_too(server: LogServer, follow: bool) -> None:
    put(server, pod_of("plan"), "terminated", "p")
    pod = pod_of("extract")
    pod["metadata"]["labels"] |= {ROUND_LABEL: "x", ATTEMPT_LABEL: "1.5", GROUP_LABEL: "9" * 50}
    pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = "y"
    pod["spec"]["subdomain"] = "theirs"
    put(server, pod, "terminated", "theirs")
    assert sorted(lines_of(follow, 2)) == ["p", "theirs"]


def test_a_bug_in_a_thread_is_raised_to_the_reader(server: LogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Pod) -> str:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(merged_logs, "prefix_of", broken)
    put(server, pod_of("plan"), "running", "p")
    follower = Follower()
    follower.thread.join(10)
    assert "a bug of ours" in str(follower.failed)


def test_few_logs_are_read_at_once_and_all_in_the_end(server: LogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_logs, "MAX_STREAMS", 3)
    names = [put(server, pod_of("extract", group=group), "running", str(group)) for group in range(9)]
    follower = Follower()
    follower.until(3)
    time.sleep(0.3)
    assert len(follower.found) == 3
    assert len(server.asked) == 3
    for name in names:
        turn(server, name, "terminated")
    follower.over.set()
    found = follower.end()
    assert sorted(line for _, line in found) == sorted(map(str, range(9)))


@pytest.mark.parametrize("cuts", [[], [0], [1]])
def test_a_very_long_line_is_cut_and_comes_once_across_reconnections(
    server: LogServer, monkeypatch: pytest.MonkeyPatch, cuts: list[int]
) -> None:
    monkeypatch.setattr("launcher.kube.cluster.LONGEST_LINE", 2**16)
    put(server, pod_of("plan"), "terminated", "before", "y" * 2**19, "z" * 2**17, "after")
    server.cuts = cuts
    lines = printed()
    stamp = len("2026-01-01T00:00:00.000000000Z ")
    assert lines == ["before", "y" * (2**16 - stamp) + CUT, "z" * (2**16 - stamp) + CUT, "after"]


def test_closing_ends_all_threads_even_of_silent_streams(server: LogServer) -> None:
    before = set(threading.enumerate())
    for group in range(3):
        put(server, pod_of("extract", group=group), "running", "a")
    # The server's own threads come and go with its connections: only ours have these targets.
    lines = log_lines(Cluster(), "default", "demo", follow=True)
    for _ in range(3):
        next(lines)
    lines.close()

    def ours() -> list[str]:
        return [one.name for one in set(threading.enumerate()) - before if "_enqueue_error_of" in one.name]

    eventually(lambda: not ours(), 5)


def test_a_slow_reader_loses_no_line(server: LogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_logs, "MAX_QUEUED", 4)
    put(server, pod_of("plan"), "terminated", *map(str, range(200)))
    over = threading.Event()
    found = []
    for _, line in log_lines(Cluster(), "default", "demo", follow=True, is_over=over.is_set):
        found.append(line)
        over.set()
        time.sleep(0.001)
    assert found == [str(number) for number in range(200)]
