"""Fine-tune a model on a selection with TRL's SFTTrainer: full weights, or a LoRA adapter.

pip install -c constraints.txt ".[job,train]"
python examples/train/sft.py MANIFEST --model HuggingFaceTB/SmolLM2-135M-Instruct --out build/tuned
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prism_job.api import PrismError, Selection
from prism_job.storage.model_files import read_config

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model on a selection with TRL's SFTTrainer.")
    parser.add_argument("manifest", help="path or s3:// address of manifest.json, as `prism run` printed it")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file of the model that is tuned")
    parser.add_argument("--out", required=True, help="folder of the tuned model")
    parser.add_argument("--epochs", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: all weights (%(default)s)")
    options = parser.parse_args()
    out = Path(options.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        parser.error(f"--out {out} is there already and not empty: name a new folder")
    try:
        selection = Selection.load(options.manifest)
        read_config(options.model)
    except PrismError as error:
        parser.exit(error.exit_code, f"error: {error}\n")

    import torch  # after the options are checked: these imports take seconds
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    extraction = selection.manifest.spec.spec.extraction
    dataset = selection.examples(format="trl")  # messages; or prompt and completion; or text; as the pool's layout was
    if "messages" in dataset.column_names:
        dataset = Dataset.from_list([row for each in dataset for row in answers(each, extraction.loss_on)])
    config = SFTConfig(
        output_dir=options.out,
        save_strategy="no",  # the model itself is saved at the end
        num_train_epochs=options.epochs,
        max_length=extraction.max_length,  # as the gradients were taken
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    adapter = LoraConfig(r=options.lora_rank, task_type="CAUSAL_LM") if options.lora_rank else None
    model, tokenizer = load(options.model)
    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    trainer.save_model(options.out)
    print(f"the tuned {'adapter' if adapter else 'model'} is in {out}")


def answers(row: Row, loss_on: str) -> list[Row]:
    """A row of prompt and completion for each turn that is learnt.

    As prompt and completion, because TRL then knows which tokens to learn whatever the chat template is. For whole
    conversations (`assistant_only_loss=True`) it needs a template with {% generation %} marks, which few models have.
    """
    turns = row.pop("messages")
    if turns is None:  # a pool of several layouts
        return [row]
    learnt = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0]
    if loss_on == "last":
        learnt = learnt[-1:]
    return [row | {"prompt": turns[:place], "completion": [turns[place]]} for place in learnt]


def load(model: str) -> tuple[Any, Any]:
    """What SFTTrainer takes: a name, and no tokenizer of ours; or a GGUF file's weights in 32 bits, and its tokenizer."""
    if not model.endswith(".gguf"):
        return model, None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": Path(model).parent, "gguf_file": Path(model).name}
    loaded = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    # The weights are no longer quantised, but transformers remembers that they were, and would neither train nor save them.
    loaded.hf_quantizer, loaded.is_quantized = None, False
    del loaded.config.quantization_config
    return loaded, AutoTokenizer.from_pretrained(**file)


if __name__ == "__main__":
    main()
