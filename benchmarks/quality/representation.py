"""What a forward pass alone finds (`score: representation`), beside PRISM's gradients, and what each costs.

Right from wrong among things alike: the facts task, and the mixture of rectification with its tuned reference. What belongs to
a topic: `benchmarks.quality.forward --method nearest --method mean`. Both at once: the facts, half of them wrong, among short
rows of BIG-Bench-Hard, and the chain of the two, representation first and PRISM on what is left.

    python -m benchmarks.quality.representation --data FOLDER --seeds 1 --json representation.json

Shapes: N candidates.
"""

import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import job
from benchmarks.quality import harness
from benchmarks.quality.facts import make_data
from benchmarks.quality.forward import OTHERS
from benchmarks.quality.harness import Float64, Rows
from benchmarks.quality.rectification import EPOCHS, RATE, Mixture
from prism_job.storage import model_files

NUM_FACTS, NUM_OTHERS = 240, 240
LEFT = 0.6
"""Share of the pool that the chain's first run keeps: the facts are half of it."""
KEPT = 0.25
"""Budget of each selection from the pool: as many rows as there are right facts."""

PARTS = ("facts", "rectification", "topic", "cost")
METHODS = {
    "preference": "PRISM",
    "loss": "own loss, token mean",
    "nearest": "representation, nearest",
    "mean": "representation, mean",
    "chain": "representation (nearest), PRISM on what is left",
}


def main() -> None:
    made = harness.parser(__doc__, seeds=1)
    made.add_argument("--part", action="append", choices=PARTS, help="repeatable; all without it")
    made.add_argument("--method", action="append", choices=list(METHODS), help="repeatable; all without it")
    made.add_argument("--cost-rows", type=int, default=240, help="candidates whose cost is measured (%(default)s)")
    options = made.parse_args()
    parts = options.part or PARTS
    by_seed = [figures_of(options, seed, parts) for seed in range(options.seeds)]
    found = harness.over_seeds(by_seed)
    for part, title in (
        ("facts", "AUROC, right above wrong facts"),
        ("rectification", "AUROC, right above wrong answers of the mixture, ranked by its tuned reference"),
        ("topic", f"share of right facts among the {KEPT:.0%} that are kept of facts and other tasks"),
        ("on_topic", "share of facts, right or wrong, among them"),
    ):
        lines = [[name, found[f"{part}[{key}]"]] for key, name in METHODS.items() if f"{part}[{key}]" in found]
        if lines:
            print(f"\n{title}\n\n{harness.table(['ranked by', ''], lines)}")
    costs = {name: value for name, value in found.items() if name.startswith("cost")}
    if costs:
        print("\n" + harness.table(["cost", ""], list(costs.items())))
    job.write_json(options.json, {"seeds": options.seeds, **harness.flat(found)})


def figures_of(options: Any, seed: int, parts: tuple[str, ...]) -> dict[str, float]:
    work, model = options.work, options.model
    methods = options.method or list(METHODS)
    settings = [seed, methods, options.cost_rows, model_files.identify(model), harness.constants(__name__)]
    compute = {
        "facts": lambda: facts(work, model, seed, methods),
        "rectification": lambda: rectification(work, model, seed, methods),
        "topic": lambda: topic(work, model, options.data, seed, methods),
        "cost": lambda: cost(work, model, seed, options.cost_rows),
    }
    found: dict[str, float] = {}
    for part in parts:
        found |= harness.once(work / "representation" / f"{part}-{seed}.json", settings, compute[part])
    return found


def rankings(
    work: Path, name: str, rows: Rows, targets: Rows, model: str, methods: Collection[str]
) -> dict[str, Float64]:
    """The ranking of each of these methods but the chain. Gradients are extracted where one of them needs them."""
    ranked: dict[str, Float64] = {}
    units = {"examplesPerShard": NUM_FACTS}  # so that facts among other rows are those of the facts alone
    if {"nearest", "mean", "chain"} & {*methods}:
        wanted = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in targets]
        hidden = harness.extract(
            work, f"{name}-hidden", rows, wanted, model=model, representation=True, extraction=units
        )
        ranked |= {similarity: hidden.similarities(similarity) for similarity in ("nearest", "mean")}
    if {"preference", "loss"} & {*methods}:
        run = harness.extract(work, name, rows, targets, model=model, extraction=units)
        ranked |= {"preference": run.scores(run.targets.preference_Q), "loss": -run.loss_N}
    return ranked


def facts(work: Path, model: str, seed: int, methods: Collection[str]) -> dict[str, float]:
    rows, targets = make_data(seed)
    good_N = np.array([row["label"] == 1 for row in rows])
    ranked = rankings(work, f"facts-{seed}", rows, targets, model, methods)
    return {f"facts[{method}]": harness.area(ranking_N, good_N) for method, ranking_N in ranked.items()}


def rectification(work: Path, model: str, seed: int, methods: Collection[str]) -> dict[str, float]:
    mixture = Mixture(work, model, seed)
    mixture._once("tuned", lambda: mixture._reference("tuned", EPOCHS, RATE))
    reference = str(mixture._folder("tuned"))
    ranked = rankings(work, f"rectification-tuned-{seed}", mixture.rows, mixture.targets, reference, methods)
    return {f"rectification[{method}]": harness.area(it_N, mixture.good_N) for method, it_N in ranked.items()}


def topic(work: Path, model: str, data: Path, seed: int, methods: Collection[str]) -> dict[str, float]:
    """The facts among the shortest rows of other tasks. The second run of the chain has the rows of the first run's manifest:
    what it selected, in plan order."""
    about_facts, targets = make_data(seed)
    asked = [json.loads(line) for line in (data / "bbh.jsonl").open(encoding="utf-8")]
    others = sorted((one for one in asked if one["task"] in OTHERS), key=lambda one: (len(one["prompt"]), one["id"]))
    rows = about_facts + [
        {
            "messages": [
                {"role": "user", "content": one["prompt"]},
                {"role": "assistant", "content": one["completion"]},
            ]
        }
        for one in others[:NUM_OTHERS]
    ]
    is_fact_N = np.arange(len(rows)) < len(about_facts)
    good_N = np.array([row.get("label") == 1 for row in rows])
    name = f"topic-{seed}"
    ranked = rankings(work, name, rows, targets, model, methods)
    num_kept = round(KEPT * len(rows))
    chosen = {method: np.argsort(-ranking_N, kind="stable")[:num_kept] for method, ranking_N in ranked.items()}
    recall = {}
    if "chain" in methods:
        left = np.sort(np.argsort(-ranked["nearest"], kind="stable")[: round(LEFT * len(rows))])
        second = harness.extract(work, f"{name}-chain", [rows[place] for place in left], targets, model=model)
        among = second.scores(second.targets.preference_Q)
        chosen["chain"] = left[np.argsort(-among, kind="stable")[:num_kept]]
        recall = {"recall of the chain's first run": float(is_fact_N[left].sum() / is_fact_N.sum())}
    found = {f"topic[{method}]": float(good_N[places].mean()) for method, places in chosen.items()}
    return (
        found | recall | {f"on_topic[{method}]": float(is_fact_N[places].mean()) for method, places in chosen.items()}
    )


def cost(work: Path, model: str, seed: int, num_rows: int) -> dict[str, float]:
    """Seconds of CPU of each extraction from an empty store, less those of one that has a single row to extract; and the bytes
    of a stored candidate. K-FAC's factors are part of the gradients' cost."""
    rows, targets = make_data(seed)
    rows, targets = rows[:num_rows], targets[: max(1, num_rows // 4)]
    found: dict[str, float] = {}
    for name, scoring in (("gradients", {}), ("representation", {"score": "representation"})):
        seconds = {}
        for size, some in (("all", rows), ("one", rows[:1])):
            folder = work / "cost" / f"{name}-{size}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            job.write_jsonl(folder / "pool.jsonl", some)
            job.write_jsonl(folder / "targets.jsonl", targets if size == "all" else targets[:1])
            spec = job.selection(
                folder,
                model={"uri": str(Path(model).resolve()), "dtype": "float32"},
                scoring=scoring,
                extraction={"tokensPerBatch": 1024},
            )
            path = job.write_document(folder / "selection.yaml", f"{name}-{size}", spec)
            job.run_stage("plan", path)
            before = job.cpu_seconds()
            _, outcome = job.run_stage("extract", path)
            seconds[size] = job.cpu_seconds() - before
            print(f"{name}, {size}: {seconds[size]:.1f} CPU s, {outcome['tokens']} tokens", file=sys.stderr)
        found[f"cost, CPU seconds: {name}"] = seconds["all"] - seconds["one"]
        store = work / "cost" / f"{name}-all" / "store"
        candidates = [path for path in store.rglob("*.safetensors") if path.name.count(".") == 1]
        found[f"cost, bytes a row: {name}"] = sum(path.stat().st_size for path in candidates) / len(rows)
    for figure in ("CPU seconds", "bytes a row"):
        found[f"cost, {figure}: ratio"] = found[f"cost, {figure}: representation"] / found[f"cost, {figure}: gradients"]
    return found


if __name__ == "__main__":
    main()
