"""The inner product of each stored row with a direction, read straight from the stored bytes, one scorer a codec; or its cosine
to the nearest of some responses.

Shapes: N rows, D dims, S = D / 256 blocks, B = 256 dims of a block; H hidden dims, Q responses.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.store.codec import BLOCK

Float64 = NDArray[np.float64]


class SignScorer:
    """Inner products with sign rows: those of the direction in integers of 24 bits, a step for each block of 256 dims.

    A step is 1 / (2^23 - 1) of the block's largest absolute value, so that a dim is off by half of that at most, and a score,
    with m_s that largest value, by Σ_s 256 scale_s m_s 2^-24 <= 2^-20 |row| |direction|. The result of a row does not depend
    on its neighbours.
    """

    def __init__(self, direction_D: Float64) -> None:
        from prism_job.score.sign_kernel import LIMIT, compiled_loop, sign_sums  # imports numba, for this codec alone

        compiled_loop()  # here, before threads ask for it
        self._sign_sums = sign_sums
        blocks_SB = direction_D.reshape(-1, BLOCK)
        # Scaled to 1, so that no direction, however damped, leaves the range of float64 in what follows.
        self.scale = float(np.abs(direction_D).max(initial=0.0)) or 1.0
        relative_SB = blocks_SB / self.scale
        self.steps_S = np.abs(relative_SB).max(axis=1) / LIMIT
        steps_S1 = np.where(self.steps_S > 0, self.steps_S, 1.0)[:, None]
        self.quantised_D = np.rint(relative_SB / steps_S1).clip(-LIMIT, LIMIT).astype(np.int32).reshape(-1)

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> Float64:
        scores_N = self._sign_sums(arrays["signs"], arrays["scales"], self.quantised_D, self.steps_S)
        if arrays["unit"].shape != scores_N.shape:
            raise ValueError(f"units of shape {arrays['unit'].shape} beside {len(scores_N)} rows")
        return scores_N * (arrays["unit"].astype(np.float64) * self.scale)


class Float16Scorer:
    """Inner products with float16 rows, in float64."""

    def __init__(self, direction_D: Float64) -> None:
        self.direction_D = direction_D

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> Float64:
        scores = np.array([np.dot(row.astype(np.float64), self.direction_D) for row in arrays["values"]])
        return scores.reshape(-1) * arrays["unit"].astype(np.float64)


class CosineScorer:
    """The largest inner product of each float16 row, scaled to length 1, with these rows, in float64.

    One matrix product of many rows: the last bits of a result may depend on the other rows of its unit.
    """

    def __init__(self, compared_QH: Float64) -> None:
        self.compared_QH = compared_QH

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> Float64:
        num_rows = max(1, PRODUCTS // len(self.compared_QH))
        values_NH, largest_N = arrays["values"], np.empty(len(arrays["values"]))
        for start in range(0, len(values_NH), num_rows):
            rows_NH = scaled_to_one(values_NH[start : start + num_rows].astype(np.float64))
            largest_N[start : start + num_rows] = (rows_NH @ self.compared_QH.T).max(axis=1)
        return largest_N


PRODUCTS = 2**21
"""Inner products that are held at a time: 16 MiB."""


def scaled_to_one(rows_NH: Float64) -> Float64:
    """Each row divided by its length; a zero row stays zero."""
    norm_N1 = np.linalg.norm(rows_NH, axis=1, keepdims=True)
    scaled: Float64 = np.divide(rows_NH, norm_N1, out=np.zeros_like(rows_NH), where=norm_N1 > 0)
    return scaled


def scorer(codec: str, direction_D: Float64) -> SignScorer | Float16Scorer:
    return SignScorer(direction_D) if codec == "sign" else Float16Scorer(direction_D)


def finish(raw_N: Float64, tokens_N: NDArray[np.int32], norm_N: NDArray[np.float32], score: str, loss: str) -> Float64:
    """The score that the spec asks for: cosine divides by the row's norm (LESS), loss `mean` by its response tokens."""
    if score == "cosine":
        divisor = norm_N.astype(np.float64)
    else:
        divisor = tokens_N.astype(np.float64) if loss == "mean" else np.ones(len(raw_N))
    return np.divide(raw_N, divisor, out=np.zeros_like(raw_N), where=divisor > 0)
