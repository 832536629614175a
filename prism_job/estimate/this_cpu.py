"""How fast this machine's CPU multiplies matrices: measured in a moment, since no data sheet names it."""

import os
import time

import torch

from prism_job.estimate.costs import Gpu

SIZE = 512
"""Rows and columns: about the tokens of a micro-batch and the width of a small model."""

SECONDS = 0.2
"""For each type; the fastest product counts, as the peaks of cards do."""


def measure_cpu() -> Gpu:
    """As a card: its peaks are those of a product of two matrices, with as many threads as torch takes; its memory is all."""
    return Gpu(
        matrix_flops=_flops_per_second(torch.bfloat16),
        float32_flops=_flops_per_second(torch.float32),
        memory_bytes=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    )


def _flops_per_second(dtype: torch.dtype) -> float:
    matrix = torch.ones(SIZE, SIZE, dtype=dtype)
    fastest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - before)
    return 2 * SIZE**3 / fastest
