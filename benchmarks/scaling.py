"""What ranks and groups cost beside one process: a table of medians.

Ranks of ZeRO-3 (gloo on CPU) and groups that share a store extract the same rows as stage 0 does alone, as users run them: one
thread a rank, all settings once a round. ZeRO-3 does not load GGUF files, so the model is converted to safetensors. Where ranks
outnumber cores they take turns, so tokens are given per CPU second as well. CPU seconds are those of a run less those of a run
over one short row a rank; tokens per second are those of the passes alone.

    python -m benchmarks.scaling --data FOLDER/gsm8k_train.jsonl --examples 32 --json scaling.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from benchmarks.quality import tuning

SETTINGS = {
    "one process": (0, 1, 1),
    "ZeRO-3, 1 rank": (3, 1, 1),
    "ZeRO-3, 2 ranks": (3, 2, 1),
    "ZeRO-3, 4 ranks": (3, 4, 1),
    "two groups": (0, 1, 2),
}
"""name -> (stage, ranks, groups)"""
SHORT_ROWS = [f'{{"prompt": "2 + {number} =", "completion": " {2 + number}"}}\n' for number in range(4)]
"""One a rank: a run over them is start and end, and passes of a few tokens."""


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prompt/completion rows")
    parser.add_argument("--model", type=Path, default=Path(job.MODEL))
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model.is_dir():
            (folder / "model").symlink_to(options.model.resolve())
        else:
            tokenizer, model = tuning.load(str(options.model))
            tuning.save(model, tokenizer, folder / "model")
        rows = options.data.read_text().splitlines(keepends=True)[: options.examples]
        figures = {"examples": options.examples, "cores": len(os.sched_getaffinity(0))}
        figures |= compare_settings(folder, rows, options.rounds)
    job.write_json(options.json, figures)


def compare_settings(folder: Path, rows: list[str], rounds: int) -> dict[str, float]:
    """Each setting's medians, printed and returned; ratios are medians of the ratios within a round."""
    starts = {}
    for name, (stage, ranks, groups) in SETTINGS.items():
        starts[name] = extract(folder, SHORT_ROWS[: ranks * groups], stage, ranks, groups)[2]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, setting in SETTINGS.items():
            tokens, seconds, cpu_seconds, wall_seconds = extract(folder, rows, *setting)
            found[name].append((tokens / seconds, tokens / max(1e-9, cpu_seconds - starts[name]), wall_seconds))
            print(f"{name}: {seconds:.1f} s of passes, {wall_seconds:.1f} s in all", file=sys.stderr, flush=True)
    figures: dict[str, float] = {}
    columns = ("tokens/s", "of one process", "tokens/CPU s", "of one process", "wall s", "start CPU s")
    print(f"{'':<20}" + "".join(f"{column:>16}" for column in columns))
    for name, results in found.items():
        medians = [statistics.median(values) for values in zip(*results, strict=True)]
        rounds_beside = list(zip(results, found["one process"], strict=True))
        ratios = [statistics.median(mine[part] / alone[part] for mine, alone in rounds_beside) for part in (0, 1)]
        row = {
            "tokens_a_second": medians[0],
            "ratio_of_tokens_a_second": ratios[0],
            "tokens_a_cpu_second": medians[1],
            "ratio_of_tokens_a_cpu_second": ratios[1],
            "wall_seconds": medians[2],
            "start_cpu_seconds": starts[name],
        }
        print(f"{name:<20}" + "".join(f"{value:>16.3g}" for value in row.values()))
        figures |= {f"{key}[{name}]": value for key, value in row.items()}
    return figures


def extract(folder: Path, rows: list[str], stage: int, ranks: int, groups: int) -> tuple[int, float, float, float]:
    """Tokens, seconds of the passes (mean of the ranks, longest of the groups), CPU seconds and seconds of the processes."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        document = plan(folder, Path(name), rows, stage)
        before, started = job.cpu_seconds(), time.monotonic()
        options = (f"--ranks={ranks}", f"--groups={groups}")
        running = [
            subprocess.Popen(
                job.command("extract", document, *options, f"--group={group}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for group in range(groups)
        ]
        outputs = [process.communicate()[0] for process in running]
        wall_seconds, cpu_seconds = time.monotonic() - started, job.cpu_seconds() - before
        if any(process.returncode for process in running):
            sys.exit("\n".join(outputs)[-3000:])
    messages = [json.loads(text.splitlines()[-1]) for text in outputs]
    pass_seconds = max(message["seconds"] for message in messages) / ranks
    return sum(message["tokens"] for message in messages), pass_seconds, cpu_seconds, wall_seconds


def plan(folder: Path, run_folder: Path, rows: list[str], stage: int) -> Path:
    """The document of an empty store, planned. Eight units, so that every rank has some."""
    (run_folder / "pool.jsonl").write_text("".join(rows))
    job.write_jsonl(run_folder / "targets.jsonl", [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    per_shard = max(1, len(rows) // 8)
    spec = job.selection(
        run_folder,
        model={"uri": str(folder / "model"), "dtype": "float32"},
        extraction={"tokensPerBatch": 1024, "examplesPerShard": per_shard, "deepspeed": {"stage": stage}},
    )
    document = job.write_document(run_folder / "selection.yaml", "scaling", spec)
    job.run_stage("plan", document)
    return document


if __name__ == "__main__":
    main()
