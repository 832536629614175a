"""The attention backend that a model's rows are computed with: a function of the document and of config.json alone.

So the plan stage, which does not import torch, can name it in the extractor digest.
"""

from typing import Literal

from prism_job.spec.model import ModelSpec
from prism_job.storage import model_files

# fmt: off
EAGER_ONLY = frozenset({
    "big_bird", "bigbird_pegasus", "bloom", "codegen", "cpmant", "deepseek_v4", "falcon_mamba", "flint", "gemma2",
    "git", "got_ocr2", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "hy_v4",
    "inkling2_text", "mamba", "mamba2", "megatron-bert", "mimo_v2_flash", "mpt", "mvp", "openai-gpt", "prophetnet",
    "reformer", "rembert", "roformer", "rwkv", "trocr", "vaultgemma", "xglm", "xlm", "xlnet", "xlstm",
})
# fmt: on
"""`model_type` of the causal language models that transformers has without sdpa attention.

A list of our own, so that the digest of a store does not change with transformers' version. Where transformers has no sdpa for
a model that is not listed, loading it fails and says so (extract/load/model_config.py).
"""


def attention_backend(model: ModelSpec) -> Literal["sdpa", "eager"]:
    """`model.attention`, with `auto` resolved: sdpa, or eager where the architecture has no sdpa.

    Raises RequestError, TransientError: config.json cannot be read.
    """
    if model.attention != "auto":
        return model.attention
    return "eager" if model_files.model_types(model.uri, model.revision) & EAGER_ONLY else "sdpa"
