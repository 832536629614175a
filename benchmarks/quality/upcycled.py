"""A real mixture of experts: does it rank as well as the dense model that it was made from?

Each MLP of the model is copied into 4 experts with a little noise; a random router sends each token to two of them
(sparse upcycling, Komatsuzaki et al. 2023). The result is tuned for 60 steps on GSM8K and BIG-Bench-Hard, a dense
twin on the same batches; none of this text is about the facts. Then each model ranks right above wrong statements,
and the job's scores without curvature are compared with exact ones: plain autograd over the whole weights, an example
at a time.

    python -m benchmarks.quality.upcycled --data FOLDER --json build/quality/upcycled.json

Training takes 9 GB of memory. The models are left in the folder upcycled of --work. Shapes: N candidates, Q pairs.
"""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks import job
from benchmarks.quality import harness, tuning
from benchmarks.quality.facts import make_data
from benchmarks.quality.harness import Rows
from prism_job.data import examples
from prism_job.evaluate.audit import spearman
from prism_job.extract import tokenise
from prism_job.extract.tokenise import Encoded
from prism_job.extract.work_unit import SIDES
from prism_job.storage import model_files

EXPERTS, TOP_K = 4, 2
NOISE = 0.1
"""Standard deviation of the noise of a copy, relative to that of the weight."""
STEPS, BATCH, RATE, MAX_TOKENS = 60, 4, 1e-4, 96
HELD = 16
"""Texts that are not trained on, for the loss."""
EXACT = 80
"""So many candidates get an exact score."""
MODELS = {"dense": "dense, as published", "tuned": "dense, tuned", "moe": f"{EXPERTS} experts, top {TOP_K}, tuned"}
METHODS = {"preference": "PRISM", "cosine": "by cosine", "plain": "no curvature", "loss": "own loss"}


def main() -> None:
    options = harness.parser(__doc__, seeds=1).parse_args()
    folder = options.work / "upcycled"
    settings = [model_files.identify(options.model), harness.constants(__name__)]
    paths = {"dense": options.model, "tuned": str(folder / "tuned"), "moe": str(folder / "moe")}
    figures: dict[str, Any] = {"seeds": options.seeds}
    for kind in ("tuned", "moe"):
        losses = harness.once(folder / f"{kind}.json", settings, partial(train, options, kind, Path(paths[kind])))
        figures |= {f"{name}[{kind}]": value for name, value in losses.items()}
    by_seed = []
    for seed in range(options.seeds):
        found, scores = {}, {}
        for kind, path in paths.items():
            about = [*settings, model_files.identify(path)]
            compute = partial(rank, options.work, path, f"{kind}-{seed}", seed)
            ranked = harness.once(folder / f"{kind}-{seed}.json", about, compute)
            scores[kind] = np.array(ranked.pop("scores"))
            found |= {f"{name}[{kind}]": value for name, value in ranked.items()}
        found |= {f"spearman_with_tuned[{kind}]": spearman(scores[kind], scores["tuned"]) for kind in MODELS}
        by_seed.append(found)
    intervals = harness.over_seeds(by_seed)
    names = [*(f"auroc_{method}" for method in METHODS), "spearman_exact", "spearman_with_tuned", "mean_pi"]
    heads = ["model", *(f"AUROC {name}" for name in METHODS.values()), "Spearman, exact", "with the tuned", "mean π"]
    lines = [[label, *(intervals[f"{name}[{kind}]"] for name in names)] for kind, label in MODELS.items()]
    print(f"{json.dumps(figures, indent=1)}\n\n{harness.table(heads, lines)}")
    job.write_json(options.json, figures | harness.flat(intervals))


def train(options: Any, kind: str, path: Path) -> dict[str, float]:
    """Tune the dense model or its experts and save it at `path`. The loss of held-out texts before and after."""
    torch.manual_seed(0)
    tokenizer, model = tuning.load(options.model)
    rows = [json.loads(line) for name in ("gsm8k_train", "bbh") for line in (options.data / f"{name}.jsonl").open()]
    random.Random(0).shuffle(rows)
    texts: list[Encoded] = []
    while len(texts) < HELD + STEPS * BATCH:
        row = rows.pop()
        if row.get("task") != "multistep_arithmetic_two":  # bare sums, as the facts task has
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            encoded = tokenise.encode_candidate(examples.candidate_content({"messages": turns}), tokenizer, 2048)
            texts += [encoded] if len(encoded.ids) <= MAX_TOKENS else []
    model = upcycled(model, NOISE) if kind == "moe" else model
    before = float(tuning.mean_nll(model, texts[:HELD]).mean())
    tuning.tune_in_bfloat16(model, texts[HELD:], rate=RATE, batch_size=BATCH)
    after = float(tuning.mean_nll(model, texts[:HELD]).mean())
    tuning.save(model, tokenizer, path)
    return {"loss_before": before, "loss_after": after, "texts": len(texts), "weights": model.num_parameters()}


def upcycled(dense: Any, noise: float) -> PreTrainedModel:
    """A Mixtral whose experts are copies of a Llama's MLPs; without noise it computes what the Llama does."""
    config = dense.config.to_diff_dict()
    for name in ("model_type", "architectures", "quantization_config", "transformers_version", "dtype"):
        config.pop(name, None)
    sparse = MixtralForCausalLM(MixtralConfig(**config, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K))
    weights = dense.state_dict()
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=dense.config.initializer_range)
                continue
            parts = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
            mlp = [weights[f"{name.rpartition('experts.')[0]}{part}.weight"] for part in parts if ".experts." in name]
            weight = torch.cat(mlp) if mlp else weights[name]
            parameter.copy_(weight.expand_as(parameter))
            if mlp:
                parameter.add_(torch.randn_like(parameter), alpha=noise * float(weight.std()))
    return sparse.float().requires_grad_(False).eval()


def rank(work: Path, path: str, name: str, seed: int) -> dict[str, Any]:
    """How well the job's scores rank right above wrong, and how they agree with exact ones."""
    candidates, targets = make_data(seed)
    good_N = np.array([row["label"] == 1 for row in candidates])
    run = harness.extract(work, f"upcycled-{name}", candidates, targets, model=path, dtype="bfloat16")
    pi_Q = run.targets.preference_Q
    score_N, plain_N = run.scores(pi_Q), run.without_curvature().scores(pi_Q)
    rankings = {"preference": score_N, "cosine": score_N / run.norm_N, "plain": plain_N, "loss": -run.loss_N}
    found = {f"auroc_{name}": harness.area(ranking_N, good_N) for name, ranking_N in rankings.items()}
    exact_N = exact_scores(path, candidates[:EXACT], targets, pi_Q)
    found |= {"spearman_exact": spearman(plain_N[:EXACT], exact_N), "mean_pi": float(pi_Q.mean())}
    return {**found, "scores": score_N.tolist()}


def exact_scores(path: str, candidates: Rows, targets: Rows, pi_Q: np.ndarray) -> np.ndarray:
    """Equations 3 and 4 without curvature over every matrix but embeddings and head: float64 [N]."""
    tokenizer, model = tuning.load(path)
    model.requires_grad_(True)
    weights = [one for name, one in model.named_parameters() if one.ndim > 1 and "embed" not in name]

    def gradient(*texts: Encoded, share: float = 0.0) -> tuple[torch.Tensor, ...]:
        nll_B, tokens_B = tuning.nll(model, tokenise.collate(texts, tuning.CPU))
        mean_B = nll_B / tokens_B
        return torch.autograd.grad(share * (mean_B[0] - mean_B[1]) if share else nll_B.sum(), weights)

    direction = [torch.zeros_like(weight) for weight in weights]
    for row, pi in zip(targets, pi_Q, strict=True):
        sides = tokenise.encode_target(row, tokenizer, 2048)
        texts = [sides[side] for side in SIDES]
        for total, part in zip(direction, gradient(*texts, share=float(pi) / len(pi_Q)), strict=True):
            total += part
    encoded = [tokenise.encode_candidate(examples.candidate_content(row), tokenizer, 2048) for row in candidates]
    gradients = (zip(gradient(one), direction, strict=True) for one in encoded)
    return np.array([sum(float(part.flatten() @ total.flatten()) for part, total in each) for each in gradients])


if __name__ == "__main__":
    main()
