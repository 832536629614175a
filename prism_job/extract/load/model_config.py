"""A model's config: read and checked before its weights, and against the settings of extraction. Does not load weights."""

from collections.abc import Iterator
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prism_job.errors import RequestError
from prism_job.plan.attention import attention_backend
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec
from prism_job.storage import model_files

DEQUANTISED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""Quantised checkpoints whose weights transformers turns into plain matrices of `model.dtype` as it loads them."""

_OTHER_TASKS = (
    "Classification",
    "QuestionAnswering",
    "MaskedLM",
    "MultipleChoice",
    "RewardModel",
    "NextSentencePrediction",
)
_NAME_ANOTHER = "name a causal language model that transformers knows"


def load_config(spec: ModelSpec) -> PretrainedConfig | None:
    """The config of a causal language model that can be captured, ready for `from_pretrained`; None for a GGUF file.

    Raises RequestError: another kind of model, remote code, quantised weights that cannot be captured, or an attention backend
    that the architecture does not have.
    """
    if spec.uri.endswith(".gguf"):
        return None
    raw = model_files.read_config(spec.uri, spec.revision)
    if (model_type := raw.get("model_type")) is not None and str(model_type) not in CONFIG_MAPPING:
        known = f"transformers {transformers.__version__} does not know the model type '{model_type}'"
        what = f"{known}, and PRISM runs no code of a repository" if "auto_map" in raw else known
        raise RequestError(what, where=spec.uri, fix=f"use an image with a newer transformers, or {_NAME_ANOTHER}")
    folder = model_files.fetch_config_and_tokenizer(spec.uri, spec.revision)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all are about this file
        fix = "check config.json: it must be the config of a causal language model"
        raise RequestError(f"config.json cannot be used: {short(error)}", where=spec.uri, fix=fix) from error
    _refuse_other_tasks(config, spec)
    _prepare_quantisation(config, spec)
    _refuse_missing_sdpa(config, spec)
    return config


def short(error: BaseException) -> str:
    """An error of a library on one line, with its type: the text of a KeyError is only the key."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def fix_of(error: BaseException, otherwise: str) -> str:
    """What to do where transformers cannot build a model. The architecture in a GGUF file is known only then."""
    return "set model.attention: eager" if "scaled_dot_product_attention" in str(error) else otherwise


def _refuse_other_tasks(config: PretrainedConfig, spec: ModelSpec) -> None:
    named = config.architectures
    made_for = str(named[0]) if isinstance(named, list) and named else ""
    if config.is_encoder_decoder:
        what = f"'{config.model_type}' is an encoder-decoder model; PRISM takes decoders only"
        raise RequestError(what, where=spec.uri, fix=_NAME_ANOTHER)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"transformers has no causal language model of type '{config.model_type}'"
        fix = f"{_NAME_ANOTHER}; of a multimodal model, save the language model alone"
        raise RequestError(what, where=spec.uri, fix=fix)
    if any(task in made_for for task in _OTHER_TASKS):
        what = f"the checkpoint is a {made_for}, not a causal language model"
        raise RequestError(what, where=spec.uri, fix=_NAME_ANOTHER)


def is_quantised(config: PretrainedConfig | None) -> bool:
    """Whether the checkpoint holds quantised weights."""
    return config is not None and any(True for _ in _quantisations(config))


def _quantisations(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    for part in (config, config.get_text_config(decoder=True)):
        if isinstance(settings := getattr(part, "quantization_config", None), dict):
            yield settings


def _prepare_quantisation(config: PretrainedConfig, spec: ModelSpec) -> None:
    for settings in _quantisations(config):
        if settings.get("quant_method") == "bitsandbytes":
            if not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
                what = (
                    "quantization_config in config.json names bitsandbytes, and neither load_in_4bit nor load_in_8bit"
                )
                fix = "copy config.json again; if the weights are in 16 bits, remove quantization_config from it"
                raise RequestError(what, where=spec.uri, fix=fix)
            continue  # loaded as it is (extract/load/quantised.py)
        method = str(settings.get("quant_method", "a method that quantization_config does not name"))
        if method not in DEQUANTISED:
            what = f"the weights are quantised by {method}, and their gradients cannot be captured"
            fix = "name the unquantised model in model.uri; model.quantization: nf4 loads it in 4 bits"
            raise RequestError(what, where=spec.uri, fix=fix)
        # Without this it would depend on the machine: a GPU with the right kernels keeps the layers quantised.
        settings["dequantize"] = True


def _refuse_missing_sdpa(config: PretrainedConfig, spec: ModelSpec) -> None:
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model[0] if isinstance(model, tuple) else model
    if attention_backend(spec) == "sdpa" and not model._supports_sdpa:
        what = f"{model.__name__} has no sdpa attention in transformers {transformers.__version__}"
        raise RequestError(what, where="spec.model.attention", fix="set model.attention: eager")


def refuse_unsuitable_settings(extraction: ExtractionSpec, config: PretrainedConfig, num_layers: int) -> None:
    """Raises RequestError: maxLength or codec.dims is more than this model has positions or projected dims."""
    refuse_long_texts(extraction, config)
    dim, codec = extraction.projection.dim, extraction.codec
    unfolded_dims = num_layers * dim**2
    if codec.kind == "sign" and codec.dims > unfolded_dims:
        what = f"codec.dims {codec.dims} is more than the {unfolded_dims} dims there are to fold ({num_layers} layers × {dim}²)"
        fix = f"set it to {2 ** (unfolded_dims.bit_length() - 1)} or less, or raise projection.dim"
        raise RequestError(what, where="spec.extraction.codec.dims", fix=fix)


def refuse_long_texts(extraction: ExtractionSpec, config: PretrainedConfig) -> None:
    """Raises RequestError: maxLength is more than this model has positions."""
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions and extraction.max_length > positions:
        what = f"maxLength {extraction.max_length} is more than the model's {positions} positions"
        raise RequestError(what, where="spec.extraction.maxLength", fix=f"set it to {positions} or less")
    if (positions := _longrope_positions(text)) and extraction.max_length > positions:
        what = f"maxLength {extraction.max_length} is over {positions}: for a longer text, longrope changes the frequencies"
        what += " of its whole batch, so a row would depend on its batch"
        raise RequestError(what, where="spec.extraction.maxLength", fix=f"set it to {positions} or less")


def _longrope_positions(text_config: PretrainedConfig) -> int | None:
    """Up to how many positions longrope uses its short factors. `dynamic` scaling needs none: it begins past all positions."""
    parameters: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [each for each in (parameters, *parameters.values()) if isinstance(each, dict)]
    return min(
        (
            int(each["original_max_position_embeddings"])
            for each in by_layer_type
            if each.get("rope_type") == "longrope"
        ),
        default=None,
    )
