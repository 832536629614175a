"""Extraction beside what users would run instead, and beside the arithmetic it needs in any case.

The same rows of GSM8K, each method in a process of its own, one after the other in every round; medians over rounds. What is
the same and what differs: docs/performance.md. bergson runs in the Python of a virtual environment that has it (`--bergson
PYTHON`); without one it is left out.

    python -m benchmarks.extraction --data FOLDER/gsm8k_train.jsonl --bergson VENV/bin/python --json extraction.json

With `--sizes`, `tokensPerBatch: auto` beside these sizes in place of the methods: the same passes in one process, in turns.

    python -m benchmarks.extraction --data FOLDER/gsm8k_train.jsonl --rows 32 --rounds 2 --dtype bfloat16 \
        --sizes 512 1024 2048 4096 --json sizes.json
"""

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

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job

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
"""A training step frees and allocates weight gradients with every batch, and page faults are slow on virtual machines."""

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
    parser = job.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--rows", type=int, default=256, help="%(default)s")
    parser.add_argument("--less-rows", type=int, default=4, help="of a round, for LESS's recipe (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--tokens-per-batch", type=int, default=512, help="%(default)s")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of all (%(default)s)")
    parser.add_argument("--bergson", type=Path, help="a Python that has bergson")
    parser.add_argument("--bergson-tokens", type=int, default=512, help="its own token_batch_size (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens per batch to compare with auto")
    parser.add_argument("--model", default=job.MODEL, help="%(default)s")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)  # in a child process
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.model, options.dtype, options.data, options.tokens_per_batch)))
        return
    if options.sizes:
        job.write_json(options.json, {"rows": options.rows, "dtype": options.dtype} | compare_sizes(options))
        return
    rows = [json.loads(line) for line in options.data.open(encoding="utf-8")][: options.rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own, as everything that holds weights: a child's peak of memory starts at its parent's.
        child([sys.executable, "-c", AS_FOLDER, options.model, str(model := folder / "model")])
        methods = [method for method in METHODS if method != "bergson" or options.bergson]
        measured: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for number in range(options.rounds):
            for method in methods:
                part = rows[number :: options.rounds] if method in ("less", "train_kept") else rows
                part = part[: options.less_rows] if method == "less" else part
                measured[method].append(run(method, folder / f"{method}-{number}", part, model, options))
                print(f"round {number}, {method}: {measured[method][-1]}", file=sys.stderr, flush=True)
    figures = as_figures(measured)
    print_table(figures)
    job.write_json(options.json, {"rows": len(rows), "rounds": options.rounds, "dtype": options.dtype} | figures)


def as_figures(measured: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds, of the figures and of PRISM's ratio to each."""
    figures = {}
    for method, rounds in measured.items():
        for name in rounds[0]:
            figures[f"{name}[{method}]"] = statistics.median(each[name] for each in rounds)
    for method, rounds in measured.items():
        for name in ("tokens_per_second", "peak_bytes"):
            ratios = [prism[name] / other[name] for prism, other in zip(measured["prism"], rounds, strict=True)]
            figures[f"{name}_over[{method}]"] = statistics.median(ratios)
            figures[f"{name}_over_least[{method}]"], figures[f"{name}_over_most[{method}]"] = min(ratios), max(ratios)
    return figures


def print_table(figures: dict[str, float]) -> None:
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


def run(method: str, folder: Path, rows: list[Any], model: Path, options: argparse.Namespace) -> dict[str, float]:
    folder.mkdir()
    job.write_jsonl(folder / "pool.jsonl", rows)
    if method in ("prism", "bergson"):
        timed, peak_bytes, stored = (run_prism if method == "prism" else run_bergson)(folder, model, options)
        timed["tokens_per_second"] = timed["tokens"] / timed["seconds"]
        bytes_per_example = sum(path.stat().st_size for path in stored) / len(rows)
        return {**timed, "peak_bytes": peak_bytes, "bytes_per_example": bytes_per_example}
    again = [sys.executable, "-m", "benchmarks.extraction", "--method", method, "--data", str(folder / "pool.jsonl")]
    again += ["--model", str(model), "--dtype", options.dtype, f"--tokens-per-batch={options.tokens_per_batch}"]
    lines, peak_bytes = child(again, KEPT if method == "train_kept" else {})
    return {**json.loads(lines[-1]), "peak_bytes": peak_bytes}


Ran = tuple[dict[str, float], int, list[Path]]
"""Tokens and seconds, peak of memory in bytes, files that hold the rows."""


def run_prism(folder: Path, model: Path, options: argparse.Namespace) -> Ran:
    """`plan`, then `extract` as users run it, timed from the loaded model to the last put."""
    job.write_jsonl(folder / "targets.jsonl", [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}])
    settings = {"uri": str(model), "dtype": options.dtype}
    spec = job.selection(folder, model=settings, extraction={"tokensPerBatch": options.tokens_per_batch})
    document = job.write_document(folder / "selection.yaml", "extraction", spec)
    child(job.command("plan", document))
    lines, peak_bytes = child(job.command("extract", document))
    events = [json.loads(line) for line in lines if line.startswith("{")]
    loaded = next(event["time"] for event in events if event["event"] == "layers")
    seconds = max(event["time"] for event in events if event["event"] == "shard") - loaded
    stored = (folder / "store").rglob("*.safetensors")
    rows = [path for path in stored if ".targets." not in path.name and ".factors." not in path.name]
    return {"tokens": events[-1]["tokens"], "seconds": seconds}, peak_bytes, rows


def run_bergson(folder: Path, model: Path, options: argparse.Namespace) -> Ran:
    """`bergson build` over the same token ids and labels."""
    rows = []
    for each in encoded(str(model), folder / "pool.jsonl"):
        labels = [token if loss else -100 for token, loss in zip(each.ids, each.supervised, strict=True)]
        rows.append({"input_ids": each.ids, "labels": labels, "length": len(each.ids)})
    job.write_jsonl(folder / "tokens.jsonl", rows)
    build = [str(options.bergson), "-c", BERGSON, "build", str(folder / "index"), "--model", str(model)]
    build += ["--dataset", str(folder / "tokens.jsonl"), "--projection_dim", "16"]
    build += ["--precision", {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]]
    build += ["--token_batch_size", str(options.bergson_tokens)]
    lines, peak_bytes = child(build)
    timed = json.loads(next(line for line in lines if line.startswith('{"seconds"')))
    stored = [path for path in (folder / "index").rglob("*") if path.is_file() and "gradients" in path.name]
    return timed, peak_bytes, stored


def child(arguments: list[str], environment: dict[str, str] | None = None) -> tuple[list[str], int]:
    """Lines of its standard output, and its peak of resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
        process = subprocess.Popen(arguments, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        errors.seek(0)
        if status:
            sys.exit(f"{' '.join(arguments[:4])} failed:\n{output.read()}{errors.read()[-4000:]}")
        return output.read().splitlines(), usage.ru_maxrss * 1024


def encoded(model: str, path: Path) -> Iterator[Any]:
    from prism_job.data import examples
    from prism_job.extract import tokenise
    from prism_job.extract.load.model import load_tokenizer
    from prism_job.spec.model import ModelSpec

    tokenizer = load_tokenizer(ModelSpec(uri=model, dtype="float32"))
    for line in path.open(encoding="utf-8"):
        yield tokenise.encode_candidate(examples.candidate_content(json.loads(line)), tokenizer, 2048)


def measure(method: str, model_uri: str, dtype: Dtype, path: Path, tokens_per_batch: int) -> dict[str, float]:
    """What is not PRISM's: seconds of one pass over all rows, after one over the shortest row."""
    import torch

    from prism_job.extract import tokenise
    from prism_job.extract.load.model import load_model
    from prism_job.spec.model import ModelSpec

    cpu = torch.device("cpu")
    model = load_model(ModelSpec(uri=model_uri, dtype=dtype), cpu).requires_grad_(method != "forward")
    rows = list(encoded(model_uri, path))
    lengths = [len(each.ids) for each in rows]
    cuts = tokenise.micro_batches(lengths, 1 if method == "less" else tokens_per_batch)
    batches = [tokenise.collate([rows[position] for position in positions], cpu) for positions in cuts]
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
    figures = {"tokens": sum(lengths), "seconds": seconds, "tokens_per_second": sum(lengths) / seconds}
    return figures | ({"bytes_per_example": LESS_DIMS * 2} if method == "less" else {})


def compare_sizes(options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of all passes over the rows at each size, medians over rounds; and what `auto` takes, and its price."""
    import itertools

    import torch

    from prism_job.extract import tokenise
    from prism_job.extract.batch_size import BatchSize
    from prism_job.extract.capture.gradients import GradientCapture
    from prism_job.extract.capture.layers import captured_layers
    from prism_job.extract.capture.row_format import RowFormat
    from prism_job.extract.distributed.world import World
    from prism_job.extract.load.model import load_model
    from prism_job.spec.document import parse_spec
    from prism_job.spec.model import ModelSpec

    cpu = torch.device("cpu")
    model = load_model(ModelSpec(uri=options.model, dtype=options.dtype), cpu)
    capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(64, 0, 65_536)])
    rows = list(itertools.islice(encoded(options.model, options.data), options.rows))
    lengths = [len(each.ids) for each in rows]

    def passes(texts: Any) -> float:
        started = time.monotonic()
        capture.gradients_of(tokenise.collate(texts, cpu), mean=False, factors=capture.new_factors())
        return time.monotonic() - started

    with tempfile.TemporaryDirectory() as folder:
        document = job.write_document(Path(folder) / "selection.yaml", "sizes", job.selection(Path(folder)))
        run = parse_spec(document.read_text(), str(document))
    world = World(0, 1, 0, 1, 0, sharded=False, device=cpu)
    measured: dict[str, list[float]] = {}
    for number in range(options.rounds):
        cpu_before, before = time.process_time(), time.monotonic()
        auto = BatchSize(run, "", world)
        auto.choose(lambda: rows, lambda texts: min(passes(texts), passes(texts)))
        taken = auto.current
        probe = {"auto_tokens": taken, "auto_seconds": time.monotonic() - before}
        figures = {**probe, "auto_cpu_seconds": time.process_time() - cpu_before}
        for size in options.sizes if number % 2 == 0 else options.sizes[::-1]:
            started = time.process_time()
            for positions in tokenise.micro_batches(lengths, size):
                passes([rows[position] for position in positions])
            figures[f"cpu_seconds[{size}]"] = time.process_time() - started
        least = min(figures[f"cpu_seconds[{size}]"] for size in options.sizes)
        figures["auto_over_best"] = figures[f"cpu_seconds[{taken}]"] / least
        for name, value in figures.items():
            measured.setdefault(name, []).append(value)
        print(f"round {number}: {figures}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in measured.items()} | {"tokens": sum(lengths)}


def loss_of(model: Any, batch: Any) -> Any:
    """As a trainer calls the model: mask and labels, the logits of all positions."""
    labels_BT = batch.ids_BT.masked_fill(~batch.supervised_BT, -100)
    mask_BT = batch.real_BT.long()
    return model(input_ids=batch.ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False).loss


def less(model: Any) -> Callable[[Any], None]:
    """Gradients of all weights of the layers, then one projection of them all: each weight's random sign, sums to 8,192."""
    import torch

    from prism_job.extract.capture.layers import captured_layers

    weights = [weight.parameter for weight in captured_layers(model, ("*",)).weights.values()]
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
