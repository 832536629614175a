"""How much the reference model prefers each target's wanted response, and the direction that follows (DESIGN, section 2).

Shapes: Q target pairs, L layers, M = P² numbers of one layer's sketch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def preference(chosen_mean_nll_Q: Float64, rejected_mean_nll_Q: Float64) -> Float64:
    """π_q = p̄(y⁺) / (p̄(y⁺) + p̄(y⁻)), equations 1 and 2, with log p̄ = −(token-mean NLL).

    A sigmoid of the difference of log p̄: no probability is formed, so long responses cannot underflow.
    """
    difference = np.asarray(rejected_mean_nll_Q, np.float64) - np.asarray(chosen_mean_nll_Q, np.float64)
    positive = difference >= 0
    small = np.exp(-np.abs(difference))
    return np.where(positive, 1 / (1 + small), small / (1 + small))


def target_weights(weighting: str, preference_Q: Float64) -> Float64:
    """Weight of each pair in the direction: π_q (PRISM) or 1 (the baseline it must beat)."""
    return preference_Q if weighting == "preference" else np.ones_like(preference_Q)


def contributions(weighted_dots_Q: Float64) -> Float64:
    """Share of each pair in the direction: its weighted inner product with it, over the sum; they add up to 1.

    Args:
        weighted_dots_Q: π_q ⟨ḡ(q,y⁺) − ḡ(q,y⁻), g⟩; their sum is |Q| ‖g‖².
    """
    total = float(weighted_dots_Q.sum())
    return weighted_dots_Q / total if total > 0 else np.zeros_like(weighted_dots_Q)
