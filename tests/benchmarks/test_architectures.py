"""Laws of the table of architectures: it lists what the registry has, and an architecture of each kind gives exact rows."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.models import architectures, tiny_architectures
from benchmarks.models.tiny_architectures import KINDS, MODEL_TYPES, NOT_BUILT


def test_the_document_lists_every_architecture_of_the_registry_once() -> None:
    text = architectures.DOCUMENT.read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == [
        name for kind in KINDS for name in MODEL_TYPES if f"| `{name}` |" in section(text, kind)
    ]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == sorted(MODEL_TYPES)
    assert re.findall(r"^- `([\w-]+)`:", text, re.MULTILINE) == list(NOT_BUILT)
    assert "**fails**" not in text


def section(text: str, kind: str) -> str:
    return next(part for part in text.split("\n## ") if part.lower().startswith(kind))


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("phi3", "dense"),
        ("falcon", "dense"),  # its own linear layer
        ("hrm_text", "dense"),  # cycles without a gradient
        ("ctrl", "dense"),  # scales its embeddings in place
        ("qwen3_moe", "experts"),
        ("gpt_oss", "experts"),
        ("deepseek_v3", "experts"),
        ("llama4_text", "experts"),  # outside transformers' interface
        ("longcat_flash", "experts"),
        ("qwen3_next", "hybrid or state-space"),
        ("mamba", "hybrid or state-space"),
        ("zamba2", "hybrid or state-space"),  # two layers share a weight
        ("qwen3_5", "multimodal"),
        ("phi4_multimodal", "multimodal"),
        ("bert", "encoder used as a decoder"),
    ],
)
def test_rows_of_an_architecture_of_each_kind_are_the_gradients_of_autograd(model_type: str, kind: str) -> None:
    verdict = architectures.judge(model_type)
    assert (verdict.kind, verdict.failed, verdict.refused) == (kind, "", "")
    assert verdict.row_error < 1e-12  # float64 on both sides: 1e-15 seen
    assert verdict.batch_error < architectures.BATCH_TOLERANCE
    if kind == "experts":
        assert verdict.share >= 0.99


def test_a_float64_model_is_float64_throughout() -> None:
    model, _ = tiny_architectures.build("llama")
    with architectures.in_float64():
        norm = model.double().model.norm
        given = torch.randn(3, 64, dtype=torch.float64)
        plain = norm.weight * given * torch.rsqrt(given.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        torch.testing.assert_close(norm(given), plain, rtol=1e-14, atol=1e-14)
    assert torch.get_default_dtype() == torch.float32
