"""Loading a model changes none of its numbers: types of weights and buffers are those that transformers gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prism_job.extract.model import load_model
from prism_job.spec import ModelSpec
from tests.models import save_tiny_adapter


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_buffers_keep_the_type_that_transformers_gives_them(tiny_model: Path, dtype: str) -> None:
    # RoPE's frequencies in bfloat16 turn position 2,000 by almost half a circle.
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    found = load_model(ModelSpec.model_validate({"uri": str(tiny_model), "dtype": dtype}), torch.device("cpu"))
    assert {parameter.dtype for parameter in found.parameters()} == {getattr(torch, dtype)}
    buffers = dict(plain.named_buffers())
    assert buffers
    for name, buffer in found.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name


def test_an_adapters_weights_take_the_models_type(tiny_model: Path, tmp_path: Path) -> None:
    adapter = str(save_tiny_adapter(tmp_path / "adapter"))
    spec = ModelSpec.model_validate({"uri": str(tiny_model), "adapter": adapter, "dtype": "bfloat16"})
    found = load_model(spec, torch.device("cpu"))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert any(".lora_" in name for name, _ in found.named_parameters())
