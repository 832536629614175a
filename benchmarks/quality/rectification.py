"""Rectification where the loss is uninformative: find what taught a model wrong answers, drop it, and train again.

240 answers to short questions, half of them wrong: every capital is Rome, every sum ten too large. The reference is the model
tuned on that mixture. Each method ranks the mixture with the reference, half of it is dropped, the model as it was is tuned
on the rest, and asked held-out questions. A second reference has memorised the mixture. More in docs/method.md.

    python -m benchmarks.quality.rectification --seeds 3 --json build/quality/rectification.json
    python -m benchmarks.quality.rectification --seeds 3 --only preference   # whose preference π is, with swapped pairs

Shapes: N rows of the mixture.
"""

import random
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import job
from benchmarks.quality import figure, harness, tuning
from benchmarks.quality.facts import CAPITALS, OPERANDS, Fact
from benchmarks.quality.harness import Float64
from prism_job.extract import tokenise
from prism_job.extract.tokenise import Encoded
from prism_job.storage import model_files

NUM_CAPITALS = (40, 40, 30)
NUM_SUMS = (80, 80, 30, 100)
"""Right in the mixture, wrong in it, target pairs, held out; of the countries whatever is left is held out."""

EPOCHS, RATE = 2, 2e-5
MEMORISED_EPOCHS, MEMORISED_RATE = 5, 1e-4
DROPPED = 0.5
SWAPPED, DRAWS = 0.3, 100
"""Share of the pairs that are swapped in a second look at the same rankings, and how often they are drawn."""

SHARES = (0.0, 0.2, 0.3, 0.4, 0.5)
RETRAINED = 0.4
"""Shares of the pairs that are swapped where π comes from different models; and that at which the model is trained again."""

WHOSE = {
    "uniform": "uniform",
    "reference": "π of the reference (the paper's)",
    "before": "π of the model before tuning (preferenceModel)",
}
KINDS = ("all", "capitals", "sums")

METHODS = {
    "full": "nothing (the reference itself)",
    "random": "random",
    "loss": "highest loss, token mean",
    "uniform": "lowest uniform influence (K-FAC)",
    "preference": "lowest by PRISM (preference, K-FAC)",
    "oracle": "what is wrong",
}
INFLUENCES = {
    "uniform": "uniform",
    "preference": "PRISM",
    "uniform_cosine": "uniform, cosine",
    "preference_cosine": "PRISM, cosine",
}


def main() -> None:
    made = harness.parser(__doc__, seeds=3)
    made.add_argument("--memorised-seeds", type=int, default=1, help="seeds that also memorise (%(default)s)")
    made.add_argument("--only", choices=("preference",), help="only the part on scoring.preferenceModel")
    options = made.parse_args()
    mixtures = [Mixture(options.work, options.model, seed) for seed in range(options.seeds)]
    whose = print_whose(mixtures, options.memorised_seeds)
    if options.only:
        job.write_json(options.json, {"seeds": options.seeds, **harness.flat(whose)})
        return
    by_seed = [mixture.figures() for mixture in mixtures]
    found = harness.over_seeds(by_seed)
    if options.memorised_seeds:
        found |= harness.over_seeds([mixture.memorised() for mixture in mixtures[: options.memorised_seeds]])
    before = found["wrong[before]"]
    print(f"\nbefore any tuning {before} of the held-out questions have the wrong answer as the likelier\n")
    lines = [[name, found.get(f"auroc[{method}]", ""), found[f"wrong[{method}]"]] for method, name in METHODS.items()]
    print(harness.table(["dropped half", "AUROC of the ranking", "prefers the wrong answer afterwards"], lines))
    gain = [seed["auroc[preference]"] - seed["auroc[loss]"] for seed in by_seed]
    print(f"\nAUROC of PRISM over the loss: {harness.interval(gain)}; mean π {found['mean_pi']}\n")
    kinds = ("auroc", "swapped_auroc")
    lines = [[name, *(found[f"{kind}[{key}]"] for kind in kinds)] for key, name in INFLUENCES.items()]
    print(harness.table(["AUROC", "clean pairs", f"{SWAPPED:.0%} swapped"], lines) + "\n")
    start = "memorised_auroc["
    memorised = [[name[len(start) : -1], value] for name, value in found.items() if name.startswith(start)]
    lines = [
        [f"{name}, {kind}", *(found[f"{pairs}_mistakes_auroc[{method}][{kind}]"] for pairs in ("same", "other"))]
        for method, name in (("uniform", "uniform"), ("preference", "PRISM"), ("loss", "loss"))
        for kind in ("all", "capitals", "sums")
    ]
    print(harness.table(["AUROC", "pairs reject the mixture's mistakes", "pairs reject other mistakes"], lines))
    print(f"what repeats a rejected answer is wrong: {found['repeats_auroc']}\n")
    if memorised:
        print(f"mean loss of the mixture: tuned {found['mixture_loss']}, memorised {found['memorised_mixture_loss']}\n")
        print(harness.table(["ranked by, once the mixture is memorised", "AUROC"], memorised))
    figures = harness.flat(found | whose | {"auroc_gain_over_loss": harness.interval(gain)})
    job.write_json(options.json, {"seeds": options.seeds, **figures})
    afterwards = {"before any tuning": before}
    afterwards |= {name: found[f"wrong[{method}]"] for method, name in METHODS.items()}
    title, label = "Prefers the wrong answer after tuning on the rest", "share of held-out questions"
    figure.bars(options.figure, title, label, {"half that was dropped": afterwards})


def print_whose(mixtures: Sequence["Mixture"], memorised_seeds: int) -> dict[str, harness.Interval]:
    """Tables of whose preference π is. Returns their figures."""
    figures = {}
    for reference, chosen in (("tuned", mixtures), ("memorised", mixtures[:memorised_seeds])):
        if not chosen:
            continue
        found = harness.over_seeds([mixture.whose(reference) for mixture in chosen])
        means = f"{found[f'{reference}_mean_pi[reference]']} and {found[f'{reference}_mean_pi[before]']}"
        print(
            f"\nreference: {reference}, {len(chosen)} seed(s); mean π of the reference and of the model before: {means}\n"
        )
        for kind in KINDS:
            lines = [
                [f"{share:.0%}", *(found[f"{reference}_auroc[{whose}][{share:g}][{kind}]"] for whose in WHOSE)]
                for share in SHARES
            ]
            print(harness.table([f"AUROC, {kind}; pairs swapped", *WHOSE.values()], lines) + "\n")
        figures |= found
    by_seed = [mixture.retrained() for mixture in mixtures]
    after = harness.over_seeds(by_seed)
    for whose in ("uniform", "reference"):
        less = [seed["swapped_wrong[before]"] - seed[f"swapped_wrong[{whose}]"] for seed in by_seed]
        after[f"swapped_wrong[before]_less[{whose}]"] = harness.interval(less)
    names = [[f"swapped_wrong[{whose}]", f"swapped_wrong[before]_less[{whose}]", name] for whose, name in WHOSE.items()]
    lines = [[name, after[wrong], after.get(less, "")] for wrong, less, name in names]
    heads = ["prefers the wrong answer afterwards", "preferenceModel less it, within a seed"]
    print(harness.table([f"dropped half, {RETRAINED:.0%} swapped", *heads], lines) + "\n")
    return figures | after


class Mixture:
    """The mixture of one seed: its rows, the models tuned on it, the rankings."""

    def __init__(self, work: Path, model: str, seed: int) -> None:
        self.work, self.model, self.seed = work, model, seed
        chance = random.Random(f"mixture {seed}")
        countries = chance.sample([one for one in CAPITALS if CAPITALS[one] != "Rome"], len(CAPITALS) - 1)
        drawn = chance.sample(list(combinations_with_replacement(OPERANDS, 2)), sum(NUM_SUMS))
        sums = [(a, b) if chance.random() < 0.5 else (b, a) for a, b in drawn]

        def facts(place: int) -> list[Fact]:
            first = sum(NUM_CAPITALS[:place])
            last = first + NUM_CAPITALS[place] if place < len(NUM_CAPITALS) else None
            start = sum(NUM_SUMS[:place])
            added_up = [added(*both) for both in sums[start : start + NUM_SUMS[place]]]
            return [*map(capital, countries[first:last]), *added_up]

        rows = [(fact, True) for fact in facts(0)] + [(fact, False) for fact in facts(1)]
        chance.shuffle(rows)
        self.good_N = np.array([right for _, right in rows])
        self.rows = [
            {"prompt": prompt(fact), "completion": fact.right if right else fact.wrong, "label": int(right)}
            for fact, right in rows
        ]
        self.targets = [{"prompt": prompt(fact), "chosen": fact.right, "rejected": fact.wrong} for fact in facts(2)]
        cities = [f" {CAPITALS[one]}." for one in countries[sum(NUM_CAPITALS) :]]
        self.other_targets = [
            {**row, "rejected": chance.choice(cities) if fact.kind == "capital" else slip(row["chosen"], chance)}
            for row, fact in zip(self.targets, facts(2), strict=True)
        ]
        self.held = facts(3)

    def figures(self) -> dict[str, float]:
        found = self._once("before", lambda: {"wrong[before]": self._wrong(tuning.load(self.model))})
        found |= self._once("tuned", lambda: self._reference("tuned", EPOCHS, RATE))
        found |= self._once("rankings", self._rankings)
        found |= self._once("other-mistakes", self._other_mistakes)
        for method in METHODS:
            if method != "full":
                found |= self._once(method, lambda method=method: self._after(method))
        return found

    def whose(self, reference: str) -> dict[str, float]:
        settings = {"tuned": (EPOCHS, RATE), "memorised": (MEMORISED_EPOCHS, MEMORISED_RATE)}[reference]
        found = self._once(reference, lambda: self._reference(reference, *settings))
        wrong = found["wrong[full]" if reference == "tuned" else "memorised_wrong[full]"]
        figures = self._once(f"whose-{reference}", lambda: self._whose(reference))
        return figures | {f"{reference}_wrong[full]": wrong}

    def retrained(self) -> dict[str, float]:
        return {
            f"swapped_wrong[{whose}]": self._once(f"swapped-{whose}", lambda whose=whose: self._after_swaps(whose))[
                "wrong"
            ]
            for whose in WHOSE
        }

    def memorised(self) -> dict[str, float]:
        found = self._once("memorised", lambda: self._reference("memorised", MEMORISED_EPOCHS, MEMORISED_RATE))
        return found | self._once("memorised-rankings", self._memorised)

    def _once(self, name: str, compute: Any) -> dict[str, Any]:
        settings = [self.seed, model_files.identify(self.model), harness.constants(__name__)]
        return harness.once(self.work / "rectification" / f"{self.seed}-{name}.json", settings, compute)

    def _reference(self, name: str, epochs: int, rate: float) -> dict[str, float]:
        tokenizer, model = tuning.load(self.model)
        encoded = self._encoded(tokenizer, self.rows)
        tuning.tune(model, encoded, epochs=epochs, rate=rate, seed=self.seed)
        tuning.save(model, tokenizer, self._folder(name))
        prefix = "" if name == "tuned" else f"{name}_"
        return {
            f"{prefix}wrong[full]": self._wrong((tokenizer, model)),
            f"{prefix}mixture_loss": float(tuning.mean_nll(model, encoded).mean()),
        }

    def _folder(self, name: str) -> Path:
        return self.work / "references" / f"{name}-{self.seed}"

    def _extracted(self, name: str, model: str) -> harness.Extracted:
        return harness.extract(self.work, f"rectification-{name}-{self.seed}", self.rows, self.targets, model=model)

    def _ranked(self, method: str, run: harness.Extracted) -> Float64:
        if method == "random":
            return np.random.default_rng(self.seed).random(len(self.rows))
        if method == "oracle":
            return self.good_N.astype(np.float64)
        if method == "loss":
            return -run.loss_N
        weighted = method.startswith("preference")
        scores_N = run.scores(run.targets.preference_Q if weighted else np.ones(len(self.targets)))
        return scores_N / run.norm_N if method.endswith("cosine") else scores_N

    def _rankings(self) -> dict[str, Any]:
        run = self._extracted("tuned", str(self._folder("tuned")))
        methods = dict.fromkeys([*METHODS, *INFLUENCES])
        methods.pop("full")
        found = {f"auroc[{method}]": harness.area(self._ranked(method, run), self.good_N) for method in methods}
        return found | self._swapped(run) | {"mean_pi": float(run.targets.preference_Q.mean())}

    def _other_mistakes(self) -> dict[str, float]:
        """AUROC where the pairs reject other mistakes than the mixture's, by kind of question as well; and of a baseline that
        the pairs allow: what repeats a rejected answer is wrong."""
        reference = str(self._folder("tuned"))
        same = self._extracted("tuned", reference)
        name = f"rectification-other-{self.seed}"
        other = harness.extract(self.work, name, self.rows, self.other_targets, model=reference)
        is_capital_N = np.array(["capital" in row["prompt"] for row in self.rows])
        found: dict[str, float] = {}
        for pairs, run in (("same", same), ("other", other)):
            for method in ("uniform", "preference", "loss"):
                ranking_N = self._ranked(method, run)
                for kind, rows_N in (("all", is_capital_N | True), ("capitals", is_capital_N), ("sums", ~is_capital_N)):
                    auroc = harness.area(ranking_N[rows_N], self.good_N[rows_N])
                    found[f"{pairs}_mistakes_auroc[{method}][{kind}]"] = auroc
        rejected = {row["rejected"] for row in self.targets}
        repeats_N = np.array([row["completion"] in rejected for row in self.rows])
        return found | {"repeats_auroc": harness.area(-repeats_N.astype(np.float64), self.good_N)}

    def _swapped(self, run: harness.Extracted) -> dict[str, float]:
        """AUROC of each influence with a share of the pairs swapped, mean of the draws."""
        scores_NQ, pi_Q = run.scores_by_pair(), run.targets.preference_Q
        generator = np.random.default_rng(self.seed)
        found: dict[str, list[float]] = {method: [] for method in INFLUENCES}
        for _ in range(DRAWS):
            swapped_Q = harness.draw_swapped(generator, len(pi_Q), SWAPPED)
            sign_Q, weight_Q = harness.flipped(pi_Q, swapped_Q)
            for method, values in found.items():
                ranking_N = scores_NQ @ (sign_Q * (weight_Q if method.startswith("preference") else 1.0))
                values.append(harness.area(ranking_N / (run.norm_N if "cosine" in method else 1.0), self.good_N))
        return {f"swapped_auroc[{method}]": float(np.mean(values)) for method, values in found.items()}

    def _with_preference_model(self, reference: str) -> harness.Extracted:
        name, folder = f"rectification-whose-{reference}-{self.seed}", str(self._folder(reference))
        return harness.extract(self.work, name, self.rows, self.targets, model=folder, preference_model=self.model)

    def _weights(self, run: harness.Extracted) -> dict[str, Float64]:
        pi_Q = {"reference": run.targets.reference_preference_Q, "before": run.targets.preference_Q}
        return {"uniform": np.full(len(self.targets), 0.5), **pi_Q}

    def _whose(self, reference: str) -> dict[str, float]:
        """AUROC by whose π weighs the pairs, with shares of them swapped, mean of the draws; and both mean π."""
        run = self._with_preference_model(reference)
        scores_NQ, weights = run.scores_by_pair(), self._weights(run)
        is_capital_N = np.array(["capital" in row["prompt"] for row in self.rows])
        among = dict(zip(KINDS, (is_capital_N | True, is_capital_N, ~is_capital_N), strict=True))
        found = {f"{reference}_mean_pi[{whose}]": float(pi_Q.mean()) for whose, pi_Q in weights.items()}
        for share in SHARES:
            generator = np.random.default_rng([self.seed, round(100 * share)])
            drawn = [harness.draw_swapped(generator, len(self.targets), share) for _ in range(DRAWS if share else 1)]
            for whose, pi_Q in weights.items():
                rankings = [scores_NQ @ np.multiply(*harness.flipped(pi_Q, swapped_Q)) for swapped_Q in drawn]
                for kind, rows_N in among.items():
                    areas = [harness.area(ranking_N[rows_N], self.good_N[rows_N]) for ranking_N in rankings]
                    found[f"{reference}_auroc[{whose}][{share:g}][{kind}]"] = float(np.mean(areas))
        return found

    def _after_swaps(self, whose: str) -> dict[str, float]:
        """One draw of swapped pairs, the same for all."""
        run = self._with_preference_model("tuned")
        swapped_Q = harness.draw_swapped(np.random.default_rng(self.seed), len(self.targets), RETRAINED)
        ranking_N = run.scores_by_pair() @ np.multiply(*harness.flipped(self._weights(run)[whose], swapped_Q))
        return {"wrong": self._after_dropping(ranking_N)}

    def _memorised(self) -> dict[str, float]:
        after = self._extracted("memorised", str(self._folder("memorised")))
        before = self._extracted("before", self.model)
        methods = ("loss", "uniform", "preference", "preference_cosine")
        rankings = {method: self._ranked(method, after) for method in methods}
        rankings["before tuning: loss"] = self._ranked("loss", before)
        rankings["before tuning: PRISM"] = self._ranked("preference", before)
        rankings["before tuning: PRISM by cosine"] = self._ranked("preference_cosine", before)
        rankings["rise of the likelihood by tuning"] = after.loss_N - before.loss_N
        found = {f"memorised_auroc[{name}]": harness.area(value, self.good_N) for name, value in rankings.items()}
        return found | {"memorised_mean_pi": float(after.targets.preference_Q.mean())}

    def _after(self, method: str) -> dict[str, float]:
        run = self._extracted("tuned", str(self._folder("tuned")))
        return {f"wrong[{method}]": self._after_dropping(self._ranked(method, run))}

    def _after_dropping(self, ranking_N: Float64) -> float:
        """What `_wrong` finds once the model as it was is tuned on the rows that rank highest."""
        order = np.argsort(ranking_N, kind="stable")
        kept = np.sort(order[round(DROPPED * len(order)) :])
        tokenizer, model = tuning.load(self.model)
        rows = [self.rows[place] for place in kept]
        tuning.tune(model, self._encoded(tokenizer, rows), epochs=EPOCHS, rate=RATE, seed=self.seed)
        return self._wrong((tokenizer, model))

    def _encoded(self, tokenizer: Any, rows: harness.Rows) -> list[Encoded]:
        return [tokenise.encode_candidate(row, tokenizer, 512) for row in rows]

    def _wrong(self, asked: tuple[Any, Any]) -> float:
        """Share of held-out questions whose wrong answer has the higher likelihood, length-normalised."""
        tokenizer, model = asked
        nll = {}
        for side in ("right", "wrong"):
            rows = [{"prompt": prompt(fact), "completion": getattr(fact, side)} for fact in self.held]
            nll[side] = tuning.mean_nll(model, self._encoded(tokenizer, rows))
        return float((nll["wrong"] < nll["right"]).mean())


def prompt(fact: Fact) -> str:
    return f"Question: {fact.question}\nAnswer:"


def capital(country: str) -> Fact:
    return Fact("capital", f"What is the capital of {country}?", f" {CAPITALS[country]}.", " Rome.")


def slip(right: str, chance: random.Random) -> str:
    """Another wrong sum than the mixture's: one or two off."""
    return f" {int(right.strip(' .')) + chance.choice((-2, -1, 1, 2))}."


def added(a: int, b: int) -> Fact:
    return Fact("sum", f"What is {a} + {b}?", f" {a + b}.", f" {a + b + 10}.")


if __name__ == "__main__":
    main()
