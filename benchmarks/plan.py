"""What the plan stage costs beside reading and JSON-parsing the same file, in seconds of CPU.

The pool is a jsonl file of prompt and completion: the questions and answers of GSM8K again and again, each with a number
behind it so that no two rows are the same. `python -m prism_job plan` runs on it as a process of its own, from local
folders into an empty store, without audit; Python's imports alone (the same command over one row) are taken off. Beside it
another process reads the lines and calls json.loads on each. Medians of `--repeats` rounds, on one core.

    python benchmarks/plan.py --data gsm8k_train.jsonl --rows 10000 100000 --json plan.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import yaml

PARSE = """
import json, sys, time
started = time.process_time()
with open(sys.argv[1], "rb") as file:
    for line in file:
        json.loads(line)
print(time.process_time() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl: prompt and completion a line")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    figures: dict[str, float] = {}
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="prism-plan-") as folder:
            measured = measure(Path(folder), arguments.data, num_rows, arguments.repeats)
        print(
            f"{num_rows:,} rows: " + ", ".join(f"{name} {value:,.4g}" for name, value in measured.items()), flush=True
        )
        figures |= {f"{name}[{num_rows}]": value for name, value in measured.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def measure(folder: Path, data: Path, num_rows: int, repeats: int) -> dict[str, float]:
    lines = data.read_bytes().splitlines()
    write_pool(folder / "pool.jsonl", lines, num_rows)
    write_pool(folder / "one.jsonl", lines, 1)
    rounds = []
    for _ in range(repeats):
        parse_seconds = float(run(sys.executable, "-c", PARSE, str(folder / "pool.jsonl"))[0])
        start_seconds = plan(folder, "one")
        plan_seconds = plan(folder, "pool") - start_seconds
        rounds.append(
            {
                "parse_seconds": parse_seconds,
                "start_seconds": start_seconds,
                "plan_seconds": plan_seconds,
                "plan_microseconds_a_row": plan_seconds / num_rows * 1e6,
                "plan_over_parse": plan_seconds / parse_seconds,
            }
        )
    size = {"pool_bytes": (folder / "pool.jsonl").stat().st_size}
    return size | {name: median(each[name] for each in rounds) for name in rounds[0]}


def write_pool(path: Path, lines: list[bytes], num_rows: int) -> None:
    with path.open("w") as file:
        for number, line in enumerate(islice(cycle(lines), num_rows)):
            row = json.loads(line)
            file.write(json.dumps({"prompt": row["prompt"], "completion": f"{row['completion']} ({number})"}) + "\n")


def plan(folder: Path, pool: str) -> float:
    """Seconds of CPU of the stage, from nothing."""
    for name in ("store", "output"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"0" * 64)
    pair = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    (folder / "targets.jsonl").write_text(json.dumps(pair) + "\n")
    document = {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": "synthetic"},
        "spec": {
            "model": {"uri": str(folder / "model")},
            "candidates": {"uris": [str(folder / f"{pool}.jsonl")]},
            "targets": {"uris": [str(folder / "targets.jsonl")]},
            "store": str(folder / "store"),
            "output": str(folder / "output"),
            "selection": {"keep": "highest", "budget": {"fraction": 0.5}},
            "audit": {"examples": 0},
        },
    }
    (folder / "selection.yaml").write_text(yaml.safe_dump(document))
    return run(sys.executable, "-m", "prism_job", "plan", "--spec", str(folder / "selection.yaml"))[1]


def run(*command: str) -> tuple[str, float]:
    """What it prints, and its seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed: {ran.stdout[-500:]} {ran.stderr[-2000:]}")
    return ran.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
