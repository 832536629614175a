"""A model's shape from its config alone: built on the meta device, where tensors have sizes and no data. Does not know costs.

Sizes are in parameters unless the name says otherwise.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prism_job.errors import RequestError
from prism_job.estimate.meta_pass import Growth, TextCosts, text_costs
from prism_job.extract.capture.layers import CapturedWeight, Layers, LinearLayer, captured_layers
from prism_job.extract.load.adapter import with_shapes_of_adapter
from prism_job.extract.load.model import files_of
from prism_job.extract.load.model_config import (
    fix_of,
    load_config,
    refuse_long_texts,
    refuse_unsuitable_settings,
    short,
)
from prism_job.extract.load.quantiser import KEPT, TOO_MANY
from prism_job.plan.attention import attention_backend
from prism_job.spec.document import RunSpec
from prism_job.storage import model_files

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
"""The repeated part of a model that a parameter belongs to: `model.layers.7` of `model.layers.7.mlp.up_proj.weight`."""


@dataclass(frozen=True)
class Sides:
    """A captured weight, and its rows a token. Of experts, k of which run for a token (docs/architecture.md, Fused experts),
    some products have one row a token and some have k."""

    inputs: int
    outputs: int
    inputs_projected: float  # rows that are multiplied with the inputs' signs
    outputs_projected: float
    rows: float  # of the two projected sides, whose product is the sketch


@dataclass(frozen=True)
class ModelShape:
    """The sizes that costs depend on."""

    parameters: int  # of the model; shared ones count once
    active: float  # of them, those that a token passes through: all but the experts that do not run
    covered: int  # weights of the captured layers
    coverage: float  # their share of the matrix weights that spec.extraction.layers requests
    share_of_model: float  # their share of all matrix weights but embeddings and head
    matrices: float  # weights that a token is multiplied with, as often as it is; without the head
    head: int  # of the output head: vocabulary × hidden
    vocabulary: int
    largest_block: int  # of the repeated blocks
    largest_tensor: int
    products: Growth  # FLOPs of a text's products of two activations, forward, as in attention
    kept: Growth  # bytes of a text's activations that wait for the backward pass
    sides: dict[str, Sides]  # captured weights by name, in model order
    widest_side: float  # numbers a token of the largest input or output of a weight
    weight_bytes: float  # of all parameters as they are held
    dequantised: int  # quantised weights of a module, which holds them in dtype_bytes while it runs; 0 if none
    dtype_bytes: int  # of one weight in the forward pass
    buffer_bytes: int  # of what a model keeps beside its weights, such as RoPE's frequencies

    @property
    def is_quantised(self) -> bool:
        return self.dequantised > 0

    @property
    def sketched_rows(self) -> float:
        """Rows a token over all captured weights."""
        return sum(it.rows for it in self.sides.values())


def model_shape(spec: RunSpec) -> ModelShape:
    """The shape of spec.model, with its adapter, from config files alone. A model of 671B parameters takes seconds.

    Raises RequestError: no config of a causal language model; layers or settings that extraction would refuse.
    """
    model = _meta_model(spec)
    forward_only = spec.scoring.is_forward_only
    layers = Layers({}, 1, 1, {}) if forward_only else captured_layers(model, spec.extraction.layers)
    is_eager = attention_backend(spec.model) == "eager"
    costs = text_costs(model, eager=is_eager)
    if forward_only:
        refuse_long_texts(spec.extraction, model.config)
    else:
        layers = _without_unused(layers, costs)
        refuse_unsuitable_settings(spec.extraction, model.config, len(layers.weights))
    head: Any = model.get_output_embeddings()
    blocks: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if match := _BLOCK.match(name):
            blocks[match[1]] += parameter.numel()
    parameters = list(model.parameters())
    quantised = _quantised_bytes(model, spec)
    used = [(each, costs.rows[id(each)]) for each in parameters if id(each) in costs.rows]
    return ModelShape(
        parameters=sum(each.numel() for each in parameters),
        active=sum(each.numel() * _share_run(each, costs) for each in parameters),
        covered=sum(weight.numel for weight in layers.weights.values()),
        coverage=layers.coverage,
        share_of_model=layers.share_of_model,
        matrices=sum(each.numel() / costs.num_experts.get(id(each), 1) * rows for each, rows in used),
        head=head.weight.numel(),
        vocabulary=head.weight.shape[0],
        largest_block=max(blocks.values()),
        largest_tensor=max(each.numel() for each in parameters),
        products=costs.products,
        kept=costs.kept if is_eager else Growth(costs.kept.per_token, 0),
        sides={name: _sides(weight, costs) for name, weight in layers.weights.items()},
        widest_side=max(max(each.shape[-2:]) * rows for each, rows in used),
        weight_bytes=sum(quantised.values()) + sum(each.nbytes for each in parameters if id(each) not in quantised),
        dequantised=max(
            sum(each.numel() for each in module.parameters(recurse=False) if id(each) in quantised)
            for module in model.modules()
        ),
        dtype_bytes=getattr(torch, spec.model.dtype).itemsize,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _without_unused(layers: Layers, costs: TextCosts) -> Layers:
    """Extraction leaves them out too, after two tiny passes."""
    reason = "a text does not pass through it, or not by a call of its module"
    unused = [name for name, weight in layers.weights.items() if not costs.called.intersection(weight.modules)]
    return layers.without(dict.fromkeys(unused, reason)) if unused else layers


def _quantised_bytes(model: nn.Module, spec: RunSpec) -> dict[int, float]:
    """Bytes of each parameter that bitsandbytes holds, by its id: see extract/load/quantiser.py. Empty where it holds none."""
    stored = getattr(cast(Any, model).config, "quantization_config", None) or {}
    kind = spec.model.quantization or (
        "nf4" if stored.get("load_in_4bit") else "int8" if stored.get("load_in_8bit") else None
    )
    if kind is None:
        return {}
    # Scales: nf4 has 32 bits for each 64 weights, or 8 and 32 for each 256 of these; int8 32 for each output.
    is_double = spec.model.quantization == "nf4" or bool(stored.get("bnb_4bit_use_double_quant"))
    bits = 4 + (8 / 64 + 32 / (64 * 256) if is_double else 32 / 64)
    head = cast(Any, model).get_output_embeddings()
    found: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if isinstance(module, LinearLayer) and module is not head and ".lora_" not in name and not name.endswith(KEPT):
            found.append(cast(nn.Parameter, module.weight))
        elif ".experts" in name and spec.model.quantization:
            found += [each for each in module.parameters(recurse=False) if each.ndim == 3 and each.numel() < TOO_MANY]
    return {
        id(each): each.numel() * bits / 8 if kind == "nf4" else each.numel() + 4 * each.shape[:-1].numel()
        for each in found
    }


def _share_run(parameter: nn.Parameter, costs: TextCosts) -> float:
    num_experts = costs.num_experts.get(id(parameter))
    return min(1, costs.rows[id(parameter)] / num_experts) if num_experts else 1


def _sides(weight: CapturedWeight, costs: TextCosts) -> Sides:
    rows = costs.rows.get(id(weight.parameter), 0)
    if not weight.num_experts:
        return Sides(weight.inputs, weight.outputs, rows, rows, rows)
    # Up: all experts of a token see one input, and their output gradients are summed after they are projected. Down: their
    # inputs differ; the gradient of their sum is one, which is projected before it is weighted.
    is_down = weight.attribute == "down_proj"
    return Sides(weight.inputs, weight.outputs, *((rows, 1, rows) if is_down else (1, rows, 1)))


def _meta_model(spec: RunSpec) -> Any:
    folder, gguf = files_of(model_files.fetch_config_and_tokenizer(spec.model.uri, spec.model.revision))
    config = load_config(spec.model)
    try:
        config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False, **gguf)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, spec.model.dtype), attn_implementation=attention_backend(spec.model)
            )
    except Exception as error:  # transformers raises many kinds; all are about these files
        fix = fix_of(error, "check that the folder holds the config.json of a causal language model")
        what = f"no model can be built from its config: {short(error)}"
        raise RequestError(what, where=spec.model.uri, fix=fix) from error
    if spec.model.adapter:
        with torch.device("meta"):
            model = with_shapes_of_adapter(model, spec.model.adapter)
    return model.eval().requires_grad_(False)
