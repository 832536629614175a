"""A tiny random model of every causal-LM architecture of transformers, built from its config class. Not how it is judged."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96

NOT_BUILT = {
    "dots3_note": "its vision experts cannot be made tiny; dots3_note_text is the same text model",
    "gemma3n": "its vision tower needs timm; gemma3n_text is the same text model",
    "gemma4_assistant": "drafts tokens for another model and needs its states",
    "gemma4_unified_assistant": "drafts tokens for another model and needs its states",
    "musicgen": "AutoModelForCausalLM cannot build it from its own config",
    "musicgen_melody": "AutoModelForCausalLM cannot build it from its own config",
}
"""Of transformers' list, what is left out, and why."""

MODEL_TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT)

_ENCODERS = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie git marian
mbart megatron-bert mvp pegasus plbart prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper
xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
_HYBRIDS = """
bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 minimax
nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2
"""
KINDS = ("dense", "experts", "hybrid or state-space", "multimodal", "encoder used as a decoder")

_SIZES: dict[int, str] = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    128: "mamba_d_ssm",
    80: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size"
    " intermediate_size_mlp dense_intermediate_size n_inner",
    64: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width input_embedding_size"
    " output_embedding_size hidden_size_global max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"
    " max_source_positions model_max_length context_length encoder_hash_byte_group_vocab",
    50: "ngram_vocab_size_base",
    40: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
    " moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    32: "kv_lora_rank q_lora_rank pronunciation_vocab_size shape_vocab_size",
    24: "qk_head_dim",
    16: "head_dim swa_head_dim dim_head d_head kv_channels attention_head_dim attention_head_size qk_nope_head_dim v_head_dim"
    " router_hidden_size ple_embed_dim mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim"
    " linear_head_dim indexer_head_dim",
    8: "o_lora_rank index_n_heads qk_rope_head_dim rotary_dim index_head_dim mamba_n_heads mamba_num_heads rel_extent"
    " hidden_size_per_layer_input hc_lowrank pronunciation_embed_dim shape_embed_dim",
    6: "index_topk attention_chunk_size",
    5: "sliding_window sliding_window_size attention_window_size window_size local_attention_window_len",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
    " num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts num_local_experts"
    " n_routed_experts moe_num_experts mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size block_size"
    " linear_num_value_heads linear_num_heads gated_norm_rank d_rel laurel_rank adapter_rank local_attention indexer_budget",
    3: "moe_layer_end_index",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers"
    " num_blocks num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads indexer_n_heads"
    " indexer_compress_ratio num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num mamba_dt_rank"
    " time_step_rank n_mamba_heads linear_num_key_heads split_ngram_parts num_codebooks eos_token_id sep_token_id",
    1: "bos_token_id decoder_start_token_id cls_token_id num_layers_per_stack topk_group n_group num_expert_group"
    " first_k_dense_replace num_dense_layers moe_layer_start_index mamba_n_groups n_groups mamba_ngroups indexer_kv_heads"
    " is_decoder",
    0: "pad_token_id num_nextn_predict_layers num_kv_shared_layers",
}
_SMALL = {
    name: bool(size) if name == "is_decoder" else size for size, names in _SIZES.items() for name in names.split()
}

_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
"""With latent attention there are as many heads of keys as of queries, and head_dim is the part that is rotated."""

_MAMBA_THEN_ATTENTION = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"hc_mult": 2, "index_n_heads": 4, "o_groups": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "swa_head_dim": 24,
    },
    "electra": {"embedding_size": 32},
    "falcon_mamba": {"intermediate_size": None},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [80] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": None},
    "hy_v4": {"hc_mult": 2, "indexer_types": ["full", "shared"]},
    "inkling_text": {"n_shared_experts": 1, "n_routed_experts": 12},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"intermediate_size": None},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"]},
    "rwkv": {"attention_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [*_MAMBA_THEN_ATTENTION[1:], "linear_attention"]},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _MAMBA_THEN_ATTENTION,
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What the sizes above do not fit. None: the config computes it."""


def build(model_type: str, seed: int = 0) -> tuple[Any, str]:
    """(frozen float32 model, its attention): sdpa, or eager where the architecture has no other."""
    config = tiny_config(type(CONFIG_MAPPING[model_type]()))
    try:
        attention, model = "sdpa", _from_config(config, "sdpa")
    except (ValueError, ImportError) as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        attention, model = "eager", _from_config(config, "eager")
    model = model.eval().requires_grad_(False)
    _fill(model, seed)
    model.config.use_cache = False
    return model, attention


def _from_config(config: PreTrainedConfig, attention: str) -> Any:
    # Eager experts, which the oracle runs, are a loop over experts; transformers' grouped product has no float64.
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager", dtype=torch.float32
    )


def kind_of(model_type: str, model: nn.Module) -> str:
    """One of KINDS."""
    config = CONFIG_MAPPING[model_type]()
    if model_type in _ENCODERS.split():
        return KINDS[4]
    if any(getattr(config, f"{part}_config", None) is not None for part in ("text", "vision", "audio")):
        return KINDS[3]
    if model_type in _HYBRIDS.split():
        return KINDS[2]
    has_experts = any("experts" in name for name, parameter in model.named_parameters() if parameter.ndim == 3)
    return KINDS[1 if has_experts else 0]


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config, small: widths of 64, two to four layers so that each kind of layer occurs, four experts."""
    special = _SPECIAL.get(config_class.model_type, {})
    default = vars(config_class())
    given = {name: size for name, size in _SMALL.items() if name in default}
    if default.get("q_lora_rank") is None:
        given.pop("q_lora_rank", None)
    if "qk_rope_head_dim" in given:
        given |= {name: size for name, size in _LATENT.items() if name in default}
    given |= _layer_lists(default, special.get("num_hidden_layers", 2))
    for name, part in default.items():
        if isinstance(part, PreTrainedConfig) and name not in special:
            given[name] = tiny_config(type(part))
    return config_class(**{name: value for name, value in (given | special).items() if value is not None})


def _layer_lists(default: dict[str, Any], depth: int) -> dict[str, Any]:
    """The config's lists of one entry a layer, cut to as many layers as there are kinds of layer, at least `depth`."""
    num_layers = default.get("num_hidden_layers")
    lists = {
        name: _kinds(values)
        for name, values in default.items()
        if isinstance(values, list | tuple) and len(values) == num_layers and name != "hybrid_layer_ids"
    }
    few = {name: kinds for name, kinds in lists.items() if len(kinds) <= 4}
    depth = max([depth, *map(len, few.values())])
    cut: dict[str, Any] = {name: list(values)[:depth] for name, values in lists.items()}
    for name, kinds in few.items():  # the last layer is of the kind that is last by default
        cut[name] = [kinds[(layer - depth) % len(kinds)] for layer in range(depth)]
    return cut | {name: depth for name in ("num_hidden_layers", "num_layers", "n_layer") if name in default}


def _kinds(values: Sequence[Any]) -> list[Any]:
    """Each value once, in order, but the last value last."""
    kinds = [value for position, value in enumerate(values) if value not in values[:position]]
    kinds.remove(values[-1])
    return [*kinds, values[-1]]


def _fill(model: nn.Module, seed: int) -> None:
    """Wider than an initialisation for training: logits differ, attention is not flat, no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn * 0.14 if parameter.ndim > 1 else parameter.nan_to_num() + drawn * 0.1)
