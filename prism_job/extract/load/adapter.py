"""A LoRA adapter on the reference model. Refuses the kinds whose matrices capture would not see, or not as they are trained."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from prism_job.errors import DataError, RequestError
from prism_job.extract.load.model_config import short
from prism_job.progress import event
from prism_job.storage import model_files

_MERGE = "merge the adapter into its base (merge_and_unload, save_pretrained) and name the result in model.uri"
_LEAVE_OUT = "leave model.adapter out: the rows are then those of the base model"
_NO_MATRICES = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)


def with_adapter(model: PreTrainedModel, uri: str, dtype: torch.dtype) -> Any:
    """The model with its adapter's weights, all of them in `dtype`.

    Raises:
        RequestError: no adapter of this model, or not a plain LoRA adapter.
        DataError: a weight of the adapter is missing, or has no place in this model.
    """
    from peft import PeftModel

    folder = model_files.fetch_model(uri, is_adapter=True)
    with _loading(uri):
        _refuse_other_kinds(json.loads((folder / "adapter_config.json").read_text()), uri)
        stored = set(safetensors.torch.load_file(folder / "adapter_model.safetensors"))
        adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    _refuse_other_parts(adapted, uri)
    loaded = {name.replace(".modules_to_save.default", "").replace(".default", "") for name in adapted.state_dict()}
    strange = sorted((stored - loaded) | ({name for name in loaded if ".lora_" in name} - stored))
    if strange:
        fix = "name the model that the adapter was made for in model.uri, or copy the adapter again"
        what = f"{len(strange)} of the adapter's weights do not match this model, the first: {strange[0]}"
        raise DataError(what, where=uri, fix=fix)
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    at_ends = {id(parameter) for module in ends for parameter in module.parameters()}
    not_captured = []
    for name, parameter in adapted.named_parameters():
        if _is_of_adapter(name):  # peft loads adapters in float32
            parameter.data = parameter.data.to(dtype)
            not_captured += [name] if id(parameter) in at_ends else []
    if not_captured:
        event("adapter", not_captured=not_captured, note="embeddings and head are not captured")
    return adapted


def with_shapes_of_adapter(model: PreTrainedModel, uri: str) -> Any:
    """The model with an adapter of this config, without its weights: what `with_adapter` gives, as far as shapes go."""
    from peft import PeftConfig, get_peft_model

    folder = model_files.fetch_config_and_tokenizer(uri)
    with _loading(uri):
        config = PeftConfig.from_pretrained(str(folder))
        _refuse_other_kinds(config.to_dict(), uri)
        adapted = get_peft_model(model, config)
    _refuse_other_parts(adapted, uri)
    return adapted


@contextlib.contextmanager
def _loading(uri: str) -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # peft raises many kinds; all are about these files and this model
        fix = "check that it is a PEFT adapter made for the model in model.uri"
        raise RequestError(f"the adapter cannot be loaded: {short(error)}", where=uri, fix=fix) from error


def _refuse_other_kinds(config: dict[str, Any], uri: str) -> None:
    """Raises RequestError: by adapter_config.json this is not LoRA, or a kind of LoRA that capture does not see as it is."""
    kind = config.get("peft_type")
    if kind != "LORA":
        fix = _LEAVE_OUT if kind in _NO_MATRICES else _MERGE
        raise RequestError(f"this is a PEFT adapter of type {kind}; only LoRA is captured", where=uri, fix=fix)
    if config.get("alora_invocation_tokens"):
        what = "this is an activated LoRA (aLoRA): its matrices see only the tokens after the invocation"
        raise RequestError(f"{what}, which is not captured", where=uri, fix=f"{_LEAVE_OUT}; it cannot be merged")
    if config.get("target_parameters"):
        what = (
            f"this adapter changes parameters, not layers (target_parameters: {', '.join(config['target_parameters'])})"
        )
        raise RequestError(f"{what}, which is not captured", where=uri, fix=_MERGE)
    for option in (
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "velora_config",
        "monteclora_config",
        "arrow_config",
        "kasa_config",
    ):
        if config.get(option):
            raise RequestError(f"this adapter is not plain LoRA: it sets {option}", where=uri, fix=_MERGE)


def _is_of_adapter(name: str) -> bool:
    return any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta."))


def _refuse_other_parts(adapted: Any, uri: str) -> None:
    """Refuses a weight that training changes, and that is no LoRA matrix, embedding, head, norm or bias."""
    _refuse_other_kinds(
        adapted.active_peft_config.to_dict(), uri
    )  # peft turns layers into parameters for fused experts
    left_out = {id(adapted.get_input_embeddings()), id(adapted.get_output_embeddings())}
    for name, module in adapted.named_modules():
        saved = getattr(module, "modules_to_save", None)
        if not isinstance(saved, nn.ModuleDict) or id(module) in left_out:
            continue
        if any(parameter.ndim > 1 for parameter in saved.parameters()):
            short_name = name.removeprefix("base_model.model.")
            what = (
                f"this adapter holds {short_name} as a whole (modules_to_save), and only its LoRA matrices are captured"
            )
            raise RequestError(what, where=uri, fix=_MERGE)
