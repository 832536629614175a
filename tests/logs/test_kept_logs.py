"""Laws of reading kept logs: only those asked for are read, one at a time, and none that no pod can have written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from prism_job.logs.bounded_log import FIRST_BYTES, LAST_BYTES, BoundedLog
from prism_job.logs.kept_logs import put_log, read_logs
from prism_job.storage.folder import LocalFolder


class CountingFolder(LocalFolder):
    """A store that lists what it was asked to read."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.read: list[str] = []

    def get(self, key: str) -> bytes:
        self.read.append(key.removeprefix("demo/logs/"))
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> CountingFolder:
    return CountingFolder(str(tmp_path))


def put(store: LocalFolder, key: str, content: bytes = b"line\n", modified: float = 1e9) -> None:
    put_log(str(store.root), "demo", key, content)
    os.utime(store.root / "demo/logs" / key, (modified, modified))


def test_logs_come_by_stage_attempt_group_node_and_time(store: CountingFolder) -> None:
    order = ["plan", "extract-0/0", "extract-0/1", "extract-10/0", "extract-0.2/0", "extract-3.10/0", "reduce"]
    for pod in sorted(order):
        put(store, f"u/0/{pod}/b.log", b"b\n", modified=1e9)
        put(store, f"u/0/{pod}/a.log", b"a\n", modified=2e9)
    found = [(log["pod"], *log["lines"]) for log in read_logs(store, "demo")]
    assert found == [(pod, name) for pod in order for name in "ba"]


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        ({"stage": "plan"}, ["u/1/plan/p.log"]),
        ({"group": 1}, ["u/1/extract-1/p.log"]),
        ({"pods": ["extract-1", "plan"]}, ["u/1/plan/p.log", "u/1/extract-1/p.log"]),
        ({"round_key": "u/1", "stage": "plan"}, ["u/1/plan/p.log"]),
        ({"round_key": "v/1"}, ["v/1/plan/p.log"]),
        ({"round_key": "w/1"}, []),
    ],
)
def test_only_logs_that_are_asked_for_are_read(store: CountingFolder, wanted: dict[str, Any], keys: list[str]) -> None:
    for key in (
        "v/1/plan/p.log",
        "u/10/plan/p.log",
        "u/1/extract-0/p.log",
        "u/1/extract-1/p.log",
        "u/1/extract-10/p.log",
    ):
        put(store, key)
    put(store, "u/1/plan/p.log", modified=2e9)
    assert all(log["round"] == keys[0].rpartition("/1/")[0] + "/1" for log in read_logs(store, "demo", **wanted))
    assert store.read == keys


def test_the_next_log_is_read_when_the_last_one_was_taken(store: CountingFolder) -> None:
    for group in range(3):
        put(store, f"u/0/extract-{group}/p.log")
    logs = read_logs(store, "demo")
    for number in range(3):
        next(logs)
        assert len(store.read) == number + 1


def test_the_longest_log_that_a_pod_keeps_is_read_and_a_larger_object_is_not(store: CountingFolder) -> None:
    longest = BoundedLog()
    for _ in range(150):
        longest.add(1, b"x" * 59_999 + b"\n")
    assert longest.num_bytes > FIRST_BYTES + LAST_BYTES
    put(store, "u/0/plan/p.log", longest.content())
    put(store, "u/0/reduce/p.log")
    os.truncate(store.root / "demo/logs/u/0/reduce/p.log", 10**10)
    plan, reduce = read_logs(store, "demo")
    assert "\n".join([*plan["lines"], ""]).encode() == longest.content()
    assert reduce["lines"][0].startswith(
        f"(not read: {store.uri('demo/logs/u/0/reduce/p.log')} has 10,000,000,000 bytes"
    )
    assert store.read == ["u/0/plan/p.log"]


@pytest.mark.parametrize("tail", [None, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("content", [b"one\n\n\xff three\r\n", b"one\n\n\xff three\r"])
def test_lines_end_where_a_pods_lines_end_and_a_tail_is_of_each_log(
    store: CountingFolder, content: bytes, tail: int | None
) -> None:
    lines = ["one", "", "\ufffd three\r"]
    for pod in ("plan", "reduce"):
        put(store, f"u/0/{pod}/p.log", content)
    expected = lines if tail is None else lines[len(lines) - min(tail, 3) :]
    assert [log["lines"] for log in read_logs(store, "demo", tail=tail)] == [expected, expected]


@pytest.mark.parametrize("key", ["u/0/plan.log", "u/0/other/p.log", "u/0/plan/p.txt", "u/x/plan/p.log", "0/plan/p.log"])
def test_an_object_that_is_no_pods_log_is_ignored(store: CountingFolder, key: str) -> None:
    put(store, key)
    assert list(read_logs(store, "demo")) == []
