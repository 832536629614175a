"""Out of memory: a pass is halved and the run continues with the same rows; one example too large for any budget is named.

Memory is not really exhausted: passes over more tokens than a limit raise what torch raises.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import Projections, RowFormat
from prism_job.extract.capture.sketches import PassSketches, RowSums
from prism_job.extract.passes import Passes
from prism_job.extract.tokenise import Encoded
from tests.conftest import Job, candidate, turn, write_jsonl
from tests.extract.test_worlds import assert_same_shards, single, stored
from tests.models import build_model

LONG = {"messages": [turn("user", "Say it all"), turn("assistant", "seven and eight make fifteen, " * 4)]}
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"

Watcher = Callable[[tuple[int, ...], Any], None]


@pytest.fixture
def before_each_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watcher], None]:
    """Calls a function with the dims of the row formats and the batch of every pass; it may raise."""
    plain = GradientCapture.gradients_of

    def install(watch: Watcher) -> None:
        def watched(capture: GradientCapture, batch: Any, **named: Any) -> Any:
            watch(tuple(row_format.dim for row_format in capture.row_formats), batch)
            return plain(capture, batch, **named)

        monkeypatch.setattr(GradientCapture, "gradients_of", watched)

    return install


@pytest.fixture
def limit(before_each_pass: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the tokens that fit; returns the sizes of the passes that were tried, in tokens."""
    plain = PassSketches.add

    def install(max_tokens: int, error: Exception | type[Exception] = torch.OutOfMemoryError) -> list[int]:
        tried: list[int] = []

        def add(sketches: PassSketches, *layer: Any) -> None:
            plain(sketches, *layer)
            if sketches.batch.ids_BT.numel() > max_tokens and len(sketches.finished) > 3:  # within the backward pass
                raise error

        before_each_pass(lambda _, batch: tried.append(batch.ids_BT.numel()))
        monkeypatch.setattr(PassSketches, "add", add)
        return tried

    return install


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        MemoryError,
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError(CUBLAS),
    ],
    ids=["cuda", "python", "cpu allocator", "cublas workspace"],
)
def test_a_pass_that_does_not_fit_is_halved_and_every_row_is_the_same(job: Job, limit: Any, error: Any) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(30)])
    job.spec["extraction"] |= {"codec": {"kind": "float16"}, "examplesPerShard": 1024}
    wanted = single(job)
    job.plan()
    tried = limit(300, error)
    job.passes("extract")
    assert_same_shards(stored(job), wanted)
    assert len([event for event in job.events if event["event"] == "memory"]) == 1, "reported once"
    assert 0 < len([tokens for tokens in tried if tokens > 300]) <= 3, "what did not fit once is not tried again"


def test_a_failed_pass_is_freed_before_the_cache_is_emptied(limit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", torch.float32)
    capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(6, 0, 256)])
    tensors: list[weakref.ref[Any]] = []
    alive: list[int] = []
    plain = PassSketches.expect_gradient

    def expect_gradient(sketches: PassSketches, name: str) -> None:
        plain(sketches, name)
        tensors.extend(weakref.ref(each) for each in (sketches, sketches.batch.ids_BT, sketches.sums[0].rows_BD))

    limit(12)
    monkeypatch.setattr(PassSketches, "expect_gradient", expect_gradient)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(each() is not None for each in tensors)))
    gc.disable()  # a pass is freed by its last reference, not by chance
    try:
        Passes(capture, can_halve=True).compute([Encoded([3, 4, 5, 6], [False, True, True, True])] * 8, mean=False)
    finally:
        gc.enable()
    assert tensors
    assert alive == [0, 0], "of 8 examples, then of 4"


def test_an_example_that_does_not_fit_is_quarantined_with_its_length(job: Job, limit: Any) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [*(candidate(number) for number in range(9)), LONG])
    job.spec["candidates"]["maxBadFraction"] = 0.1
    limit(80)
    manifest = job.run()
    (quarantined,) = [json.loads(line) for line in (manifest.parent / "quarantine.jsonl").read_text().splitlines()]
    assert quarantined["line"] == 10
    assert "tokens do not fit into memory alone" in quarantined["reason"]
    assert int(quarantined["reason"].split()[1]) > 80
    job.spec["candidates"]["maxBadFraction"] = 0.0
    job.spec["store"] = str(job.folder / "store2")
    job.fails("extract", 65, "do not fit into memory", "a.jsonl line 10")


@pytest.mark.parametrize("audited", [0, 10])
def test_a_target_that_does_not_fit_ends_the_run_by_name_with_an_audit_and_without(
    job: Job, limit: Any, audited: int
) -> None:
    job.spec["audit"] = {"examples": audited}
    job.plan()
    limit(21)  # what the probe takes
    job.fails("extract", 65, "does not fit into memory alone", "targets.jsonl line 1")


@pytest.mark.parametrize(
    ("owner", "method"), [(Projections, "_signs_of"), (GradientCapture, "new_factors"), (RowSums, "add")]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_an_audit_that_does_not_fit_is_named_and_can_be_switched_off(
    job: Job, owner: type, method: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its matrices are built, its sums of factors, or in a pass; the first are those over targets."""
    plain = getattr(owner, method)

    def failing(self: Any, *arguments: Any, **named: Any) -> Any:
        row_formats = {
            Projections: lambda: [self.row_format],
            GradientCapture: lambda: self.row_formats,
            RowSums: lambda: [self.projections.row_format],
        }[owner]()
        if any(row_format.dim == 16 for row_format in row_formats):
            raise error
        return plain(self, *arguments, **named)

    monkeypatch.setattr(owner, method, failing)
    job.spec["audit"] = {"examples": 10}
    job.fails("extract", 64, "the audit does not fit", "16 projected dims", "spec.audit", "set audit: {examples: 0}")
    job.spec["audit"] = {"examples": 0}
    job.run()


def test_halves_of_passes_with_the_audit_give_the_same_rows_and_leave_the_candidates_whole(
    job: Job, before_each_pass: Any
) -> None:
    tried: list[tuple[tuple[int, ...], int]] = []
    is_limited = False

    def watch(dims: tuple[int, ...], batch: Any) -> None:
        tried.append((dims, batch.ids_BT.numel()))
        if is_limited and len(dims) > 1 and batch.size > 1:
            raise torch.OutOfMemoryError

    before_each_pass(watch)
    job.spec["audit"] = {"examples": 10}
    job.spec["extraction"] |= {"codec": {"kind": "float16"}}
    wanted = single(job)
    whole, is_limited = [tokens for dims, tokens in tried if len(dims) == 1], True
    tried.clear()
    job.plan()
    job.passes("extract")
    assert [tokens for dims, tokens in tried if len(dims) == 1] == whole
    assert len([1 for dims, _ in tried if len(dims) == 2]) > 3, "three pairs, some text by text"
    assert_same_shards(stored(job), wanted)


def test_only_the_matrices_of_the_current_rows_are_held(
    job: Job, before_each_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Projections.__init__
    built: list[tuple[int, weakref.ref[Projections]]] = []
    held: dict[tuple[int, ...], set[int]] = {}

    def started(projections: Projections, row_format: RowFormat, *more: Any) -> None:
        start(projections, row_format, *more)
        built.append((row_format.dim, weakref.ref(projections)))

    def watch(dims: tuple[int, ...], _: Any) -> None:
        held[dims] = {dim for dim, projections in built if projections() is not None}

    monkeypatch.setattr(Projections, "__init__", started)
    before_each_pass(watch)
    job.spec["audit"] = {"examples": 10}
    job.plan()
    job.passes("extract")
    assert held == {(8, 16): {8, 16}, (8,): {8}, (16,): {16}}


def test_matrices_of_the_run_itself_that_do_not_fit_are_not_the_audits_fault(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Projections, "_signs_of", failing)
    job.spec["audit"] = {"examples": 10}
    job.plan()
    code, words = job.stage("extract")
    assert (code, words["error"], "audit" in words["fix"]) == (75, "out of memory", False)
    assert "tokensPerBatch" in words["fix"]


def test_any_other_error_of_torch_is_not_taken_for_a_lack_of_memory(job: Job, before_each_pass: Any) -> None:
    def watch(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    job.plan()
    before_each_pass(watch)
    with pytest.raises(RuntimeError, match="shapes"):
        job.stage("extract")
