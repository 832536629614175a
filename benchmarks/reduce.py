"""What the reduce stage costs over a large store: peak memory, seconds, and its rate beside reading the same shards.

The store is synthetic and written with the project's own `write_shard` and `Plan`: rows of 65,536 signs (8,192 bytes and
their scales), random scores, one row in a hundred a duplicate, some quarantined. Four things are compared in seconds of CPU,
each in a process of its own on one core (`--cores`): `cat` over the shards; the reducer's own reader, checks and all; its
scoring of a shard in memory; its pass over the candidates, which is both and keeps the scores. `python -m prism_job reduce`
then runs as a whole, without audit. Medians of `--repeats` rounds.

    python -m benchmarks.reduce --rows 10000 100000 1000000 --folder /somewhere/with/11/GB --json reduce.json
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from prism_job.plan.plan import Plan, Unit, digest_of, plan_key
from prism_job.plan.units import factor_units
from prism_job.spec.digest import digest
from prism_job.spec.document import parse_spec
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows

ROWS_PER_UNIT, DIMS, DIM = 1024, 65_536, 64
STORE_BYTES_A_ROW = 8_900
NUM_BLOCKS = 4
"""Random payloads that all units share; ids, lengths and losses are each unit's own."""
OPENED = """
import os, sys, time
import numpy as np
from prism_job.plan.plan import read_plan
from prism_job.score import malloc
from prism_job.score.candidates import score_candidates
from prism_job.score.scorers import scorer
from prism_job.spec.document import parse_spec
from prism_job.store import shards
from prism_job.storage.address import open_store
malloc.share_one_heap()
run = parse_spec(open(sys.argv[1]).read(), sys.argv[1])
plan, store = read_plan(run), open_store(run.spec.store)
ids, row_bytes = [unit.id for unit in plan.candidates], int(sys.argv[2]) // 8
direction_KD = np.random.default_rng(0).standard_normal((1, int(sys.argv[2])))
started = time.process_time()
"""
READ_ONLY = """
depth = shards.read_depth(max(unit.num_rows for unit in plan.candidates) * row_bytes)
for _ in shards.read_ahead(store, plan.extractor, ids, lambda shard: None, depth):
    pass
print(time.process_time() - started)
"""
SCORE_ONLY = """
arrays = shards.read_shard(store, plan.extractor, "candidates", ids[0]).arrays
score, seconds = scorer("sign", direction_KD[0]), []
while len(seconds) < 301:
    started = time.process_time()
    score(arrays)
    seconds.append(time.process_time() - started)
print(sorted(seconds)[len(seconds) // 2] / len(arrays["ids"]) * plan.num_examples)
"""
"""The scores of one shard that is in memory, again and again; the median, for as many rows."""
WHOLE_PASS = """
scorer("sign", direction_KD[0])
sys.stdout, shown = open(os.devnull, "w"), sys.stdout
started = time.process_time()
score_candidates(run.spec, plan, store, [], direction_KD)
print(time.process_time() - started, file=shown)
"""


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--layers", type=int, default=16, help="layers of the model; 16 is the least for 65,536 dims")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the stores are made, and deleted (default: TMPDIR)")
    arguments = parser.parse_args()
    figures: dict[str, float] = {"layers": arguments.layers, "pairs": arguments.pairs, "cores": arguments.cores}
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="prism-reduce-", dir=arguments.folder) as folder:
            if shutil.disk_usage(folder).free < 1.1 * STORE_BYTES_A_ROW * num_rows:
                sys.exit(f"{num_rows} rows need {STORE_BYTES_A_ROW * num_rows / 1e9:.1f} GB in {folder}; use --folder")
            shape = (num_rows, arguments.layers, arguments.pairs)
            measured = measure(Path(folder), *shape, arguments.cores, arguments.repeats)
        shown = ", ".join(f"{name} {value:,.3f}" for name, value in measured.items())
        print(f"{num_rows:,} rows: {shown}", flush=True)
        figures |= {f"{name}[{num_rows}]": value for name, value in measured.items()}
    first, last = (figures[f"peak_rss_bytes[{num_rows}]"] for num_rows in (arguments.rows[0], arguments.rows[-1]))
    figures["peak_last_over_first"] = last / first
    print(f"peak at {arguments.rows[-1]:,} rows over the peak at {arguments.rows[0]:,}: {last / first:.3f}")
    job.write_json(arguments.json, figures)


def measure(folder: Path, num_rows: int, num_layers: int, num_pairs: int, cores: int, repeats: int) -> dict[str, float]:
    spec_path, shard_paths = make_store(folder, num_rows, num_layers, num_pairs)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everywhere)[-cores:])
    cat(shard_paths)
    rounds = [measure_once(folder, spec_path, shard_paths) for _ in range(repeats)]
    os.sched_setaffinity(0, everywhere)
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


def measure_once(folder: Path, spec_path: Path, shard_paths: list[Path]) -> dict[str, float]:
    store_bytes = sum(path.stat().st_size for path in shard_paths)
    codes = {"read": READ_ONLY, "score": SCORE_ONLY, "pass": WHOLE_PASS}
    seconds = {"cat": cat(shard_paths), **{name: run_code(code, spec_path) for name, code in codes.items()}}
    for published in (folder / "output" / "synthetic").glob("*/"):
        shutil.rmtree(published)  # of the round before: a selection that is there is not made again
    stage_seconds, usage = reduce(spec_path, folder / "events.jsonl")
    return {
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "seconds": stage_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        **{f"{name}_bytes_per_second": store_bytes / each for name, each in seconds.items()},
        **{f"{name}_over_cat": seconds["cat"] / seconds[name] for name in codes},
        **{f"{name}_over_read": seconds["read"] / seconds[name] for name in ("score", "pass")},
    }


def run_code(code: str, spec_path: Path) -> float:
    command = [sys.executable, "-c", OPENED + code, str(spec_path), str(DIMS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cat(paths: list[Path]) -> float:
    """Seconds of CPU."""
    before = job.cpu_seconds()
    for start in range(0, len(paths), 500):
        subprocess.run(["cat", *map(str, paths[start : start + 500])], check=True, stdout=subprocess.DEVNULL)
    return job.cpu_seconds() - before


def reduce(spec_path: Path, log: Path) -> tuple[float, Any]:
    """Seconds of the whole stage, and what its process used."""
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(job.command("reduce", spec_path), stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        sys.exit(f"the reduce stage failed: {log.read_text().splitlines()[-1]}")
    return seconds, usage


def make_store(folder: Path, num_rows: int, num_layers: int, num_pairs: int) -> tuple[Path, list[Path]]:
    spec_path = job.write_document(folder / "selection.yaml", "synthetic", job.selection(folder))
    run = parse_spec(spec_path.read_text(), str(spec_path))
    store, random = open_store(run.spec.store), np.random.default_rng(0)
    extractor = digest("synthetic")
    candidates = list(write_candidates(store, extractor, num_rows, random))
    factors = factor_units(candidates)
    for unit_id in factors:
        arrays = {side: factor_sums(num_layers, random) for side in ("inputs", "outputs")}
        shards.write_shard(store, extractor, "factors", unit_id, arrays, {"num_tokens": 2 * DIM})
    plan = Plan(
        spec_digest=digest_of(run.spec),
        extractor=extractor,
        extractor_parts={"model": {}},
        sources=["pool/synthetic.jsonl"],
        ignored=[],
        candidates=candidates,
        target_sources=["targets.jsonl"],
        target_sets=[""],
        targets=write_targets(store, extractor, num_layers, num_pairs, random),
        factors=factors,
        **{key: [] for key in ("quarantine", "missing_candidates", "missing_targets", "missing_factors")},
    )
    open_store(run.spec.output).put(plan_key(run), plan.model_dump_json(indent=1).encode())
    return spec_path, [Path(store.uri(shards.shard_key(extractor, "candidates", unit.id))) for unit in candidates]


def write_candidates(store: Store, extractor: str, num_rows: int, random: np.random.Generator) -> Iterator[Unit]:
    blocks = [random.integers(0, 256, (ROWS_PER_UNIT, DIMS // 8), np.uint8) for _ in range(NUM_BLOCKS)]
    scales_NS = random.random((ROWS_PER_UNIT, DIMS // 256)).astype(np.float16)
    known: set[str] = set()
    for number, start in enumerate(range(0, num_rows, ROWS_PER_UNIT)):
        size = min(ROWS_PER_UNIT, num_rows - start)
        ids = random.integers(0, 256, (size, 16), np.uint8)
        ids[::100] = np.arange(16, dtype=np.uint8)  # one content in a hundred is always the same
        tokens = random.integers(1, 500, size).astype(np.int32)
        tokens[7::2000] = 0
        arrays = {
            "ids": ids,
            "nll": random.random(size) * 100,
            "tokens": tokens,
            "norm": random.random(size).astype(np.float32),
            "signs": blocks[number % NUM_BLOCKS][:size],
            "scales": scales_NS[:size],
            "unit": random.random(size).astype(np.float32),
        }
        unit_id = shards.unit_id_of(shards.hex_ids(ids))
        notes = {"quarantined": {str(place): "no response" for place in np.flatnonzero(tokens == 0).tolist()}}
        shards.write_shard(store, extractor, "candidates", unit_id, arrays, notes)
        rows = staged_rows.stage_rows(store, [{"text": f"Row {place} of a unit."} for place in range(size)], known)
        yield Unit(id=unit_id, rows=rows, num_rows=size, source=0, lines=[(start + 1, size)])


def factor_sums(num_layers: int, random: np.random.Generator) -> np.ndarray:
    sides_LTP = random.standard_normal((num_layers, 2 * DIM, DIM)).astype(np.float32)
    return (sides_LTP.transpose(0, 2, 1) @ sides_LTP)[:, *np.triu_indices(DIM)]


def write_targets(
    store: Store, extractor: str, num_layers: int, num_pairs: int, random: np.random.Generator
) -> list[Unit]:
    ids = random.integers(0, 256, (num_pairs, 16), np.uint8)
    arrays = {
        "ids": ids,
        "rows": random.standard_normal((num_pairs, num_layers * DIM**2)).astype(np.float32),
        **{f"{side}_nll": random.random(num_pairs) * 100 for side in ("chosen", "rejected")},
        **{f"{side}_tokens": np.full(num_pairs, 20, np.int32) for side in ("chosen", "rejected")},
    }
    unit_id = shards.unit_id_of(shards.hex_ids(ids))
    notes = {"layers": [f"layers.{number}" for number in range(num_layers)], "dim": DIM}
    shards.write_shard(store, extractor, "targets", unit_id, arrays, notes)
    pairs = [{"prompt": f"{number}?", "chosen": "yes", "rejected": "no"} for number in range(num_pairs)]
    rows = staged_rows.stage_rows(store, pairs, set())
    return [Unit(id=unit_id, rows=rows, num_rows=num_pairs, source=0, lines=[(1, num_pairs)])]


if __name__ == "__main__":
    main()
