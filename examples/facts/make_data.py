"""The demo's data: short statements, half of them wrong, and pairs that prefer the right answer. Standard library only.

    python examples/facts/make_data.py --out build/facts

writes `candidates.jsonl` (120 capitals and 120 two-digit sums as one-turn conversations, half of each kind wrong; column
`label` is 1 where the answer is right, 0 where it is wrong) and `targets.jsonl` (30 pairs of each kind, on other countries
and other sums). Dropping the lowest half should drop the wrong ones; only the
evaluation reads `label`. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from capitals import CAPITALS

NUM_RIGHT = NUM_WRONG = 60
NUM_PAIRS = 30
"""Candidates with a right answer, candidates with a wrong one, and target pairs: of each kind."""

OPERANDS = range(10, 50)
"""So that answers have two digits as well: past a hundred a model of 135M parameters can hardly add."""

MISSES = (-10, -2, -1, 1, 2, 10)
"""Slips a person makes: a step or two off, or a lost carry. As many up as down, so that size does not reveal the label."""


@dataclass(frozen=True)
class Fact:
    """A question with its right answer and a plausible wrong one."""

    kind: str
    question: str
    right: str
    wrong: str


def make_data(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the candidates and of the targets."""
    chance = random.Random(seed)
    num_facts = NUM_RIGHT + NUM_WRONG + NUM_PAIRS
    countries = chance.sample(list(CAPITALS), num_facts)
    # a + b and b + a are one sum: drawn once, then put in either order.
    drawn = chance.sample(list(combinations_with_replacement(OPERANDS, 2)), num_facts)
    sums = [(a, b) if chance.random() < 0.5 else (b, a) for a, b in drawn]

    def facts(start: int, count: int) -> list[Fact]:
        part = slice(start, start + count)
        return [*capital_facts(countries[part]), *sum_facts(chance, sums[part])]

    candidates = [candidate(fact, label=1) for fact in facts(0, NUM_RIGHT)]
    candidates += [candidate(fact, label=0) for fact in facts(NUM_RIGHT, NUM_WRONG)]
    targets = [target(fact) for fact in facts(NUM_RIGHT + NUM_WRONG, NUM_PAIRS)]
    chance.shuffle(candidates)
    chance.shuffle(targets)
    return candidates, targets


def capital_facts(countries: list[str]) -> list[Fact]:
    """With the next country's capital as the wrong answer.

    So a group with its wrong answers names every city once, as does one with the right answers: the frequency of a city does
    not reveal the label, and no city of the candidates is in the targets.
    """
    others = [*countries[1:], *countries[:1]]
    stated = "The capital of {} is {}."
    return [
        Fact(
            "capital",
            f"What is the capital of {country}?",
            stated.format(country, CAPITALS[country]),
            stated.format(country, CAPITALS[other]),
        )
        for country, other in zip(countries, others, strict=True)
    ]


def sum_facts(chance: random.Random, sums: list[tuple[int, int]]) -> list[Fact]:
    """Each with a near miss as the wrong answer."""
    return [
        Fact("sum", f"What is {a} + {b}?", f"{a} + {b} = {a + b}.", f"{a} + {b} = {a + b + chance.choice(MISSES)}.")
        for a, b in sums
    ]


def candidate(fact: Fact, label: int) -> dict[str, Any]:
    """A row with a right (label 1) or wrong (label 0) answer."""
    answer = fact.right if label else fact.wrong
    return {"messages": [*_turn("user", fact.question), *_turn("assistant", answer)], "kind": fact.kind, "label": label}


def target(fact: Fact) -> dict[str, Any]:
    """A pair that prefers the right answer to the wrong one."""
    return {
        "prompt": _turn("user", fact.question),
        "chosen": _turn("assistant", fact.right),
        "rejected": _turn("assistant", fact.wrong),
        "kind": fact.kind,
    }


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, UTF-8, the same bytes on every system."""
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write the facts demo's candidates.jsonl and targets.jsonl.")
    parser.add_argument("--out", type=Path, default=Path("build/facts"), help="folder to write to (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the facts and of the wrong answers (%(default)s)")
    options = parser.parse_args()
    candidates, targets = make_data(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "candidates.jsonl", candidates)
    write_rows(options.out / "targets.jsonl", targets)
    print(f"{len(candidates)} candidates and {len(targets)} target pairs in {options.out}")


if __name__ == "__main__":
    main()
