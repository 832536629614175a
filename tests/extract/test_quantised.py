"""Rows of a model whose weights bitsandbytes holds in 4 or 8 bits are those of the dequantised model, in every dtype.

The oracle is built of plain linear layers, whose weights bitsandbytes' own functions dequantise in float32.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from prism_job.errors import DataError, RequestError
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.model import load_model
from prism_job.plan.extractor import extractor_parts
from prism_job.spec.model import ModelSpec
from tests.conftest import Job, read_json
from tests.extract.test_gradients import (
    CPU,
    DIM,
    EXAMPLES,
    FLOAT32,
    SEED,
    TOLERANCE,
    capture_of,
    deviation_B,
    extract,
    in_batches_of,
)
from tests.models import save_tiny_adapter, save_tiny_gguf, save_tiny_model
from tests.oracle import linear_layers, sketches, weight_gradients

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

QUANTISATIONS = ["nf4", "int8"]
COUNT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    saved = {kind: save_tiny_model(folder / kind, kind, seed=1) for kind in ("llama", "gpt2")}
    return {**saved, "adapter": save_tiny_adapter(folder / "adapter")}


def load(folder: Path, dtype: str = "float32", **settings: Any) -> Any:
    return load_model(ModelSpec.model_validate({"uri": str(folder), "dtype": dtype, **settings}), CPU)


def dequantised_into(model: Any, quantised: Any) -> Any:
    """`model`, a plain one, with the numbers that `quantised` stands for."""
    plain = dict(model.named_modules())
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            state = weight.quant_state
            before, state.dtype = state.dtype, torch.float32
            numbers = bnb.functional.dequantize_4bit(weight.data, state)
            state.dtype = before
        elif isinstance(module, bnb.nn.Linear8bitLt):
            numbers = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        is_transposed = not isinstance(plain[name], nn.Linear)  # GPT-2's
        plain[name].weight.data.copy_(numbers.T if is_transposed else numbers)
    return model


def rows_of(model: Any, size: int = 4) -> torch.Tensor:
    return extract(capture_of(model, None), in_batches_of(size, COUNT)).rows_BD


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_every_row_is_the_weight_gradient_of_the_dequantised_model(
    folders: dict[str, Path], kind: str, quantization: str
) -> None:
    model, unquantised = load(folders[kind], quantization=quantization), load(folders[kind])
    before = rows_of(unquantised)
    plain = dequantised_into(unquantised, model)
    layers = captured_layers(model, ("*",))
    assert layers.names == list(linear_layers(plain))
    assert layers.coverage == 1
    exact = exact_rows(plain)
    # The same numbers in the same dtype, so float32's own tolerance; alone and in fours, so no batch-mate counts.
    for size in (1, 4):
        assert bool((deviation_B(rows_of(model, size), exact) < TOLERANCE[FLOAT32]).all())
    assert bool((deviation_B(before, exact) > 100 * TOLERANCE[FLOAT32]).all()), "quantising moves a row"


def exact_rows(plain: Any) -> torch.Tensor:
    computed = [weight_gradients(plain, example, mean=False)[0] for example in EXAMPLES[:COUNT]]
    in_float64 = [{name: gradient.double() for name, gradient in each.items()} for each in computed]
    return torch.stack([torch.cat(list(sketches(each, SEED, DIM).values())) for each in in_float64])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_inputs_and_products_keep_the_models_dtype(folders: dict[str, Path], quantization: str, dtype: str) -> None:
    model = load(folders["llama"], dtype, quantization=quantization)
    plain = dequantised_into(load(folders["llama"], dtype), model)
    kept = {name: weight.dtype for name, weight in model.named_parameters() if weight.is_floating_point()}
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(kept)
    assert set(kept.values()) == {getattr(torch, dtype)}
    (found,), (wanted,) = (capture_of(each, None).projections for each in (model, plain))
    assert {side.dtype for sides in found.sides.values() for side in sides} == {
        side.dtype for sides in wanted.sides.values() for side in sides
    }
    # bitsandbytes rounds a dequantised weight once, as the copy into the plain model does: the same products, the same bits.
    assert torch.equal(rows_of(model), rows_of(plain))


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_of_an_adapter_over_quantised_weights_the_rows_are_the_adapters(
    folders: dict[str, Path], quantization: str
) -> None:
    adapter = str(folders["adapter"])
    model = load(folders["llama"], adapter=adapter, quantization=quantization)
    plain = dequantised_into(load(folders["llama"], adapter=adapter), model)
    layers = captured_layers(model, ("*",))
    assert layers.names == list(linear_layers(plain))
    assert all(".lora_" in name for name in layers.names)
    assert layers.coverage == 1
    for size in (1, 4):
        assert bool((deviation_B(rows_of(model, size), exact_rows(plain)) < TOLERANCE[FLOAT32]).all())


def test_no_product_leaves_the_dequantised_weight_in_memory(folders: dict[str, Path]) -> None:
    """Which is what 4 bits are for. Nor is any weight changed by a pass: a second one gives the same rows."""
    model = load(folders["llama"], quantization="nf4")
    layer = model.model.layers[0].mlp.down_proj
    saved: list[torch.Size] = []
    inputs = torch.randn(2, 3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.shape), lambda each: each):
        layer(inputs).sum().backward()
    assert saved == []
    with torch.no_grad():
        model(input_ids=torch.arange(20)[None])  # after which bitsandbytes' own product would let no gradient pass
    assert torch.equal(rows_of(model), rows_of(model))


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_a_checkpoint_that_is_quantised_already_is_loaded_as_it_is(
    folders: dict[str, Path], quantization: str, tmp_path: Path
) -> None:
    model = load(folders["llama"], quantization=quantization)
    wanted = rows_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(rows_of(load(tmp_path)), wanted)
    with pytest.raises(RequestError, match=r"quantised already \(bitsandbytes\)") as refusal:
        load(tmp_path, quantization=quantization)
    assert refusal.value.where == "spec.model.quantization"
    with pytest.raises(RequestError, match="ZeRO stage 3"):
        load_model(ModelSpec(uri=str(tmp_path)), CPU, zero3={})


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_what_cannot_be_quantised_is_refused(
    folders: dict[str, Path], quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.model_validate({"uri": str(folders["llama"]), "quantization": quantization})
    with pytest.raises(RequestError, match="ZeRO stage 3") as refusal:
        load_model(spec, CPU, zero3={})
    assert "stage: 0" in refusal.value.fix
    with pytest.raises(RequestError, match=r"quantised already \(GGUF\)"):
        load(save_tiny_gguf(tmp_path / "tiny.gguf"), quantization=quantization)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RequestError, match="need the package bitsandbytes"):
        load_model(spec, CPU)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_a_weight_that_is_not_finite_is_named_although_its_bits_are(
    folders: dict[str, Path], quantization: str, bad: float, tmp_path: Path
) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = safetensors.torch.load_file(path)
    weights[name][3, 5] = bad
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"weight {name} holds NaN or infinite"):
        load(tmp_path, quantization=quantization)


def test_quantised_rows_have_a_digest_of_their_own_and_old_stores_keep_theirs(job: Job) -> None:
    parts = extractor_parts(job.parsed().spec)
    assert "quantization" not in parts
    digests = {job.plan()["extractor"]}
    for quantization in QUANTISATIONS:
        job.spec["model"]["quantization"] = quantization
        assert extractor_parts(job.parsed().spec) == {**parts, "quantization": quantization}
        digests.add(job.plan()["extractor"])
    assert len(digests) == 3


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_a_run_with_quantised_weights_publishes_a_selection(job: Job, quantization: str) -> None:
    job.spec["model"] |= {"quantization": quantization, "dtype": "bfloat16"}
    manifest = read_json(job.run())
    assert manifest["spec"]["spec"]["model"]["quantization"] == quantization
    assert manifest["counts"]["selected"] == 4
