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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    T5Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prism_job.errors import DataError, RequestError
from prism_job.extract.model import load_model
from prism_job.extract.model_config import load_config, refuse_unsuitable_settings
from prism_job.plan.attention import EAGER_ONLY, attention_backend
from prism_job.plan.extractor import extractor_parts
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec
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
from tests.models import HIDDEN, NUM_LAYERS, VOCAB, build_tokenizer, fill
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
    "package compressed-tensors | pip install": {"quantization_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize(("expected", "settings"), WRONG_CONFIGS.items(), ids=WRONG_CONFIGS)
def test_a_model_that_cannot_be_captured_is_refused_without_its_weights(
    tiny_model: Path, tmp_path: Path, expected: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_job.extract.model_config.find_spec", lambda name: None)
    folder = changed(tiny_model, tmp_path / "model", **settings)
    (folder / "model.safetensors").unlink()
    refuses(lambda: load_config(spec_of(folder)), f"{expected} | {folder}")


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


def test_an_fp8_checkpoint_is_the_model_that_its_numbers_stand_for(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    folder = changed(tiny_model, tmp_path / "fp8", quantization_config=settings)
    weights, wanted = safetensors.torch.load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if "_proj" in name]:
        rows, columns = weights[name].shape
        blocks = weights[name].view(rows // 16, 16, columns // 16, 16)
        scales = blocks.abs().amax((1, 3)) / 448  # the largest number of float8_e4m3fn
        stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name], weights[f"{name}_scale_inv"] = stored.view(rows, columns), scales
        wanted[name] = (stored.float() * scales[:, None, :, None]).view(rows, columns)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_model(spec_of(folder), CPU).state_dict()
    assert found.keys() == load_model(spec_of(tiny_model), CPU).state_dict().keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=0)  # one product in float32


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
