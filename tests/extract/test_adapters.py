"""A row of an adapted model is the gradient of the adapter's LoRA matrices, whatever else it holds; or it is refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from prism_job.errors import DataError, RequestError
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.load.model import load_model
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
from tests.models import fill, save_tiny_model
from tests.oracle import linear_layers, sketches, weight_gradients

COUNT = 6
LAYERS = ["q_proj", "down_proj"]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen 2: its q, k and v layers have biases."""
    return save_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", seed=1)


def save_adapter(base: Path, folder: Path, options: Options) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **({"target_modules": LAYERS} | options))
    with warnings.catch_warnings(action="ignore"):  # peft warns of nearly every option here
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=FLOAT32), config)
        fill(adapted, seed=2)  # the base too: what the adapter does not hold must come from the base's own files
        adapted.save_pretrained(folder)
    return folder


def load(base: Path, adapter: Path, dtype: str = "float32") -> Any:
    return load_model(ModelSpec.model_validate({"uri": str(base), "adapter": str(adapter), "dtype": dtype}), CPU)


CAPTURED: dict[str, Options] = {
    "plain": {},
    "scaled by the root of its rank": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "all linear layers": {"target_modules": "all-linear"},
    "all biases": {"bias": "all"},
    "biases of its layers": {"bias": "lora_only"},
    "biases of its own": {"lora_bias": True},
    "embedding": {"target_modules": [*LAYERS, "embed_tokens"]},
    "head and embedding": {"target_modules": [*LAYERS, "lm_head", "embed_tokens"]},
    "head and embedding as a whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "some tokens": {"trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize("options", CAPTURED.values(), ids=CAPTURED)
def test_every_row_is_the_gradient_of_the_loras_matrices(base: Path, tmp_path: Path, options: Options) -> None:
    adapter = save_adapter(base, tmp_path, options)
    model = load(base, adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=FLOAT32)
    reference = PeftModel.from_pretrained(plain, str(adapter)).eval().requires_grad_(False)
    ids = torch.tensor([EXAMPLES[0].ids])
    # The same weights through the same code: the same bits.
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    layers = [name for name in linear_layers(reference) if ".lm_head." not in name]
    assert captured_layers(model, ("*",)).names == layers
    wanted = []
    for example in EXAMPLES[:COUNT]:
        gradients, _, _ = weight_gradients(reference, example, mean=False)
        in_float64 = {name: gradients[name].double() for name in layers}
        wanted.append(torch.cat(list(sketches(in_float64, SEED, DIM).values())))
    found = extract(capture_of(model, None), in_batches_of(3, COUNT)).rows_BD
    assert bool((deviation_B(found, torch.stack(wanted)) < TOLERANCE[FLOAT32]).all())


def test_what_an_adapter_holds_of_embedding_and_head_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(base, save_adapter(base, tmp_path, CAPTURED["head and embedding"]))
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"adapter"' in line]
    prefix = "base_model.model"
    assert event["not_captured"] == [
        *(f"{prefix}.model.embed_tokens.lora_embedding_{side}.default" for side in "AB"),
        *(f"{prefix}.lm_head.lora_{side}.default.weight" for side in "AB"),
    ]


@pytest.mark.parametrize("name", ["head and embedding as a whole", "some tokens", "all biases"])
def test_all_weights_of_an_adapter_take_the_models_type(base: Path, tmp_path: Path, name: str) -> None:
    model = load(base, save_adapter(base, tmp_path, CAPTURED[name]), "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    extract(capture_of(model, None), in_batches_of(3, COUNT))


MERGE = "merge the adapter into its base"
REFUSED: dict[str, Options] = {
    f"sets use_dora | {MERGE}": {"use_dora": True},
    "aLoRA | leave model.adapter out | cannot be merged": {"alora_invocation_tokens": [5, 6]},
    f"model.layers.0.mlp.up_proj as a whole | modules_to_save | {MERGE}": {"modules_to_save": ["up_proj"]},
}


@pytest.mark.parametrize(("expected", "options"), REFUSED.items(), ids=REFUSED)
def test_lora_that_capture_does_not_see_as_it_is_trained_is_refused(
    base: Path, tmp_path: Path, expected: str, options: Options
) -> None:
    refuses(base, save_adapter(base, tmp_path, options), expected)


def test_an_adapter_of_fused_experts_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = save_adapter(base, tmp_path / "adapter", options)
    refuses(base, adapter, f"target_parameters: mlp.experts.down_proj | {MERGE}")


@pytest.mark.parametrize(
    ("kind", "fix"), [("LOHA", MERGE), ("IA3", MERGE), ("PREFIX_TUNING", "leave model.adapter out")]
)
def test_other_kinds_of_adapters_are_refused_before_they_are_loaded(
    base: Path, tmp_path: Path, kind: str, fix: str
) -> None:
    adapter = save_adapter(base, tmp_path, {})
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
    refuses(base, adapter, f"type {kind} | only LoRA | {fix}")


def refuses(base: Path, adapter: Path, expected: str) -> None:
    with pytest.raises(RequestError) as refusal:
        load(base, adapter)
    assert refusal.value.where == str(adapter)
    for part in expected.split(" | "):
        assert part in f"{refusal.value.what} {refusal.value.fix}"


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    gpt2 = save_tiny_model(tmp_path / "gpt2", "gpt2")
    refuses(gpt2, save_adapter(base, tmp_path / "adapter", {}), "not found in the base model | a PEFT adapter made for")


@pytest.mark.parametrize(
    "other_name", [None, "base_model.model.model.layers.7.lora_A.weight"], ids=["lacking", "too many"]
)
def test_an_adapter_whose_weights_do_not_match_the_model_is_refused(
    base: Path, tmp_path: Path, other_name: str | None
) -> None:
    adapter = save_adapter(base, tmp_path, {})
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    first = min(weights)
    weight = weights[first].clone() if other_name else weights.pop(first)
    safetensors.torch.save_file(
        weights | ({other_name: weight} if other_name else {}), adapter / "adapter_model.safetensors"
    )
    with pytest.raises(
        DataError,
        match=re.escape(f"1 of the adapter's weights do not match this model, the first: {other_name or first}"),
    ):
        load(base, adapter)


def test_the_estimate_refuses_what_extraction_would(job: Job, base: Path) -> None:
    adapter = job.folder / "adapter"
    job.spec["model"] |= {"uri": str(base), "adapter": str(adapter)}
    for options, expected in ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["up_proj"]}, "as a whole"):
        save_adapter(base, adapter, options)
        job.refuses(("estimate", "--spec", str(job.spec_path())), 64, expected, str(adapter), MERGE)
    del job.spec["model"]["adapter"]
    job.spec["extraction"]["maxLength"] = 5000
    job.refuses(("estimate", "--spec", str(job.spec_path())), 64, "maxLength 5000", "4096 or less")
