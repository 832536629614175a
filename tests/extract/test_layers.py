"""Which layers are captured: every linear layer that the globs name, and nothing is left out in silence."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from prism_job.errors import RequestError
from prism_job.extract.capture.layers import captured_layers
from tests.models import build_model


@cache
def model_of(kind: str) -> Any:
    return build_model(kind, torch.float32, seed=1)


LLAMA_LAYERS = [
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied"])
def test_every_linear_layer_is_captured_but_the_head_and_no_embedding(kind: str) -> None:
    layers = captured_layers(model_of(kind), ("*",))
    assert layers.names == LLAMA_LAYERS
    assert layers.coverage == 1


def test_transposed_layers_of_gpt2_are_captured_and_its_position_embedding_is_not() -> None:
    layers = captured_layers(model_of("gpt2"), ("*",))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert layers.names == [f"transformer.h.{layer}.{part}" for layer in range(2) for part in parts]
    assert layers.coverage == 1


def test_of_an_adapted_model_only_the_adapter_is_captured() -> None:
    layers = captured_layers(model_of("lora"), ("*",))
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    prefix = "base_model.model.model.layers"
    assert layers.names == [
        f"{prefix}.{layer}.{part}.lora_{side}.default" for layer in range(2) for part in parts for side in "AB"
    ]
    assert layers.coverage == 1


def test_globs_choose_layers_by_name() -> None:
    model = model_of("llama")
    assert captured_layers(model, ("*.q_proj", "*.down_proj")).names == [
        name for name in LLAMA_LAYERS if name.endswith(("q_proj", "down_proj"))
    ]
    assert captured_layers(model, ("model.layers.1.*",)).names == LLAMA_LAYERS[7:]


@pytest.mark.parametrize("beside", [(), ("*.q_proj",)], ids=["alone", "beside a good one"])
@pytest.mark.parametrize("glob", ["lm_head", "model.embed_tokens", "*.no_such_layer"])
def test_globs_that_name_no_linear_layer_are_refused(glob: str, beside: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match=f"'{re.escape(glob)}' matches no linear layer that") as refusal:
        captured_layers(model_of("llama"), (*beside, glob))
    assert refusal.value.where == "spec.extraction.layers"
    assert "model.layers.0.self_attn.q_proj" in refusal.value.fix


def test_fused_experts_and_routers_are_captured_and_a_part_of_the_model_is_no_whole() -> None:
    model = build_model("mixtral")
    layers = captured_layers(model, ("*",))
    parts = ("gate", "experts.gate_up_proj", "experts.down_proj")
    assert [name for name in layers.names if ".mlp." in name] == [
        f"model.layers.{layer}.mlp.{part}" for layer in range(2) for part in parts
    ]
    assert (layers.coverage, layers.share_of_model) == (1, 1)
    attention = captured_layers(model, ("*.self_attn.*",))
    assert attention.names == [name for name in LLAMA_LAYERS if "self_attn" in name]
    size = sum(parameter.numel() for name, parameter in model.named_parameters() if "_attn" in name)
    whole = sum(parameter.numel() for name, parameter in model.model.layers.named_parameters() if parameter.ndim > 1)
    assert (attention.coverage, attention.share_of_model) == (1, pytest.approx(size / whole))
    without = captured_layers(model, ("!*.self_attn.*",))
    assert without.names == [name for name in layers.names if "self_attn" not in name]
    assert without.share_of_model == pytest.approx(1 - size / whole)


def test_globs_that_leave_out_every_layer_are_refused() -> None:
    with pytest.raises(RequestError, match="no weight that can be captured is left") as refusal:
        captured_layers(model_of("llama"), ("!model.layers.*",))
    assert refusal.value.where == "spec.extraction.layers"


class Fused(nn.Module):
    """One linear layer of 1,000 numbers and a 3-D parameter beside it, as fused experts have."""

    def __init__(self, num_fused: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.linear = nn.Linear(20, 50, bias=False)
        self.experts = nn.Parameter(torch.zeros(2, 1, num_fused // 2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_coverage_counts_matrix_parameters_and_has_its_floor_at_nine_tenths() -> None:
    assert captured_layers(Fused(110), ("*",)).coverage == pytest.approx(1000 / 1110)
    with pytest.raises(RequestError, match=r"covers 89\.9%.*not captured: experts"):
        captured_layers(Fused(112), ("*",))


def test_a_model_without_a_head_is_refused() -> None:
    model = model_of("llama").model
    with pytest.raises(RequestError, match="LlamaModel has no head"):
        captured_layers(model, ("*",))
