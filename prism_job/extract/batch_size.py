"""Tokens of a micro-batch: the document's number, or for `auto` what this run chose before, or the best of a few sizes.

Does not know units, shards, or how a pass is computed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prism_job.extract.distributed.world import World
from prism_job.extract.tokenise import MAX_EXAMPLES_PER_BATCH, Encoded
from prism_job.plan.batch_record import Setting, read_batch_size, write_batch_size
from prism_job.progress import event
from prism_job.spec.document import SelectionRun
from prism_job.spec.extraction import AUTO

CPU_SIZES = (1024,)
"""One size, so that nothing is measured: others were no faster by more than noise (docs/performance.md), and measuring costs as
much as some 25 rows. More tokens could end a pod: a CPU's lack of memory raises no error."""

GPU_SIZES = tuple(2**power for power in range(9, 16))

MIN_GAIN = 0.03
"""Share of a token's time that a doubling must save: noise decides seldom, and memory is not spent for nothing."""

MARGIN = 0.2
"""Share of a GPU's memory left free: other texts of as many tokens can take more than those that were measured."""


class BatchSize:
    """The size of a rank's micro-batches.

    With a number nothing is measured. What `auto` has chosen is kept beside the plan: a run that is resumed or repeated takes
    it again on the same hardware, and so do its other ranks and groups, unless they measured at the same moment.
    """

    def __init__(self, run: SelectionRun, extractor: str, world: World) -> None:
        self.run, self.world = run, world
        self.sizes = GPU_SIZES if world.device.type == "cuda" else CPU_SIZES
        self.is_auto = run.spec.extraction.tokens_per_batch == AUTO
        ranks = world.size if world.sharded else 1
        offload = run.spec.extraction.deepspeed.offload
        self.setting = Setting(extractor=extractor, device=_device_name(world.device), ranks=ranks, offload=offload)
        self.current = run.spec.extraction.expected_tokens_per_batch

    def choose(self, texts: Callable[[], list[Encoded]], seconds_of: Callable[[list[Encoded]], float | None]) -> None:
        """Set `current`. Collective where the world shares its weights: then all ranks choose the same.

        Args:
            texts: some of those that will be extracted; on all ranks the same.
            seconds_of: what a pass over these texts takes; None where they do not fit into memory.
        """
        if not self.is_auto:
            return
        started, how = time.monotonic(), "chosen before"
        size = self._recorded()
        if not size and len(self.sizes) == 1:
            size, how = self.sizes[0], "not measured on a CPU"
        if not size:
            chosen, how = self.measure(texts(), seconds_of), "measured"
            size = self._recorded() or chosen  # another rank or group may have been faster
            if self.world.rank == 0 or not self.world.sharded:
                write_batch_size(self.run, self.setting, size)
        self.current = size
        event("batch", tokens=size, how=how, seconds=round(time.monotonic() - started, 3))

    def halve(self) -> int:
        """Half of the current size, for the next attempt of this run."""
        self.current = max(1, self.current // 2)
        write_batch_size(self.run, self.setting, self.current)
        return self.current

    def _recorded(self) -> int:
        """0: nothing."""
        (size,) = self.world.largest(read_batch_size(self.run, self.setting) or 0)
        return size

    def measure(self, texts: list[Encoded], seconds_of: Callable[[list[Encoded]], float | None]) -> int:
        """The size to take, by passes of the longest of these texts."""
        longest_first = sorted((text.ids for text in texts), key=len)[::-1]
        if not longest_first:
            return self.current
        longest = len(longest_first[0])
        sizes = [size for size in self.sizes if size >= longest] or [self.sizes[-1]]

        def measure(size: int) -> Measured | None:
            self.current = size
            batch = _filled(longest_first, min(max(1, size // longest), MAX_EXAMPLES_PER_BATCH))
            memory = _Memory(self.world.device)
            seconds = seconds_of(batch)
            return None if seconds is None else Measured(seconds / (len(batch) * longest), memory.double_fits())

        return largest_that_pays(sizes, measure, self.world)


@dataclass(frozen=True)
class Measured:
    """A size's passes. `double_fits`: whether, by what they took, twice as many tokens would fit into memory."""

    seconds_per_token: float
    double_fits: bool


def largest_that_pays(sizes: Sequence[int], measure: Callable[[int], Measured | None], world: World) -> int:
    """Of these doubling sizes the last that fits and saves MIN_GAIN over the one before it.

    The ranks of a world that shares its weights measure the same sizes and get the same answer.

    Args:
        measure: the passes of a size; None where they do not fit into memory.
    """
    chosen, best = sizes[0], float("inf")
    for size in sizes:
        measured = measure(size)
        pays = measured is not None and measured.seconds_per_token < best * (1 - MIN_GAIN)
        is_worse, is_last = world.any_rank(not pays, measured is None or not measured.double_fits)
        if is_worse:
            break
        assert measured is not None
        chosen, best = size, measured.seconds_per_token
        if is_last:
            break
    return chosen


def _filled(texts: list[list[int]], num_texts: int) -> list[Encoded]:
    """The first texts, and again where they are too few. Each token carries loss, the most that a pass can be asked."""
    chosen = [texts[number % len(texts)] for number in range(num_texts)]
    return [Encoded(ids, [False] + [True] * (len(ids) - 1)) for ids in chosen]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


class _Memory:
    """What passes take of a GPU's memory; of a CPU's nothing is known, and everything counts as fitting."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def double_fits(self) -> bool:
        """Whether twice what was taken since the start fits beside what was there."""
        if self.device.type != "cuda":
            return True
        peak = torch.cuda.max_memory_allocated(self.device)
        room = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return peak + (peak - self.before) <= (1 - MARGIN) * room
