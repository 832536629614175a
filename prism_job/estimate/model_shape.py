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
from prism_job.extract.adapter import refuse_other_kinds
from prism_job.extract.capture.layers import LinearLayer, captured_layers, layer_dims
from prism_job.extract.model import files_of
from prism_job.extract.model_config import load_config, short
from prism_job.plan.attention import attention_backend
from prism_job.spec.document import RunSpec
from prism_job.storage import model_files

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
"""The repeated part of a model that a parameter belongs to: `model.layers.7` of `model.layers.7.mlp.up_proj.weight`."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that costs depend on."""

    parameters: int  # of the model; shared ones count once
    covered: int  # weights of the captured layers
    coverage: float  # their share of the matrix weights that spec.extraction.layers requests
    matrices: int  # weights that every token is multiplied with: all but embeddings and head, with all fused experts
    head: int  # of the output head: vocabulary × hidden
    vocabulary: int
    largest_block: int  # of the repeated blocks
    largest_tensor: int
    attention_width: int  # Σ over layers of heads × head size
    sides: dict[str, tuple[int, int]]  # (inputs, outputs) of each captured layer, in model order
    linear_sides: int  # Σ inputs + outputs over all linear layers of the blocks, captured or not
    widest_side: int
    dtype_bytes: int  # of one weight in the forward pass
    buffer_bytes: int  # of what a model keeps beside its weights, such as RoPE's frequencies


def model_shape(spec: RunSpec) -> ModelShape:
    """The shape of spec.model, with its adapter, from config files alone. A 70B Llama takes under a second.

    Raises RequestError: no config of a causal language model; layers that cannot be captured.
    """
    model = _meta_model(spec)
    layers = captured_layers(model, spec.extraction.layers)
    head = cast(nn.Module, model.get_output_embeddings())
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excluded = {id(parameter) for module in (*embeddings, head) for parameter in module.parameters()}
    blocks: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if match := _BLOCK.match(name):
            blocks[match[1]] += parameter.numel()
    linear = [
        layer_dims(module)
        for module in model.modules()
        if isinstance(module, LinearLayer) and id(module.weight) not in excluded
    ]
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        covered=sum(weight.numel for weight in layers.weights.values()),
        coverage=layers.coverage,
        matrices=sum(each.numel() for each in model.parameters() if each.ndim > 1 and id(each) not in excluded),
        head=cast(Any, head).weight.numel(),
        vocabulary=cast(Any, head).weight.shape[0],
        largest_block=max(blocks.values()),
        largest_tensor=max(parameter.numel() for parameter in model.parameters()),
        attention_width=config.num_hidden_layers
        * heads
        * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        sides={name: (weight.inputs, weight.outputs) for name, weight in layers.weights.items()},
        linear_sides=sum(inputs + outputs for inputs, outputs in linear),
        widest_side=max(max(dims) for dims in linear),
        dtype_bytes=getattr(torch, spec.model.dtype).itemsize,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _meta_model(spec: RunSpec) -> Any:
    folder, gguf = files_of(model_files.fetch_config_and_tokenizer(spec.model.uri, spec.model.revision))
    try:
        config = load_config(spec.model) or AutoConfig.from_pretrained(folder, trust_remote_code=False, **gguf)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, spec.model.dtype), attn_implementation=attention_backend(spec.model)
            )
            if spec.model.adapter:
                from peft import PeftConfig, get_peft_model

                adapter = PeftConfig.from_pretrained(str(model_files.fetch_config_and_tokenizer(spec.model.adapter)))
                refuse_other_kinds(adapter.to_dict(), spec.model.adapter)
                model = get_peft_model(model, adapter)
    except RequestError:
        raise
    except Exception as error:  # transformers raises many kinds; all are about these files
        fix = "check that the folder holds the config.json of a causal language model"
        what = f"no model can be built from its config: {short(error)}"
        raise RequestError(what, where=spec.model.uri, fix=fix) from error
    return model.eval().requires_grad_(False)
