"""Fine-tune a model on a selection with TRL's SFTTrainer: full weights, or a LoRA adapter.

pip install -c constraints.txt ".[job,train]"
python examples/train/sft.py MANIFEST --model HuggingFaceTB/SmolLM2-135M-Instruct --out build/tuned
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from prism_job.api import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model on a selection with TRL's SFTTrainer.")
    parser.add_argument("manifest", help="path or s3:// address of manifest.json, as `prism run` printed it")
    parser.add_argument("--model", required=True, help="hub id or folder of the model that is tuned")
    parser.add_argument("--out", required=True, help="folder of the tuned model")
    parser.add_argument("--epochs", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: all weights (%(default)s)")
    options = parser.parse_args()

    selection = Selection.load(options.manifest)
    dataset = selection.examples(
        format="trl"
    )  # messages; or prompt and completion; or text; whatever the pool's layout was
    is_conversation = "messages" in dataset.column_names
    if is_conversation and all(len(roles(row)) == 1 for row in dataset):
        # One answer: as prompt and completion, because TRL then knows which tokens to learn whatever the chat template is.
        dataset = dataset.map(split_answer, remove_columns="messages")
        is_conversation = False
    config = SFTConfig(
        output_dir=options.out,
        num_train_epochs=options.epochs,
        max_length=selection.manifest.spec.spec.extraction.max_length,  # as the gradients were taken
        assistant_only_loss=is_conversation,  # several answers: the chat template needs {% generation %} marks
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    adapter = LoraConfig(r=options.lora_rank, task_type="CAUSAL_LM") if options.lora_rank else None
    trainer = SFTTrainer(options.model, args=config, train_dataset=dataset, peft_config=adapter)
    trainer.train()
    trainer.save_model(options.out)


def roles(row: dict[str, Any]) -> list[str]:
    """The turns of a conversation that are learnt."""
    return [message["role"] for message in row["messages"] if message["role"] == "assistant"]


def split_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


if __name__ == "__main__":
    main()
