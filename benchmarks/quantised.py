"""Rows of quantised weights beside those of 16 and 32 bits: do they rank alike, and does a batch-mate change them?

Candidates are GSM8K questions and answers, targets pairs of a right and a wrong solution. Rows are unfolded, scores plain
inner products with the direction that the same weights give, so nothing but the weights differs. "LLM.int8()" is
bitsandbytes' own product, which PRISM does not use: 8-bit inputs, and columns with inputs above a threshold apart. The
adapter is trained over nf4 weights, one pass over as many other examples; its rows are of its own weights alone.

    python -m benchmarks.quantised --data FOLDER --json quantised.json

Shapes: N examples, D unfolded dims, B examples of a batch, T tokens.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from benchmarks.fidelity import SIDES, make_pairs
from benchmarks.quality import tuning
from prism_job.data import examples
from prism_job.evaluate.audit import spearman
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.load import quantised
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.extract.tokenise import Encoded
from prism_job.score.preference import preference
from prism_job.spec.model import ModelSpec

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}
NF4_ONCE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OWN_PRODUCTS: dict[str, dict[str, Any]] = {
    "LLM.int8(), threshold 6": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "LLM.int8(), threshold 0": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
"""bitsandbytes' settings of its own products."""
PARTS = ("weights", "batch-mates", "adapter")
NUM_ALONE = 4
"""Examples whose rows are computed a second time, alone."""


@dataclass(frozen=True)
class Measured:
    """What one setting gives."""

    rows_ND: Tensor
    direction_D: Tensor
    preferences: np.ndarray
    alone: np.ndarray  # of the first rows: relative difference of the row alone and in its batch
    tokens_per_cpu_second: float
    weight_bytes: int

    @property
    def scores(self) -> np.ndarray:
        return (self.rows_ND @ self.direction_D).numpy()


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl and gsm8k_model_solutions.jsonl")
    parser.add_argument("--model", default=job.MODEL)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--dim", type=int, default=64, help="projected dims a side; half of it for the adapter")
    parser.add_argument("--tokens-per-batch", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    chosen = parser.parse_args()
    with (chosen.data / "gsm8k_train.jsonl").open() as file:
        rows = [json.loads(line) for line in file][: 2 * chosen.examples]
    with (chosen.data / "gsm8k_model_solutions.jsonl").open() as file:
        pairs = make_pairs([json.loads(line) for line in file], chosen.pairs)
    figures: dict[str, Any] = {"examples": chosen.examples, "pairs": len(pairs), "dim": chosen.dim}
    with tempfile.TemporaryDirectory() as name:
        folder, adapter = Path(name) / "model", Path(name) / "adapter"
        tokenizer, model = tuning.load(str(chosen.model))
        tuning.save(model, tokenizer, folder)
        del model
        tokenizer = load_tokenizer(ModelSpec(uri=str(folder)))
        encoded = [tokenise.encode_candidate(examples.candidate_content(row), tokenizer, 2048) for row in rows]
        targets = [
            tokenise.encode_candidate({"prompt": pair["prompt"], "completion": pair[side]}, tokenizer, 2048)
            for pair in pairs
            for side in SIDES
        ]
        work = Work(encoded[: chosen.examples], targets, chosen)

        def loaders(prefix: str, **more: str) -> dict[str, Any]:
            specs = {name: ModelSpec(uri=str(folder), **settings, **more) for name, settings in SETTINGS.items()}
            return {prefix + name: lambda spec=spec: load_model(spec, CPU) for name, spec in specs.items()}

        if "weights" in chosen.parts:
            once = {"nf4 without double quantisation": lambda: by_transformers(folder, NF4_ONCE, torch.bfloat16)}
            compare(figures, loaders("") | once, work, chosen.dim)
        if "batch-mates" in chosen.parts:
            # In float32, where rounding alone moves a row by 1e-6; few examples, because LLM.int8() is slow on a CPU.
            few = Work(work.candidates[: 2 * NUM_ALONE], work.targets[:4], chosen)
            ours = ModelSpec(uri=str(folder), dtype="float32", quantization="int8")
            makers = {
                "float32, few": loaders("")["float32"],
                "int8 in float32, few": lambda: load_model(ours, CPU),
                **{
                    f"{name} in float32, few": lambda given=given: by_transformers(folder, given, torch.float32)
                    for name, given in OWN_PRODUCTS.items()
                },
            }
            compare(figures, makers, few, chosen.dim)
        if "adapter" in chosen.parts:
            train_adapter(folder, adapter, encoded[chosen.examples :], chosen.tokens_per_batch)
            compare(figures, loaders("adapter over ", adapter=str(adapter)), work, chosen.dim // 2)
    job.write_json(chosen.json, figures)


@dataclass(frozen=True)
class Work:
    """What every setting computes."""

    candidates: list[Encoded]
    targets: list[Encoded]  # chosen and rejected in turn
    chosen: argparse.Namespace

    def measure(self, model: Any, dim: int) -> Measured:
        capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(dim, 0, None)])
        self.rows(capture, self.candidates[:2], mean=False)
        started = time.process_time()
        rows_ND, _ = self.rows(capture, self.candidates, mean=False)
        seconds = time.process_time() - started
        of_targets, nlls = self.rows(capture, self.targets, mean=True)
        preferences = preference(nlls[0::2], nlls[1::2])
        weights = torch.from_numpy(preferences).float()[:, None] / len(preferences)
        alone_ND, _ = self.rows(capture, self.candidates[:NUM_ALONE], mean=False, alone=True)
        together_ND = rows_ND[:NUM_ALONE]
        return Measured(
            rows_ND,
            ((of_targets[0::2] - of_targets[1::2]) * weights).sum(0),
            preferences,
            ((alone_ND - together_ND).norm(dim=1) / together_ND.norm(dim=1)).numpy(),
            sum(len(each.ids) for each in self.candidates) / seconds,
            sum(weight.nbytes for weight in model.parameters()),
        )

    def rows(
        self, capture: GradientCapture, encoded: list[Encoded], *, mean: bool, alone: bool = False
    ) -> tuple[Tensor, np.ndarray]:
        """Rows [N, D], and the token-mean negative log-likelihood of each."""
        lengths = [len(each.ids) for each in encoded]
        batches = [[index] for index in range(len(encoded))]
        rows, nlls = [None] * len(encoded), np.zeros(len(encoded))
        for indices in batches if alone else tokenise.micro_batches(lengths, self.chosen.tokens_per_batch):
            (found,) = capture.gradients_of(tokenise.collate([encoded[index] for index in indices], CPU), mean=mean)
            nlls[indices] = (found.nll_B / found.tokens_B).numpy()
            for index, row in zip(indices, found.rows_BD, strict=True):
                rows[index] = row
        return torch.stack(rows), nlls


def by_transformers(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """nf4 with our products, int8 with bitsandbytes' own."""
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    if config.load_in_4bit:
        quantised.use_dequantised_weights(model, dtype)
    return model.eval().requires_grad_(False)


def train_adapter(folder: Path, adapter: Path, encoded: list[Encoded], tokens_per_batch: int) -> None:
    """LoRA of rank 16 on all linear layers, over nf4 weights, one pass with AdamW at 2e-4, saved to `adapter`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_model(ModelSpec(uri=str(folder), dtype="bfloat16", quantization="nf4"), CPU)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4)
    for indices in tokenise.micro_batches([len(each.ids) for each in encoded], tokens_per_batch):
        batch = tokenise.collate([encoded[index] for index in indices], CPU)
        labels_BT = batch.ids_BT.masked_fill(~batch.supervised_BT, -100)
        loss = adapted(input_ids=batch.ids_BT, attention_mask=batch.real_BT.long(), labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.save_pretrained(adapter)


def row_cosines(rows_ND: Tensor, others_ND: Tensor) -> np.ndarray:
    """In float64: a float32 sum over a million dims is off by 5e-5."""
    pairs = zip(rows_ND, others_ND, strict=True)
    return np.array([float(torch.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in pairs])


def compare(figures: dict[str, Any], makers: dict[str, Any], work: Work, dim: int) -> None:
    """Measure each setting, and print it beside the first two."""
    first: list[Measured] = []
    print(
        f"{'weights':<34}{'GB':>6}{'tokens/CPU s':>14}{'cosine to float32 (lowest)':>28}{'bfloat16':>10}{'direction':>11}"
        f"{'Spearman to float32':>21}{'bfloat16':>10}{'alone/batch median':>20}{'highest':>9}{'|pi - float32|':>16}"
    )
    for name, make in makers.items():
        found = work.measure(make(), dim)
        first = first if len(first) == 2 else [*first, found]
        cosines = [row_cosines(found.rows_ND, each.rows_ND) for each in (first[0], first[-1])]
        figures[name] = {
            "gigabytes": found.weight_bytes / 1e9,
            "tokens_per_cpu_second": found.tokens_per_cpu_second,
            "cosine_float32": float(cosines[0].mean()),
            "lowest_cosine_float32": float(cosines[0].min()),
            "cosine_bfloat16": float(cosines[1].mean()),
            "cosine_of_direction": float(row_cosines(found.direction_D[None], first[0].direction_D[None])[0]),
            "spearman_float32": spearman(found.scores, first[0].scores),
            "spearman_bfloat16": spearman(found.scores, first[-1].scores),
            "alone_median": float(np.median(found.alone)),
            "alone_highest": float(found.alone.max()),
            "preference_difference": float(np.abs(found.preferences - first[0].preferences).mean()),
        }
        it = figures[name]
        print(
            f"{name:<34}{it['gigabytes']:>6.3f}{it['tokens_per_cpu_second']:>14.1f}{it['cosine_float32']:>17.4f} "
            f"({it['lowest_cosine_float32']:.4f}){'':>1}{it['cosine_bfloat16']:>10.4f}{it['cosine_of_direction']:>11.4f}"
            f"{it['spearman_float32']:>21.4f}{it['spearman_bfloat16']:>10.4f}{it['alone_median']:>20.2g}"
            f"{it['alone_highest']:>9.2g}{it['preference_difference']:>16.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
