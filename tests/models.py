"""Tiny random models and a tiny tokenizer, built from seeds alone: no network, a unit extracts in well under a second.

`build_model` gives a model in memory for laws about gradients; `save_tiny_model` a folder on which the whole job can run.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# Tiny matrices: two threads that wait for each other on busy cores took thirty times as long as one.
torch.set_num_threads(1)

KINDS = ("llama", "gpt2", "qwen2", "lora", "tied")
VOCAB = 300
HIDDEN = 32
NUM_LAYERS = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Norway is Oslo.",
    "What is the capital of Spain? The capital of Spain is Madrid.",
    "Seven and eight make fifteen. Twelve and nine make twenty-one. How many do three and four make?",
    "user assistant system question answer",
)


def config_of(kind: str) -> Any:
    """The configuration of one kind; `lora` is the Llama that the adapter wraps."""
    shared: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2Config(n_embd=HIDDEN, n_layer=NUM_LAYERS, n_head=4, n_positions=512, **shared)
    shared |= {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": kind == "tied",
    }
    if kind == "qwen2":
        return Qwen2Config(**shared)
    if kind == "mixtral":
        return MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **shared)
    if kind == "deepseek_v3":  # a dense layer, then one of experts in two groups with a shared expert; latent attention
        heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        heads |= {"q_lora_rank": 24, "kv_lora_rank": 16}
        experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        return DeepseekV3Config(
            **{**shared, **heads, **experts, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
        )
    return LlamaConfig(**shared)


def build_model(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, attention: str = "sdpa") -> Any:
    """A frozen model in evaluation mode; the same seed gives the same weights (rounded) in every dtype.

    Args:
        kind: one of KINDS, or "mixtral" or "deepseek_v3" (experts fused into 3-D parameters).
        dtype: float64 models are float64 throughout: transformers' RMSNorm, which computes in float32 whatever the
            type, is replaced by torch's own.
    """
    model: Any = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation=attention, dtype=torch.float32)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    model = model.to(dtype).eval().requires_grad_(False)
    fill(model, seed)
    if dtype == torch.float64:
        norms_in_float64(model)
    model.config.use_cache = False
    return model


def fill(model: nn.Module, seed: int) -> None:
    # Wider than an initialisation for training (0.02): logits differ, attention is not flat, LoRA's B is not zero.
    # Drawn in float64 and then rounded, so that a float32 model holds the float64 model's numbers.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            parameter.data.copy_(drawn * 0.2)
        else:
            parameter.data.copy_(drawn * 0.1 + (1.0 if "norm" in name or ".ln_" in name else 0.0))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # a buffer that is stored: it decides which experts are chosen
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) * 0.1)


def norms_in_float64(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                weight: torch.Tensor = child.weight  # type: ignore[assignment]
                norm = nn.RMSNorm(weight.shape[0], eps=child.variance_epsilon, dtype=weight.dtype)  # type: ignore[arg-type]
                norm.weight = child.weight  # type: ignore[assignment]
                setattr(parent, name, norm)


@cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def build_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over any text, 300 tokens; padding 0, end of text 2 (<|im_end|>), no BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=4096,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_model(
    folder: str | Path,
    kind: str = "llama",
    chat_template: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write config, safetensors and a fast tokenizer (with a ChatML template, or none); returns the folder.

    kind: llama, gpt2, qwen2, tied, mixtral or deepseek_v3. For an adapter see `save_tiny_adapter`.
    """
    if kind == "lora":
        raise ValueError("save the base with save_tiny_model and the adapter with save_tiny_adapter")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    build_model(kind, torch.float32, seed).to(dtype).save_pretrained(path)
    build_tokenizer(chat_template).save_pretrained(path)
    return path


def save_tiny_adapter(folder: str | Path, seed: int = 0) -> Path:
    """Write a LoRA adapter (B not zero) that fits save_tiny_model's llama; returns the folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    build_model("lora", torch.float32, seed).save_pretrained(path)
    return path


def weights_into(source: PreTrainedModel, target: PreTrainedModel) -> Any:
    """Copy source's weights, as they are, into target (of another dtype, say); returns target."""
    target.load_state_dict(source.state_dict())
    return target


def save_tiny_gguf(path: str | Path, seed: int = 0) -> Path:
    """Write save_tiny_model's llama, its tokenizer and its template as one float32 GGUF file, as llama.cpp's converter does."""
    import gguf

    model, tokenizer = build_model("llama", torch.float32, seed), build_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(list(range(VOCAB)))
    special = {token["content"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        weight = parameter
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for layer, num_heads in heads.items():
            if f".{layer}." in name:  # llama.cpp turns pairs of neighbouring dims, transformers pairs of halves
                halves = weight.reshape(num_heads, 2, -1, config.hidden_size)
                weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
