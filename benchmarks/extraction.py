"""Extraction beside what a user would take instead, and beside the arithmetic it cannot do without.

The same rows of GSM8K, the same tokens and, but for bergson, which cuts its own, the same micro-batches, each method in a
process of its own, one after the other in every round. A round takes all rows, of two lines a part, another in each
round; a line is the median of the rounds. The audit is off, the curvature's factor sums are on. bergson is timed in the
Python of a virtual environment that has it (`--bergson PYTHON`); without one its line is left out.

    python -m benchmarks.extraction --data FOLDER/gsm8k_train.jsonl --bergson VENV/bin/python --json extraction.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Dtype = Literal["float32", "bfloat16"]
METHODS = {
    "prism": "PRISM: p=64, 65,536 signs, factor sums, store included",
    "train": "a training step's forward and backward, weight gradients",
    "train_kept": "the same, where malloc keeps what is freed",
    "forward": "forward alone",
    "bergson": "bergson build, p=16",
    "less": "LESS's recipe: one example at a time, all weights, 8,192 dims",
}
LESS_DIMS = 8_192
KEPT = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"}
"""A training step's weight gradients are freed and allocated with every batch, and page faults are dear on virtual machines."""
SELECTION = {"apiVersion": "prism.dev/v1alpha1", "kind": "SelectionRun", "metadata": {"name": "extraction"}}

AS_FOLDER = """
import pathlib, sys
from benchmarks.quality import tuning
tokenizer, model = tuning.load(sys.argv[1])
tuning.save(model, tokenizer, pathlib.Path(sys.argv[2]))
"""
BERGSON = """
import json, sys, time
import bergson.build
from bergson.__main__ import main
collect = bergson.build.collect_gradients
def timed(**given):
    started = time.monotonic()
    collect(**given)
    print(json.dumps({"seconds": time.monotonic() - started, "tokens": int(sum(given["data"]["length"]))}), flush=True)
bergson.build.collect_gradients = timed
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--rows", type=int, default=256, help="%(default)s")
    parser.add_argument(
        "--less-rows", type=int, default=4, help="rows of a round that LESS's recipe takes (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--tokens-per-batch", type=int, default=512, help="%(default)s")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of all (%(default)s)")
    parser.add_argument("--bergson", type=Path, help="a Python that has bergson")
    parser.add_argument("--bergson-tokens", type=int, default=512, help="its own token_batch_size (%(default)s)")
    parser.add_argument("--model", default="build/model/SmolLM2-135M-Instruct.gguf", help="%(default)s")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--method", choices=("train", "train_kept", "forward", "less"), help=argparse.SUPPRESS
    )  # as a child
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.model, options.dtype, options.data, options.tokens_per_batch)))
        return
    rows = [json.loads(line) for line in options.data.open(encoding="utf-8")][: options.rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own, as all that holds weights: a child's peak of memory begins at its parent's.
        child([sys.executable, "-c", AS_FOLDER, options.model, str(model := folder / "model")])
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for number in range(options.rounds):
            for method, seen in found.items():
                if method == "bergson" and not options.bergson:
                    continue
                part = rows[number :: options.rounds] if method in ("less", "train_kept") else rows
                part = part[: options.less_rows] if method == "less" else part
                seen.append(run(method, folder / f"{method}-{number}", part, model, options))
                print(f"round {number}, {method}: {seen[-1]}", file=sys.stderr, flush=True)
    figures = as_figures({method: seen for method, seen in found.items() if seen})
    say(figures)
    if options.json:
        setting = {"rows": len(rows), "rounds": options.rounds, "dtype": options.dtype}
        options.json.write_text(json.dumps(setting | figures, indent=1))


def as_figures(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds, of the figures and of PRISM's ratio to each."""
    figures = {}
    for method, rounds in found.items():
        for name in rounds[0]:
            figures[f"{name}[{method}]"] = statistics.median(each[name] for each in rounds)
    for method, rounds in found.items():
        for name in ("tokens_per_second", "peak_bytes"):
            ratios = [prism[name] / other[name] for prism, other in zip(found["prism"], rounds, strict=True)]
            figures[f"{name}_over[{method}]"] = statistics.median(ratios)
            figures[f"{name}_over_least[{method}]"], figures[f"{name}_over_most[{method}]"] = min(ratios), max(ratios)
    return figures


def say(figures: dict[str, float]) -> None:
    print("| | tokens/s | PRISM's rate over it | peak memory | bytes an example |")
    print("|---|---|---|---|---|")
    for method, name in METHODS.items():
        if f"tokens_per_second[{method}]" not in figures:
            continue
        stored = figures.get(f"bytes_per_example[{method}]")
        ratio, least, most = (figures[f"tokens_per_second_over{end}[{method}]"] for end in ("", "_least", "_most"))
        print(
            f"| {name} | {figures[f'tokens_per_second[{method}]']:.1f} | {ratio:.2f} ({least:.2f} to {most:.2f}) "
            f"| {figures[f'peak_bytes[{method}]'] / 1e9:.2f} GB "
            f"| {'' if stored is None else f'{stored:,.0f}'} |"
        )


def run(
    method: str, folder: Path, rows: list[dict[str, Any]], model: Path, options: argparse.Namespace
) -> dict[str, float]:
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", rows)
    if method == "prism":
        return run_prism(folder, model, len(rows), options)
    if method == "bergson":
        return run_bergson(folder, model, len(rows), options)
    command = [sys.executable, "-m", "benchmarks.extraction", "--method", method, "--data", str(folder / "rows.jsonl")]
    command += ["--model", str(model), "--dtype", options.dtype]
    command += ["--tokens-per-batch", str(options.tokens_per_batch)]
    lines, peak_bytes = child(command, KEPT if method == "train_kept" else {})
    return {**json.loads(lines[-1]), "peak_bytes": peak_bytes}


def run_prism(folder: Path, model: Path, num_rows: int, options: argparse.Namespace) -> dict[str, float]:
    """`plan`, then `extract` as users run it, timed from the loaded model to the last put."""
    write_jsonl(folder / "targets.jsonl", [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}])
    document: dict[str, Any] = {
        **SELECTION,
        "spec": {
            "model": {"uri": str(model), "dtype": options.dtype},
            "candidates": {"uris": [str(folder / "rows.jsonl")]},
            "targets": {"uris": [str(folder / "targets.jsonl")]},
            "store": str(folder / "store"),
            "output": str(folder / "output"),
            "extraction": {"tokensPerBatch": options.tokens_per_batch},
            "audit": {"examples": 0},
            "selection": {"keep": "highest", "budget": {"fraction": 0.1}},
        },
    }
    (folder / "selection.yaml").write_text(yaml.safe_dump(document))
    stage = [sys.executable, "-m", "prism_job"]
    child([*stage, "plan", "--spec", str(folder / "selection.yaml")])
    lines, peak_bytes = child([*stage, "extract", "--spec", str(folder / "selection.yaml")])
    events = [json.loads(line) for line in lines if line.startswith("{")]
    loaded = next(one["time"] for one in events if one["event"] == "layers")
    seconds = max(one["time"] for one in events if one["event"] == "shard") - loaded
    stored = [path for path in (folder / "store").rglob("*.safetensors") if ".targets." not in path.name]
    plain = [path for path in stored if ".factors." not in path.name]
    tokens = events[-1]["tokens"]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak_bytes,
        "bytes_per_example": sum(path.stat().st_size for path in plain) / num_rows,
    }


def run_bergson(folder: Path, model: Path, num_rows: int, options: argparse.Namespace) -> dict[str, float]:
    """`bergson build` over the same token ids and labels."""
    tokens = list(encoded(str(model), folder / "rows.jsonl"))
    labels = [[one if loss else -100 for one, loss in zip(each.ids, each.supervised, strict=True)] for each in tokens]
    lengths = [len(each.ids) for each in tokens]
    columns = zip((each.ids for each in tokens), labels, lengths, strict=True)
    write_jsonl(
        folder / "tokens.jsonl", [dict(zip(("input_ids", "labels", "length"), one, strict=True)) for one in columns]
    )
    command = [str(options.bergson), "-c", BERGSON, "build", str(folder / "index"), "--model", str(model)]
    command += ["--dataset", str(folder / "tokens.jsonl"), "--projection_dim", "16"]
    command += ["--precision", {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]]
    command += ["--token_batch_size", str(options.bergson_tokens)]
    lines, peak_bytes = child(command)
    said = json.loads(next(line for line in lines if line.startswith('{"seconds"')))
    stored = [path for path in (folder / "index").rglob("*") if path.is_file() and "gradients" in path.name]
    return {
        **said,
        "tokens_per_second": said["tokens"] / said["seconds"],
        "peak_bytes": peak_bytes,
        "bytes_per_example": sum(path.stat().st_size for path in stored) / num_rows,
    }


def child(command: list[str], environment: dict[str, str] | None = None) -> tuple[list[str], int]:
    """Lines of its standard output, and its peak of resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        errors.seek(0)
        if status:
            sys.exit(f"{' '.join(command[:4])} failed:\n{output.read()}{errors.read()[-4000:]}")
        return output.read().splitlines(), usage.ru_maxrss * 1024


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def encoded(model: str, path: Path) -> Iterator[Any]:
    from prism_job.data import examples
    from prism_job.extract import tokenise
    from prism_job.extract.model import load_tokenizer
    from prism_job.spec.model import ModelSpec

    tokenizer = load_tokenizer(ModelSpec(uri=model, dtype="float32"))
    for line in path.open(encoding="utf-8"):
        yield tokenise.encode_candidate(examples.candidate_content(json.loads(line)), tokenizer, 2048)


# In a process of its own: what is not PRISM's.


def measure(method: str, model_uri: str, dtype: Dtype, path: Path, tokens_per_batch: int) -> dict[str, float]:
    """Seconds of one pass over all rows, after one over the shortest row."""
    import torch

    from prism_job.extract import tokenise
    from prism_job.extract.model import load_model
    from prism_job.spec.model import ModelSpec

    cpu = torch.device("cpu")
    model = load_model(ModelSpec(uri=model_uri, dtype=dtype), cpu).requires_grad_(method != "forward")
    rows = list(encoded(model_uri, path))
    lengths = [len(each.ids) for each in rows]
    cuts = (
        [[place] for place in range(len(rows))]
        if method == "less"
        else tokenise.micro_batches(lengths, tokens_per_batch)
    )
    batches = [tokenise.collate([rows[place] for place in places], cpu) for places in cuts]
    step: Callable[[Any], None] = less(model) if method == "less" else lambda batch: loss_of(model, batch)
    if method.startswith("train"):
        step = lambda batch: loss_of(model, batch).backward()  # noqa: E731
    with torch.set_grad_enabled(method != "forward"):
        step(tokenise.collate([min(rows, key=lambda each: len(each.ids))], cpu))
        started = time.monotonic()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            step(batch)
    seconds = time.monotonic() - started
    found = {"tokens": sum(lengths), "seconds": seconds, "tokens_per_second": sum(lengths) / seconds}
    return found | ({"bytes_per_example": LESS_DIMS * 2} if method == "less" else {})


def loss_of(model: Any, batch: Any) -> Any:
    """As a trainer calls the model: mask and labels, the logits of all positions."""
    labels_BT = batch.ids_BT.masked_fill(~batch.supervised_BT, -100)
    mask_BT = batch.real_BT.long()
    return model(input_ids=batch.ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False).loss


def less(model: Any) -> Callable[[Any], None]:
    """Gradients of all weights of the layers, then one projection of them all: each weight's random sign, sums to 8,192."""
    import torch

    from prism_job.extract.capture.layers import captured_layers

    weights = [module.weight for module in captured_layers(model, ("*",)).modules.values()]
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(2, (weight.numel(),), generator=generator, dtype=torch.int8) * 2 - 1 for weight in weights]

    def step(batch: Any) -> None:
        folded = torch.zeros(LESS_DIMS)
        for gradient, sign in zip(torch.autograd.grad(loss_of(model, batch), weights), signs, strict=True):
            signed = gradient.flatten() * sign
            folded += torch.nn.functional.pad(signed, (0, -len(signed) % LESS_DIMS)).view(-1, LESS_DIMS).sum(0)
        folded.half()

    return step


if __name__ == "__main__":
    main()
