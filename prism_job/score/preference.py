"""π: how much a model prefers the chosen response of a target pair (docs/architecture.md, Method).

Shapes: Q target pairs.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def preference(chosen_mean_nll_Q: Float64, rejected_mean_nll_Q: Float64) -> Float64:
    """π_q = p̄(y⁺) / (p̄(y⁺) + p̄(y⁻)), equations 1 and 2, with log p̄ = −(token-mean NLL).

    Computed as a sigmoid of the difference of log p̄: no probability is formed, so long responses cannot underflow.
    nan where a pair has no rejected response (weighting: uniform).
    """
    difference = np.asarray(rejected_mean_nll_Q, np.float64) - np.asarray(chosen_mean_nll_Q, np.float64)
    positive = difference >= 0
    small = np.exp(-np.abs(difference))
    return np.where(positive, 1 / (1 + small), small / (1 + small))


def mean_nll(nll_Q: NDArray[np.floating], tokens_Q: NDArray[np.integer]) -> Float64:
    """Token mean of summed NLLs; nan where there is no token."""
    tokens = tokens_Q.astype(np.float64)
    mean: Float64 = np.divide(nll_Q, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
    return mean
