"""Weights that bitsandbytes holds in 4 or 8 bits: how they are loaded, what they stand for, and the products with them.

A quantised layer computes what a plain linear layer with its dequantised weight computes, in the dtype of its inputs.
bitsandbytes' own products are not used. The 8-bit one (LLM.int8()) quantises the inputs as well, and treats columns apart in
which *any* token of a batch has a large input, so a batch-mate changes a row (by .02 to .2 of its norm on SmolLM2-135M,
benchmarks/quantised.py). The 4-bit one reorders a weight for inference on some CPUs; no gradient passes it afterwards.
"""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from prism_job.errors import RequestError
from prism_job.progress import event
from prism_job.spec.model import ModelSpec


def loading_arguments(spec: ModelSpec, folder: str, device: torch.device, *, is_sharded: bool) -> dict[str, Any]:
    """What `from_pretrained` needs beside its other arguments; empty where bitsandbytes holds no weight of this model.

    nf4 is quantised twice (the scales of its blocks too): 4.13 bits a weight in place of 4.5 (docs/performance.md).

    Raises RequestError: weights that are quantised already, ZeRO stage 3, or no bitsandbytes here.
    """
    stored = "GGUF" if spec.uri.endswith(".gguf") else _stored_quantisation(folder)
    if stored and spec.quantization:
        what = f"the weights of this model are quantised already ({stored})"
        fix = "leave model.quantization out, or name the checkpoint in 16 bits, as safetensors"
        raise RequestError(what, where="spec.model.quantization", fix=fix)
    if not spec.quantization and stored != "bitsandbytes":
        return {}
    if is_sharded:
        what = "quantised weights cannot be used with ZeRO stage 3"
        fix = "set extraction.deepspeed.stage: 0 (each rank holds the whole model), or use weights in 16 bits"
        raise RequestError(what, where="spec.model.quantization" if spec.quantization else spec.uri, fix=fix)
    _bitsandbytes()  # before transformers imports it
    placed: dict[str, Any] = {"device_map": {"": device}}  # a weight is quantised where it will stay
    if spec.quantization == "int8":
        placed["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif spec.quantization == "nf4":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        placed["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return placed


def _stored_quantisation(folder: str) -> str | None:
    try:
        return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):  # loading the model reports what is wrong with its config
        return None


def use_dequantised_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every quantised layer of a loaded model multiply by its dequantised weight, in `dtype`; report their share.

    Raises RequestError: a layer whose weight bitsandbytes would quantise in each pass (`llm_int8_has_fp16_weight`).
    """
    num_quantised = num_bytes = 0
    for name, module in _quantised_layers(model):
        weight: Any = module.weight
        if not is_quantised(weight):
            fix = "save the model in 16 bits (transformers' save_pretrained), and set model.quantization: int8"
            raise RequestError("this layer holds 16-bit weights that are quantised in each pass", where=name, fix=fix)
        if weight.dtype != torch.int8:
            weight.quant_state.dtype = dtype  # that of its dequantised values
        module.forward, module.compute_dtype = partial(_multiply, module), dtype
        num_quantised += module.in_features * module.out_features
        num_bytes += weight.nbytes
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if not is_quantised(weight)}
    total = num_quantised + sum(sizes.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    event("quantised", share=round(num_quantised / total, 4), bytes=num_bytes, largest_others=largest)


def _quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    bnb = _bitsandbytes()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield name, module


def is_quantised(weight: Any) -> bool:
    """Whether bitsandbytes holds this parameter."""
    return weight.dtype == torch.int8 or getattr(weight, "quant_state", None) is not None


def dequantised(weight: Any, dtype: torch.dtype) -> Tensor:
    """The matrix [outputs, inputs] that a quantised weight stands for."""
    if weight.dtype == torch.int8:
        return weight.data.to(dtype).mul_(weight.SCB[:, None] / 127)  # SCB: each output's largest, float32
    return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)


class _Product(torch.autograd.Function):
    """inputs · Wᵀ + bias. W is dequantised in both passes, because autograd would keep it between them."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, dequantised(layer.weight, inputs.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dequantised(ctx.layer.weight, gradient.dtype), None


def _multiply(layer: Any, inputs: Tensor) -> Tensor:
    return _Product.apply(inputs, layer)


def _bitsandbytes() -> Any:
    # It warns of a faster product for inference on a CPU, which would be downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        what, fix = "quantised weights need the package bitsandbytes", "run: pip install bitsandbytes"
        raise RequestError(what, where="spec.model", fix=fix) from error
    return bitsandbytes
