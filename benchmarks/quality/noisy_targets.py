"""Wrong target pairs: how ranking right above wrong statements survives when 0 to 50 % of the pairs are swapped.

The facts task of examples/facts. In a swapped pair chosen and rejected change places. A seed draws the facts, and each share
of swapped pairs is drawn 100 times within it (scores are linear in the pairs, so a draw costs nothing).

    python -m benchmarks.quality.noisy_targets --seeds 5 --json build/quality/noisy_targets.json

Shapes: N candidates, Q pairs.
"""

from pathlib import Path

import numpy as np

from benchmarks import job
from benchmarks.quality import figure, harness
from benchmarks.quality.facts import make_data
from benchmarks.quality.harness import Extracted, Float64
from prism_job.storage import model_files

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
DRAWS = 100
DROPPED = 0.25
"""Budget of the precision: the lowest quarter is dropped, half of what is wrong."""

METHODS = {
    "preference": "PRISM (preference, K-FAC)",
    "preference_cosine": "PRISM by cosine",
    "preference_plain": "preference, no curvature",
    "uniform": "uniform (K-FAC)",
    "uniform_plain": "uniform, no curvature",
    "one_minus_pi": "1 − π (K-FAC)",
    "less": "LESS: cosine to the mean wanted response",
    "less_pairs": "cosine to the mean pair",
    "unpaired": "wanted responses only (K-FAC)",
    "loss": "candidate's own loss",
    "random": "random",
}

DRAWN = ("preference", "uniform", "one_minus_pi", "less", "less_pairs", "unpaired", "loss")
"""Methods of the figure."""


def main() -> None:
    options = harness.parser(__doc__, seeds=5).parse_args()
    by_seed = [one_seed(options.work, options.model, seed) for seed in range(options.seeds)]
    found = harness.over_seeds(by_seed)
    for measure, title in (("auroc", "AUROC"), ("precision", f"precision of the lowest {DROPPED:.0%}")):
        print(f"\n{title}, mean of {options.seeds} seeds (95 % interval), by share of swapped pairs\n")
        lines = [[name, *(found[f"{measure}[{key}][{share:g}]"] for share in SHARES)] for key, name in METHODS.items()]
        print(harness.table(["ranked by", *(f"{share:.0%}" for share in SHARES)], lines))
    gain = [seed["auroc[preference][0.4]"] - seed["auroc[uniform][0.4]"] for seed in by_seed]
    print(f"\npreference over uniform at 40 %: {harness.interval(gain)} AUROC")
    job.write_json(options.json, {"seeds": options.seeds, **harness.flat(found)})
    series = {METHODS[key]: [found[f"auroc[{key}][{share:g}]"] for share in SHARES] for key in DRAWN}
    axes = ("share of the pairs that are swapped", "AUROC")
    figure.lines(options.figure, "Right above wrong statements, by how many pairs are wrong", axes, SHARES, series)


def one_seed(work: Path, model: str, seed: int) -> dict[str, float]:
    settings = [seed, model_files.identify(model), harness.constants(__name__)]
    path = work / "noisy_targets" / f"{seed}.json"
    return harness.once(path, settings, lambda: measure(*extracted(work, model, seed), seed))


def extracted(work: Path, model: str, seed: int) -> tuple[Extracted, Extracted, np.ndarray]:
    """The run over the pairs, the run over single responses (all chosen, then all rejected), and which rows are right."""
    candidates, targets = make_data(seed)
    single = [{"prompt": row["prompt"], "chosen": row[side]} for side in ("chosen", "rejected") for row in targets]
    pairs = harness.extract(work, f"facts-{seed}", candidates, targets, model=model)
    responses = harness.extract(work, f"facts-{seed}-single", candidates, single, model=model, weighting="uniform")
    return pairs, responses, np.array([row["label"] == 1 for row in candidates])


def measure(pairs: Extracted, responses: Extracted, good_N: np.ndarray, seed: int) -> dict[str, float]:
    """AUROC and precision of each method at each share, means over the draws."""
    by_pair = {True: pairs.scores_by_pair(), False: pairs.without_curvature().scores_by_pair()}
    by_response = {True: responses.scores_by_pair(), False: responses.without_curvature().scores_by_pair()}
    norm_N, pi_Q = pairs.norm_N, pairs.targets.preference_Q
    generator = np.random.default_rng(seed)
    sums: dict[str, float] = {}
    for share in SHARES:
        for _ in range(DRAWS):
            swapped_Q = harness.draw_swapped(generator, len(pi_Q), share)
            sign_Q, weight_Q = harness.flipped(pi_Q, swapped_Q)
            wanted_R = np.concatenate([~swapped_Q, swapped_Q]).astype(np.float64)
            rankings: dict[str, Float64] = {
                "preference": by_pair[True] @ (sign_Q * weight_Q),
                "preference_cosine": by_pair[True] @ (sign_Q * weight_Q) / norm_N,
                "preference_plain": by_pair[False] @ (sign_Q * weight_Q),
                "uniform": by_pair[True] @ sign_Q,
                "uniform_plain": by_pair[False] @ sign_Q,
                "one_minus_pi": by_pair[True] @ (sign_Q * (1 - weight_Q)),
                "less": by_response[False] @ wanted_R / norm_N,
                "less_pairs": by_pair[False] @ sign_Q / norm_N,
                "unpaired": by_response[True] @ wanted_R,
                "loss": -pairs.loss_N,
                "random": generator.random(len(good_N)),
            }
            for method, ranking_N in rankings.items():
                values = {
                    "auroc": harness.area(ranking_N, good_N),
                    "precision": harness.precision_of_dropped(ranking_N, good_N, DROPPED),
                }
                for name, value in values.items():
                    key = f"{name}[{method}][{share:g}]"
                    sums[key] = sums.get(key, 0.0) + value / DRAWS
    return {**sums, "mean_pi": float(pi_Q.mean()), "share_pi_over_half": float((pi_Q > 0.5).mean())}


if __name__ == "__main__":
    main()
