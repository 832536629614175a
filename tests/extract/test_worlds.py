"""Worlds of several ranks, as processes: the same rows as one process gives, partitioned weights, exit codes passed on.

ZeRO-3 runs on CPU ranks over gloo. Rows are compared one by one with a single process's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prism_job.store import codec, shards
from tests.conftest import Job, Row, candidate, read_json, write_jsonl
from tests.models import save_tiny_adapter, save_tiny_model

FLOAT32 = 1e-5
"""Of a row's norm. Rounding: ranks may sum in another order, and DeepSpeed gathers the same weights."""


def command(job: Job, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "prism_job", "extract", "--spec", str(job.spec_path()), *arguments]


def extract(job: Job, *arguments: str) -> tuple[int, list[Row]]:
    """Run the extract stage as a process. Its exit code and all events of all ranks, the termination message last."""
    done = subprocess.run(command(job, *arguments), capture_output=True, text=True, timeout=240, env=environment())
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert events, done.stderr
    assert "built successfully" not in done.stdout, "no op is compiled: images carry no compiler"
    return done.returncode, events


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def stored(job: Job) -> dict[tuple[str, str], dict[str, NDArray[Any]]]:
    """Every shard that the plan names: (kind, unit) -> its arrays, rows decoded."""
    found = {}
    for extractor, kind, unit in job.shards():
        arrays = dict(shards.read_shard(job.store(), extractor, kind, unit).arrays)
        if kind == "candidates":
            arrays["rows"] = codec.decode_float16(arrays)
            del arrays["values"], arrays["unit"]
        if kind == "sums":
            arrays |= {name: arrays[name][None] for name in ("preference", "uniform")}
        found[kind, unit] = arrays
    return found


def assert_same_shards(found: Any, wanted: Any, tolerance: float = FLOAT32) -> None:
    assert found.keys() == wanted.keys()
    for place, arrays in wanted.items():
        for name, values in arrays.items():
            other = found[place][name]
            if values.dtype.kind in "iu":
                np.testing.assert_array_equal(other, values)
                continue
            flat, wanted_flat = other.reshape(len(values), -1), values.reshape(len(values), -1)
            norm = np.linalg.norm(wanted_flat, axis=1)
            # float16 rounds a value that lies between two of its own either way: 5e-4 of the largest, beside rounding.
            slack = tolerance + (5e-4 if (place[0], name) == ("candidates", "rows") else 0)
            assert (np.linalg.norm(flat - wanted_flat, axis=1) <= slack * norm + 1e-12).all(), (place, name)


@pytest.fixture
def uneven(job: Job) -> Job:
    """Seven units of candidates, the last of one row, texts of unlike length; one of 3 pairs."""
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(25)])
    job.use_codec("float16")
    return job


def single(job: Job) -> Any:
    """The same run by one process, into a store of its own."""
    alone = job.copy(store=str(job.folder / "alone"))
    alone.plan()
    _ = alone.passes("extract")
    return stored(alone)


@pytest.mark.parametrize(
    ("kind", "stage", "ranks", "dtype"),
    [("llama", 0, 2, "float32"), ("llama", 3, 4, "float32"), ("mixtral", 3, 2, "bfloat16")],
)
def test_a_world_writes_the_shards_of_a_single_process(
    uneven: Job, kind: str, stage: int, ranks: int, dtype: str
) -> None:
    """Also with fused experts and in bfloat16: the same micro-batches give the same bits, so no router decides otherwise."""
    uneven.spec["model"] = {"uri": str(save_tiny_model(uneven.folder / "model", kind)), "dtype": dtype}
    wanted = single(uneven)
    uneven.spec["extraction"]["deepspeed"] = {"stage": stage}
    uneven.plan()
    code, events = extract(uneven, f"--ranks={ranks}")
    assert code == 0, events[-1]
    assert (events[-1]["event"], events[-1]["units"], events[-1]["examples"]) == ("done", 8, 28)
    assert_same_shards(stored(uneven), wanted)
    written = [event["unit"] for event in events if event["event"] == "shard" and event["kind"] == "candidates"]
    assert len(written) == len(set(written)) == 7, "no unit is computed twice"
    if stage == 3:
        shares = [event for event in events if event["event"] == "shares"]
        assert len(shares) == ranks
        for share in shares:
            # A share is a weight's numbers over R, rounded up: at most one number more a weight.
            assert share["held"] <= share["parameters"] / ranks + share["weights"]
    code, events = extract(uneven, f"--ranks={ranks}")
    assert (code, events[-1]["units"]) == (0, 0), "a second time nothing is left to do"


def test_a_rank_without_a_unit_keeps_step_with_the_others(uneven: Job) -> None:
    uneven.spec["extraction"]["examplesPerShard"] = 1024
    wanted = single(uneven)
    uneven.spec["extraction"]["deepspeed"] = {"stage": 3, "offload": "cpu"}  # where weights rest changes no row either
    uneven.plan()
    code, events = extract(uneven, "--ranks=4")
    assert code == 0, events[-1]
    writers = {event["rank"] for event in events if event["event"] == "shard"}
    assert len(writers) == 2, "one unit of candidates and one of targets"
    assert_same_shards(stored(uneven), wanted)


def test_a_world_that_shards_two_models_one_after_the_other_writes_what_a_single_process_does(uneven: Job) -> None:
    """An idle rank keeps step in the passes of the preference model too, which have no backward."""
    other = save_tiny_model(uneven.folder / "other", "gpt2")
    uneven.spec["scoring"] = {"preferenceModel": {"uri": str(other), "dtype": "float32"}}
    wanted = single(uneven)
    uneven.spec["extraction"]["deepspeed"] = {"stage": 3}
    uneven.plan()
    code, events = extract(uneven, "--ranks=2")
    assert code == 0, events[-1]
    loads = [Path(event["model"]).name for event in events if event["event"] == "loading" and event.get("rank", 0) == 0]
    assert loads == ["other", uneven.spec["model"]["uri"].rpartition("/")[2]]
    assert (events[-1]["units"], events[-1]["examples"]) == (9, 31)
    assert_same_shards(stored(uneven), wanted)


def test_hidden_states_from_a_world_that_shards_the_weights_are_those_of_a_single_process(uneven: Job) -> None:
    uneven.spec["scoring"] = {"score": "representation"}
    wanted = single(uneven)
    uneven.spec["extraction"]["deepspeed"] = {"stage": 3}
    uneven.plan()
    code, events = extract(uneven, "--ranks=2")
    assert code == 0, events[-1]
    assert (events[-1]["units"], events[-1]["examples"]) == (8, 28)
    assert_same_shards(stored(uneven), wanted)


def test_the_audit_of_a_world_is_that_of_a_single_process(uneven: Job) -> None:
    """Its units are assigned like the others, and idle ranks keep step with its larger rows too. Of a model with experts."""
    uneven.spec["model"]["uri"] = str(save_tiny_model(uneven.folder / "model", "deepseek_v3"))
    figures, found = [], []
    for number, ranks in enumerate((1, 2)):
        job = uneven.copy(audit={"examples": 12}, store=str(uneven.folder / f"audited-{ranks}"))
        job.spec["extraction"]["deepspeed"] = {"stage": 3 if number else 0}
        planned = job.plan()
        code, events = extract(job, "--ranks", str(ranks))
        assert code == 0, events
        assert events[-1]["units"] == planned["missing"] == planned["units"]
        assert 0 < events[-1]["auditSeconds"] < events[-1]["seconds"]
        assert job.plan()["missing"] == 0
        found.append(stored(job))
        words = job.passes("reduce")
        figures.append(read_json(Path(words["manifest"]))["audit"])
    assert_same_shards(found[1], found[0])
    assert figures[0]["spearman_between"] is not None
    # Scores differ by rounding, which changes no rank of these twelve.
    assert figures[1] == pytest.approx(figures[0], abs=1e-9)


# Groups


def test_a_group_does_its_own_units_first_and_then_those_that_others_left(uneven: Job) -> None:
    uneven.plan()
    code, events = extract(uneven, "--groups=2", "--group=1")  # the other group is gone for good
    assert (code, events[-1]["units"]) == (0, 8)
    plan = uneven.planned()
    order = [*(unit.id for unit in plan.targets), *(unit.id for unit in plan.candidates)]
    written = [event["unit"] for event in events if event["event"] == "shard" and event["kind"] != "factors"]
    assert written == [*order[1::2], *order[0::2][::-1]]
    uneven.passes("reduce")


def test_the_units_of_a_group_killed_for_good_are_done_by_the_other(uneven: Job) -> None:
    write_jsonl(uneven.folder / "pool" / "a.jsonl", [candidate(number) for number in range(400)])
    uneven.plan()
    with world(uneven, "--ranks=2", "--groups=2", "--group=0") as (doomed, ranks):
        wait_for(doomed, '"shard"')
        for pid in [*ranks, doomed.pid]:
            os.kill(pid, signal.SIGKILL)
    assert extract(uneven, "--groups=2", "--group=1")[0] == 0
    uneven.passes("reduce")


def test_two_groups_at_once_complete_one_store(uneven: Job) -> None:
    wanted = single(uneven)
    uneven.plan()
    commands = [command(uneven, "--groups=2", f"--group={group}") for group in (0, 1)]
    groups = [subprocess.Popen(each, stdout=subprocess.DEVNULL, env=environment()) for each in commands]
    assert [group.wait(timeout=120) for group in groups] == [0, 0]
    assert_same_shards(stored(uneven), wanted)


# Exit codes, as the spawner's parent sees them


@pytest.mark.parametrize("case", ["codec", "adapter", "rows"])
def test_the_error_of_a_rank_is_that_of_its_world(uneven: Job, case: str) -> None:
    if case == "codec":
        uneven.spec["extraction"]["codec"] = {"kind": "sign", "dims": 65536}
    if case == "adapter":
        uneven.spec["model"]["adapter"] = str(save_tiny_adapter(uneven.folder / "adapter"))
        uneven.spec["extraction"]["deepspeed"] = {"stage": 3}
    uneven.plan()
    rows = next((uneven.folder / "store" / "rows").iterdir())
    if case == "rows":
        rows.write_bytes(b"not zstd")
    code, events = extract(uneven, "--ranks=2")
    assert code == events[-1]["exitCode"] == (65 if case == "rows" else 64)
    mention = {"codec": "codec.dims 65536", "adapter": "cannot be used with ZeRO stage 3", "rows": rows.name}[case]
    assert mention in f"{events[-1]['error']} {events[-1]['where']}"


def test_a_hang_names_rank_and_step_and_is_transient(uneven: Job) -> None:
    """One rank of a sharded world is suspended: its peer waits, and reports which rank it is and what it was doing."""
    uneven.spec["extraction"] |= {"deepspeed": {"stage": 3}, "stepTimeoutSeconds": 5}
    write_jsonl(uneven.folder / "pool" / "a.jsonl", [candidate(number) for number in range(800)])
    uneven.plan()
    with world(uneven, "--ranks=2") as (process, ranks):
        wait_for(process, '"shard"')
        os.kill(ranks[0], signal.SIGSTOP)
        out, _ = process.communicate(timeout=90)
    message = json.loads(out.splitlines()[-1])
    assert process.returncode == message["exitCode"] == 75
    assert "no progress for 5 s" in message["error"]
    assert re.search(r"rank \d, pass \d+", message["where"])


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "rank killed"])
def test_a_world_that_ends_early_leaves_no_rank_and_keeps_finished_units(
    uneven: Job, sent: signal.Signals, stage: int
) -> None:
    uneven.spec["extraction"]["deepspeed"] = {"stage": stage}
    write_jsonl(uneven.folder / "pool" / "a.jsonl", [candidate(number) for number in range(400)])
    uneven.plan()
    with world(uneven, "--ranks=2") as (process, ranks):
        wait_for(process, '"shard"')
        os.kill(process.pid if sent == signal.SIGTERM else ranks[1], sent)
        process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert not any(is_alive(rank) for rank in ranks)
    kept = {path: path.stat().st_mtime_ns for path in (uneven.folder / "store").rglob("*.safetensors")}
    assert kept
    if sent == signal.SIGKILL:
        assert extract(uneven, "--ranks=2")[0] == 0
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was whole is kept"
        uneven.passes("reduce")


def test_a_spawner_killed_hard_leaves_no_rank(uneven: Job) -> None:
    write_jsonl(uneven.folder / "pool" / "a.jsonl", [candidate(number) for number in range(4000)])
    uneven.plan()
    with world(uneven, "--ranks=2") as (process, ranks):
        wait_for(process, '"shard"')
        process.kill()
        deadline = time.monotonic() + 20
        while (alive := [rank for rank in ranks if is_alive(rank)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive


@contextlib.contextmanager
def world(job: Job, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A spawner and the pids of its ranks; none of them outlives it."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command(job, *arguments), env=environment(), **pipes)
    deadline = time.monotonic() + 60
    while len(ranks := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        yield process, ranks
    finally:
        for pid in [process.pid, *ranks]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text}")


def children(pid: int) -> list[int]:
    """Child processes that run the extract stage, by pid."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # not a process, or one that ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"prism_job" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
