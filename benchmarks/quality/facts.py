"""The facts task of examples/facts, as the experiments use it, and more pairs of its kinds where sixty are not enough."""

import random
import sys
from itertools import combinations_with_replacement
from pathlib import Path

from benchmarks.quality.harness import Rows

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "facts"))
from capitals import CAPITALS
from make_data import OPERANDS, Fact, capital_facts, make_data, sum_facts, target

__all__ = ["CAPITALS", "OPERANDS", "Fact", "make_data", "more_pairs"]


def more_pairs(seed: int, count: int) -> Rows:
    """So many pairs about countries and sums that `make_data(seed)` leaves out; all countries that are left, then sums."""
    candidates, targets = make_data(seed)
    asked = {row["messages"][0]["content"] for row in candidates} | {row["prompt"][0]["content"] for row in targets}
    chance = random.Random(f"more {seed}")
    countries = [one for one in CAPITALS if f"What is the capital of {one}?" not in asked]
    sums = [
        (a, b)
        for a, b in combinations_with_replacement(OPERANDS, 2)
        if not {f"What is {a} + {b}?", f"What is {b} + {a}?"} & asked
    ]
    facts = capital_facts(chance.sample(countries, len(countries)))
    facts += sum_facts(chance, chance.sample(sums, count - len(facts)))
    chance.shuffle(facts)
    return [target(fact) for fact in facts]
