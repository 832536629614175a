"""The reference model and its tokenizer, frozen and checked. Does not know layers, gradients or data.

Loads hub models, folders, s3:// prefixes and GGUF files alike. No remote code, no pickle.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prism_job.errors import DataError, RequestError
from prism_job.extract.load import quantised, quantiser
from prism_job.extract.load.adapter import with_adapter
from prism_job.extract.load.model_config import fix_of, is_quantised, load_config, short
from prism_job.plan.attention import attention_backend
from prism_job.progress import event
from prism_job.spec.model import ModelSpec
from prism_job.storage import model_files


def load_tokenizer(spec: ModelSpec, path: Path | None = None) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Args:
        path: where its files are already; else the model is fetched.

    Raises RequestError: it has none, or only a slow one, which does not report which characters a token covers.
    """
    folder, gguf = files_of(path or model_files.fetch_model(spec.uri, spec.revision))
    fix = "check config.json, and put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **gguf)
    except Exception as error:  # transformers raises many kinds; all are about these files
        fix = "check that the file is whole and holds a tokenizer" if gguf else fix
        raise RequestError(f"no tokenizer can be loaded: {short(error)}", where=spec.uri, fix=fix) from error
    if not tokenizer.is_fast:
        fix = "convert it (save_pretrained of the fast class) and put tokenizer.json beside the weights"
        raise RequestError("the tokenizer has no fast version", where=spec.uri, fix=fix)
    return cast(PreTrainedTokenizerBase, tokenizer)


def files_of(path: Path) -> tuple[str, dict[str, Any]]:
    """(folder, arguments) of `from_pretrained`, for a folder or a GGUF file."""
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})


def load_model(spec: ModelSpec, device: torch.device, zero3: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model in evaluation mode, all weights frozen and finite.

    Args:
        zero3: DeepSpeed's settings where the weights are partitioned over the ranks. Only rank 0 reads files, memory-mapped.

    Raises:
        RequestError: not a causal language model that transformers knows without remote code.
        DataError: a weight is missing, NaN or infinite; names the tensor.
    """
    config = load_config(spec)
    folder, gguf = files_of(model_files.fetch_model(spec.uri, spec.revision))
    if zero3 is not None:
        _refuse_with_sharded_weights(spec, config)
    quantised_arguments = quantiser.loading_arguments(spec, config, device, is_sharded=zero3 is not None)
    partitioning = _partition_while_loading(zero3) if zero3 is not None else None
    try:
        with _one_table_of_gguf_names() if gguf else nullcontext():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=attention_backend(spec),
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=zero3 is None,  # refused below; ranks other than 0 do not know the name
                **quantised_arguments,
                **(gguf or {"use_safetensors": True, "config": config}),
            )
    except safetensors.SafetensorError as error:
        fix = "copy the checkpoint again: one of its files is truncated or changed"
        raise DataError(f"damaged weights: {short(error)}", where=spec.uri, fix=fix) from error
    except Exception as error:  # as above: shapes that do not match, a bad config.json
        if "async_io" in str(error):
            fix = "install libaio (Debian: libaio-dev) and a compiler, or set offload: cpu"
            what = "offload: nvme needs DeepSpeed's async_io op, which cannot be built here"
            raise RequestError(what, where="spec.extraction.deepspeed.offload", fix=fix) from error
        fix = fix_of(error, "check that the folder holds config.json and safetensors of a causal language model")
        raise RequestError(f"the model cannot be loaded: {short(error)}", where=spec.uri, fix=fix) from error
    finally:
        del partitioning
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        what = f"weight {name} is {list(stored)} in the files, and {list(wanted)} by config.json"
        raise DataError(what, where=spec.uri, fix="put config.json and the weights of one model into the folder")
    if lacking := sorted(loading["missing_keys"]):
        raise DataError(
            f"the files lack {len(lacking)} weight(s) of this model, the first: {lacking[0]}",
            where=spec.uri,
            fix="name the whole language model, head included, or copy it again: transformers would fill in random numbers",
        )
    if unused := sorted(loading["unexpected_keys"]):
        event("weights", unused=len(unused), first=unused[:4], note="in the files, but not part of this language model")
    if quantised_arguments:
        quantised.use_dequantised_weights(model, getattr(torch, spec.dtype))
    if spec.adapter:
        model = with_adapter(model, spec.adapter, getattr(torch, spec.dtype))
    # Never .to(dtype) for the whole model: it would round buffers that transformers keeps in float32, such as RoPE's.
    model = (model if zero3 is not None else model.to(device)).eval().requires_grad_(False)
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        weight = getattr(parameter, "ds_tensor", parameter)  # a rank checks its own share
        # The scales of a block that held NaN, or of an output beyond float16's range in int8, are not finite.
        weight = quantised.dequantised(weight) if quantised.is_quantised(weight) else weight
        if not bool(torch.isfinite(weight).all()):
            what = f"weight {name} holds NaN or infinite values"
            fix = "use an earlier checkpoint: the gradients of this one are meaningless"
            if spec.quantization == "int8":
                what += " in float16, in which int8 takes weights (up to 65,504)"
                fix = "set model.quantization: nf4, or leave it out; if that is refused too, use an earlier checkpoint"
            raise DataError(what, where=spec.uri, fix=fix)
    return cast(PreTrainedModel, model)


@contextmanager
def _one_table_of_gguf_names() -> Iterator[None]:
    """transformers 5.23 makes gguf's table of names again for each submodule: 8 of 20 seconds for 135M parameters."""
    import gguf

    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(original)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = original


def _refuse_with_sharded_weights(spec: ModelSpec, config: PretrainedConfig | None) -> None:
    kinds = {"an adapter": spec.adapter, "a GGUF file": config is None, "a quantised checkpoint": is_quantised(config)}
    for kind in (kind for kind, is_used in kinds.items() if is_used):
        fix = "merge or convert it to a folder of safetensors in 16 bits, or set extraction.deepspeed.stage: 0"
        raise RequestError(f"{kind} cannot be used with ZeRO stage 3", where=spec.adapter or spec.uri, fix=fix)


def _partition_while_loading(zero3: dict[str, Any]) -> Any:
    """transformers partitions the weights as it loads them, while the returned object is alive."""
    from transformers.integrations import HfDeepSpeedConfig  # imports deepspeed: seconds that stage 0 need not spend

    return HfDeepSpeedConfig(zero3)
