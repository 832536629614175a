"""Forward selection: 5 % of a mixed pool that should teach one family of tasks, against random, LESS, uniform and all of it.

The pool is GSM8K train and BIG-Bench-Hard. A seed splits a family's rows: 64 become target pairs (the right answer against the
model's own answer, or with `--rejected other` against another answer of the same form), half of the rest stays in the pool,
of the other half 64 are held out. The model is tuned on what each method keeps, and asked about the held-out rows.

    python -m benchmarks.quality.forward --data FOLDER --seeds 3 --json build/quality/forward.json

Shapes: N rows of the pool.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import job
from benchmarks.quality import figure, harness, tuning
from benchmarks.quality.harness import Rows
from prism_job.extract import tokenise
from prism_job.spec.digest import digest
from prism_job.storage import model_files

FAMILIES = {
    "numbers": ("multistep_arithmetic_two", "object_counting"),
    "yes-no": ("navigate", "sports_understanding", "web_of_lies"),
}
OTHERS = ("boolean_expressions", "dyck_languages", "hyperbaton", "ruin_names", "snarks", "word_sorting")
NUM_GSM8K = 700
NUM_PAIRS, NUM_HELD = 64, 64
BUDGET = 0.05
CHAIN = 0.2
"""Share of the pool that `representation` leaves for PRISM in the chain."""
EPOCHS, RATE = 1, 1e-4

METHODS = {
    "none": "not tuned",
    "random": "random 5 %",
    "less": "LESS 5 % (cosine to the mean wanted response)",
    "uniform": "uniform 5 % (K-FAC)",
    "preference": "PRISM 5 % (preference, K-FAC)",
    "nearest": "representation 5 % (nearest wanted response)",
    "mean": "representation 5 % (mean over the wanted responses)",
    "chain": "representation (nearest) 20 %, PRISM 5 % of the pool among them",
    "all": "the whole pool",
}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "max40": ("PRISM, at most 40 % a task", {"perGroup": {"groupBy": "task", "max": 0.4}}),
    "max20": ("PRISM, at most 20 % a task", {"perGroup": {"groupBy": "task", "max": 0.2}}),
    "near": ("PRISM, dedupe: near", {"dedupe": "near"}),
}
"""With `--rules`: the ranking of `preference` under rules of `spec.selection`."""


def main() -> None:
    made = harness.parser(__doc__, seeds=3)
    made.add_argument("--all-seeds", type=int, default=1, help="seeds that also tune on the whole pool (%(default)s)")
    made.add_argument("--family", action="append", choices=list(FAMILIES), help="repeatable; all without it")
    made.add_argument("--rejected", choices=("own", "other"), default="own", help="the rejected answers (%(default)s)")
    made.add_argument(
        "--rules", action="store_true", help="also PRISM under shares of each task, and without near-duplicates"
    )
    made.add_argument("--rows-a-task", type=int, help="a smaller pool: only so many rows of each task; all without it")
    made.add_argument("--budget", type=float, default=BUDGET, help="share of the pool that is kept (%(default)s)")
    made.add_argument("--method", action="append", choices=list(METHODS), help="repeatable; all without it")
    options = made.parse_args()
    names = {method: name for method, name in METHODS.items() if method in (options.method or METHODS)}
    names |= {rule: name for rule, (name, _) in RULES.items()} if options.rules else {}
    pool = read_pool(options.data)
    figures: dict[str, Any] = {"seeds": options.seeds, "pool": len(pool), "all_seeds": options.all_seeds}
    drawn: dict[str, dict[str, harness.Interval]] = {}
    for family in options.family or FAMILIES:

        def family_of(seed: int, family: str = family) -> Family:
            size = Size(options.budget, options.rows_a_task)
            return Family(options.work, options.model, pool, family, seed, options.rejected, size)

        methods = [method for method in names if method != "all"]
        by_seed = []
        for seed in range(options.seeds):
            split = family_of(seed)
            by_seed.append({key: value for method in methods for key, value in split.tuned(method).items()})
        over = harness.over_seeds(by_seed)
        if options.all_seeds and "all" in names:
            over |= harness.over_seeds([family_of(seed).tuned("all") for seed in range(options.all_seeds)])
        print(f"\n{family}: {', '.join(FAMILIES[family])}\n")
        shown = {method: name for method, name in names.items() if f"loss[{method}]" in over}
        columns = ("loss", "wrong", "family")
        lines = [[name, *(over[f"{column}[{method}]"] for column in columns)] for method, name in shown.items()]
        print(harness.table(["tuned on", "held-out loss", "prefers the wrong answer", "rows of the family"], lines))
        figures |= {f"{family}/{name}": value for name, value in harness.flat(over).items()}
        drawn[family] = {name: over[f"loss[{method}]"] for method, name in shown.items()}
    job.write_json(options.json, figures)
    title = "Held-out loss of the family after tuning on the selection"
    figure.bars(options.figure, title, "nats a token", drawn)


def read_pool(folder: Path) -> Rows:
    """The shortest rows of GSM8K and all of the chosen tasks, as prompt and completion, with `task` named."""
    maths = [json.loads(line) for line in (folder / "gsm8k_train.jsonl").open(encoding="utf-8")]
    maths.sort(key=lambda row: (len(row["prompt"]) + len(row["completion"]), row["id"]))
    tasks = {*OTHERS, *(task for family in FAMILIES.values() for task in family)}
    asked = [json.loads(line) for line in (folder / "bbh.jsonl").open(encoding="utf-8")]
    rows = [{**one, "task": "gsm8k"} for one in maths[:NUM_GSM8K]] + [one for one in asked if one["task"] in tasks]
    return [{"prompt": row["prompt"] + "\n", **{key: row[key] for key in ("completion", "task")}} for row in rows]


@dataclass(frozen=True)
class Size:
    """What share of the pool is kept, and how many rows of each task are in it (None: all)."""

    budget: float = BUDGET
    rows_a_task: int | None = None


class Family:
    """One family of tasks under one seed: its split, the rankings, and what tuning on their tops does."""

    def __init__(
        self, work: Path, model: str, pool: Rows, family: str, seed: int, rejected: str, size: Size = Size()
    ) -> None:
        self.work, self.model, self.pool, self.family, self.seed = work, model, pool, family, seed
        self.rejected, self.size = rejected, size
        self.depends_on = [model_files.identify(model), digest(pool), harness.constants(__name__)]
        chance = random.Random(f"{family} {seed}")
        places = [place for place, one in enumerate(pool) if one["task"] in FAMILIES[family]]
        chance.shuffle(places)
        middle = NUM_PAIRS + (len(places) - NUM_PAIRS) // 2
        self.targets = [self._pair(place, chance) for place in places[:NUM_PAIRS]]
        self.held = [self._pair(place, chance) for place in places[middle:][:NUM_HELD]]
        outside = {*places[:NUM_PAIRS], *places[middle:]}
        self.in_pool_N = np.array([place not in outside for place in range(len(pool))])
        # The whole pool is extracted once for all families and seeds; a smaller one for each.
        self.extracted = np.arange(len(pool))
        if size.rows_a_task:
            rank_of: Counter[str] = Counter()
            for place in np.flatnonzero(self.in_pool_N):
                rank_of[pool[place]["task"]] += 1
                self.in_pool_N[place] = rank_of[pool[place]["task"]] <= size.rows_a_task
            self.extracted = np.flatnonzero(self.in_pool_N)

    def _pair(self, place: int, chance: random.Random) -> dict[str, str]:
        """The row's own answer against another answer that its task has."""
        one = self.pool[place]
        others = sorted({row["completion"] for row in self.pool if row["task"] == one["task"]} - {one["completion"]})
        return {"prompt": one["prompt"], "chosen": one["completion"], "rejected": chance.choice(others)}

    def tuned(self, method: str) -> dict[str, float]:
        of_pairs = f"-{self.rejected}" if method in ("uniform", "preference", "chain", *RULES) else ""
        suffix = "" if self.size == Size() else f"-{self.size.budget:g}-{self.size.rows_a_task}"
        return self._once(method, of_pairs + suffix, lambda: self._tune(method))

    def _once(self, part: str, suffix: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.work / "forward" / f"{self.family}-{self.seed}-{part}{suffix}.json"
        return harness.once(path, [part, self.family, self.seed, *self.depends_on], compute)

    def pairs(self) -> Rows:
        """The targets, with the model's own answer as the rejected one (or another answer, with `--rejected other`)."""
        if self.rejected == "other":
            return self.targets
        answers = self._once("answers", "", self._answers)["answers"]
        # Where the model is right already, or silent, another answer stands in.
        return [
            {**one, "rejected": answer} if answer.strip() and answer.strip() != one["chosen"].strip() else one
            for one, answer in zip(self.targets, answers, strict=True)
        ]

    def _answers(self) -> dict[str, Any]:
        tokenizer, model = tuning.load(self.model)
        return {"answers": tuning.answers(model, tokenizer, [one["prompt"] for one in self.targets])}

    def _tune(self, method: str) -> dict[str, float]:
        chosen = self._chosen(method)
        tokenizer, model = tuning.load(self.model)

        def encoded(rows: list[dict[str, Any]], side: str) -> list[tokenise.Encoded]:
            contents = [{"prompt": one["prompt"], "completion": one[side]} for one in rows]
            return [tokenise.encode_candidate(content, tokenizer, 512) for content in contents]

        if chosen:
            rows = [self.pool[place] for place in chosen]
            tuning.tune(model, encoded(rows, "completion"), epochs=EPOCHS, rate=RATE, seed=self.seed, half=True)
        right_H = tuning.mean_nll(model, encoded(self.held, "chosen"))
        wrong_H = tuning.mean_nll(model, encoded(self.held, "rejected"))
        in_family = [self._is_family(place) for place in chosen]
        left = self._left_for_prism() if method == "chain" else []
        return {
            f"loss[{method}]": float(right_H.mean()),
            f"wrong[{method}]": float((wrong_H <= right_H).mean()),
            f"family[{method}]": float(np.sum(in_family)),
            **({"family[left for PRISM]": float(sum(self._is_family(place) for place in left))} if len(left) else {}),
        }

    def _is_family(self, place: int) -> bool:
        return self.pool[place]["task"] in FAMILIES[self.family]

    def _chosen(self, method: str) -> list[int]:
        places = np.flatnonzero(self.in_pool_N)
        if method in ("none", "all"):
            return places.tolist() if method == "all" else []
        num_kept = round(self.size.budget * len(places))
        if method in RULES:
            pairs = self._preference()
            among = np.flatnonzero(self.in_pool_N[self.extracted])
            scores_N = pairs.scores(pairs.targets.preference_Q)[among]
            selection = {"keep": "highest", "budget": {"count": num_kept}, **RULES[method][1]}
            group_of = [self.pool[place]["task"] for place in places]
            return places[harness.selected(scores_N, selection, pairs.signs_NW[among], group_of).order].tolist()
        if method == "chain":
            places = self._left_for_prism()
            name = f"forward-{self.family}-{self.seed}-{self.rejected}-chain"
            second = self._extract(name, self.pairs(), "preference", among=places)
            ranking_N = second.scores(second.targets.preference_Q)
            return places[np.argsort(-ranking_N, kind="stable")[:num_kept]].tolist()
        ranking_N = self._ranking(method)
        return places[np.argsort(-ranking_N[places], kind="stable")[:num_kept]].tolist()

    def _left_for_prism(self) -> NDArray[np.int64]:
        """The places of what the chain's first run keeps, in plan order, as a manifest gives its rows to the second."""
        places = np.flatnonzero(self.in_pool_N)
        nearest_N = self._ranking("nearest")[places]
        return np.sort(places[np.argsort(-nearest_N, kind="stable")[: round(CHAIN * len(places))]])

    def _ranking(self, method: str) -> harness.Float64:
        if method == "random":
            return np.random.default_rng(self.seed).random(len(self.pool))
        name = f"forward-{self.family}-{self.seed}"
        wanted = [{"prompt": one["prompt"], "chosen": one["chosen"]} for one in self.targets]
        if method in ("nearest", "mean"):
            hidden = self._extract(f"{name}-hidden", wanted, "uniform", representation=True)
            return self._of_all(hidden.similarities(method))
        if method == "less":
            single = self._extract(f"{name}-single", wanted, "uniform").without_curvature()
            return self._of_all(single.scores(np.ones(NUM_PAIRS)) / single.norm_N)
        pairs = self._preference()
        return self._of_all(pairs.scores(np.ones(NUM_PAIRS) if method == "uniform" else pairs.targets.preference_Q))

    def _of_all(self, of_extracted: harness.Float64) -> harness.Float64:
        ranking_N = np.full(len(self.pool), -np.inf)
        ranking_N[self.extracted] = of_extracted
        return ranking_N

    def _preference(self) -> harness.Extracted:
        name = f"forward-{self.family}-{self.seed}-{self.rejected}"
        return self._extract(name, self.pairs(), "preference")

    def _extract(
        self,
        name: str,
        targets: Rows,
        weighting: str,
        among: NDArray[np.int64] | None = None,
        *,
        representation: bool = False,
    ) -> harness.Extracted:
        # The pool's rows are the same for every family, seed and method: extracted once.
        size = 256 if self.size.rows_a_task is None else 128
        options: dict[str, Any] = {"weighting": weighting, "representation": representation}
        options["extraction"] = {"examplesPerShard": size}
        rows = [self.pool[place] for place in (self.extracted if among is None else among)]
        return harness.extract(self.work, name, rows, targets, model=self.model, dtype="bfloat16", **options)


if __name__ == "__main__":
    main()
