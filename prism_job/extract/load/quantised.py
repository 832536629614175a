"""Weights that bitsandbytes holds in 4 or 8 bits: what they stand for, and the products with them. Does not load them.

A quantised layer computes what a plain linear layer with its dequantised weight computes, in the dtype of its inputs.
bitsandbytes' own products are not used. The 8-bit one (LLM.int8()) quantises the inputs as well, and treats columns apart in
which *any* token of a batch has a large input, so a batch-mate changes a row (docs/performance.md). The 4-bit one reorders a
weight for inference on some CPUs; no gradient passes it afterwards.
"""

import importlib
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prism_job.errors import RequestError
from prism_job.progress import event

_UNQUANTISED = "use weights in 16 bits: leave model.quantization out, and name no checkpoint that is quantised already"


def use_dequantised_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every quantised layer of a loaded model compute with its dequantised weights, in `dtype`; report their share.

    Raises RequestError: no quantised weight, or a layer of bitsandbytes that holds a 16-bit weight.
    """
    bnb = bitsandbytes()
    sizes, num_bytes = {}, 0
    for name, module in model.named_modules():
        weights = {each: weight for each, weight in module.named_parameters(recurse=False) if is_quantised(weight)}
        is_linear = isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
        if is_linear and not weights:
            what = (
                "this layer's weights are not quantised, although config.json has a quantization_config of bitsandbytes"
            )
            fix = "remove quantization_config from config.json; model.quantization: nf4 or int8 quantises the weights"
            raise RequestError(what, where=name, fix=fix)
        for each, weight in weights.items():
            if weight.dtype == torch.int8:
                # Packed like 4 bits, so that a model that reads the weight itself fails, rather than computes with it.
                weight.logical_shape, weight.data = weight.shape, weight.data.view(-1, 1)
            else:
                weight.quant_state.dtype = dtype
            weight.compute_dtype = dtype  # that of its dequantised numbers
            sizes[f"{name}.{each}"] = logical_shape(weight).numel()
            num_bytes += weight.nbytes
        if is_linear:
            module.forward = partial(_multiply, module)
        elif weights:
            module.forward = partial(_with_dequantised, module, weights, module.forward)
    others = {name: weight.numel() for name, weight in model.named_parameters() if name not in sizes}
    largest = sorted(others, key=lambda name: -others[name])[:4]
    if not sizes:
        what = f"{type(model).__name__} has no layer that bitsandbytes can quantise; the largest weight is {largest[0]}"
        raise RequestError(what, where="spec.model", fix=_UNQUANTISED)
    num_quantised = sum(sizes.values())
    share = round(num_quantised / (num_quantised + sum(others.values())), 4)
    event("quantised", share=share, parameters=num_quantised, bytes=num_bytes, largest_others=largest)
    _refuse_reading_weights(model)


def _refuse_reading_weights(model: Any) -> None:
    try:
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, TypeError) as error:
        what = f"{type(model).__name__} reads a weight without calling its layer, so this weight cannot be quantised: {error}"
        raise RequestError(what, where="spec.model", fix=_UNQUANTISED) from error


def is_quantised(weight: Any) -> bool:
    """Whether bitsandbytes holds this parameter."""
    return weight.dtype == torch.int8 or getattr(weight, "quant_state", None) is not None


def logical_shape(weight: Any) -> torch.Size:
    """The shape of what a weight stands for; a quantised one is packed."""
    state = getattr(weight, "quant_state", None)
    return getattr(weight, "logical_shape", weight.shape) if state is None else torch.Size(state.shape)


def compute_dtype(weight: Any) -> torch.dtype:
    """That of a product with this weight."""
    return getattr(weight, "compute_dtype", weight.dtype)


def dequantised(weight: Any) -> Tensor:
    """What a quantised weight stands for, in its `compute_dtype`: a matrix [outputs, inputs], or those of all experts."""
    if weight.dtype == torch.int8:
        scales = weight.SCB[..., None] / 127  # SCB: each output's largest, float32
        return weight.data.view(weight.logical_shape).to(weight.compute_dtype).mul_(scales)
    return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)


class _Product(torch.autograd.Function):
    """inputs · Wᵀ + bias. W is dequantised in both passes, because autograd would keep it between them."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, dequantised(layer.weight), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dequantised(ctx.layer.weight), None


def _multiply(layer: Any, inputs: Tensor) -> Tensor:
    return _Product.apply(inputs, layer)


def _with_dequantised(module: nn.Module, weights: dict[str, Any], forward: Any, *arguments: Any, **kwargs: Any) -> Any:
    """One forward pass of experts, which read their 3-D weights as attributes and multiply as they like.

    What autograd would keep of the dequantised weights, it keeps as the quantised weight and a view's strides.
    """
    dense = {name: dequantised(weight) for name, weight in weights.items()}
    names = {each.untyped_storage().data_ptr(): name for name, each in dense.items()}

    def pack(kept: Tensor) -> Any:
        name = names.get(kept.untyped_storage().data_ptr())
        return kept if name is None else (name, kept.size(), kept.stride(), kept.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, *view = kept
        return dequantised(weights[name]).as_strided(*view)

    vars(module).update(dense)  # found before the parameters of these names
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*arguments, **kwargs)
    finally:
        for name in dense:
            del vars(module)[name]


def bitsandbytes() -> Any:
    """The package, imported where it is needed. Raises RequestError: it is not installed."""
    # It warns of a faster product for inference on a CPU, which would be downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        what, fix = "quantised weights need the package bitsandbytes", "run: pip install bitsandbytes"
        raise RequestError(what, where="spec.model", fix=fix) from error
