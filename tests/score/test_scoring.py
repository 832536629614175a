"""Laws of the reduction: preferences, curvature, scores and selection against slow twins, and the truth they stand for.

The last part trains a tiny model for one small step and looks whether the preference moves as the score says.

Shapes: N rows, Q target pairs, D dims, L layers, P projected dims a side.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_job import projection
from prism_job.errors import RequestError
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.tokenise import Encoded, collate, encode_response
from prism_job.score import sign_kernel
from prism_job.score.column import Column
from prism_job.score.curvature import Factors, damping_value, solve, unpack
from prism_job.score.preference import preference, target_weights
from prism_job.score.scorers import Float16Scorer, SignScorer, finish, scorer
from prism_job.score.selection import Selected, select
from prism_job.score.sign_kernel import LIMIT, sign_sums
from prism_job.score.targets import contributions
from prism_job.spec.selection import BudgetSpec, SelectionSpec
from prism_job.store import codec
from tests.models import VOCAB, build_model, build_tokenizer
from tests.oracle import linear_layers, plain_loss, weight_gradients

# Preference


def preference_by_hand(chosen_nll_T: list[float], rejected_nll_T: list[float]) -> float:
    """Equations 1 and 2 as they stand: products of token probabilities, roots, a quotient; in 50 digits."""
    with localcontext() as context:
        context.prec = 50

        def likelihood(nll_T: list[float]) -> Decimal:
            product = Decimal(1)
            for nll in nll_T:
                product *= (-Decimal(nll)).exp()
            return product ** (Decimal(1) / len(nll_T))

        chosen, rejected = likelihood(chosen_nll_T), likelihood(rejected_nll_T)
        return float(chosen / (chosen + rejected))


def test_preferences_are_those_of_the_paper() -> None:
    random = np.random.default_rng(0)
    for chosen_length, rejected_length in ((1, 1), (3, 40), (100, 7)):
        chosen, rejected = random.exponential(3, chosen_length), random.exponential(3, rejected_length)
        found = preference(np.array([chosen.mean()]), np.array([rejected.mean()]))
        wanted = preference_by_hand(chosen.tolist(), rejected.tolist())
        # The mean of float64 NLLs: 1e-16 an operation.
        assert found[0] == pytest.approx(wanted, rel=1e-13)


def test_responses_of_thousands_of_tokens_do_not_underflow() -> None:
    random = np.random.default_rng(1)
    chosen, rejected = random.uniform(10, 20, 2000), random.uniform(10, 20.5, 2000)
    assert chosen.sum() > 20_000
    assert math.exp(-chosen.sum()) == 0  # what a naive p(y) comes to
    with np.errstate(all="raise"):
        found = preference(np.array([chosen.sum() / 2000]), np.array([rejected.sum() / 2000]))
    assert found[0] == pytest.approx(preference_by_hand(chosen.tolist(), rejected.tolist()), rel=1e-12)
    assert 0.4 < found[0] < 0.8


nlls = st.floats(0, 1e5)


@settings(deadline=None, derandomize=True)
@given(nlls, nlls)
def test_the_preferences_for_either_response_add_up_to_one(chosen: float, rejected: float) -> None:
    pair = np.array([chosen, rejected])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = preference(pair, pair[::-1])
    assert abs(found.sum() - 1) <= 2**-52  # each is rounded once or twice
    assert (found >= 0).all()
    assert (found[0] > 0.5) <= (chosen < rejected)


def test_equal_responses_are_preferred_alike() -> None:
    assert preference(np.array([0.0, 7.25, 15_000.0]), np.array([0.0, 7.25, 15_000.0])).tolist() == [0.5, 0.5, 0.5]


def test_only_response_tokens_count_in_a_preference() -> None:
    model, tokenizer = build_model("llama", torch.float64, seed=2), build_tokenizer()
    capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(4, 0, None)])
    prompt, chosen, rejected = "What is the capital of Norway? ", "Oslo, of course.", "Rome"
    sides = [encode_response(prompt, response, None, tokenizer, 200) for response in (chosen, rejected)]
    (rows,) = capture.gradients_of(collate(sides, torch.device("cpu")), mean=True)
    mean_nll = (rows.nll_B / rows.tokens_B).numpy()
    found = preference(mean_nll[:1], mean_nll[1:])[0]

    def response_nlls(response: str) -> list[float]:
        ids = [*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]
        num_prompt = len(tokenizer(prompt).input_ids)
        assert tokenizer.decode(ids[:num_prompt]) == prompt  # no token stands across the seam
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        return [-float(log_p[place - 1, ids[place]]) for place in range(num_prompt, len(ids))]

    # The model's own rounding, float64.
    assert found == pytest.approx(preference_by_hand(response_nlls(chosen), response_nlls(rejected)), rel=1e-9)
    assert abs(found - 0.5) > 0.01


def test_weights_are_preferences_or_ones() -> None:
    preference_Q = np.array([0.1, 0.9, 0.5])
    assert target_weights("preference", preference_Q).tolist() == [0.1, 0.9, 0.5]
    assert target_weights("uniform", preference_Q).tolist() == [1, 1, 1]


def test_contributions_are_shares_of_the_directions_square() -> None:
    random = np.random.default_rng(3)
    pairs_QD, weight_Q = random.standard_normal((5, 30)) + 0.5, random.uniform(0, 1, 5)
    direction_D = weight_Q @ pairs_QD
    found = contributions(weight_Q * (pairs_QD @ direction_D))
    assert found.sum() == pytest.approx(1, rel=1e-12)
    for pair in range(5):
        wanted = weight_Q[pair] * sum(pairs_QD[pair] * direction_D) / sum(direction_D**2)
        assert found[pair] == pytest.approx(wanted, rel=1e-12)
    assert contributions(np.zeros(3)).tolist() == [0, 0, 0]


# Curvature

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
@pytest.mark.parametrize("damping", [0.001, 0.1, 10.0])
def test_the_solve_is_that_of_the_dense_matrix(num_tokens: int, damping: float) -> None:
    factors, directions = made_up_factors(num_tokens), [made_up_direction(), made_up_direction()[::-1]]
    solved = solve(np.stack(directions), factors, damping)
    for direction_LPP, found in zip(directions, solved, strict=True):
        wanted = dense_solve(direction_LPP, factors, damping_value(factors, damping))
        for layer in range(3):
            # The dense matrix's condition is at most 1e6 here; times 1e-16, and some room.
            assert np.linalg.norm(found[layer] - wanted[layer]) < 1e-9 * np.linalg.norm(wanted[layer])


def test_damping_is_in_units_of_the_mean_eigenvalue_over_all_layers() -> None:
    factors = made_up_factors(200)
    eigenvalues = np.concatenate([np.linalg.eigvalsh(curvature) for curvature in dense_curvature(factors)])
    assert damping_value(factors, 0.3) == pytest.approx(0.3 * eigenvalues.mean(), rel=1e-12)


def test_damping_without_end_leaves_the_plain_direction() -> None:
    factors, direction_LPP = made_up_factors(200), made_up_direction()
    for damping in (1e6, 1e9, 1e12):
        solved = solve(direction_LPP[None], factors, damping)[0] * damping_value(factors, damping)
        # 1/(h + λ) = 1/λ · (1 − h/λ + …): at most the largest eigenvalue, here under 50 mean ones, over λ.
        assert np.linalg.norm(solved - direction_LPP) < 50 / damping * np.linalg.norm(direction_LPP) + 1e-12
        cosine = (solved * direction_LPP).sum() / np.linalg.norm(solved) / np.linalg.norm(direction_LPP)
        assert cosine == pytest.approx(1, abs=(50 / damping) ** 2 + 1e-14)


def test_damping_toward_zero_undoes_the_curvature() -> None:
    factors, direction_LPP = made_up_factors(200), made_up_direction()
    (solved,) = solve(direction_LPP[None], factors, 1e-13)
    for layer, curvature in enumerate(dense_curvature(factors)):
        back = (curvature @ solved[layer].flatten(order="F")).reshape(DIM, DIM, order="F")
        # λ over the smallest eigenvalue, which is no less than 1e-7 of the mean: 1e-6.
        np.testing.assert_allclose(back, direction_LPP[layer], rtol=0, atol=1e-5)


def test_factors_of_any_split_merge_to_the_whole() -> None:
    parts = [made_up_factors(num_tokens, seed) for seed, num_tokens in enumerate((3, 50, 8))]
    merged = Factors(np.zeros((3, DIM, DIM)), np.zeros((3, DIM, DIM)), 0)
    for part in parts:
        merged.merge(part)
    assert merged.num_tokens == 61
    np.testing.assert_allclose(merged.inputs_LPP, sum(part.inputs_LPP for part in parts), rtol=1e-13)
    np.testing.assert_allclose(merged.outputs_LPP, sum(part.outputs_LPP for part in parts), rtol=1e-13)


def test_upper_halves_unpack_to_the_symmetric_matrices() -> None:
    factors = made_up_factors(20)
    uppers = np.array([[m[i, j] for i in range(DIM) for j in range(i, DIM)] for m in factors.inputs_LPP], np.float32)
    np.testing.assert_array_equal(unpack(uppers, DIM), factors.inputs_LPP.astype(np.float32))


# Scores from stored bytes

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
    decoded_ND = codec.decode(kind, arrays).astype(np.float64)
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


def test_each_codec_has_its_scorer() -> None:
    assert isinstance(scorer("sign", np.zeros(256)), SignScorer)
    assert isinstance(scorer("float16", np.zeros(256)), Float16Scorer)


@pytest.mark.parametrize("score", ["influence", "cosine"])
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_finishing_divides_by_the_norm_or_by_the_tokens_or_by_nothing(score: str, loss: str) -> None:
    raw, tokens, norms = [6.0, -8.0, 5.0, 0.0, 3.0], [3, 4, 1, 0, 2], [2.0, 0.5, 0.0, 0.0, 4.0]
    found = finish(np.array(raw), np.array(tokens, np.int32), np.array(norms, np.float32), score, loss)
    for value, number, size, finished in zip(raw, tokens, norms, found, strict=True):
        divisor = size if score == "cosine" else number if loss == "mean" else 1
        wanted = value / divisor if divisor else 0
        assert finished == wanted


# Selection


def selected_by_hand(
    scores: list[float], ids: list[bytes], tokens: list[int], usable: list[bool], spec: SelectionSpec, taken_of: Any
) -> tuple[list[int], set[int], int, float | None]:
    """(selected in order, duplicates, number taken, threshold), by plain loops."""
    pool: list[int] = []
    duplicates: set[int] = set()
    for place in range(len(scores)):
        if not usable[place]:
            continue
        if spec.dedupe == "exact" and any(ids[place] == ids[earlier] for earlier in pool):
            duplicates.add(place)
        else:
            pool.append(place)
    falling = sorted(pool, key=lambda place: (-scores[place], ids[place], place))
    rising = sorted(pool, key=lambda place: (scores[place], ids[place], place))
    ranked = falling if "highest" in (spec.keep, spec.drop) else rising
    taken: list[int] = []
    spent = 0
    for place in ranked:
        spent += tokens[place]
        if spec.budget.count is not None and len(taken) == spec.budget.count:
            break
        if spec.budget.fraction is not None and len(taken) == taken_of(len(ranked)):
            break
        if spec.budget.tokens is not None and spent > spec.budget.tokens:
            break
        taken.append(place)
    kept = [place for place in falling if (place in taken) == (spec.keep is not None)]
    return kept, duplicates, len(taken), scores[taken[-1]] if taken else None


def as_arrays(scores: list[float], ids: list[bytes], tokens: list[int], usable: list[bool]) -> tuple[Any, ...]:
    ids_N = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16).copy().view("V16").reshape(-1)
    columns = Column("V16"), Column("i4")
    columns[0].append(ids_N)
    columns[1].append(np.array(tokens, np.int32))
    return np.array(scores, np.float64), *columns, np.array(usable, np.bool_)


IDS = [
    bytes(16),
    b"a" + bytes(15),
    b"a" + bytes(14) + b"\x01",
    bytes(15) + b"a",
    b"\xff" * 16,
    b"\x7f" + bytes(15),
    b"\x80" + bytes(15),
    b"0123456789abcdef",
]
"""Some differ only behind zero bytes, some in the highest bit."""

row_strategy = st.tuples(
    st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1.0, 1.0 + 2**-52, 3e300]),
    st.sampled_from(IDS),
    st.sampled_from([1, 2, 3, 10]),  # few, so that a budget is often met exactly
    st.booleans(),
)
budget_strategy = st.one_of(
    st.builds(BudgetSpec, count=st.integers(1, 25)),
    st.builds(BudgetSpec, fraction=st.floats(0.001, 1)),
    st.builds(BudgetSpec, tokens=st.integers(1, 40)),
)


def selection_strategy() -> st.SearchStrategy[SelectionSpec]:
    ends, dedupe = st.sampled_from(["highest", "lowest"]), st.sampled_from(["exact", "none"])
    return st.one_of(
        st.builds(SelectionSpec, keep=ends, budget=budget_strategy, dedupe=dedupe),
        st.builds(SelectionSpec, drop=ends, budget=budget_strategy, dedupe=dedupe),
    )


def selected(rows: list[Any], spec: SelectionSpec) -> Selected | None:
    """What `select` makes of rows (score, id, tokens, usable); None where the budget asks for more than there is."""
    arrays = as_arrays(*([list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]))
    pool = [(identity, tokens) for _, identity, tokens, usable in rows if usable]
    if spec.dedupe == "exact":
        pool = list(dict(reversed(pool)).items())  # the first of each content
    if (spec.budget.count or 0) > len(pool) or (spec.budget.tokens or 0) > sum(tokens for _, tokens in pool):
        with pytest.raises(RequestError, match="to rank"):
            select(*arrays, spec)
        return None
    return select(*arrays, spec)


PROPERTY = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same cases at every run, and no complaint about a busy machine."""


@PROPERTY
@given(st.lists(row_strategy, max_size=20), selection_strategy())
def test_selection_is_that_of_plain_loops(rows: list[Any], spec: SelectionSpec) -> None:
    found = selected(rows, spec)
    if found is None:
        return

    def nearest(count: int) -> int:
        # A half may be rounded either way: both are nearest.
        assert abs(found.num_taken - (spec.budget.fraction or 0) * count) <= 0.5 + 1e-9
        return found.num_taken

    scores, ids, tokens, usable = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    order, duplicates, num_taken, threshold = selected_by_hand(scores, ids, tokens, usable, spec, nearest)
    assert found.order.tolist() == order
    assert np.flatnonzero(found.selected_N).tolist() == sorted(order)
    assert set(np.flatnonzero(found.duplicate_N).tolist()) == duplicates
    assert found.num_taken == num_taken
    assert found.threshold == threshold


@PROPERTY
@given(st.lists(row_strategy, max_size=20), selection_strategy())
def test_unusable_rows_are_never_selected_and_take_no_budget(rows: list[Any], spec: SelectionSpec) -> None:
    usable = [place for place, row in enumerate(rows) if row[3]]
    found, without = selected(rows, spec), selected([rows[place] for place in usable], spec)
    assert (found is None) == (without is None)
    if found is None or without is None:
        return
    assert [usable[place] for place in without.order] == found.order.tolist()
    assert not found.selected_N[[place for place, row in enumerate(rows) if not row[3]]].any()
    assert not found.duplicate_N[[place for place, row in enumerate(rows) if not row[3]]].any()


def test_a_count_beyond_the_rows_there_are_is_refused() -> None:
    rows = [(1.0, IDS[0], 3, True), (2.0, IDS[1], 3, True), (2.0, IDS[1], 3, True), (3.0, IDS[2], 3, False)]
    with pytest.raises(RequestError, match="the budget is 3 examples, and there are 2 to rank"):
        select(
            *as_arrays(*[list(column) for column in zip(*rows, strict=True)]),
            SelectionSpec(keep="highest", budget=BudgetSpec(count=3)),
        )


@pytest.mark.parametrize(("tokens", "taken"), [(4, 0), (5, 1), (11, 1), (12, 2), (13, 2), (14, 3)])
def test_a_token_budget_is_spent_to_the_last_token_and_never_passed(tokens: int, taken: int) -> None:
    arrays = as_arrays([3.0, 2.0, 1.0], IDS[:3], [5, 7, 2], [True] * 3)  # the third would still fit: it is not reached
    found = select(*arrays, SelectionSpec(keep="highest", budget=BudgetSpec(tokens=tokens)))
    assert found.order.tolist() == [0, 1, 2][:taken]
    with pytest.raises(RequestError, match="15 response tokens, and there are 14 to rank"):
        select(*arrays, SelectionSpec(keep="highest", budget=BudgetSpec(tokens=15)))


@pytest.mark.parametrize("end", ["highest", "lowest"])
def test_ties_break_by_example_id(end: Any) -> None:
    arrays = as_arrays([1.0] * len(IDS), IDS, [1] * len(IDS), [True] * len(IDS))
    found = select(*arrays, SelectionSpec(keep=end, budget=BudgetSpec(count=3)))
    assert [IDS[place] for place in found.order] == sorted(IDS)[:3]


def contents_repeated(contents: dict[bytes, Any], ids: list[bytes]) -> list[Any]:
    """Rows whose score, tokens and usability belong to their content, as they do in a store."""
    return [(contents[one][0], one, *contents[one][2:]) for one in ids]


content_strategy = st.builds(
    contents_repeated,
    st.fixed_dictionaries(dict.fromkeys(IDS, row_strategy)),
    st.lists(st.sampled_from(IDS), max_size=20),
)


@PROPERTY
@given(content_strategy, selection_strategy(), st.randoms(use_true_random=False))
def test_the_order_of_the_pool_changes_nothing_but_which_of_equal_rows_stands(
    rows: list[Any], spec: SelectionSpec, random: Any
) -> None:
    shuffled = random.sample(rows, len(rows))
    first, second = selected(rows, spec), selected(shuffled, spec)
    assert (first is None) == (second is None)
    if first is None or second is None:
        return
    assert [rows[place][1] for place in first.order] == [shuffled[place][1] for place in second.order]
    assert (first.threshold, first.num_taken) == (second.threshold, second.num_taken)
    assert first.duplicate_N.sum() == second.duplicate_N.sum()


# First-order truth: what a score says happens when the model trains


@cache
def tiny_model() -> Any:
    return build_model("llama", torch.float64, seed=4)


def made_up_response(random: np.random.Generator, prompt: list[int], length: int) -> Encoded:
    ids = [*prompt, *random.integers(3, 60, length).tolist()]
    return Encoded(ids, [place >= len(prompt) for place in range(len(ids))])


@cache
def made_up_pairs() -> list[tuple[Encoded, Encoded]]:
    """Six pairs, each with a shared prompt and responses of unlike length."""
    random = np.random.default_rng(21)
    prompts = [random.integers(3, 60, 4).tolist() for _ in range(6)]
    return [(made_up_response(random, prompt, 5), made_up_response(random, prompt, 8)) for prompt in prompts]


@cache
def made_up_candidates() -> list[Encoded]:
    random = np.random.default_rng(22)
    return [
        made_up_response(random, random.integers(3, VOCAB, 3).tolist(), int(random.integers(4, 16))) for _ in range(40)
    ]


def preferences() -> np.ndarray:
    """π_q of the model as it stands."""
    with torch.no_grad():
        chosen, rejected = (
            np.array([plain_loss(tiny_model(), pair[side], mean=True)[0].item() for pair in made_up_pairs()])
            for side in (0, 1)
        )
    return preference(chosen, rejected)


def log_odds(preference_Q: np.ndarray) -> np.ndarray:
    return np.log(preference_Q / (1 - preference_Q))


@contextmanager
def stepped(step: dict[str, Tensor]) -> Iterator[None]:
    """The model with `step` added to its weights, for a while."""
    layers = linear_layers(tiny_model())
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    for name, change in step.items():
        layers[name].weight.data += change
    try:
        yield
    finally:
        for name, module in layers.items():
            module.weight.data.copy_(before[name])


def times(factor: float, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: factor * gradient for name, gradient in gradients.items()}


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(torch.cat([gradient.reshape(-1) for gradient in gradients.values()]).norm())


def summed(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(one[name] for one in gradients) for name in gradients[0]}


@cache
def weighted_direction() -> dict[str, Tensor]:
    """g = 1/|Q| Σ π_q (ḡ⁺ − ḡ⁻) in the space of the weights, by autograd."""
    parts = []
    for weight, (chosen, rejected) in zip(preferences(), made_up_pairs(), strict=True):
        for side, sign in ((chosen, 1), (rejected, -1)):
            gradients, _, _ = weight_gradients(tiny_model(), side, mean=True)
            parts.append(times(sign * float(weight) / len(made_up_pairs()), gradients))
    return summed(parts)


def extracted_scores(dim: int, fold_dims: int | None, *, exact: bool = False) -> np.ndarray:
    """Scores of the candidates as the job computes them: capture, codec, weights, direction, scorer; no curvature.

    exact: the projection is replaced by the identity, so that rows are whole gradients.
    """
    model = tiny_model()
    layers = captured_layers(model, ("*",))
    unfolded = GradientCapture(model, layers, [RowFormat(dim, 0, None)])
    folded = GradientCapture(model, layers, [RowFormat(dim, 0, fold_dims)])
    if exact:
        for projections in (*unfolded.projections, *folded.projections):
            projections.scale = 1.0
            for name, sides in projections.sides.items():
                eyes = [torch.eye(side.shape[0], dim, dtype=side.dtype) for side in sides]
                projections.sides[name] = (eyes[0], eyes[1])
    cpu = torch.device("cpu")
    chosen, rejected = (
        unfolded.gradients_of(collate([pair[side] for pair in made_up_pairs()], cpu), mean=True)[0] for side in (0, 1)
    )
    (rows,) = folded.gradients_of(collate(made_up_candidates(), cpu), mean=False)
    weight_Q = preference(*((side.nll_B / side.tokens_B).numpy() for side in (chosen, rejected)))
    direction = weight_Q @ (chosen.rows_BD - rejected.rows_BD).numpy() / len(weight_Q)
    if exact:
        return rows.rows_BD.numpy() @ direction
    if fold_dims:
        direction = projection.fold(direction.reshape(len(layers.names), -1), layers.names, 0, fold_dims)
    kind = "sign" if fold_dims else "float16"
    raw = scorer(kind, direction)(codec.encode(kind, rows.rows_BD.float().numpy()))
    return finish(raw, rows.tokens_B.numpy(), rows.norm_B.float().numpy(), "influence", "sum")


def test_a_score_is_the_slope_of_the_weighted_log_odds_along_training() -> None:
    scores, weight_Q = extracted_scores(48, None, exact=True), preferences()
    assert len({*np.sign(scores)}) == 2
    for candidate, score in zip(made_up_candidates(), scores, strict=True):
        gradient, _, _ = weight_gradients(tiny_model(), candidate, mean=False)
        size = 1e-5 / norm_of(gradient)
        sides = []
        for sign in (-1, 1):
            with stepped(times(-sign * size, gradient)):  # training goes against the gradient
                sides.append((weight_Q * log_odds(preferences())).mean())
        slope = (sides[1] - sides[0]) / (2 * size)
        # Central differences: the square of the step, and 1e-15 over 1e-5 by rounding: 2e-11 seen of the largest score.
        assert abs(slope - score) < 1e-9 * norm_of(gradient) * norm_of(weighted_direction())


@pytest.mark.parametrize(("dim", "fold_dims"), [(16, None), (16, 2048)], ids=["float16", "sign"])
def test_training_on_the_highest_scored_raises_the_preference_and_on_the_lowest_lowers_it(
    dim: int, fold_dims: int | None
) -> None:
    ranked = np.argsort(extracted_scores(dim, fold_dims))
    before = preferences().mean()
    for places, sign in ((ranked[-5:], 1), (ranked[:5], -1)):
        training = summed(
            [weight_gradients(tiny_model(), made_up_candidates()[place], mean=False)[0] for place in places]
        )
        with stepped(times(-0.02 / norm_of(training), training)):
            assert sign * (preferences().mean() - before) > 1e-4


def test_no_random_step_raises_the_preference_like_the_one_against_the_direction() -> None:
    direction, before = weighted_direction(), preferences().mean()
    size = 0.05
    with stepped(times(-size / norm_of(direction), direction)):
        gained = preferences().mean() - before
    with stepped(times(size / norm_of(direction), direction)):
        lost = preferences().mean() - before
    assert gained > 0 > lost
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        random = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in direction.items()}
        with stepped(times(size / norm_of(random), random)):
            # 15,360 dims: a random direction has a cosine of about 0.008 with the best one.
            assert abs(preferences().mean() - before) < 0.2 * gained
