"""A model is refused by its config, before its weights are read, where its rows would be wrong; the error says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prism_job.errors import DataError, RequestError
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.load.model import load_model
from prism_job.extract.load.model_config import load_config, refuse_unsuitable_settings
from prism_job.plan.attention import EAGER_ONLY, attention_backend
from prism_job.plan.extractor import extractor_parts
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec
from prism_job.storage import model_files
from tests.conftest import Job
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
from tests.models import HIDDEN, NUM_LAYERS, VOCAB, build_tokenizer, fill, save_tiny_gguf
from tests.oracle import sketches, weight_gradients

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
COUNT = 6


def spec_of(folder: Path, **settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"uri": str(folder), "dtype": "float32", **settings})


def save(folder: Path, config: Any) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=FLOAT32)
    fill(model, seed=1)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def changed(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the model whose config.json has these settings."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def refuses(call: Callable[[], object], expected: str, error: type[Exception] = RequestError) -> None:
    with pytest.raises(error) as refusal:
        call()
    text = str(refusal.value)
    for part in expected.split(" | "):
        assert part in text, text


# Attention


def test_auto_is_sdpa_and_keeps_the_digest_where_the_architecture_has_it(job: Job) -> None:
    digests = {}
    for attention in ("auto", "sdpa", "eager"):
        job.spec["model"]["attention"] = attention
        digests[attention] = job.plan()["extractor"]
    del job.spec["model"]["attention"]
    assert digests["auto"] == digests["sdpa"] == job.plan()["extractor"] != digests["eager"]


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0, sliding_window=8),
        BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=NUM_LAYERS, n_head=4),
    ],
    ids=["gemma2", "bloom"],
)
def test_auto_is_eager_where_there_is_no_sdpa_and_the_rows_are_right(tmp_path: Path, job: Job, config: Any) -> None:
    folder = save(tmp_path / "model", config)
    job.spec["model"]["uri"] = str(folder)
    assert extractor_parts(job.parsed().spec)["attention"] == "eager"
    model = load_model(spec_of(folder), CPU)
    assert model.config._attn_implementation == "eager"
    wanted = []
    for example in EXAMPLES[:COUNT]:
        gradients, _, _ = weight_gradients(model, example, mean=False)
        in_float64 = {name: gradient.double() for name, gradient in gradients.items()}
        wanted.append(torch.cat(list(sketches(in_float64, SEED, DIM).values())))
    model.requires_grad_(False)
    found = extract(capture_of(model, None), in_batches_of(3, COUNT)).rows_BD
    assert bool((deviation_B(found, torch.stack(wanted)) < TOLERANCE[FLOAT32]).all())
    refuses(lambda: load_model(spec_of(folder, attention="sdpa"), CPU), "no sdpa | set model.attention: eager")


def test_the_hint_for_a_gguf_file_without_sdpa_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its architecture is known only as it is loaded."""
    file = save_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    refuses(lambda: load_model(spec_of(file), CPU), "set model.attention: eager")
    load_model(spec_of(file, attention="eager"), CPU)


def test_transformers_has_no_sdpa_for_the_architectures_listed() -> None:
    for model_type in EAGER_ONLY:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        assert not model._supports_sdpa, f"{model_type} has sdpa now: auto may stay eager, which keeps stores"


def test_a_language_model_inside_another_decides_on_the_backend(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "model", model_type="paligemma", text_config={"model_type": "gemma2"})
    assert attention_backend(spec_of(folder)) == "eager"


# Kinds of models


def quantised_by(method: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method}}


NAME_ANOTHER = "name a causal language model"
WRONG_CONFIGS: dict[str, dict[str, Any]] = {
    f"does not know the model type 'brandnew' | newer transformers | {NAME_ANOTHER}": {"model_type": "brandnew"},
    "PRISM runs no code of a repository": {"model_type": "new", "auto_map": {"AutoConfig": "configuration_new.New"}},
    f"'t5' is an encoder-decoder model | {NAME_ANOTHER}": T5Config().to_dict(),
    f"'bart' is an encoder-decoder model | {NAME_ANOTHER}": BartConfig().to_dict(),
    f"no causal language model of type 'clip' | {NAME_ANOTHER} | save the language model alone": {"model_type": "clip"},
    f"LlamaForSequenceClassification | {NAME_ANOTHER}": {"architectures": ["LlamaForSequenceClassification"]},
    f"BertForMaskedLM, not a causal | {NAME_ANOTHER}": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "config.json cannot be used | multiple of the number of attention heads | check config.json": {
        "num_attention_heads": 5
    },
    "quantised by gptq | name the unquantised model | model.quantization: nf4": {
        "quantization_config": {"quant_method": "gptq"}
    },
    "quantised by awq | name the unquantised model": {"quantization_config": {"quant_method": "awq"}},
    "quantised by a method that quantization_config does not name": {"quantization_config": {"load_in_4bit": True}},
    "neither load_in_4bit nor load_in_8bit | copy config.json again": quantised_by("bitsandbytes"),
    "does not know the model type '['a']'": {"model_type": ["a"]},
}


@pytest.mark.parametrize("kind", [["a"], {"b": 1}, 5, None])
def test_a_model_type_that_is_no_text_is_nothing_to_the_plan(tiny_model: Path, tmp_path: Path, kind: Any) -> None:
    folder = changed(tiny_model, tmp_path / "model", part={"model_type": kind})
    assert model_files.model_types(str(folder)) == {"llama"}


@pytest.mark.parametrize(("expected", "settings"), WRONG_CONFIGS.items(), ids=WRONG_CONFIGS)
def test_a_model_that_cannot_be_captured_is_refused_without_its_weights(
    tiny_model: Path, tmp_path: Path, expected: str, settings: dict[str, Any]
) -> None:
    folder = changed(tiny_model, tmp_path / "model", **settings)
    (folder / "model.safetensors").unlink()
    refuses(lambda: load_config(spec_of(folder)), f"{expected} | {folder}")


@pytest.mark.parametrize("named", [5, [None], "x"])
def test_architectures_that_are_no_list_of_texts_say_nothing(tiny_model: Path, tmp_path: Path, named: Any) -> None:
    config = load_config(spec_of(changed(tiny_model, tmp_path / "model", architectures=named)))
    assert config is not None
    assert config.model_type == "llama"


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_config_that_is_missing_or_broken_is_refused_by_the_plan(
    job: Job, tiny_model: Path, text: str | None
) -> None:
    folder = changed(tiny_model, job.folder / "model")
    (folder / "config.json").unlink()
    if text:
        (folder / "config.json").write_text(text)
    job.spec["model"]["uri"] = str(folder)
    job.refuses("plan", 64, "config.json cannot be read" if text else "no config.json", str(folder))


def test_weights_that_do_not_fit_the_config_are_named(tiny_model: Path, tmp_path: Path) -> None:
    wide = changed(tiny_model, tmp_path / "wide", intermediate_size=96)
    refuses(
        lambda: load_model(spec_of(wide), CPU),
        "model.layers.0.mlp.down_proj.weight is [32, 48] in the files, and [32, 96] by config.json | weights of one model",
        DataError,
    )
    body = changed(tiny_model, tmp_path / "body")
    weights = safetensors.torch.load_file(body / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, body / "model.safetensors", metadata={"format": "pt"})
    expected = "lack 1 weight(s) of this model, the first: lm_head.weight | the whole language model, head included"
    refuses(lambda: load_model(spec_of(body), CPU), expected, DataError)


def test_weights_that_the_model_does_not_use_are_reported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(spec_of(changed(tiny_model, tmp_path / "model", num_hidden_layers=1)), CPU)
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"weights"' in line]
    assert event["unused"] == 9
    assert event["first"][0].startswith("model.layers.1.")


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(job: Job, tmp_path: Path) -> None:
    job.spec["model"]["uri"] = str(save(tmp_path / "model", LlamaConfig(**SHAPE | {"vocab_size": 100})))
    job.fails("extract", 64, "the tokenizer makes token", "has only 100 token embeddings", "trained with")


# Quantised checkpoints


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What DeepSeek's form stores for a weight, blocks of 16 × 16, and the numbers that it stands for."""
    rows, columns = weight.shape
    blocks = weight.view(rows // 16, 16, columns // 16, 16)
    scales = blocks.abs().amax((1, 3)) / 448  # the largest number of float8_e4m3fn
    stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    numbers = (stored.float() * scales[:, None, :, None]).view(rows, columns)
    return {".weight": stored.view(rows, columns), ".weight_scale_inv": scales}, numbers


def compressed_fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for each output."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scales).to(torch.float8_e4m3fn)
    return {".weight": stored, ".weight_scale": scales}, stored.float() * scales


def compressed_int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for each 16 inputs; eight numbers in an int32, the first in its lowest bits."""
    groups = weight.view(len(weight), -1, 16)
    scales = groups.abs().amax(2) / 7
    stored = (groups / scales[..., None]).round()
    nibbles = (stored.view(len(weight), -1, 8).long() + 8) << torch.arange(0, 32, 4)
    packed = nibbles.sum(2)
    signed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    parts = {".weight_packed": signed, ".weight_scale": scales, ".weight_shape": torch.tensor(weight.shape)}
    return parts, (stored * scales[..., None]).view_as(weight)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    shared = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return {**shared, "format": form, "config_groups": {"group_0": group}}


STORED: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}, fp8),
    "compressed fp8": (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), compressed_fp8),
    "compressed int4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        compressed_int4,
    ),
}


@pytest.mark.parametrize(("settings", "quantise"), STORED.values(), ids=STORED)
def test_a_quantised_checkpoint_is_the_plain_model_that_its_numbers_stand_for(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], quantise: Any
) -> None:
    folder = changed(tiny_model, tmp_path / "model", quantization_config=settings)
    wanted = safetensors.torch.load_file(folder / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in wanted.items():
        parts = {".weight": weight}
        if "_proj" in name:
            parts, wanted[name] = quantise(weight)
        stored |= {name.removesuffix(".weight") + part: tensor for part, tensor in parts.items()}
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(spec_of(folder), CPU)
    assert captured_layers(model, ("*",)).coverage == 1
    torch.testing.assert_close(model.state_dict(), wanted, rtol=1e-6, atol=0)  # one product in float32
    sharded = "a quantised checkpoint cannot be used with ZeRO stage 3 | in 16 bits | stage: 0"
    refuses(lambda: load_model(spec_of(folder), CPU, zero3={}), sharded)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_the_experts_of_gpt_oss_are_the_numbers_that_mxfp4_stands_for(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "model", GptOssConfig(**SHAPE | {"intermediate_size": 64}, head_dim=8, num_local_experts=4)
    )
    wanted, stored = safetensors.torch.load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(1)
    for name, weight in wanted.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        num_experts, inputs, outputs = weight.shape
        shape = (num_experts, outputs, inputs // 32)
        pairs = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": pairs, f"{name}_scales": exponents}
        numbers = FP4[torch.stack([pairs & 15, pairs >> 4], -1).long()].flatten(3)
        scales = 2.0 ** (exponents.float() - 127)
        wanted[name] = (numbers * scales[..., None]).flatten(2).transpose(1, 2)
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    configured = changed(folder, tmp_path / "mxfp4", **quantised_by("mxfp4"))
    torch.testing.assert_close(load_model(spec_of(configured), CPU).state_dict(), wanted, rtol=0, atol=0)


# Rotary embedding

LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "longrope": LONGROPE | {"factor": 2.0},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_a_maximum_length_at_which_a_long_text_would_change_a_short_one_is_refused(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **ROPE_TYPES[rope_type]}
    config = LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config, dtype=FLOAT32).eval().requires_grad_(False)
    fill(model, seed=1)
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    alone = model(input_ids=ids).logits
    accepted = {}
    for max_length in (32, 33, 64, 65, 128):
        beside = model(input_ids=torch.nn.functional.pad(ids, (0, max_length - 20))).logits[:, :20]
        is_changed = bool((beside - alone).norm() / alone.norm() > 1e-5)
        accepted[max_length] = is_accepted(max_length, config)
        assert not (accepted[max_length] and is_changed), max_length
    limit = 32 if rope_type == "longrope" else 64
    assert accepted == {max_length: max_length <= limit for max_length in accepted}


def is_accepted(max_length: int, config: Any) -> bool:
    try:
        refuse_unsuitable_settings(ExtractionSpec.model_validate({"maxLength": max_length}), config, num_layers=100)
    except RequestError as error:
        return (error.where, "or less" in error.fix) != ("spec.extraction.maxLength", True)
    return True


def test_the_positions_of_a_language_model_inside_another_are_checked() -> None:
    config = Gemma3Config(text_config={**SHAPE, "head_dim": 8, "max_position_embeddings": 64})
    assert is_accepted(64, config)
    assert not is_accepted(65, config)


def test_longrope_of_one_kind_of_layers_is_found(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", **LONGROPE},
        "sliding": {"rope_type": "default"},
    }
    assert is_accepted(32, config)
    assert not is_accepted(33, config)
