"""Rows of a model whose weights bitsandbytes holds in 4 or 8 bits are those of the dequantised model, in every dtype.

The oracle is built of plain linear layers, whose weights bitsandbytes' own functions dequantise in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconConfig
from transformers.pytorch_utils import Conv1D

from prism_job.errors import DataError, RequestError
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.load import quantised
from prism_job.extract.load.model import load_model
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
from tests.models import VOCAB, save_tiny_adapter, save_tiny_gguf, save_tiny_model
from tests.oracle import linear_layers, sketches, weight_gradients

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

QUANTISATIONS = ["nf4", "int8"]
COUNT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    saved = {kind: save_tiny_model(folder / kind, kind, seed=1) for kind in ("llama", "gpt2", "mixtral")}
    return {**saved, "adapter": save_tiny_adapter(folder / "adapter")}


def load(folder: Path, dtype: str = "float32", **settings: Any) -> Any:
    return load_model(ModelSpec.model_validate({"uri": str(folder), "dtype": dtype, **settings}), CPU)


def dequantised_into(model: Any, packed: Any) -> Any:
    """`model`, a plain one, with the numbers that `packed` stands for, experts included."""
    plain = dict(model.named_parameters())
    for name, weight in packed.named_parameters():
        if isinstance(weight, bnb.nn.Params4bit):
            state = weight.quant_state
            before, state.dtype = state.dtype, torch.float32
            numbers = bnb.functional.dequantize_4bit(weight.data, state)
            state.dtype = before
        elif isinstance(weight, bnb.nn.Int8Params):
            scales = weight.SCB.view(-1)
            numbers = bnb.functional.int8_vectorwise_dequant(weight.data.view(len(scales), -1), scales)
        else:
            continue
        is_transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        plain[name].data.copy_(numbers.T if is_transposed else numbers.view(plain[name].shape))
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
def test_fused_experts_are_quantised_and_none_is_dequantised_between_the_passes(
    folders: dict[str, Path], quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["mixtral"], quantization=quantization)
    plain = dequantised_into(load(folders["mixtral"]), model)
    kept = {name for name, weight in model.named_parameters() if not quantised.is_quantised(weight) and weight.ndim > 1}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"} | {
        f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)
    }
    made: list[Any] = []
    dequantised = quantised.dequantised

    def seen(*arguments: Any) -> torch.Tensor:
        made.append(weakref.ref(values := dequantised(*arguments)))
        return values

    monkeypatch.setattr(quantised, "dequantised", seen)
    gradients = []
    for each in (model, plain):
        embedded = plain.get_input_embeddings()(torch.arange(20)[None]).requires_grad_()
        loss = each(inputs_embeds=embedded, use_cache=False).logits.square().sum()
        if each is model:
            assert len(made) == 2 * (4 + 2), "four linear layers and two weights of experts a block"
            assert not any(reference() is not None for reference in made)
        gradients += torch.autograd.grad(loss, embedded)
    assert bool((deviation_B(*(each[0] for each in gradients)) < TOLERANCE[FLOAT32]).all())
    # Ordinary capture of experts has its oracle in test_experts.py; packed weights count with all their numbers.
    packed, unpacked = (captured_layers(each, ("*",)) for each in (model, plain))
    assert [each.numel for each in packed.weights.values()] == [each.numel for each in unpacked.weights.values()]
    assert packed.share_of_model == unpacked.share_of_model == 1
    assert bool((deviation_B(rows_of(model), rows_of(plain)) < TOLERANCE[FLOAT32]).all())


def test_a_model_that_reads_a_quantised_weight_itself_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads_its_weight(self: Any, given: torch.Tensor) -> torch.Tensor:
        return self.down_proj(
            nn.functional.linear(given, self.up_proj.weight.float())
        )  # its shape, unpacked, would fit

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", reads_its_weight)
    for quantization in QUANTISATIONS:
        with pytest.raises(RequestError, match="reads a weight without calling its layer"):
            load(folders["llama"], quantization=quantization)


def test_a_model_without_layers_that_can_be_quantised_is_refused(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="no layer that bitsandbytes can quantise"):
        load(tmp_path, quantization="nf4")


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_a_checkpoint_that_is_quantised_already_is_loaded_as_it_is(
    folders: dict[str, Path], quantization: str, tmp_path: Path
) -> None:
    kind = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    made = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=BitsAndBytesConfig(**kind))
    made.save_pretrained(tmp_path)
    model = load(tmp_path)
    plain = dequantised_into(load(folders["llama"]), model)
    assert bool((deviation_B(rows_of(model), exact_rows(plain)) < TOLERANCE[FLOAT32]).all())
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_a_weight_that_is_not_finite_is_named_although_its_bits_are(
    folders: dict[str, Path], quantization: str, bad: float, tmp_path: Path
) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = safetensors.torch.load_file(path)
    weights[name][3, 5] = bad
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    if quantization == "nf4" and bad == 1e5:
        load(tmp_path, quantization=quantization)
        return
    with pytest.raises(DataError, match=f"weight {name} holds NaN or infinite") as refusal:
        load(tmp_path, quantization=quantization)
    # int8 takes weights in float16, so its hint is not that the checkpoint is damaged.
    assert ("set model.quantization: nf4" in refusal.value.fix) == (quantization == "int8")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_config_that_calls_16_bit_weights_quantised_is_refused_with_what_to_change(
    folders: dict[str, Path], bits: int, tmp_path: Path
) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    settings = {"quantization_config": {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}}
    path.write_text(json.dumps(read_json(path) | settings))
    with pytest.raises(RequestError, match="weights are not quantised") as refusal:
        load(tmp_path)
    assert "remove quantization_config from config.json" in refusal.value.fix


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
