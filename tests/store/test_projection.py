"""Laws of the random numbers and of the stored form: the same everywhere, unbiased, and no size of row is out of range.

Shapes: N rows, P projected dims a side, M = P² numbers of one layer's sketch, D folded dims.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prism_job.projection import FoldTable, fold, fold_table
from prism_job.store import codec
from tests.oracle import rademacher

QUERY = "model.layers.0.self_attn.q_proj"
GPT2 = "transformer.h.1.mlp.c_fc"

GOLDEN_RADEMACHER = {
    (0, QUERY, "a", 576, 64): "1a76d0c2b85f41f7fd221ba551ac65468d9b097b0bc74bc9bea5b2e84fa810f8",
    (7, QUERY, "b", 192, 64): "df1cfb8730f310258412d66450ae059846bcf3e818256428779b2a237e6376e5",
    (0, GPT2, "a", 33, 5): "b9c786b2f9bb71325ac03327561d759aa536b806fa2981c3a5fa73fb19167eea",
}
GOLDEN_FOLD = {
    (0, QUERY, 64, 65_536): "20dd3dc878d8202d9def493cd6676189cc446aab920a8eb8fa96de1ac02bc56e",
    (7, GPT2, 6, 256): "5ff9604ea7e66dd7a57a5e292b473a262decefa19655cc9e7bd6457e29502930",
}
"""A change here makes every store in the world unreadable: it needs a new projection.VERSION."""


def hash_of(thing: np.ndarray | FoldTable) -> str:
    if isinstance(thing, FoldTable):
        return hashlib.sha256(thing.bucket_M.tobytes() + thing.sign_M.tobytes()).hexdigest()
    return hashlib.sha256(thing.tobytes()).hexdigest()


# The random numbers


def test_projections_and_fold_tables_equal_the_golden_ones() -> None:
    for key, golden in GOLDEN_RADEMACHER.items():
        matrix = rademacher(*key)
        assert (matrix.shape, matrix.dtype, hash_of(matrix)) == (key[3:], np.float32, golden)
    for fold_key, golden in GOLDEN_FOLD.items():
        table = fold_table(*fold_key)
        assert (table.bucket_M.dtype, table.sign_M.dtype, hash_of(table)) == (np.int64, np.float32, golden)


def test_another_process_draws_the_same_numbers() -> None:
    # Another hash seed and another order of calls: neither may matter.
    program = (
        "from tests.store.test_projection import *\n"
        "print([hash_of(fold_table(*key)) for key in reversed(GOLDEN_FOLD)])\n"
        "print([hash_of(rademacher(*key)) for key in reversed(GOLDEN_RADEMACHER)])\n"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONHASHSEED": "12345", "PATH": ""}
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, check=True)
    folds, matrices = done.stdout.splitlines()
    assert folds == str([*reversed(GOLDEN_FOLD.values())])
    assert matrices == str([*reversed(GOLDEN_RADEMACHER.values())])


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("layer", [QUERY, GPT2])
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(("dim_in", "dim_out"), [(10, 3), (3, 10), (11, 3)])
def test_a_projection_is_bits_of_shake_128_read_one_by_one(
    seed: int, layer: str, side: str, dim_in: int, dim_out: int
) -> None:
    """Of a text that holds seed, layer, side and dims: each of them changes the whole projection."""
    bits = hashlib.shake_128(f"prism-projection/1|{seed}|{layer}|{side}|{dim_in}x{dim_out}".encode()).digest(8)
    matrix = rademacher(seed, layer, side, dim_in, dim_out)
    for place, value in enumerate(matrix.reshape(-1)):
        sign = 1 if bits[place // 8] >> (place % 8) & 1 else -1
        assert value == np.float32(sign) / np.float32(dim_out**0.5)


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("layer", [QUERY, GPT2])
@pytest.mark.parametrize(("dim", "fold_dims"), [(5, 64), (6, 64), (5, 128)])
def test_a_fold_table_is_words_of_shake_128_read_one_by_one(seed: int, layer: str, dim: int, fold_dims: int) -> None:
    text = f"prism-projection/1|{seed}|{layer}|fold|{dim}x{dim}|{fold_dims}"
    words = np.frombuffer(hashlib.shake_128(text.encode()).digest(4 * dim * dim), "<u4").astype(np.int64)
    table = fold_table(seed, layer, dim, fold_dims)
    assert table.bucket_M.tolist() == (words % fold_dims).tolist()
    assert table.sign_M.tolist() == np.where(words >= 2**31, 1, -1).tolist()


# Unbiased


def assert_mean_is(estimates: np.ndarray, truth: float) -> None:
    """The mean lies within 4 of its own standard errors, and those are small enough for a wrong factor to show."""
    standard_error = estimates.std(ddof=1) / len(estimates) ** 0.5
    assert standard_error < 0.05 * abs(truth)
    assert abs(estimates.mean() - truth) < 4 * standard_error


@pytest.mark.parametrize("other_is_same", [False, True], ids=["two gradients", "one gradient's norm"])
def test_projected_inner_products_are_unbiased(other_is_same: bool) -> None:
    random = np.random.default_rng(0)
    first = random.standard_normal((12, 20))
    second = first if other_is_same else first + random.standard_normal((12, 20))
    estimates = []
    for seed in range(3000):
        side_a, side_b = rademacher(seed, QUERY, "a", 20, 4), rademacher(seed, QUERY, "b", 12, 4)
        estimates.append(((side_b.T @ first @ side_a) * (side_b.T @ second @ side_a)).sum())
    assert_mean_is(np.array(estimates), float((first * second).sum()))


def test_folded_inner_products_are_unbiased() -> None:
    random = np.random.default_rng(1)
    first = random.standard_normal((2, 36))
    second = first + random.standard_normal((2, 36))
    estimates = [fold(first, [QUERY, GPT2], seed, 16) @ fold(second, [QUERY, GPT2], seed, 16) for seed in range(2000)]
    assert_mean_is(np.array(estimates), float((first * second).sum()))


def test_a_fold_is_the_product_with_a_dense_sketch_matrix() -> None:
    layers, dims = [QUERY, GPT2, "another"], 64
    sketches_LM = np.random.default_rng(2).standard_normal((3, 49))
    wanted = np.zeros(dims)
    for layer, sketch_M in zip(layers, sketches_LM, strict=True):
        table = fold_table(5, layer, 7, dims)
        dense_MD = np.zeros((49, dims))
        dense_MD[np.arange(49), table.bucket_M] = table.sign_M
        wanted += sketch_M @ dense_MD
    # Sums of a few float64 in another order.
    np.testing.assert_allclose(fold(sketches_LM, layers, 5, dims), wanted, rtol=0, atol=1e-14)


# The codecs

HALF_RELATIVE, HALF_ABSOLUTE = 2.0**-11, 2.0**-25
"""float16 rounds to 11 bits, and under 2⁻¹⁴ to multiples of 2⁻²⁴: half a step of each."""
SINGLE = 4 * 2.0**-24
DECODERS = {"sign": codec.decode_sign, "float16": codec.decode_float16}
"""float32 rounding of the unit, of the quotient and of the product."""


def made_up_rows(num_rows: int = 12, dims: int = 1024) -> np.ndarray:
    """Heavy tails, blocks of unlike size: what gradients look like."""
    random = np.random.default_rng(3)
    sizes = np.exp(random.normal(0, 2, (num_rows, dims // 256, 1))).repeat(256, axis=2).reshape(num_rows, dims)
    return (random.standard_t(3, (num_rows, dims)) * sizes).astype(np.float32)


def test_sign_codec_keeps_the_sign_and_the_mean_size_of_each_block() -> None:
    rows_ND = made_up_rows()
    rows_ND[0, :7] = 0.0  # zero counts as positive
    decoded_ND = codec.decode_sign(codec.encode_sign(rows_ND))
    assert decoded_ND.dtype == np.float32
    for row, decoded in zip(rows_ND, decoded_ND, strict=True):
        sizes = [float(np.abs(row[start : start + 256].astype(np.float64)).mean()) for start in range(0, len(row), 256)]
        for place, value in enumerate(row):
            size = sizes[place // 256]
            bound = size * (HALF_RELATIVE + SINGLE) + max(sizes) * HALF_ABSOLUTE
            assert abs(decoded[place] - (size if value >= 0 else -size)) <= bound


def test_a_sign_row_takes_one_bit_per_dim_and_one_scale_per_block() -> None:
    arrays = codec.encode_sign(made_up_rows(dims=1024))
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "signs": ("uint8", (12, 128)),
        "scales": ("float16", (12, 4)),
        "unit": ("float32", (12,)),
    }


def test_float16_codec_stays_within_half_precision() -> None:
    rows_ND = made_up_rows().astype(np.float64)
    decoded_ND = codec.decode_float16(codec.encode_float16(rows_ND.astype(np.float32)))
    assert decoded_ND.dtype == np.float32
    unit_N1 = np.abs(rows_ND).max(axis=1, keepdims=True)
    assert (np.abs(decoded_ND - rows_ND) <= np.abs(rows_ND) * (HALF_RELATIVE + SINGLE) + unit_N1 * HALF_ABSOLUTE).all()


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_zero_rows_and_unusable_rows_are_stored_in_the_form_of_others_and_decode_to_zero(kind: str) -> None:
    rows_ND = made_up_rows()
    rows_ND[[2, 5]] = 0.0
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        arrays = codec.encode(kind, rows_ND)
    decoded_ND = DECODERS[kind](arrays)
    assert (decoded_ND[[2, 5]] == 0).all()
    assert (decoded_ND[[1, 3]] != 0).any()
    unusable = codec.zeros(kind, len(rows_ND), rows_ND.shape[1])
    assert [(name, a.dtype, a.shape) for name, a in unusable.items()] == [
        (n, a.dtype, a.shape) for n, a in arrays.items()
    ]
    assert (DECODERS[kind](unusable) == 0).all()


@pytest.mark.parametrize("size", [1e20, 1e-20, 1e30, 1e-30])
@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_huge_and_tiny_rows_keep_their_relative_precision(kind: str, size: float) -> None:
    plain = made_up_rows().astype(np.float64)
    rows_ND = (plain * size).astype(np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        decoded_ND = DECODERS[kind](codec.encode(kind, rows_ND))
    wanted_ND = DECODERS[kind](codec.encode(kind, plain.astype(np.float32))).astype(np.float64) * size
    assert np.isfinite(decoded_ND).all()
    unit_N1 = np.abs(wanted_ND).max(axis=1, keepdims=True)
    # One step of float16 apart, where rounding of the scaled row falls on the other side.
    bound = np.abs(wanted_ND) * (2 * HALF_RELATIVE + SINGLE) + unit_N1 * 2 * HALF_ABSOLUTE
    assert (np.abs(decoded_ND - wanted_ND) <= bound).all()


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_scaling_a_row_by_a_power_of_two_changes_only_its_unit(kind: str) -> None:
    rows_ND = made_up_rows()
    plain, scaled = codec.encode(kind, rows_ND), codec.encode(kind, rows_ND * np.float32(2.0**40))
    for name in plain:
        factor = 2.0**40 if name == "unit" else 1
        np.testing.assert_array_equal(scaled[name], plain[name] * np.asarray(factor, plain[name].dtype), err_msg=name)


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_a_rows_bytes_do_not_depend_on_the_rows_beside_it(kind: str) -> None:
    rows_ND = made_up_rows(num_rows=40, dims=256 * 9)
    together = codec.encode(kind, rows_ND)
    for size in (1, 7, 13):
        for start in range(0, len(rows_ND), size):
            part = slice(start, start + size)
            for name, array in codec.encode(kind, rows_ND[part]).items():
                assert array.tobytes() == together[name][part].tobytes(), name
