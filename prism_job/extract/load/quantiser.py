"""Which weights are quantised while a model is loaded, and the arguments of transformers for it. Does not compute with them.

transformers quantises linear layers alone. The 3-D weights of fused experts, nearly all of a mixture of experts, are
quantised here in the same way, one after the other as they are loaded, on the device where they will stay.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from prism_job.errors import RequestError
from prism_job.extract.load.quantised import bitsandbytes
from prism_job.spec.model import ModelSpec

KEPT = ("dt_proj", "classifier")
"""Linear layers (of Mamba, of LongCat's router) whose weight a model reads without calling them: it must be there as it is."""
TOO_MANY = 2**31
"""bitsandbytes' kernels count a weight's numbers in 32 bits."""


def loading_arguments(
    spec: ModelSpec, config: PretrainedConfig | None, device: torch.device, *, is_sharded: bool
) -> dict[str, Any]:
    """What `from_pretrained` needs beside its other arguments; empty where bitsandbytes holds no weight of this model.

    nf4 is quantised twice (the scales of its blocks too): 4.13 bits a weight in place of 4.5 (docs/performance.md).

    Args:
        config: the checkpoint's; None for a GGUF file.

    Raises RequestError: weights that are quantised already, ZeRO stage 3, or no bitsandbytes here.
    """
    stored = "GGUF" if config is None else _stored_quantisation(config)
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
    bitsandbytes()  # before transformers imports it
    placed: dict[str, Any] = {"device_map": {"": device}}
    return {**placed, "quantization_config": _config_of(spec.quantization)} if spec.quantization else placed


def _stored_quantisation(config: PretrainedConfig) -> str | None:
    for part in (config, config.get_text_config(decoder=True)):
        if settings := getattr(part, "quantization_config", None):
            return str(settings.get("quant_method"))
    return None


def _config_of(kind: str) -> BitsAndBytesConfig:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**nf4) if kind == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    config.quant_method = f"prism-{kind}"
    if config.quant_method not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(config.quant_method)(_Nf4 if kind == "nf4" else _Int8)
    return config


class _Experts:
    """Adds the experts' weights to what a quantiser of transformers quantises."""

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        is_linear: bool = super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]
        if is_linear or ".experts." not in param_name:
            return is_linear
        weight = getattr(model.get_submodule(param_name.rpartition(".")[0]), param_name.rpartition(".")[2])
        return weight.ndim == 3 and weight.numel() < TOO_MANY

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(super().get_quantize_ops())  # type: ignore[misc]

    @staticmethod
    def get_modules_to_not_convert(model: nn.Module, skipped: Any = None, *arguments: Any) -> list[str]:
        return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(model, skipped, *arguments), *KEPT]


class _Nf4(_Experts, Bnb4BitHfQuantizer): ...


class _Int8(_Experts, Bnb8BitHfQuantizer): ...


class _Quantise(ConversionOps):
    """Quantises a weight as it is loaded: experts here, a linear layer as transformers does."""

    def __init__(self, of_linear: ConversionOps) -> None:
        self.of_linear = of_linear

    def convert(self, input_dict: dict[str, Any], *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        if weight.ndim != 3:
            return self.of_linear.convert(input_dict, *arguments, **kwargs)
        nn_ = bitsandbytes().nn
        if self.of_linear.hf_quantizer.quantization_config.load_in_4bit:
            return {name: nn_.Params4bit(weight, quant_type="nf4", compress_statistics=True).to(weight.device)}
        rows, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.flatten(0, 1).half())
        quantised = nn_.Int8Params(rows.view(weight.shape), requires_grad=False)
        quantised.SCB = scales.view(weight.shape[:2])
        return {name: quantised}
