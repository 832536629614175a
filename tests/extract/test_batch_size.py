"""`tokensPerBatch: auto`: which size is taken, that it changes no row, and that a run takes the same again.

Timings are made up: a size that is measured on a busy machine would be another one each time.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prism_job.extract import batch_size
from prism_job.extract.batch_size import BatchSize, Measured, largest_that_pays
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.sketches import PassSketches
from prism_job.extract.distributed.world import World
from prism_job.extract.passes import Passes
from prism_job.extract.tokenise import Encoded
from tests.conftest import Job, candidate, write_jsonl
from tests.extract.test_worlds import assert_same_shards, single, stored

ALONE = World(0, 1, 0, 1, 0, sharded=False, device=torch.device("cpu"))
SIZES = (64, 128, 256)


@pytest.fixture
def auto(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run that measures on a CPU, texts of unlike length."""
    monkeypatch.setattr(batch_size, "CPU_SIZES", SIZES)
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(25)])
    job.use_codec("float16")
    job.spec["extraction"] |= {"tokensPerBatch": "auto", "examplesPerShard": 16}
    return job


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], list[int]]:
    """Makes up the seconds of a token by size; returns the sizes that are measured. The passes are real."""

    def install(by_size: dict[int, float]) -> list[int]:
        measured: list[int] = []
        plain = BatchSize.choose

        def choose(self: BatchSize, texts: Any, seconds_of: Any) -> None:
            def made_up(batch: list[Encoded]) -> float | None:
                measured.append(self.current)
                num_tokens = len(batch) * max(len(text.ids) for text in batch)
                assert num_tokens <= self.current
                return None if seconds_of(batch) is None else by_size[self.current] * num_tokens

            plain(self, texts, made_up)

        monkeypatch.setattr(BatchSize, "choose", choose)
        return measured

    return install


def batch_events(job: Job) -> list[tuple[int, str]]:
    return [(event["tokens"], event["how"]) for event in job.events if event["event"] == "batch"]


def records(job: Job) -> list[Path]:
    return list((Path(job.spec["output"]) / "test").glob("batch-*.json"))


@pytest.mark.parametrize(
    ("rates", "fits", "chosen", "measured"),
    [
        ([1.0, 0.9, 0.8], 3, 256, 3),
        ([1.0, 0.9, 0.89], 3, 128, 3),  # a gain of 1 % is noise
        ([1.0, 1.1, 0.5], 3, 64, 2),  # no size is tried beyond one that is worse
        ([1.0, 0.9, 0.8], 2, 128, 2),
        ([1.0, 0.9, None], 3, 128, 3),  # out of memory in spite of the forecast
        ([None, 0.9, 0.8], 3, 64, 1),  # passes are halved then
    ],
)
def test_the_last_doubling_that_fits_and_pays_is_taken(
    rates: list[float | None], fits: int, chosen: int, measured: int
) -> None:
    tried: list[int] = []

    def measure(size: int) -> Measured | None:
        tried.append(size)
        rate = rates[SIZES.index(size)]
        return None if rate is None else Measured(rate, double_fits=size < SIZES[fits - 1])

    assert largest_that_pays(SIZES, measure, ALONE) == chosen
    assert tried == list(SIZES[:measured])


def _choose_as_rank(rank: int, rates: list[float], folder: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank, 2, rank, 1, 0, sharded=True, device=torch.device("cpu"))
    tried = []

    def measure(size: int) -> Measured:
        tried.append(size)
        world.any_rank(False)  # a pass is collective: a rank that made one alone would wait here for ever
        return Measured(rates[SIZES.index(size)], double_fits=True)

    answers.put((rank, largest_that_pays(SIZES, measure, world), tried))
    torch.distributed.destroy_process_group()


def test_ranks_that_share_the_weights_agree_although_their_clocks_do_not(tmp_path: Path) -> None:
    rates = [[1.0, 0.5, 0.4], [1.0, 0.8, 0.9]]  # the second finds the largest size slower
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(target=_choose_as_rank, args=(rank, rates[rank], str(tmp_path), answers)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(answers.get() for _ in ranks) == [(0, 128, [64, 128, 256]), (1, 128, [64, 128, 256])]


@pytest.mark.parametrize("best", SIZES)
def test_auto_changes_no_row_and_its_document_repeats_the_run(auto: Job, seconds: Any, best: int) -> None:
    auto.spec["extraction"]["tokensPerBatch"] = 4096
    wanted = single(auto)
    auto.spec["extraction"]["tokensPerBatch"] = "auto"
    seconds({size: 2.0 if size > best else 1 / size for size in SIZES})
    auto.plan()
    auto.passes("extract")
    assert batch_events(auto) == [(best, "measured")]
    assert_same_shards(stored(auto), wanted)
    manifest = Path(auto.passes("reduce")["manifest"])
    replaying = yaml.safe_load((manifest.parent / "spec.yaml").read_text())
    assert replaying["spec"]["extraction"]["tokensPerBatch"] == best


def test_a_run_takes_the_size_that_it_chose_again_and_computes_the_same_bits(auto: Job, seconds: Any) -> None:
    measured = seconds({64: 1.0, 128: 0.9, 256: 1.0})
    auto.plan()
    auto.passes("extract")
    first = stored(auto)
    assert (measured, batch_events(auto)) == ([64, 128, 256], [(128, "measured")])
    shutil.rmtree(auto.spec["store"])
    auto.plan()
    auto.passes("extract")
    assert (measured, batch_events(auto)) == ([64, 128, 256], [(128, "chosen before")])
    for unit, arrays in stored(auto).items():
        assert all((arrays[name] == first[unit][name]).all() for name in arrays), unit
    auto.spec["model"]["dtype"] = "bfloat16"  # another extractor
    auto.plan()
    auto.passes("extract")
    assert len(records(auto)) == 2


def test_a_number_is_never_measured(auto: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    plain = GradientCapture.gradients_of

    def watched(capture: GradientCapture, batch: Any, **named: Any) -> Any:
        tried.append(batch.size)
        return plain(capture, batch, **named)

    monkeypatch.setattr(GradientCapture, "gradients_of", watched)
    auto.spec["extraction"]["tokensPerBatch"] = 100
    auto.run()
    assert sum(tried) == 25 + 2 * 3, "each text once"
    assert not batch_events(auto)
    assert not records(auto)


def test_a_cpu_has_one_size_and_measures_nothing(auto: Job, seconds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "CPU_SIZES", (64,))
    measured = seconds({})
    auto.plan()
    auto.passes("extract")
    assert (measured, batch_events(auto), records(auto)) == ([], [(64, "not measured on a CPU")], [])
    manifest = Path(auto.passes("reduce")["manifest"])
    assert yaml.safe_load((manifest.parent / "spec.yaml").read_text())["spec"]["extraction"]["tokensPerBatch"] == "auto"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of more than 100 tokens does not fit."""
    plain = PassSketches.add

    def add(sketches: PassSketches, *layer: Any) -> None:
        plain(sketches, *layer)
        if sketches.batch.ids_BT.numel() > 100 and len(sketches.finished) > 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(PassSketches, "add", add)


@pytest.mark.usefixtures("memory")
def test_a_size_that_does_not_fit_is_not_taken(auto: Job, seconds: Any) -> None:
    measured = seconds({64: 1.0, 128: 0.5, 256: 0.2})
    auto.plan()
    auto.passes("extract")
    assert (measured, batch_events(auto)) == ([64, 128], [(64, "measured")])
    found = stored(auto)
    auto.spec["extraction"]["tokensPerBatch"] = 50
    assert_same_shards(found, single(auto))


@pytest.mark.usefixtures("memory")
def test_a_world_that_cannot_halve_a_pass_takes_half_the_size_in_its_next_attempt(
    auto: Job, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Passes.__init__
    monkeypatch.setattr(
        Passes, "__init__", lambda self, capture, **named: plain(self, capture, **{**named, "can_halve": False})
    )
    seconds({64: 1.0, 128: 0.5, 256: 0.2})
    auto.fails("extract", 75, "out of memory in a pass of", "run again", "at most 64 tokens")
    auto.passes("extract")
    assert batch_events(auto) == [(64, "chosen before")]
    auto.spec["extraction"]["tokensPerBatch"] = 128
    auto.spec["store"] = str(auto.folder / "store2")
    auto.fails("extract", 75, "set extraction.tokensPerBatch below")


def test_a_damaged_record_is_named(auto: Job, seconds: Any) -> None:
    seconds({64: 1.0, 128: 2.0})
    auto.plan()
    auto.passes("extract")
    (record,) = records(auto)
    record.write_text("{}")
    shutil.rmtree(auto.spec["store"])
    auto.fails("extract", 65, record.name, "delete that object")
