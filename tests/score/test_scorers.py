"""Laws of the scores of stored bytes, against plain dot products and loops.

Shapes: N rows, D dims.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_job.errors import RequestError
from prism_job.score import sign_kernel
from prism_job.score.scorers import SignScorer, finish, scorer
from prism_job.score.sign_kernel import LIMIT, sign_sums
from prism_job.store import codec

DIMS = 2048


@cache
def made_up_rows() -> np.ndarray:
    random = np.random.default_rng(4)
    sizes = np.exp(random.normal(0, 3, (150, 1)))
    rows_ND = (random.standard_t(3, (150, DIMS)) * sizes).astype(np.float32)
    rows_ND[17] = 0
    rows_ND[18] *= np.float32(1e20)
    rows_ND[19] *= np.float32(1e-20)
    return rows_ND


def made_up_direction_D() -> np.ndarray:
    return np.random.default_rng(5).standard_normal(DIMS) * np.exp(np.random.default_rng(6).normal(0, 2, DIMS))


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_a_score_is_the_dot_product_with_the_decoded_row(kind: str) -> None:
    direction_D, arrays = made_up_direction_D(), codec.encode(kind, made_up_rows())
    found = scorer(kind, direction_D)(arrays)
    decode = codec.decode_sign if kind == "sign" else codec.decode_float16
    decoded_ND = decode(arrays).astype(np.float64)
    assert found.shape == (len(decoded_ND),)
    for score, row in zip(found, decoded_ND, strict=True):
        terms = row * direction_D
        # The sign scorer's own bound is the next test's; decoding rounds to float32.
        assert abs(score - math.fsum(terms)) <= 1e-6 * np.abs(terms).sum()
    assert found[17] == 0


def part_of(arrays: dict[str, np.ndarray], places: Any) -> dict[str, np.ndarray]:
    return {name: array[places] for name, array in arrays.items()}


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_a_score_is_the_same_bits_whatever_rows_stand_beside_it(kind: str) -> None:
    score_rows, arrays = scorer(kind, made_up_direction_D()), codec.encode(kind, made_up_rows())
    wanted = score_rows(arrays)
    random = np.random.default_rng(7)
    for size in (1, 2, 63, 64, 65, 128, 150):
        for places in (np.arange(size), random.permutation(150)[:size], random.integers(0, 150, size)):
            assert score_rows(part_of(arrays, places)).tobytes() == wanted[places].tobytes()
    for place in range(150):
        assert score_rows(part_of(arrays, slice(place, place + 1)))[0] == wanted[place]
    assert score_rows(part_of(arrays, slice(0, 0))).shape == (0,)


def hostile_directions_KD() -> list[np.ndarray]:
    """Blocks of unlike sizes, empty ones, an outlier a block, all dims as large as the largest, tiny and huge ones."""
    random = np.random.default_rng(8)
    plain = random.standard_normal(DIMS)
    unlike = plain * np.repeat(10.0 ** random.uniform(-30, 5, DIMS // codec.BLOCK), codec.BLOCK)
    empty = np.where(np.arange(DIMS) < 2 * codec.BLOCK, 0, plain)
    outlier = np.where(np.arange(DIMS) % codec.BLOCK == 77, 1e6, plain)
    equal = np.where(plain > 0, 3.7, -3.7)
    return [plain, unlike, empty, outlier, equal, plain * 1e-300, plain * 1e250, np.full(DIMS, 5e-324), np.zeros(DIMS)]


@pytest.mark.parametrize("number", range(len(hostile_directions_KD())))
def test_a_score_is_off_by_half_a_step_of_its_blocks_at_most(number: int) -> None:
    direction_D, arrays = hostile_directions_KD()[number], codec.encode_sign(made_up_rows())
    found = SignScorer(direction_D)(arrays)
    signs_ND = np.unpackbits(arrays["signs"], axis=1, bitorder="little") * 2.0 - 1
    scales_NS = arrays["scales"].astype(np.float64) * arrays["unit"].astype(np.float64)[:, None]
    largest_S = np.abs(direction_D).reshape(-1, codec.BLOCK).max(axis=1)
    for score, signs_D, scales_S in zip(found, signs_ND, scales_NS, strict=True):
        row_D = signs_D * np.repeat(scales_S, codec.BLOCK)
        wanted = math.fsum(row_D * direction_D)
        # 256 dims of a block, each off by half of 2^-23 of the largest; the rest is float64's own rounding.
        bound = math.fsum(codec.BLOCK * scales_S * largest_S / (2 * (2**23 - 1)))
        assert abs(score - wanted) <= bound + 1e-13 * np.abs(row_D * direction_D).sum() + 1e-320
        sizes = np.linalg.norm(row_D) * (np.linalg.norm(direction_D / largest_S.max()) if largest_S.max() else 0)
        assert bound <= 2**-20 * 1.001 * sizes * largest_S.max() + 1e-320


def test_sums_at_the_edge_of_int32_are_exact() -> None:
    # All of a block's dims at the limit, with and against the signs: ± 256 (2^23 - 1), which int32 just holds.
    quantised_D = np.full(512, LIMIT, np.int32)
    signs_NW = np.repeat(np.array([[255, 0], [0, 255], [255, 255], [0, 0]], np.uint8), 32, axis=1)
    found = sign_sums(signs_NW, np.ones((4, 2), np.float16), quantised_D, np.array([1.0, 0.5]))
    assert (found / (256 * LIMIT)).tolist() == [0.5, -0.5, 1.5, -1.5]


ON_A_PLAIN_PROCESSOR = """
import sys
import numpy as np
from numba.core.caching import CacheImpl
if sys.argv[2] == "no folder":
    CacheImpl._locator_classes = []
from prism_job.score.sign_kernel import sign_sums
given = np.load(sys.argv[1])
sys.stdout.buffer.write(sign_sums(*[given[name] for name in ("signs", "scales", "quantised", "steps")]).tobytes())
"""


@pytest.mark.parametrize("cache", ["a folder", "no folder"])
def test_sums_are_those_of_plain_loops_on_any_processor_with_and_without_a_cache(cache: str, tmp_path: Path) -> None:
    random, (num_rows, num_blocks) = np.random.default_rng(9), (5, 3)
    signs_NW = random.integers(0, 256, (num_rows, num_blocks * 32), np.uint8)
    scales_NS, steps_S = random.random((num_rows, num_blocks)).astype(np.float16), random.random(num_blocks)
    quantised_D = random.integers(-LIMIT, LIMIT + 1, num_blocks * 256).astype(np.int32)
    wanted = []
    for row in range(num_rows):
        bits, score = np.unpackbits(signs_NW[row], bitorder="little").tolist(), 0.0
        for block in range(num_blocks):
            dims = range(256 * block, 256 * block + 256)
            signed = sum(int(quantised_D[dim]) * (1 if bits[dim] else -1) for dim in dims)
            score += signed * float(steps_S[block]) * float(scales_NS[row, block])
        wanted.append(score)
    assert sign_sums(signs_NW, scales_NS, quantised_D, steps_S).tolist() == wanted
    given = tmp_path / "given.npz"
    np.savez(given, signs=signs_NW, scales=scales_NS, quantised=quantised_D, steps=steps_S)
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ON_A_PLAIN_PROCESSOR, str(given), cache]
    found = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True).stdout
    assert np.frombuffer(found).tolist() == wanted
    assert any(tmp_path.rglob("*.nbi")) == (cache == "a folder")


def test_a_system_that_forbids_machine_code_and_a_big_endian_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise OSError("no memory may be executed")

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "numba")  # the next import asks the system again
        patch.setattr("llvmlite.binding.check_jit_execution", forbidden)
        with pytest.raises(RequestError, match="no memory may be executed"):
            sign_kernel.compiled_loop.__wrapped__()
    monkeypatch.setattr(sign_kernel.sys, "byteorder", "big")
    with pytest.raises(RequestError, match="little-endian"):
        sign_kernel.compiled_loop.__wrapped__()


@pytest.mark.parametrize("name", ["signs", "scales", "unit"])
def test_arrays_that_do_not_fit_together_are_refused_and_not_read_past(name: str) -> None:
    arrays = codec.encode_sign(made_up_rows())
    score_rows = SignScorer(made_up_direction_D())
    for change in (lambda array: array[:-1], lambda array: array[..., :-1], lambda array: np.repeat(array, 2, axis=-1)):
        with pytest.raises(ValueError, match=r"shape|units"):
            score_rows({**arrays, name: change(arrays[name])})


@pytest.mark.parametrize("score", ["influence", "cosine"])
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_finishing_divides_by_the_norm_or_by_the_tokens_or_by_nothing(score: str, loss: str) -> None:
    raw, tokens, norms = [6.0, -8.0, 5.0, 0.0, 3.0], [3, 4, 1, 0, 2], [2.0, 0.5, 0.0, 0.0, 4.0]
    found = finish(np.array(raw), np.array(tokens, np.int32), np.array(norms, np.float32), score, loss)
    for value, number, size, finished in zip(raw, tokens, norms, found, strict=True):
        divisor = size if score == "cosine" else number if loss == "mean" else 1
        wanted = value / divisor if divisor else 0
        assert finished == wanted
