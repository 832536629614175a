"""The demo's data: sums, half of them ten too large, and pairs that prefer the right answer. Standard library only.

    python examples/sums/make_sums.py --out build/sums

writes `candidates.jsonl` (160 sums of two numbers of two digits; 80 answers are ten too large, so no word and no length marks
them; column `label` is 1 where the answer is right), `targets.jsonl` (30 pairs about other sums) and `held_out.jsonl` (60 other
sums with both answers, on which nothing is trained). The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

OPERANDS = range(10, 50)
EXCESS = 10
"""What wrong answers are too large by: a carry that should not be there."""
NUM_CANDIDATES, NUM_PAIRS, NUM_HELD_OUT = 160, 30, 60

Rows = list[dict[str, Any]]


def make_data(seed: int) -> tuple[Rows, Rows, Rows]:
    """Rows of the candidates, of the targets, and the sums that are held out."""
    rng = random.Random(seed)
    # a + b and b + a are one sum: drawn once, then put in either order.
    count = NUM_CANDIDATES + NUM_PAIRS + NUM_HELD_OUT
    drawn = rng.sample(list(combinations_with_replacement(OPERANDS, 2)), count)
    sums = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in drawn]
    labels = [1, 0] * (NUM_CANDIDATES // 2)
    rng.shuffle(labels)
    candidates = [
        {"prompt": _question(a, b), "completion": _answer(a + b if label else a + b + EXCESS), "label": label}
        for (a, b), label in zip(sums, labels, strict=False)
    ]
    pairs = [
        {"prompt": _question(a, b), "chosen": _answer(a + b), "rejected": _answer(a + b + EXCESS)}
        for a, b in sums[NUM_CANDIDATES:]
    ]
    return candidates, pairs[:NUM_PAIRS], pairs[NUM_PAIRS:]


def _question(a: int, b: int) -> str:
    return f"Question: What is {a} + {b}?\nAnswer:"


def _answer(total: int) -> str:
    return f" {total}."


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Write the demo's candidates, targets and held-out sums.")
    parser.add_argument("--out", type=Path, default=Path("build/sums"), help="folder to write to (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("candidates", "targets", "held_out"), make_data(options.seed), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_bytes(text.encode())


if __name__ == "__main__":
    main()
