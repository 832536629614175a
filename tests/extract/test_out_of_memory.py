"""Out of memory: a pass is halved and the run goes on with the same rows; one example too large for any budget is named.

The memory that ends is played: passes over so many tokens raise what torch raises.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_job.extract import worker
from prism_job.extract.capture.gradients import GradientCapture
from tests.conftest import Job, candidate, turn, write_jsonl
from tests.extract.test_worlds import assert_same_shards, single, stored

LONG = {"messages": [turn("user", "Say it all"), turn("assistant", "seven and eight make fifteen, " * 4)]}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the tokens that fit; returns the sizes of the passes that were tried, in (examples, tokens)."""
    rows_of, add_sketch = worker.rows_of, GradientCapture._add_sketch

    def limit(tokens_that_fit: int, error: type[Exception] = torch.OutOfMemoryError) -> list[tuple[int, int]]:
        tried: list[tuple[int, int]] = []

        def counted(captures: Any, batch: Any, **named: Any) -> Any:
            tried.append((batch.size, batch.ids_BT.numel()))
            return rows_of(captures, batch, **named)

        def failing(capture: GradientCapture, state: Any, *layer: Any) -> None:
            add_sketch(capture, state, *layer)
            if (
                state.batch.ids_BT.numel() > tokens_that_fit and len(state.done) > 3
            ):  # in the middle of the backward pass
                raise error("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(worker, "rows_of", counted)
        monkeypatch.setattr(GradientCapture, "_add_sketch", failing)
        return tried

    return limit


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_pass_that_does_not_fit_is_halved_and_every_row_is_the_same(job: Job, passes: Any, error: Any) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(30)])
    job.spec["extraction"] |= {"codec": {"kind": "float16"}, "examplesPerShard": 1024}
    wanted = single(job)
    job.plan()
    tried = passes(300, error)
    code, words = job.stage("extract")
    assert code == 0, words
    assert_same_shards(stored(job), wanted)
    said = [event for event in job.events if event["event"] == "memory"]
    assert len(said) == 1, "said once"
    too_large = [tokens for _, tokens in tried if tokens > 300]
    assert 0 < len(too_large) <= 3, "what did not fit once is not tried again"


def test_an_example_that_fits_no_memory_is_quarantined_with_its_length(job: Job, passes: Any) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [*(candidate(number) for number in range(9)), LONG])
    job.spec["candidates"]["maxBadFraction"] = 0.1
    job.plan()
    passes(80)
    manifest = Path(_run_on(job)["manifest"])
    (quarantined,) = [json.loads(line) for line in (manifest.parent / "quarantine.jsonl").read_text().splitlines()]
    assert quarantined["line"] == 10
    assert "tokens do not fit into memory alone" in quarantined["reason"]
    assert int(quarantined["reason"].split()[1]) > 80
    job.spec["candidates"]["maxBadFraction"] = 0.0
    job.spec["store"] = str(job.folder / "store2")
    job.fails("extract", 65, "do not fit into memory", "a.jsonl line 10")


def test_a_target_that_fits_no_memory_ends_the_run_by_name(job: Job, passes: Any) -> None:
    job.plan()
    passes(8)
    job.fails("extract", 65, "does not fit into memory alone", "targets.jsonl line 1")


@pytest.mark.parametrize("place", ["_projections", "new_factors", "_add_sketch"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_an_audit_that_fits_no_memory_is_named_and_can_be_switched_off(
    job: Job, place: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its matrices are built, its sums of factors, or in each pass, those over targets beside their own rows first."""
    plain = getattr(GradientCapture, place)

    def failing(capture: GradientCapture, *arguments: Any) -> Any:
        if capture.dim == 16:
            raise error
        return plain(capture, *arguments)

    monkeypatch.setattr(GradientCapture, place, failing)
    job.spec["audit"] = {"examples": 10}
    job.fails("extract", 64, "the audit does not fit", "16 projected dims", "spec.audit", "set audit: {examples: 0}")
    job.spec["audit"] = {"examples": 0}
    job.plan()
    _run_on(job)


def test_a_target_too_large_beside_the_audit_is_not_laid_to_it(job: Job, passes: Any) -> None:
    job.spec["audit"] = {"examples": 10}
    job.plan()
    passes(8)
    job.fails("extract", 65, "does not fit into memory alone", "targets.jsonl line 1")


def test_a_target_that_fits_with_its_own_rows_alone_is_laid_to_the_audit(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of = worker.rows_of

    def failing(captures: Any, *arguments: Any, **named: Any) -> Any:
        if len(captures) > 1:
            raise torch.OutOfMemoryError
        return rows_of(captures, *arguments, **named)

    monkeypatch.setattr(worker, "rows_of", failing)
    job.spec["audit"] = {"examples": 10}
    job.plan()
    job.fails("extract", 64, "the audit does not fit", "spec.audit")


def test_halves_made_beside_the_audit_give_the_same_rows_and_leave_the_candidates_whole(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of = worker.rows_of
    tried: list[tuple[int, int]] = []

    def failing(captures: Any, batch: Any, **named: Any) -> Any:
        tried.append((len(captures), batch.ids_BT.numel()))
        if limited and len(captures) > 1 and batch.size > 1:
            raise torch.OutOfMemoryError
        return rows_of(captures, batch, **named)

    monkeypatch.setattr(worker, "rows_of", failing)
    job.spec["audit"] = {"examples": 10}
    job.spec["extraction"] |= {"codec": {"kind": "float16"}}
    limited = False
    wanted = single(job)
    whole, limited = [tokens for captures, tokens in tried if captures == 1], True
    tried.clear()
    job.plan()
    code, words = job.stage("extract")
    assert code == 0, words
    assert [tokens for captures, tokens in tried if captures == 1] == whole
    assert len([1 for captures, _ in tried if captures == 2]) > 3, "three pairs, some text by text"
    assert_same_shards(stored(job), wanted)


def test_the_audits_matrices_are_let_go_while_candidates_pass(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sides(dict[str, Any]):
        """A dict that can be watched."""

    start, rows_of = GradientCapture.__init__, worker.rows_of
    built: list[tuple[int, weakref.ref[Any]]] = []
    alive: list[tuple[list[int], set[int]]] = []

    def started(capture: GradientCapture, model: Any, layers: Any, dim: int, *more: Any) -> None:
        start(capture, model, layers, dim, *more)
        capture.sides = Sides(capture.sides)
        built.append((dim, weakref.ref(capture.sides)))

    def watched(captures: Any, *arguments: Any, **named: Any) -> Any:
        alive.append(([one.dim for one in captures], {dim for dim, sides in built if sides() is not None}))
        return rows_of(captures, *arguments, **named)

    monkeypatch.setattr(GradientCapture, "__init__", started)
    monkeypatch.setattr(worker, "rows_of", watched)
    job.spec["audit"] = {"examples": 10}
    job.plan()
    code, words = job.stage("extract")
    assert code == 0, words
    assert {tuple(dims): held for dims, held in alive} == {(8, 16): {8, 16}, (8,): {8}, (16,): {8, 16}}


def test_matrices_of_the_run_itself_that_fit_no_memory_are_not_laid_to_the_audit(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(GradientCapture, "_projections", failing)
    job.spec["audit"] = {"examples": 10}
    job.plan()
    code, words = job.stage("extract")
    assert (code, words["error"], "audit" in words["fix"]) == (75, "out of memory", False)


def test_any_other_error_of_torch_is_no_lack_of_memory(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_of(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    job.plan()
    monkeypatch.setattr(worker, "rows_of", rows_of)
    with pytest.raises(RuntimeError, match="shapes"):
        job.stage("extract")


def _run_on(job: Job) -> dict[str, Any]:
    for stage in ("extract", "reduce"):
        code, words = job.stage(stage)
        assert code == 0, words
    return words
