"""Laws of `estimate` for models that are too large to load here, from their published config.json alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.follow import estimate_table as tables
from tests.conftest import Job
from tests.models import build_tokenizer

# What decides shapes in the config.json published with each model.
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_3_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
LLAMA_3_405B = LLAMA | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = QWEN3_MOE | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
}
QWEN3_235B_A22B = QWEN3_MOE | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
MIXTRAL_8X22B = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 56,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MAMBA_CODESTRAL_7B = {
    "model_type": "mamba2",
    "chunk_size": 256,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "n_groups": 8,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "state_size": 128,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 32768,
}


def attention(hidden: int, heads: int, groups: int, size: int) -> int:
    """Weights of q and o, and of k and v."""
    return 2 * hidden * heads * size + 2 * hidden * groups * size


def by_hand(config: dict[str, Any]) -> tuple[float, float]:
    """(weights that a token is multiplied with, the head's among them; further FLOPs a token that grow with no text)."""
    it, hidden, layers = config, config["hidden_size"], config["num_hidden_layers"]
    head, further = it["vocab_size"] * hidden, 0
    match it["model_type"]:
        case "llama":
            block = attention(
                hidden, it["num_attention_heads"], it["num_key_value_heads"], hidden // it["num_attention_heads"]
            )
            weights = layers * (block + 3 * hidden * it["intermediate_size"])
        case "qwen3_moe":
            block = attention(hidden, it["num_attention_heads"], it["num_key_value_heads"], it["head_dim"])
            experts = it["num_experts_per_tok"] * 3 * hidden * it["moe_intermediate_size"]
            weights = layers * (block + it["num_experts"] * hidden + experts)
        case "mixtral":
            block = attention(
                hidden, it["num_attention_heads"], it["num_key_value_heads"], hidden // it["num_attention_heads"]
            )
            experts = it["num_experts_per_tok"] * 3 * hidden * it["intermediate_size"]
            weights = layers * (block + it["num_local_experts"] * hidden + experts)
        case "gpt_oss":
            block = attention(hidden, it["num_attention_heads"], it["num_key_value_heads"], it["head_dim"])
            experts = it["num_experts_per_tok"] * 3 * hidden * it["intermediate_size"]
            weights = layers * (block + it["num_local_experts"] * hidden + experts)
        case "deepseek_v3":
            heads, rank, rope = it["num_attention_heads"], it["kv_lora_rank"], it["qk_rope_head_dim"]
            query = it["q_lora_rank"] * (hidden + heads * (it["qk_nope_head_dim"] + rope))
            keys_and_values = hidden * (rank + rope) + rank * heads * (it["qk_nope_head_dim"] + it["v_head_dim"])
            block = query + keys_and_values + heads * it["v_head_dim"] * hidden
            dense = it["first_k_dense_replace"]
            experts = (it["num_experts_per_tok"] + it["n_shared_experts"]) * 3 * hidden * it["moe_intermediate_size"]
            weights = layers * block + dense * 3 * hidden * it["intermediate_size"]
            weights += (layers - dense) * (it["n_routed_experts"] * hidden + experts)
        case "mamba2":
            inner, state, heads = it["expand"] * hidden, it["state_size"], it["num_heads"]
            convolved = inner + 2 * it["n_groups"] * state
            weights = layers * (hidden * (inner + convolved + heads) + it["conv_kernel"] * convolved + inner * hidden)
            # Within a chunk C·Bᵀ and its product with the inputs; between chunks into the state and out of it.
            within = it["chunk_size"] * (state + it["head_dim"])
            further = layers * heads * 2 * (within + 2 * state * it["head_dim"])
    return weights + head, further


PUBLISHED = {
    # name: config, parameters as published, (stage, offload, nodes, GPUs a node) on H200s
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.53e9, (0, "none", 1, 1)),
    "Qwen3-235B-A22B": (QWEN3_235B_A22B, 235.09e9, (3, "none", 1, 8)),
    "DeepSeek-V3": (DEEPSEEK_V3, 671.03e9, (3, "none", 5, 8)),
    "gpt-oss-120b": (GPT_OSS_120B, 116.83e9, (3, "none", 1, 4)),
    "Mixtral-8x22B": (MIXTRAL_8X22B, 140.62e9, (3, "none", 1, 8)),
    "Llama-3.1-405B": (LLAMA_3_405B, 405.85e9, (3, "none", 4, 8)),
    "Mamba-Codestral-7B": (MAMBA_CODESTRAL_7B, 7.2854e9, (0, "none", 1, 1)),
}


def estimated(job: Job, config: dict[str, Any], *options: str, **model: Any) -> dict[str, Any]:
    folder = job.folder / "published"
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    has_sdpa = config["model_type"] not in ("gpt_oss", "mamba2")
    job.spec["model"] = {"uri": str(folder), "dtype": "bfloat16", "attention": "sdpa" if has_sdpa else "eager"} | model
    job.spec["extraction"] |= {"projection": {"dim": 64}, "codec": {"kind": "sign", "dims": 65536}}
    return job.passes("estimate", "--spec", str(job.spec_path()), *options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published_and_flops_a_token_as_counted_by_hand(job: Job, name: str) -> None:
    config, parameters, world = PUBLISHED[name]
    predicted = estimated(job, config, "--gpu", "H200")
    assert predicted["parameters"] == pytest.approx(parameters, rel=1e-3)  # published figures have 4 or 5 digits
    weights, further = by_hand(config)
    assert predicted["flops_per_token"] == pytest.approx(
        2 * weights + further, rel=1e-3
    )  # by hand without norms and gates
    embedded = config["vocab_size"] * config["hidden_size"]
    assert predicted["parameters_active"] == pytest.approx(weights + embedded, rel=1e-2)
    assert predicted["coverage"] >= 0.99
    topology = predicted["topology"]
    assert (topology["stage"], topology["offload"], topology["nodes"], topology["gpus_per_node"]) == world


def test_terms_of_a_70b_models_memory_add_up(job: Job) -> None:
    predicted = estimated(job, LLAMA_3_70B)
    assert predicted["parameters"] == 70_553_706_496
    assert predicted["parameters_covered"] == predicted["parameters"] - 2 * 128256 * 8192 - (2 * 80 + 1) * 8192
    assert (predicted["topology"]["stage"], predicted["topology"]["offload"]) == (3, "none")
    assert "ZeRO stage 3, tokensPerBatch" in tables.estimate_table(predicted)
    assert predicted["topology"]["device_bytes"] <= 0.85 * predicted["gpu_memory_bytes"]
    by_setting = {(row["stage"], row["offload"]): row for row in predicted["memory"][:4]}
    assert set(by_setting) == {(0, "none"), (3, "none"), (3, "cpu"), (3, "nvme")}
    assert not by_setting[0, "none"]["fits"]
    assert by_setting[0, "none"]["weights_bytes"] == 2 * predicted["parameters"]
    world = by_setting[3, "none"]
    assert world["weights_bytes"] == 2 * predicted["parameters"] // world["ranks"]
    for row in predicted["memory"]:
        terms = [value for name, value in row.items() if name.endswith("_bytes")]
        outside = row["device_bytes"] + row["host_bytes"] + row["nvme_bytes"]
        assert sum(terms) - outside == pytest.approx(row["device_bytes"], abs=len(terms))  # each term is rounded


def test_a_70b_model_in_4_bits_fits_on_one_card_and_one_of_235b_does_not(job: Job) -> None:
    fits = estimated(job, LLAMA_3_70B, quantization="nf4")
    topology = fits["topology"]
    assert (topology["stage"], topology["offload"], topology["nodes"], topology["gpus_per_node"]) == (0, "none", 1, 1)
    embeddings_and_head = 2 * LLAMA_3_70B["vocab_size"] * LLAMA_3_70B["hidden_size"]  # type: ignore[operator]
    expected = (fits["parameters"] - embeddings_and_head) * 4.127 / 8 + 2 * embeddings_and_head
    assert fits["memory"][0]["weights_bytes"] == pytest.approx(expected, rel=1e-3)  # norms
    too_large = estimated(job, QWEN3_235B_A22B, quantization="nf4")
    assert too_large["topology"] is None
    assert "123 GB of it for weights; quantise to fewer bits" in tables.estimate_table(too_large)
