"""What `dedupe: near` costs the selection of a large pool: seconds and peak memory of `select`, and how many copies it finds.

The rows are synthetic: 4,096 signs each, the part of a stored row that is compared, written as the reduce stage writes them
while it scores (a whole store of 1,000,000 rows would be 9 GB, and reading it is what `benchmarks/reduce.py` measures). Two
unrelated rows agree in `--unrelated` of their signs, as those of one task do. A tenth of the rows are copies of another row,
each with up to half of the differences that the threshold allows. Each size runs in a process of its own.

    python -m benchmarks.near --rows 100000 1000000 --fraction 0.05 1 --json near.json
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from prism_job.score import malloc
from prism_job.score.column import Column
from prism_job.score.selection import select
from prism_job.score.walk import SIGN_BYTES, compiled_walk
from prism_job.spec.ranking import NEAR_AGREEMENT, SelectionSpec

COPIES = 0.1
PART = 2**14


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.05, 1.0], help="share of the pool that is kept")
    parser.add_argument("--unrelated", type=float, default=0.6, help="agreement of unrelated rows (%(default)s)")
    parser.add_argument("--dedupe", choices=("near", "exact"), help="of one run in this process; it prints its figures")
    options = parser.parse_args()
    if options.dedupe:
        print(*measure(options.rows[0], options.fraction[0], options.unrelated, options.dedupe))
        return
    figures: dict[str, float] = {}
    for num_rows in options.rows:
        for fraction in options.fraction:
            for dedupe in ("exact", "near"):
                shape = [
                    "--rows",
                    num_rows,
                    "--fraction",
                    fraction,
                    "--unrelated",
                    options.unrelated,
                    "--dedupe",
                    dedupe,
                ]
                command = [sys.executable, "-m", "benchmarks.near", *map(str, shape)]
                done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                names = ("seconds", "peak_rss_bytes", "copies_kept", "left_out", "wrongly_left_out")
                found = dict(zip(names, map(float, done), strict=True))
                shown = ", ".join(f"{name} {value:,.2f}" for name, value in found.items())
                print(f"{num_rows:,} rows, {fraction:g} kept, {dedupe}: {shown}", flush=True)
                figures |= {f"{name}[{num_rows},{fraction:g},{dedupe}]": value for name, value in found.items()}
    job.write_json(options.json, figures)


def measure(num_rows: int, fraction: float, unrelated: float, dedupe: str) -> tuple[float, int, int, int, int]:
    """Seconds of CPU of `select`, peak memory of the process, copies of a kept row that it keeps, rows that it leaves out as
    near-duplicates, and those of them that are no copies."""
    random = np.random.default_rng(0)
    signs, ids, tokens = Column(f"V{SIGN_BYTES}"), Column("V16"), Column("i4")
    origin = np.arange(num_rows)
    is_copy = random.random(num_rows) < COPIES
    for start in range(0, num_rows, PART):
        stop = min(start + PART, num_rows)
        copy = np.flatnonzero(is_copy[start:stop])
        origin[start + copy] = random.integers(0, num_rows, len(copy))
    origin = np.where(is_copy[origin], np.arange(num_rows), origin)  # a copy of a copy would differ twice as much
    for start in range(0, num_rows, PART):
        rows = np.arange(start, min(start + PART, num_rows))
        if dedupe == "near":
            signs.append(signs_of(rows, origin[rows], unrelated, random))
        ids.append(random.integers(0, 256, (len(rows), 16), np.uint8).view("V16")[:, 0])
        tokens.append(np.ones(len(rows), np.int32))
    scores_N = np.random.default_rng(1).random(num_rows)
    document = {"keep": "highest", "budget": {"fraction": fraction}, "dedupe": dedupe}
    malloc.return_freed_memory()
    compiled_walk()  # 2 s, or taken from numba's cache
    started = time.process_time()
    spec = SelectionSpec.model_validate(document)
    chosen = select(scores_N, ids, tokens, np.ones(num_rows, np.bool_), spec, None, signs if dedupe == "near" else None)
    seconds = time.process_time() - started
    kept = origin[chosen.order]
    left_out, wrongly = 0, 0
    if chosen.near:
        left_out, wrongly = len(chosen.near[0]), int((origin[chosen.near[0]] != origin[chosen.near[1]]).sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, peak, len(kept) - len(np.unique(kept)), left_out, wrongly


def signs_of(rows: np.ndarray, origin: np.ndarray, unrelated: float, random: np.random.Generator) -> np.ndarray:
    bits = rows_of(origin, unrelated)
    for place in np.flatnonzero(origin != rows).tolist():
        flips = random.integers(0, 8 * SIGN_BYTES, random.integers(0, int((1 - NEAR_AGREEMENT) * 4 * SIGN_BYTES)))
        np.bitwise_xor.at(bits[place], flips // 8, np.uint8(1) << (flips % 8).astype(np.uint8))
    return bits.view(f"V{SIGN_BYTES}")[:, 0]


def rows_of(numbers: np.ndarray, unrelated: float) -> np.ndarray:
    """The signs of these rows, each from its own number: a bit is set with such a chance that two rows agree in `unrelated`."""
    # q² + (1 − q)² = unrelated, in steps of 1/256.
    chance = round(256 * (1 + (2 * unrelated - 1) ** 0.5) / 2)
    out = np.empty((len(numbers), SIGN_BYTES), np.uint8)
    for place, number in enumerate(numbers.tolist()):
        draws = np.random.Generator(np.random.SFC64(number)).bytes(8 * SIGN_BYTES)
        out[place] = np.packbits(np.frombuffer(draws, np.uint8) < chance)
    return out


if __name__ == "__main__":
    main()
