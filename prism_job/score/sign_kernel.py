"""The compiled loop that sums a quantised direction over the signs of rows. Does not read files or the spec.

numpy has no operation that adds where a bit is set. numba compiles this loop for the processor it runs on, once a process, or
takes it from a cache where a folder can be written. Sums within a block are of integers and blocks are added in a fixed order,
so every processor gives the same bits.

Shapes: N rows, S blocks of 256 dims, W = 32 S bytes of signs.
"""

import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.store.codec import BLOCK

LIMIT = 2**23 - 1
"""Largest absolute value of a quantised dim: 256 of them together stay within int32."""

_WORDS = BLOCK // 32
"""32-bit words of signs in a block. Read byte by byte, the loop is a third slower or more."""


def sign_sums(
    signs_NW: NDArray[np.uint8],
    scales_NS: NDArray[np.floating[Any]],
    quantised_D: NDArray[np.int32],
    steps_S: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Σ_s scale_ns step_s Σ_{d in s} ± quantised_d: the inner sums exact, the outer one in float64, in order. float64 [N].

    Args:
        scales_NS: float16 or float32.
        quantised_D: none above LIMIT in absolute value.
        steps_S: what 1 in `quantised_D` stands for, in each block.

    Raises:
        RequestError: see `compiled_loop`.
        ValueError: shapes that do not fit together; the loop itself checks no bounds.
    """
    num_rows, num_blocks = scales_NS.shape
    shapes = (signs_NW.shape, quantised_D.shape, steps_S.shape)
    expected = ((num_rows, num_blocks * BLOCK // 8), (num_blocks * BLOCK,), (num_blocks,))
    if shapes != expected:
        raise ValueError(
            f"signs, direction and steps of shapes {shapes} beside scales {scales_NS.shape}, not {expected}"
        )
    scores_N = np.empty(num_rows)
    compiled_loop()(
        np.ascontiguousarray(signs_NW, np.uint8).view(np.uint32),
        np.ascontiguousarray(scales_NS, np.float32),  # not every processor has half floats
        np.ascontiguousarray(quantised_D, np.int32),
        quantised_D.reshape(num_blocks, BLOCK).sum(axis=1, dtype=np.int32),
        np.ascontiguousarray(steps_S, np.float64),
        scores_N,
    )
    return scores_N


def _loop(
    words_NV: NDArray[np.uint32],
    scales_NS: NDArray[np.float32],
    quantised_D: NDArray[np.int32],
    block_sums_S: NDArray[np.int32],
    steps_S: NDArray[np.float64],
    scores_N: NDArray[np.float64],
) -> None:
    num_rows, num_blocks = scales_NS.shape
    for row in range(num_rows):
        score = 0.0
        for block in range(num_blocks):
            where_set = np.int32(0)
            for dim in range(BLOCK):
                bit = (words_NV[row, block * _WORDS + (dim >> 5)] >> (dim & 31)) & 1
                where_set += quantised_D[block * BLOCK + dim] & -bit
            # Σ ± q = 2 Σ_{set} q − Σ q. As int32 the inner loop is twice as fast as with 64 bits.
            signed = np.int32(2 * where_set - block_sums_S[block])
            score += signed * steps_S[block] * scales_NS[row, block]
        scores_N[row] = score


@cache
def compiled_loop() -> Callable[..., None]:
    """The loop as machine code that releases the GIL; one for the process.

    Raises RequestError: a system that forbids code made at run time, or a processor whose lowest byte does not come first.
    """
    fix = "run the reduce stage elsewhere, or extract with codec float16, which needs none"
    if sys.byteorder != "little":
        raise RequestError("scores of sign rows need a little-endian processor", where=platform.machine(), fix=fix)
    types = import_numba(fix).types
    # Arrays of a shard are read-only and start at any byte.
    argument_types = [
        types.Array(dtype, ndim, "C", readonly=True, aligned=False)
        for dtype, ndim in (
            (types.uint32, 2),
            (types.float32, 2),
            (types.int32, 1),
            (types.int32, 1),
            (types.float64, 1),
        )
    ]
    return compiled(_loop, types.void(*argument_types, types.float64[::1]), fix)


def import_numba(fix: str) -> Any:
    """The module. Raises RequestError: a system that forbids code made at run time."""
    try:
        import numba  # asks the system whether it may run code of its own
    except OSError as error:
        what = f"this system forbids code that is made at run time: {error}"
        raise RequestError(what, where=platform.node(), fix=fix) from error
    return numba


def compiled(loop: Callable[..., None], signature: Any, fix: str) -> Callable[..., None]:
    """The loop as machine code that releases the GIL. Raises RequestError as `import_numba` does."""
    njit = import_numba(fix).njit
    try:
        return njit(signature, nogil=True, error_model="numpy", cache=True)(loop)
    except Exception:  # no folder for a cache, no room in it, or a damaged one: compiled without it
        return njit(signature, nogil=True, error_model="numpy")(loop)
