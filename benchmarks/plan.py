"""CPU seconds of the plan stage, compared with json.loads on each line of the same file.

The pool is a jsonl file of prompts and completions: the rows of GSM8K repeated, each with a number so that no two are the
same. `python -m prism_job plan` runs as a process on local folders with an empty store and without audit; the time of a plan
of one row (Python's imports) is subtracted. Medians of `--repeats` rounds on one core.

    python -m benchmarks.plan --data gsm8k_train.jsonl --rows 10000 100000 --json plan.json
"""

import json
import os
import shutil
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="gsm8k_train.jsonl: prompt and completion in each line"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    figures: dict[str, float] = {}
    for num_rows in chosen.rows:
        with tempfile.TemporaryDirectory(prefix="prism-plan-") as folder:
            rounds = list(measure(Path(folder), chosen.data, num_rows, chosen.repeats))
        for name in rounds[0]:
            figures[f"{name}[{num_rows}]"] = median(each[name] for each in rounds)
            print(f"{num_rows:,} rows: {name} {figures[f'{name}[{num_rows}]']:,.4g}", flush=True)
    job.write_json(chosen.json, figures)


def measure(folder: Path, data: Path, num_rows: int, repeats: int) -> list[dict[str, float]]:
    lines = data.read_bytes().splitlines()
    for name, count in (("pool", num_rows), ("one", 1)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number, row in enumerate(map(json.loads, islice(cycle(lines), count))):
                row = {"prompt": row["prompt"], "completion": f"{row['completion']} ({number})"}
                file.write(json.dumps(row) + "\n")
    rounds = []
    for _ in range(repeats):
        started = time.process_time()
        with (folder / "pool.jsonl").open("rb") as file:
            for line in file:
                json.loads(line)
        parse_seconds = time.process_time() - started
        start_seconds = plan_seconds_of(folder, "one")
        plan_seconds = plan_seconds_of(folder, "pool") - start_seconds
        rounds.append(
            {
                "parse_seconds": parse_seconds,
                "start_seconds": start_seconds,
                "plan_seconds": plan_seconds,
                "plan_microseconds_a_row": plan_seconds / num_rows * 1e6,
                "plan_over_parse": plan_seconds / parse_seconds,
            }
        )
    return rounds


def plan_seconds_of(folder: Path, pool: str) -> float:
    """CPU seconds of the plan stage over an empty store."""
    for name in ("store", "output"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"0" * 64)
    job.write_jsonl(folder / "targets.jsonl", [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    spec = job.selection(folder, candidates={"uris": [str(folder / f"{pool}.jsonl")]})
    document, before = job.write_document(folder / "selection.yaml", "synthetic", spec), job.cpu_seconds()
    job.run_stage("plan", document)
    return job.cpu_seconds() - before


if __name__ == "__main__":
    main()
