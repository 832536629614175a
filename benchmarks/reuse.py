"""What reuse saves: a new target set, a second run and ten per cent more data, each as a share of a full run.

Every run is what `prism run` does: plan, extract (if anything is missing) and reduce as processes, one thread each. The full
run is also compared with what `prism estimate` predicted: tokens, bytes, and FLOPs as a share of this machine's own peak.

    python -m benchmarks.reuse --data FOLDER --examples 2000 --json reuse.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from benchmarks.fidelity import make_pairs
from benchmarks.quality import tuning
from prism_job.estimate.workload import measure
from prism_job.extract.load.model import load_tokenizer
from prism_job.spec.document import RunSpec, parse_spec

STAGES = ("plan", "extract", "reduce")


@dataclass(frozen=True)
class Ran:
    """One run. Seconds by stage, by the clock; `tokens` went through the model, `audit_seconds` are the audit's passes."""

    seconds: dict[str, float]
    tokens: int
    pass_seconds: float
    audit_seconds: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl and gsm8k_model_solutions.jsonl")
    parser.add_argument("--model", type=Path, default=Path(job.MODEL))
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--tokens-per-batch", type=int, default=512, help="a CPU gains nothing from more")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="%(default)s")
    parser.add_argument("--no-audit", action="store_true")
    parser.add_argument("--tokens-alone", action="store_true", help="count the tokens of each part and run nothing")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    more = max(1, chosen.examples // 10)
    pool = (chosen.data / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)[: chosen.examples + more]
    solutions = [json.loads(line) for line in (chosen.data / "gsm8k_model_solutions.jsonl").open()]
    pairs = make_pairs(solutions, 2 * chosen.pairs)
    if len(pool) < chosen.examples + more or len(pairs) < 2 * chosen.pairs:
        parser.error(f"the data hold {len(pool)} examples and {len(pairs)} pairs, fewer than asked for")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Users' models are folders; a GGUF file takes 10 s more to load.
        tokenizer, model = tuning.load(str(chosen.model))
        tuning.save(model, tokenizer, folder / "model")
        del model
        (folder / "pool.jsonl").write_text("".join(pool[: chosen.examples]))
        (folder / "more.jsonl").write_text("".join(pool[chosen.examples :]))
        for number in (0, 1):
            part = pairs[number * chosen.pairs : (number + 1) * chosen.pairs]
            job.write_jsonl(folder / f"targets-{number}.jsonl", part)
        first = document(folder, chosen, ["pool"], 0)
        if chosen.tokens_alone:
            count_tokens(parse_spec(first.read_text(), str(first)).spec)
            return
        predicted, peak = job.run_stage("estimate", first)[1], matrix_peak(getattr(torch, chosen.dtype))
        runs = {"full run": run(first)}
        found_bytes = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
        runs["nothing new"] = sorted((run(first) for _ in range(3)), key=lambda ran: ran.total)[1]
        runs["new target set"] = run(document(folder, chosen, ["pool"], 1))
        runs["ten per cent new data"] = run(document(folder, chosen, ["pool", "more"], 0))
    figures: dict[str, Any] = {"examples": chosen.examples, "pairs": chosen.pairs, "dtype": chosen.dtype}
    figures |= shares(runs, process_starts()) | predictions(predicted, runs["full run"], found_bytes, peak)
    job.write_json(chosen.json, figures)


def shares(runs: dict[str, Ran], starts: dict[str, float]) -> dict[str, float]:
    """Prints each run beside the full one; returns its figures. A run pays the start of those stages that it had."""
    full, figures = runs["full run"], {}
    columns = ("seconds", "% of full", "without starts", "% without audit", "tokens", "% of full")
    print(f"{'run':<24}" + "".join(f"{column:>17}" for column in columns))
    for name, ran in runs.items():
        started = sum(starts[one] for one in ran.seconds)
        row = {
            "seconds": ran.total,
            "share_of_time": ran.total / full.total,
            "share_of_time_without_starts": (ran.total - started) / full.total,
            "share_of_time_without_audit": (ran.total - ran.audit_seconds) / (full.total - full.audit_seconds),
            "tokens": ran.tokens,
            "share_of_tokens": ran.tokens / full.tokens,
        }
        cells = (f"{value:>17.2%}" if "share" in key else f"{value:>17,.1f}" for key, value in row.items())
        print(f"{name:<24}" + "".join(cells))
        row |= {f"{one}_seconds": value for one, value in ran.seconds.items()}
        row |= {"pass_seconds": ran.pass_seconds, "audit_seconds": ran.audit_seconds, "start_seconds": started}
        figures |= {f"{key}[{name.replace(' ', '_')}]": value for key, value in row.items()}
    print("process starts: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in starts.items()))
    return figures


def predictions(predicted: dict[str, Any], full: Ran, found_bytes: int, peak: float) -> dict[str, float]:
    """Prints what `prism estimate` predicted of the full run beside what was measured; returns the figures."""
    flops = predicted["flops"]["total"]
    reached = flops / full.pass_seconds
    print(f"tokens: {predicted['tokens']:,} predicted, {full.tokens:,} measured")
    print(f"bytes of store: {predicted['store_bytes']:,} predicted, {found_bytes:,} measured")
    print(
        f"FLOPs: {flops:.4g} predicted; {full.pass_seconds:.1f} s of passes: {reached / 1e9:.1f} GFLOP/s, "
        f"{reached / peak:.1%} of torch.mm's {peak / 1e9:.1f} in the same run"
    )
    return {
        "tokens_predicted": predicted["tokens"],
        "bytes_predicted": predicted["store_bytes"],
        "bytes_found": found_bytes,
        "flops_predicted": flops,
        "flops_a_second": reached,
        "matrix_peak": peak,
        "utilisation": reached / peak,
    }


def process_starts() -> dict[str, float]:
    """CPU seconds until a stage's process has imported what it needs, the median of 3."""
    found = {}
    for name in STAGES:
        seconds = []
        for _ in range(3):
            started = job.cpu_seconds()
            subprocess.run([sys.executable, "-c", f"import prism_job.__main__, prism_job.stages.{name}"], check=True)
            seconds.append(job.cpu_seconds() - started)
        found[name] = statistics.median(seconds)
    return found


def count_tokens(spec: RunSpec) -> None:
    """What a new target set is of a full run by tokens, without and with padding; `prism estimate`'s own count."""
    work = measure(spec, load_tokenizer(spec.model))
    print(f"{'tokens':<8}{'candidates':>12}{'pairs':>12}{'audit sample':>14}{'a new target set':>18}")
    for name in ("tokens", "padded"):
        pool, pairs, audit = (getattr(load, name) for load in (work.pool, work.pairs, work.audit))
        print(f"{name:<8}{pool:>12,}{pairs:>12,}{audit:>14,}{pairs / (pool + pairs + audit):>18.2%}")


def document(folder: Path, chosen: argparse.Namespace, files: list[str], targets: int) -> Path:
    spec = job.selection(
        folder,
        model={"uri": str(folder / "model"), "dtype": chosen.dtype},
        candidates={"uris": [str(folder / f"{name}.jsonl") for name in files]},
        targets={"uris": [str(folder / f"targets-{targets}.jsonl")]},
        extraction={"tokensPerBatch": chosen.tokens_per_batch},
        audit={"examples": 0} if chosen.no_audit else {},
        selection={"keep": "highest", "budget": {"fraction": 0.1}},
    )
    return job.write_document(folder / f"{'-'.join(files)}-{targets}.yaml", "reuse", spec)


def run(spec: Path) -> Ran:
    """Plan, extract what is missing, reduce."""
    seconds, messages = {}, {}
    for name in STAGES:
        if name == "extract" and not messages["plan"]["missing"]:
            continue
        before = job.cpu_seconds()
        _, messages[name] = job.run_stage(name, spec)
        seconds[name] = job.cpu_seconds() - before
        print(f"{spec.stem} {name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    extracted = messages.get("extract", {"tokens": 0, "seconds": 0.0, "auditSeconds": 0.0})
    return Ran(seconds, extracted["tokens"], extracted["seconds"], extracted["auditSeconds"])


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of torch.mm on one thread: the median of 9 products of 2,048 × 2,048."""
    torch.set_num_threads(1)
    one, other = torch.randn(2, 2048, 2048).to(dtype)
    seconds = []
    for _ in range(9):
        started = time.monotonic()
        torch.mm(one, other)
        seconds.append(time.monotonic() - started)
    return 2 * 2048**3 / statistics.median(seconds)


if __name__ == "__main__":
    main()
