"""Tune SmolLM2 on the demo's rows as a LoRA adapter, with plain PEFT. The adapter beside this script was made by

    python examples/sums/tune.py build/sums/candidates.jsonl examples/sums/adapter

Shapes: B texts, T tokens, V words of the vocabulary, K tokens that carry loss.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path("build/model/SmolLM2-135M-Instruct.gguf")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Its name on the hub, for those who load the adapter there."""
RANK, RATE, EPOCHS, BATCH, SEED = 2, 2e-3, 4, 8, 0
NOT_LEARNT = -100
"""PyTorch's label of a token that carries no loss."""

Rows = list[dict[str, Any]]


class Tuned:
    """The model with a new adapter, which changes nothing before `learn`."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        source = {"pretrained_model_name_or_path": str(MODEL.parent), "gguf_file": MODEL.name}
        self.tokenizer = AutoTokenizer.from_pretrained(**source)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), config)

    def learn(self, rows: Rows, name: str) -> None:
        """AdamW, shuffled each epoch, the rate falling to 0. Loss falls on the completion."""
        texts = [self._encoded(row["prompt"], row["completion"]) for row in rows]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer, rng = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0), random.Random(SEED)
        order = [text for _ in range(EPOCHS) for text in rng.sample(texts, len(texts))]
        starts = range(0, len(order), BATCH)
        self.model.train()
        for step, start in enumerate(starts, 1):
            optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / len(starts))
            loss = self._losses(order[start : start + BATCH]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"\r{name}: step {step} of {len(starts)}, loss {loss.item():.3f} ", end="", flush=True)
        print()
        self.model.eval()

    @torch.no_grad()
    def share_wrong(self, pairs: Rows) -> float:
        """Share of the pairs whose rejected answer the model finds likelier, in nats a token."""
        sides = []
        for side in ("chosen", "rejected"):
            texts = [self._encoded(row["prompt"], row[side]) for row in pairs]
            parts = [self._losses(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
            sides.append(torch.cat(parts))
        return float((sides[1] < sides[0]).float().mean())

    def save(self, folder: Path) -> None:
        self.model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "README.md").unlink()  # a template of PEFT's
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config |= {"base_model_name_or_path": BASE, "target_modules": sorted(config["target_modules"])}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _encoded(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Token ids of the text, and labels: the completion is learnt."""
        first, second = (self.tokenizer(text)["input_ids"] for text in (prompt, completion))
        return first + second, [NOT_LEARNT] * len(first) + second

    def _losses(self, texts: list[tuple[list[int], list[int]]]) -> Tensor:
        """Mean negative log-likelihood of each text's labels, float32 [B]."""
        longest = max(len(ids) for ids, _ in texts)
        ids_BT, labels_BT, real_BT = (
            torch.tensor([[*values, *[filler] * (longest - len(values))] for values in columns])
            for columns, filler in (
                ([ids for ids, _ in texts], 0),
                ([labels for _, labels in texts], NOT_LEARNT),
                ([[1] * len(ids) for ids, _ in texts], 0),
            )
        )
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=real_BT).logits[:, :-1]
        is_learnt_BT = labels_BT[:, 1:] != NOT_LEARNT
        nll_K = cross_entropy(logits_BTV[is_learnt_BT], labels_BT[:, 1:][is_learnt_BT], reduction="none")
        nll_BT = torch.zeros(is_learnt_BT.shape).masked_scatter(is_learnt_BT, nll_K)
        return nll_BT.sum(1) / is_learnt_BT.sum(1)


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune SmolLM2 on the demo's rows, as a LoRA adapter.")
    parser.add_argument("rows", type=Path, help="JSON lines with `prompt` and `completion`")
    parser.add_argument("folder", type=Path, help="where the adapter is written")
    options = parser.parse_args()
    tuned = Tuned()
    tuned.learn(read_rows(options.rows), options.rows.name)
    tuned.save(options.folder)


if __name__ == "__main__":
    main()
