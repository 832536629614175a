"""Fine-tuning and asking a small model, for experiments on the effect of a selection.

Rows are tokenised as extraction does it, loss falls on the same tokens. Weights are float32 on the CPU; everything
follows from its seed.

Shapes: B examples of a batch, T tokens, K supervised tokens, N examples.
"""

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prism_job.extract import tokenise
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.extract.tokenise import Batch, Encoded
from prism_job.spec.model import ModelSpec

CPU = torch.device("cpu")
ASK_TOKENS = 4096
"""Tokens of a batch without gradients."""
ANSWER_TOKENS, ANSWER_BATCH = 24, 16
"""Longest answer that is generated: longer than any of the short tasks needs."""


def load(uri: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    spec = ModelSpec(uri=uri, dtype="float32")
    return load_tokenizer(spec), load_model(spec, CPU)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that `spec.model.uri` may name. A model read from GGUF cannot be saved as it is: its weights are copied."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tune(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    *,
    epochs: int,
    rate: float,
    seed: int,
    batch_size: int = 8,
    half: bool = False,
) -> None:
    """AdamW over all weights, in place: shuffled each epoch, token-mean loss of a batch, rate falling linearly to 0.

    With `half`, matrix products are in bfloat16 (twice as fast on some processors); weights and moments stay float32."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    chance, order = random.Random(seed), list(range(len(encoded)))
    starts = range(0, len(order), batch_size)
    num_steps, step = epochs * len(starts), 0
    for _ in range(epochs):
        chance.shuffle(order)
        for start in starts:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / num_steps)
            batch = tokenise.collate([encoded[n] for n in order[start : start + batch_size]], CPU)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                nll_B, tokens_B = nll(model, batch)
            optimizer.zero_grad(set_to_none=True)
            (nll_B.sum() / tokens_B.sum()).backward()
            optimizer.step()
            step += 1
    optimizer.zero_grad(set_to_none=True)
    model.requires_grad_(False).eval()


def tune_in_bfloat16(model: PreTrainedModel, encoded: Sequence[Encoded], *, rate: float, batch_size: int) -> None:
    """One epoch in the given order, otherwise as `tune`. All of a pass is in bfloat16, fused experts too, which autocast
    leaves in float32; what the optimizer changes is float32. Each weight is stepped as its gradient comes, to save memory."""
    weights = list(model.requires_grad_(True).train().parameters())
    kept = {weight: weight.detach().clone() for weight in weights}
    optimizers = {weight: torch.optim.AdamW([kept[weight]], weight_decay=0.0, fused=True) for weight in weights}
    left = 1.0  # share of the steps that are still to come

    def on_gradient(weight: Tensor) -> None:
        kept[weight].grad, weight.grad = weight.grad.float(), None  # type: ignore[union-attr]
        optimizers[weight].param_groups[0]["lr"] = rate * left
        optimizers[weight].step()
        kept[weight].grad = None
        weight.data.copy_(kept[weight])

    handles = [weight.register_post_accumulate_grad_hook(on_gradient) for weight in weights]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    for start in range(0, len(encoded), batch_size):
        left = 1 - start / len(encoded)
        nll_B, tokens_B = nll(model, tokenise.collate(list(encoded[start : start + batch_size]), CPU))
        (nll_B.sum() / tokens_B.sum()).backward()
    for handle, weight in zip(handles, weights, strict=True):
        handle.remove()
        weight.data = kept[weight]
    model.requires_grad_(False).eval()


@torch.no_grad()
def mean_nll(model: PreTrainedModel, encoded: Sequence[Encoded], *, half: bool = False) -> NDArray[np.float64]:
    """Token-mean negative log-likelihood of each response: float64 [N]. `half`: as `tune` takes it."""
    found_N = np.zeros(len(encoded))
    for places in tokenise.micro_batches([len(example.ids) for example in encoded], ASK_TOKENS):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            nll_B, tokens_B = nll(model, tokenise.collate([encoded[place] for place in places], CPU))
        found_N[places] = (nll_B / tokens_B).numpy()
    return found_N


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The model's own answer to each prompt: greedy, at most ANSWER_TOKENS."""
    found = []
    for start in range(0, len(prompts), ANSWER_BATCH):
        asked = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + ANSWER_BATCH]]
        longest = max(map(len, asked))
        ids_BT = torch.tensor([[tokenizer.eos_token_id] * (longest - len(ids)) + ids for ids in asked])
        real_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in asked])
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        answers_BT = model.generate(input_ids=ids_BT, attention_mask=real_BT, use_cache=True, **options)
        found += [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers_BT[:, longest:]]
    return found


def nll(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each example, and how many tokens carry it. Logits only where loss falls."""
    hidden_BTE = model.model(input_ids=batch.ids_BT, attention_mask=batch.real_BT.long()).last_hidden_state
    logits_KV = model.lm_head(hidden_BTE[torch.roll(batch.supervised_BT, -1, dims=1)])
    nll_K = nn.functional.cross_entropy(logits_KV.float(), batch.ids_BT[batch.supervised_BT], reduction="none")
    owner_K = batch.supervised_BT.nonzero()[:, 0]
    return torch.zeros(batch.size).index_add(0, owner_K, nll_K), batch.supervised_BT.sum(1)
