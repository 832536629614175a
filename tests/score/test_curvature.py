"""Laws of the curvature, against dense matrices.

Shapes: L layers, P projected dims a side.
"""

from __future__ import annotations

import numpy as np
import pytest

from prism_job.score.curvature import Factors, damping_value, solve, unpack

DIM = 4


def made_up_factors(num_tokens: int, seed: int = 0, layers: int = 3) -> Factors:
    """Sums over tokens; layers of unlike size, as layers are."""
    random = np.random.default_rng(seed)
    sizes = np.array([1.0, 10.0, 0.1])[:layers, None, None]
    a_LTP = random.standard_normal((layers, num_tokens, DIM)) * [1, 2, 0.5, 0.1] * sizes
    b_LTP = random.standard_normal((layers, num_tokens, DIM)) * [0.3, 1, 1, 2]
    return Factors(a_LTP.transpose(0, 2, 1) @ a_LTP, b_LTP.transpose(0, 2, 1) @ b_LTP, num_tokens)


def dense_curvature(factors: Factors) -> list[np.ndarray]:
    """H of each layer, explicitly: A ⊗ B acts on the columns of a sketch one below the other."""
    return [
        np.kron(inputs / factors.num_tokens, outputs / factors.num_tokens)
        for inputs, outputs in zip(factors.inputs_LPP, factors.outputs_LPP, strict=True)
    ]


def dense_solve(direction_LPP: np.ndarray, factors: Factors, lam: float) -> np.ndarray:
    solved = []
    for sketch, curvature in zip(direction_LPP, dense_curvature(factors), strict=True):
        columns = np.linalg.solve(curvature + lam * np.eye(DIM * DIM), sketch.flatten(order="F"))
        solved.append(columns.reshape(DIM, DIM, order="F"))
    return np.array(solved)


def made_up_direction(layers: int = 3) -> np.ndarray:
    return np.random.default_rng(8).standard_normal((layers, DIM, DIM))


@pytest.mark.parametrize("num_tokens", [200, 2], ids=["full rank", "fewer tokens than dims"])
@pytest.mark.parametrize("damping", [0.001, 0.1, 10.0, 1e12])
def test_the_solve_is_that_of_the_dense_matrix(num_tokens: int, damping: float) -> None:
    factors, directions = made_up_factors(num_tokens), [made_up_direction(), made_up_direction()[::-1]]
    solved = solve(np.stack(directions), factors, damping)
    for direction_LPP, found in zip(directions, solved, strict=True):
        wanted = dense_solve(direction_LPP, factors, damping_value(factors, damping))
        for layer in range(3):
            # The dense matrix's condition is at most 1e6 here; times 1e-16, and some room.
            assert np.linalg.norm(found[layer] - wanted[layer]) < 1e-9 * np.linalg.norm(wanted[layer])
        if damping == 1e12:  # without end it leaves the plain direction: the largest eigenvalue is under 50 mean ones
            plain = found * damping_value(factors, damping)
            assert np.linalg.norm(plain - direction_LPP) < 50 / damping * np.linalg.norm(direction_LPP) + 1e-12


def test_damping_is_in_units_of_the_mean_eigenvalue_over_all_layers() -> None:
    factors = made_up_factors(200)
    eigenvalues = np.concatenate([np.linalg.eigvalsh(curvature) for curvature in dense_curvature(factors)])
    assert damping_value(factors, 0.3) == pytest.approx(0.3 * eigenvalues.mean(), rel=1e-12)


def test_factors_of_any_split_merge_to_the_whole() -> None:
    parts = [made_up_factors(num_tokens, seed) for seed, num_tokens in enumerate((3, 50, 8))]
    merged = Factors(np.zeros((3, DIM, DIM)), np.zeros((3, DIM, DIM)), 0)
    for part in parts:
        merged.merge(part)
    assert merged.num_tokens == 61
    np.testing.assert_allclose(
        merged.inputs_LPP, sum(part.inputs_LPP for part in parts), rtol=1e-13
    )  # 1e-16 an addition
    np.testing.assert_allclose(
        merged.outputs_LPP, sum(part.outputs_LPP for part in parts), rtol=1e-13
    )  # 1e-16 an addition


def test_upper_halves_unpack_to_the_symmetric_matrices() -> None:
    factors = made_up_factors(20)
    uppers = np.array([[m[i, j] for i in range(DIM) for j in range(i, DIM)] for m in factors.inputs_LPP], np.float32)
    np.testing.assert_array_equal(unpack(uppers, DIM), factors.inputs_LPP.astype(np.float32))
