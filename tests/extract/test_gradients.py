"""Laws of extraction: a row is that example's own gradient, projected, whatever stands beside it in the batch.

The oracle is slow and obvious: one example at a time, no padding, the whole logits, autograd's own weight gradients, and
projection and fold as explicit dense matrices. Every row is compared, relative to its own norm.

Shapes: B examples, D stored dims, L layers, M = P² numbers of one layer's sketch, T tokens.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig

from prism_job.errors import DataError, RequestError
from prism_job.extract.capture.gradients import GradientBatch, GradientCapture, refuse_non_finite
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.capture.sketches import FactorSums, RowSums
from prism_job.extract.tokenise import Batch, Encoded, collate, micro_batches
from tests.extract.test_layers import LLAMA_LAYERS
from tests.models import HIDDEN, KINDS, VOCAB, build_model, weights_into
from tests.oracle import factor_sums, linear_layers, sketch_matrix, sketches, weight_gradients

torch.set_num_threads(1)  # matrices this small lose more to waiting threads than they gain

CPU = torch.device("cpu")
DIM = 6
SEED = 3
FOLD_DIMS = 256
FLOAT64, FLOAT32 = torch.float64, torch.float32

TOLERANCE = {FLOAT64: 1e-9, FLOAT32: 1e-5}
"""Of a row, relative to its norm. float64: rounding is 1e-16 an operation, 3e-15 seen; float32: 6e-8 an operation, sums of
hundreds of them through two layers, 3e-6 seen. A wrong token, layer or sign is an error of order one."""


def made_up_examples(count: int = 32) -> list[Encoded]:
    """Lengths 2 to 21 in no order; loss on the end, on all but the first, on scattered tokens, on one token."""
    random = np.random.default_rng(11)
    made = []
    for number in range(count):
        length = int(random.integers(2, 22))
        ids = random.integers(3, VOCAB, length).tolist()
        scattered = random.random(length) < 0.4
        supervised = {
            0: [index >= length // 2 for index in range(length)],
            1: [True] * length,
            2: scattered.tolist(),
            3: [index == length - 1 for index in range(length)],
        }[number % 4]
        supervised[0] = False
        supervised[-1] |= not any(supervised)
        made.append(Encoded(ids, supervised))
    return made


EXAMPLES = made_up_examples()


@cache
def model_of(kind: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    return build_model(kind, dtype, seed=1, attention=attention)


def capture_of(model: Any, fold_dims: int | None) -> GradientCapture:
    return GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(DIM, SEED, fold_dims)])


def extract(
    capture: GradientCapture, batches: list[list[int]], *, mean: bool = False, factors: FactorSums | None = None
) -> GradientBatch:
    """The rows of EXAMPLES, in their order, from these micro-batches."""
    found: dict[int, tuple[Tensor, ...]] = {}
    for indices in batches:
        batch = collate([EXAMPLES[index] for index in indices], CPU)
        (result,) = capture.gradients_of(batch, mean=mean, factors=factors)
        columns = (result.rows_BD, result.nll_B, result.tokens_B, result.norm_B)
        for row, index in enumerate(indices):
            found[index] = tuple(column[row] for column in columns)
    assert sorted(found) == list(range(len(found)))
    return GradientBatch(
        *(torch.stack(column) for column in zip(*(found[index] for index in sorted(found)), strict=True))
    )


def in_batches_of(size: int, count: int = len(EXAMPLES)) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def deviation_B(found_BD: Tensor, wanted_BD: Tensor) -> Tensor:
    """‖found − wanted‖ / ‖wanted‖ of every row."""
    assert found_BD.shape == wanted_BD.shape
    return (found_BD.double() - wanted_BD.double()).norm(dim=1) / wanted_BD.double().norm(dim=1)


def assert_same_rows(found: GradientBatch, wanted: GradientBatch, tolerance: float) -> None:
    assert bool((deviation_B(found.rows_BD, wanted.rows_BD) < tolerance).all())
    assert torch.equal(found.tokens_B, wanted.tokens_B)
    np.testing.assert_allclose(found.nll_B.double(), wanted.nll_B.double(), rtol=tolerance)
    np.testing.assert_allclose(found.norm_B.double(), wanted.norm_B.double(), rtol=tolerance)


# The oracle


@cache
def oracle_gradients(kind: str, weights_dtype: torch.dtype, mean: bool) -> list[tuple[dict[str, Tensor], float, int]]:
    """What `weight_gradients` gives for each of EXAMPLES, in float64, on the weights as `weights_dtype` holds them."""
    model = model_of(kind, FLOAT64)
    if weights_dtype != FLOAT64:
        model = weights_into(model_of(kind, weights_dtype), build_model(kind, FLOAT64))
    return [weight_gradients(model, example, mean=mean) for example in EXAMPLES]


@cache
def oracle(kind: str, weights_dtype: torch.dtype, mean: bool, folded: bool) -> GradientBatch:
    rows, norms = [], []
    computed = oracle_gradients(kind, weights_dtype, mean)
    for gradients, _, _ in computed:
        parts = sketches(gradients, SEED, DIM)
        flat = torch.cat(list(parts.values()))
        fold = [part @ sketch_matrix(SEED, DIM, name, FOLD_DIMS) for name, part in parts.items()]
        rows.append(torch.stack(fold).sum(0) if folded else flat)
        norms.append(flat.norm())
    nlls = torch.tensor([nll for _, nll, _ in computed], dtype=FLOAT64)
    return GradientBatch(
        torch.stack(rows), nlls, torch.tensor([tokens for _, _, tokens in computed]), torch.stack(norms)
    )


# Rows equal the oracle's


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_the_projected_weight_gradient(kind: str, dtype: torch.dtype, folded: bool, mean: bool) -> None:
    capture = capture_of(model_of(kind, dtype), FOLD_DIMS if folded else None)
    found = extract(capture, in_batches_of(7), mean=mean)
    assert found.rows_BD.dtype == dtype
    assert_same_rows(found, oracle(kind, dtype, mean, folded), TOLERANCE[dtype])


def test_a_bfloat16_model_is_multiplied_in_bfloat16_and_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = capture_of(model_of("llama", torch.bfloat16), None)
    projected: dict[int, list[Tensor]] = {}
    add = RowSums.add

    def seen(sums: RowSums, name: str, a_BTP: Tensor, b_BTP: Tensor, *, is_last: bool) -> None:
        assert (a_BTP.dtype, b_BTP.dtype) == (torch.bfloat16, torch.bfloat16)
        sides = [side_BTP.double() * DIM**-0.5 for side_BTP in (a_BTP, b_BTP)]
        projected[sums.projections.positions[name]] = sides
        add(sums, name, a_BTP, b_BTP, is_last=is_last)

    monkeypatch.setattr(RowSums, "add", seen)
    batch, factors = collate(EXAMPLES, CPU), capture.new_factors()
    (found,) = capture.gradients_of(batch, mean=False, factors=factors)
    assert found.rows_BD.dtype == FLOAT32
    sketches = [torch.einsum("btp,btq->bpq", b, a).flatten(1) for _, (a, b) in sorted(projected.items())]
    wanted_BD = torch.cat(sketches, 1)
    assert bool((deviation_B(found.rows_BD, wanted_BD) < TOLERANCE[FLOAT32]).all())
    np.testing.assert_allclose(found.norm_B, wanted_BD.norm(dim=1), rtol=TOLERANCE[FLOAT32])
    for side, sums_LPP in enumerate((factors.inputs_LPP, factors.outputs_LPP)):
        wanted = [each[side][batch.real_BT].T @ each[side][batch.real_BT] for _, each in sorted(projected.items())]
        assert bool((deviation_B(sums_LPP.flatten(1), torch.stack(wanted).flatten(1)) < TOLERANCE[FLOAT32]).all())


@pytest.mark.parametrize("fold_dims", [None, FOLD_DIMS], ids=["unfolded", "folded"])
def test_products_in_bfloat16_move_a_row_by_the_rounding_of_two_projected_numbers(fold_dims: int | None) -> None:
    model, row_format = model_of("llama", torch.bfloat16), RowFormat(DIM, SEED, fold_dims)
    capture = GradientCapture(model, captured_layers(model, ("*",)), [row_format, row_format])
    exact = capture.projections[1]
    exact.sides = {name: (side_a.float(), side_b.float()) for name, (side_a, side_b) in exact.sides.items()}
    rows, wanted = capture.gradients_of(collate(EXAMPLES, CPU), mean=False)
    deviation = deviation_B(rows.rows_BD, wanted.rows_BD)
    # Each of the two is off by 2^-9 at most; 0.0030 seen.
    assert bool((deviation < 2**-8).all())
    assert bool((deviation > 0).all()), "two ways of computing them"


def test_projected_numbers_past_float16s_range_make_finite_rows() -> None:
    model = build_model("llama", torch.float16, seed=1)
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data.mul_(8_000)
    attention.o_proj.weight.data.mul_(1e-6)
    inputs: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().float()))
    capture = capture_of(model, None)
    (rows,) = capture.gradients_of(collate(EXAMPLES, CPU), mean=False)
    signs = capture.projections[0].sides["model.layers.0.self_attn.o_proj"][0]
    assert float((inputs[0] @ signs).abs().max()) > torch.finfo(torch.float16).max
    assert bool(rows.rows_BD.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_batch_mates_change_a_low_precision_row_by_its_own_rounding_alone(dtype: torch.dtype) -> None:
    capture = capture_of(model_of("llama", dtype), None)
    alone, together = extract(capture, in_batches_of(1)), extract(capture, in_batches_of(32))
    exact = oracle("llama", dtype, False, False).rows_BD
    # Padding changes the order of sums, so a few roundings differ: not more than rounding took from the row already.
    own = deviation_B(alone.rows_BD, exact)
    assert bool((deviation_B(together.rows_BD, alone.rows_BD) <= 2 * own.clamp(min=own.median())).all())


@pytest.mark.parametrize("mean", [False, True])
def test_two_row_formats_of_one_pass_give_what_each_gives_alone(mean: bool) -> None:
    model = model_of("llama", FLOAT32)
    layers = captured_layers(model, ("*",))
    row_formats = [RowFormat(DIM, SEED, FOLD_DIMS), RowFormat(2 * DIM, 5, None)]
    batch, num_passes = collate(EXAMPLES, CPU), 0

    def count(*_: object) -> None:
        nonlocal num_passes
        num_passes += 1

    hook = model.register_forward_hook(count)
    try:
        found = GradientCapture(model, layers, row_formats).gradients_of(batch, mean=mean)
    finally:
        hook.remove()  # the model is shared
    assert num_passes == 1
    for row_format, rows in zip(row_formats, found, strict=True):
        (wanted,) = GradientCapture(model, layers, [row_format]).gradients_of(batch, mean=mean)
        for name in ("rows_BD", "nll_B", "tokens_B", "norm_B"):
            assert torch.equal(getattr(rows, name), getattr(wanted, name)), name


def test_the_mean_over_a_long_response_does_not_underflow_in_float16() -> None:
    random = np.random.default_rng(4)
    long = Encoded(random.integers(3, VOCAB, 2000).tolist(), [False] + [True] * 1999)
    rows = {}
    for mean in (False, True):
        capture = capture_of(model_of("llama", torch.float16), None)
        (rows[mean],) = capture.gradients_of(collate([long], CPU), mean=mean)
    assert bool(
        (deviation_B(rows[True].rows_BD * 1999, rows[False].rows_BD) < 1e-6).all()
    )  # a division in float32: 6e-8
    np.testing.assert_allclose(rows[True].norm_B * 1999, rows[False].norm_B, rtol=1e-6)


def test_rows_of_chosen_layers_are_those_parts_of_the_whole_row() -> None:
    model = model_of("llama", FLOAT64)
    chosen = GradientCapture(model, captured_layers(model, ("*.mlp.*",)), [RowFormat(DIM, SEED, None)])
    found = extract(chosen, in_batches_of(7)).rows_BD
    whole = oracle("llama", FLOAT64, False, False).rows_BD.reshape(len(EXAMPLES), len(LLAMA_LAYERS), -1)
    indices = [index for index, name in enumerate(LLAMA_LAYERS) if ".mlp." in name]
    assert bool((deviation_B(found, whole[:, indices].flatten(1)) < TOLERANCE[FLOAT64]).all())


def with_mlps_that_see(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A Llama of the same numbers, whose MLPs reshape what they are given, as some models do."""
    model = build_model("llama", dtype, seed=1)

    def reshaped(plain: Any) -> Any:
        return lambda given: plain(given.reshape(shape)).view_as(given)

    for layer in model.model.layers:
        layer.mlp.forward = reshaped(layer.mlp.forward)
    return model


def test_layers_that_see_all_tokens_of_a_batch_on_one_axis_give_the_same_rows() -> None:
    capture = capture_of(with_mlps_that_see((-1, HIDDEN), FLOAT64), FOLD_DIMS)
    factors = capture.new_factors()
    found = extract(capture, in_batches_of(7), factors=factors)
    assert_same_rows(found, oracle("llama", FLOAT64, False, True), TOLERANCE[FLOAT64])
    assert_same_factors(factors, factor_oracle("llama"), TOLERANCE[FLOAT64])


def with_an_unused_layer() -> Any:
    model = build_model("llama", FLOAT64)
    model.unused = nn.Linear(4, 4, dtype=FLOAT64)
    return model


def with_a_layer_beside_the_embeddings() -> Any:
    model = build_model("llama", FLOAT64)
    model.beside = nn.Linear(4, HIDDEN, dtype=FLOAT64).requires_grad_(False)
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda given: plain(given) + model.beside(torch.ones(*given.shape[:2], 4, dtype=FLOAT64))
    return model


@pytest.mark.parametrize(
    ("build", "message", "where"),
    [
        (lambda: with_mlps_that_see((-1, 7, HIDDEN), FLOAT64), "one row a token", "model.layers.0.mlp.gate_proj"),
        (with_an_unused_layer, "no gradient reached 1 captured layers", "unused"),
        (with_a_layer_beside_the_embeddings, "beside cannot be captured: no gradient can reach it", "beside"),
    ],
    ids=["mixes examples on an axis", "unused", "input without embeddings"],
)
def test_a_layer_that_gives_no_row_an_example_is_refused_by_name(build: Any, message: str, where: str) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        extract(capture_of(build(), None), in_batches_of(7))
    assert refusal.value.where == where


def test_a_layer_that_the_model_calls_twice_gets_the_sum_over_its_calls() -> None:
    model = build_model("llama", FLOAT64, seed=1)
    model.model.layers[1].mlp = model.model.layers[0].mlp  # named once, at layer 0
    layers = linear_layers(model)
    assert len(layers) == len(LLAMA_LAYERS) - 3
    found = extract(capture_of(model, None), in_batches_of(7))
    computed = [weight_gradients(model, example, mean=False)[0] for example in EXAMPLES]
    wanted_BD = torch.stack([torch.cat(list(sketches(gradients, SEED, DIM).values())) for gradients in computed])
    assert bool((deviation_B(found.rows_BD, wanted_BD) < TOLERANCE[FLOAT64]).all())
    np.testing.assert_allclose(found.norm_B, wanted_BD.norm(dim=1), rtol=TOLERANCE[FLOAT64])


# What stands beside a row changes nothing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_mates_change_no_gradient(kind: str, dtype: torch.dtype, attention: str) -> None:
    # transformers' eager attention takes its softmax in float32 whatever the type, and padding changes how it sums: so a
    # float64 model has float32's tolerance there.
    narrowed = attention == "eager" and dtype == FLOAT64
    tolerance = TOLERANCE[FLOAT32 if narrowed else dtype]
    capture = capture_of(model_of(kind, dtype, attention), FOLD_DIMS)
    alone = extract(capture, in_batches_of(1))
    for size in (2, 7, 32):
        assert_same_rows(extract(capture, in_batches_of(size)), alone, tolerance)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_token_budget_nor_the_order_changes_a_gradient(kind: str, dtype: torch.dtype) -> None:
    capture = capture_of(model_of(kind, dtype), FOLD_DIMS)
    lengths = [len(example.ids) for example in EXAMPLES]
    cuts = [micro_batches(lengths, budget) for budget in (1, 40, 100, 10_000)]
    assert len({len(cut) for cut in cuts}) == 4, "the budgets do cut differently"
    shuffled = np.random.default_rng(0).permutation(len(EXAMPLES)).tolist()
    for cut in [*cuts, [shuffled[:20], shuffled[20:]]]:
        assert_same_rows(extract(capture, cut), oracle(kind, dtype, False, True), TOLERANCE[dtype])


def test_micro_batches_hold_every_example_once_within_the_budget() -> None:
    random = np.random.default_rng(2)
    for budget in (1, 7, 64, 1000, 10**6):
        lengths = random.integers(1, 90, 700).tolist()
        batches = micro_batches(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(700))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
            assert len(batch) <= 256
        in_order = [lengths[index] for batch in batches for index in batch]
        assert in_order == sorted(lengths, reverse=True)


@pytest.mark.parametrize("size", [1, 7])
def test_a_model_whose_tokens_look_ahead_is_refused_with_padding_and_without(size: int) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCAB, is_decoder=False, **shape)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    capture = capture_of(model, None)
    with pytest.raises(RequestError, match="not causal"):
        extract(capture, in_batches_of(size))


# Factor sums


@cache
def factor_oracle(kind: str) -> FactorSums:
    return factor_sums(model_of(kind, FLOAT64), EXAMPLES, SEED, DIM)


def assert_same_factors(found: FactorSums, wanted: FactorSums, tolerance: float) -> None:
    assert found.num_tokens == wanted.num_tokens
    for name in ("inputs_LPP", "outputs_LPP"):
        deviation = deviation_B(getattr(found, name).flatten(1), getattr(wanted, name).flatten(1))
        assert bool((deviation < tolerance).all()), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factor_sums_hold_every_real_token_and_no_padding(kind: str) -> None:
    capture = capture_of(model_of(kind, FLOAT64), None)
    factors = capture.new_factors()
    beside, again = extract(capture, in_batches_of(7), factors=factors), extract(capture, in_batches_of(7))
    assert_same_factors(factors, factor_oracle(kind), TOLERANCE[FLOAT64])
    assert torch.equal(beside.rows_BD, again.rows_BD), "the same bits again: asking for factors changes no row"
    assert torch.equal(beside.nll_B, again.nll_B)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=["float64", "float32"])
def test_factor_sums_of_any_split_add_up_to_the_whole(dtype: torch.dtype) -> None:
    capture = capture_of(model_of("llama", dtype), FOLD_DIMS)
    whole = capture.new_factors()
    extract(capture, in_batches_of(32), factors=whole)
    random = np.random.default_rng(5)
    for num_parts in (2, 5):
        part_of = random.integers(0, num_parts, len(EXAMPLES))
        merged = capture.new_factors()
        for part in range(num_parts):
            factors = capture.new_factors()
            batch = collate([EXAMPLES[index] for index in np.flatnonzero(part_of == part)], CPU)
            capture.gradients_of(batch, mean=False, factors=factors)
            merged.add(factors)
        assert_same_factors(merged, whole, TOLERANCE[dtype])


# The model is left as it was


def all_hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def plain_logits(model: Any) -> Tensor:
    batch = collate(EXAMPLES[:5], CPU)
    return model(input_ids=batch.ids_BT, attention_mask=batch.real_BT.long(), use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_extraction_leaves_the_model_as_it_was(kind: str) -> None:
    model = build_model(kind, FLOAT32, seed=1)
    hooks, logits = all_hooks(model), plain_logits(model)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    extract(capture_of(model, FOLD_DIMS), in_batches_of(7))
    assert all_hooks(model) == hooks
    after = plain_logits(model)
    assert torch.equal(after, logits)
    assert not after.requires_grad
    for name, weight in model.named_parameters():
        assert weight.grad is None, name
        assert not weight.requires_grad, name
        assert torch.equal(weight, weights[name]), name


def test_hooks_come_off_when_a_pass_fails() -> None:
    model = build_model("llama", FLOAT32, seed=1)
    hooks = all_hooks(model)
    batch = collate(EXAMPLES[:3], CPU)
    beyond = Batch(batch.ids_BT + VOCAB, batch.real_BT, batch.supervised_BT)
    capture = capture_of(model, None)
    with pytest.raises(RequestError, match="token embeddings"):
        capture.gradients_of(beyond, mean=False)
    assert all_hooks(model) == hooks
    assert_same_rows(extract(capture, in_batches_of(7)), oracle("llama", FLOAT32, False, False), TOLERANCE[FLOAT32])


def test_logits_are_computed_only_where_a_token_carries_loss() -> None:
    model = model_of("llama", FLOAT32)
    seen: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    try:
        extract(capture_of(model, None), in_batches_of(32))
    finally:
        handle.remove()
    assert seen == [(1, sum(example.num_supervised for example in EXAMPLES), VOCAB)]


def test_no_weight_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = torch.autograd.grad

    def watched(outputs: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(inputs)
        return plain(outputs, inputs, *arguments, **named)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    model = model_of("llama", FLOAT32)
    extract(capture_of(model, None), in_batches_of(32))
    longest = max(len(example.ids) for example in EXAMPLES)
    assert [tuple(tensor.shape) for tensor in asked] == [(len(EXAMPLES), longest, model.config.hidden_size)]
    assert not any(weight.requires_grad for weight in model.parameters())


# Non-finite gradients


@pytest.mark.parametrize("column", ["nll_B", "norm_B"])
def test_a_row_is_refused_for_its_loss_or_its_norm_alone(column: str) -> None:
    finite = torch.tensor([1.0, 2.0])
    gradients = GradientBatch(torch.ones(2, 4), finite, torch.tensor([3, 3]), finite)
    refuse_non_finite(gradients, ["a", "b"], "unit")
    broken = dataclasses.replace(gradients, **{column: torch.tensor([1.0, float("nan")])})
    with pytest.raises(DataError, match="example b "):
        refuse_non_finite(broken, ["a", "b"], "unit")


@pytest.mark.parametrize("sick", [0, 3], ids=["padded", "the longest"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_by_the_name_of_its_example(value: float, sick: int) -> None:
    model = build_model("llama", FLOAT32, seed=1)
    wanted = extract(capture_of(model, FOLD_DIMS), [list(range(5))])
    others = {token for index in range(5) if index != sick for token in EXAMPLES[index].ids}
    token = next(token for token in EXAMPLES[sick].ids[:-1] if token not in {0, *others})
    model.get_input_embeddings().weight.data[token] = value
    found = extract(capture_of(model, FOLD_DIMS), [list(range(5))])
    with pytest.raises(DataError, match=f"example-{sick} is not finite") as refusal:
        refuse_non_finite(found, [f"example-{index}" for index in range(5)], "unit u7")
    assert refusal.value.where == "unit u7"
    healthy = [index for index in range(5) if index != sick]  # the sick one spoils no batch-mate
    assert bool((deviation_B(found.rows_BD[healthy], wanted.rows_BD[healthy]) < TOLERANCE[FLOAT32]).all())
