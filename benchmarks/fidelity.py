"""How well stored rows keep the ranking of exact, unprojected influence scores, and what they cost in bytes.

Candidates are GSM8K solutions, targets pairs (right, wrong solution) to later questions. The default codec goes through the
job's own stages, in float32 and in bfloat16. The exact scores and the other kinds of rows come from an oracle in float32: one
example at a time, plain weight gradients, no projection or an explicit one.

    python -m benchmarks.fidelity --data FOLDER/gsm8k_model_solutions.jsonl --examples 512 --json fidelity.json
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from prism_job import projection
from prism_job.data import examples
from prism_job.evaluate.audit import spearman
from prism_job.extract import tokenise
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.score.preference import preference
from prism_job.spec.model import ModelSpec
from prism_job.store import codec
from tests.oracle import rademacher

SIGN_DIMS = (32_768, 65_536, 131_072)
LESS_DIMS = 8_192
LESS_NAME = f"count-sketch of all weights to {LESS_DIMS} float16"
SIDES = ("chosen", "rejected")


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_model_solutions.jsonl")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--model", default=job.MODEL)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.data.open()]
    candidates = [as_messages(row) for row in rows[: arguments.examples]]
    pairs = make_pairs(rows[arguments.examples :], arguments.pairs)

    figures: dict[str, float] = {"examples": len(candidates), "pairs": len(pairs)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        job_scores, job_figures = run_job(Path(folder), arguments.model, "float32", candidates, pairs)
        bfloat16_scores, bfloat16_figures = run_job(Path(other), arguments.model, "bfloat16", candidates, pairs)
    figures |= job_figures
    started = time.monotonic()
    by_kind = oracle_scores(arguments.model, candidates, pairs)
    figures["oracle_seconds"] = time.monotonic() - started

    exact = by_kind.pop("exact")[1]
    table = [("the job: p=64, sign 65,536, as stored", figures["store_bytes_per_example"], job_scores)]
    table += [("the same job in bfloat16", bfloat16_figures["store_bytes_per_example"], bfloat16_scores)]
    table += [(name, size, scores) for name, (size, scores) in by_kind.items()]
    print(f"{'store':<48}{'bytes an example':>18}{'Spearman with exact':>22}")
    for name, size, scores in table:
        value = spearman(scores, exact)
        key = name.split(":")[0].replace(" ", "_") if name.startswith("the job") else name.replace(" ", "_")
        figures[f"spearman[{key}]"] = value
        figures[f"bytes[{key}]"] = size
        print(f"{name:<48}{size:>18,.0f}{value:>22.4f}")
    figures["spearman_default"] = spearman(job_scores, exact)
    figures["store_over_8192"] = figures["store_bytes_per_example"] / 8192
    print(
        f"candidate store, everything counted: {figures['store_bytes_per_example']:,.0f} bytes an example "
        f"= {figures['store_over_8192']:.3f} x 8,192; target pairs beside it: {figures['target_bytes']:,.0f} bytes"
    )
    job.write_json(arguments.json, figures)


def as_messages(row: dict[str, str]) -> dict[str, object]:
    return {"messages": [turn("user", row["question"]), turn("assistant", row["solution"])], "label": row["is_correct"]}


def make_pairs(rows: list[dict[str, str]], wanted: int) -> list[dict[str, object]]:
    """The first right and the first wrong solution of each later question that has both."""
    by_question: dict[str, dict[bool, str]] = {}
    for row in rows:
        by_question.setdefault(row["question"], {}).setdefault(bool(row["is_correct"]), row["solution"])
    pairs = [
        {"prompt": [turn("user", question)], **{side: [turn("assistant", found[side == "chosen"])] for side in SIDES}}
        for question, found in by_question.items()
        if len(found) == 2 and found[True] != found[False]
    ]
    return pairs[:wanted]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def run_job(folder: Path, model: str, dtype: str, candidates: list, pairs: list) -> tuple[np.ndarray, dict[str, float]]:
    """The three stages as users run them, plain dot products; scores in the candidates' order, and the store's size."""
    job.write_jsonl(folder / "pool.jsonl", candidates)
    job.write_jsonl(folder / "targets.jsonl", pairs)
    spec = job.selection(  # without audit: its shards do not belong to the bytes of an example
        folder,
        model={"uri": str(Path(model).resolve()), "dtype": dtype},
        extraction={"tokensPerBatch": 2048},
        scoring={"curvature": {"kind": "none"}},
        selection={"keep": "highest", "budget": {"fraction": 0.1}, "dedupe": "none"},
    )
    document = job.write_document(folder / "selection.yaml", "fidelity", spec)
    seconds = {}
    for stage in ("plan", "extract", "reduce"):
        seconds[f"{stage}_seconds"], outcome = job.run_stage(stage, document)
    scores = pq.read_table(Path(outcome["manifest"]).parent / "scores.parquet")["score"].to_numpy()
    files = [path for path in (folder / "store").rglob("*") if path.is_file()]
    targets = sum(path.stat().st_size for path in files if ".targets." in path.name)
    everything = sum(path.stat().st_size for path in files)
    stored = (everything - targets) / len(candidates)
    return scores, {**seconds, "store_bytes_per_example": stored, "target_bytes": float(targets)}


def oracle_scores(model_uri: str, candidates: list, pairs: list) -> dict[str, tuple[float, np.ndarray]]:
    """Name -> (bytes an example, scores) for exact scores and each kind of row, from plain weight gradients."""
    spec = ModelSpec(uri=model_uri, dtype="float32")
    tokenizer, model = load_tokenizer(spec), load_model(spec, torch.device("cpu"))
    layers = captured_layers(model, ("*",))
    oracle = _Oracle(model, {name: weight.modules[0] for name, weight in layers.weights.items()})
    direction = oracle.direction(pairs, tokenizer)
    sketches = oracle.sketches(direction)
    folded = {name: make(direction, sketches) for name, (_, make, _) in oracle.kinds.items()}
    scores: dict[str, list[float]] = {name: [] for name in ("exact", *oracle.kinds)}
    for number, row in enumerate(candidates, 1):
        content = examples.candidate_content(row)
        gradient = oracle.gradient(tokenise.encode_candidate(content, tokenizer, 2048), mean=False)[0]
        scores["exact"].append(sum(float(gradient[name].flatten() @ direction[name].flatten()) for name in direction))
        sketches = oracle.sketches(gradient)
        for name, (_, make, store) in oracle.kinds.items():
            scores[name].append(float(np.dot(store(make(gradient, sketches)), folded[name])))
        if number % 32 == 0:
            print(f"oracle: {number} of {len(candidates)}", file=sys.stderr, flush=True)
    sizes = {"exact": 0.0, **{name: size for name, (size, _, _) in oracle.kinds.items()}}
    return {name: (sizes[name], np.array(values)) for name, values in scores.items()}


class _Oracle:
    """Plain per-example weight gradients, and the rows of the table made from them one by one."""

    def __init__(self, model, modules) -> None:
        self.model, self.modules = model, modules
        self.weights = {name: module.weight.requires_grad_() for name, module in modules.items()}
        count = len(modules)
        self.sides = {
            sketch: {name: _sides(name, module, *sketch) for name, module in modules.items()}
            for sketch in ((16, 0), (32, 0), (64, 0), (64, 1))
        }
        self.less = {name: _less_signs(n, module.weight.numel()) for n, (name, module) in enumerate(modules.items())}
        self.tables = {
            (dims, seed): [projection.fold_table(seed, name, 64, dims) for name in modules]
            for dims in SIGN_DIMS
            for seed in (0, 1)
        }
        # Name -> bytes an example; row of a gradient, given its sketches; what is left of that row once stored.
        self.kinds = {
            "p=16 float16": (16 * 16 * count * 2.0, lambda g, s: s[16, 0], _as_float16),
            LESS_NAME: (LESS_DIMS * 2.0, lambda g, s: self.less_sketch(g), _as_float16),
            "p=32 float16": (32 * 32 * count * 2.0, lambda g, s: s[32, 0], _as_float16),
            "p=64 float32, unfolded": (64 * 64 * count * 4.0, lambda g, s: s[64, 0], lambda row: row),
        }
        for dims in SIGN_DIMS:
            size = dims / 8 + dims / codec.BLOCK * 2 + 4
            self.kinds[f"p=64 sign {dims}"] = (size, lambda g, s, d=dims: self.fold(s, d, 0), _as_sign)
            if 2 * dims in SIGN_DIMS:
                name, make = f"two draws of p=64 sign {dims}", lambda g, s, d=dims: [self.fold(s, d, n) for n in (0, 1)]
                self.kinds[name] = (2 * size, lambda g, s, m=make: np.concatenate(m(g, s)), _as_two_signs)

    def gradient(self, encoded: tokenise.Encoded, *, mean: bool):
        """Weight gradients of one example's loss, and its token-mean negative log-likelihood."""
        ids = torch.tensor([encoded.ids])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        predicting = torch.tensor(encoded.supervised[1:])
        nll = torch.nn.functional.cross_entropy(logits[predicting], ids[0, 1:][predicting], reduction="sum")
        loss = nll / encoded.num_supervised if mean else nll
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        return dict(zip(self.weights, gradients, strict=True)), nll.item() / encoded.num_supervised

    def direction(self, pairs: list, tokenizer):
        total = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for pair in pairs:
            encoded = tokenise.encode_target(pair, tokenizer, 2048)
            sides = [self.gradient(encoded[side], mean=True) for side in SIDES]
            weight = float(preference(np.array([sides[0][1]]), np.array([sides[1][1]]))[0])
            for name, sum_ in total.items():
                sum_ += (sides[0][0][name] - sides[1][0][name]) * (weight / len(pairs))
        return total

    def sketches(self, gradient) -> dict[tuple[int, int], np.ndarray]:
        """Dim and seed -> the two-sided projection of every layer's weight gradient, one after the other."""
        rows = {}
        for sketch, sides in self.sides.items():
            parts = [sides[name][1].T @ weight_gradient @ sides[name][0] for name, weight_gradient in gradient.items()]
            rows[sketch] = torch.cat([part.flatten() for part in parts]).numpy()
        return rows

    def fold(self, sketches: dict[tuple[int, int], np.ndarray], dims: int, seed: int) -> np.ndarray:
        folded = np.zeros(dims)
        for layer, table in enumerate(self.tables[dims, seed]):
            part = sketches[64, seed][layer * 4096 : (layer + 1) * 4096] * table.sign_M
            folded += np.bincount(table.bucket_M, part, dims)
        return folded.astype(np.float32)

    def less_sketch(self, gradient) -> np.ndarray:
        # Dim j holds the sum of every 8,192nd weight from j on, each with its own random sign: unbiased, as LESS's
        # dense Rademacher projection is, and cheap enough to apply to all weights of every example.
        folded = torch.zeros(LESS_DIMS)
        for name, weight_gradient in gradient.items():
            signed = weight_gradient.flatten() * self.less[name]
            folded += torch.nn.functional.pad(signed, (0, -len(signed) % LESS_DIMS)).view(-1, LESS_DIMS).sum(0)
        return folded.numpy()


def _sides(name: str, module, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = {"a": module.in_features, "b": module.out_features}
    a, b = (torch.from_numpy(rademacher(seed, name, side, size, dim)) for side, size in sizes.items())
    return a, b


def _less_signs(seed: int, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (numel,), generator=generator, dtype=torch.int8) * 2 - 1


def _as_float16(row: np.ndarray) -> np.ndarray:
    return codec.decode_float16(codec.encode_float16(row[None].astype(np.float32)))[0]


def _as_two_signs(row: np.ndarray) -> np.ndarray:
    return np.concatenate([_as_sign(half) for half in np.split(row, 2)])


def _as_sign(row: np.ndarray) -> np.ndarray:
    return codec.decode_sign(codec.encode_sign(row[None]))[0]


if __name__ == "__main__":
    main()
