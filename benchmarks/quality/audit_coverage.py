"""Does the audit's interval hold the true agreement with exact scores? 50 audits of 128 rows, on GSM8K solutions.

The job extracts the 256 shortest solutions of gsm8k_model_solutions.jsonl and 32 pairs (right, wrong) to other questions, and
its audit extracts all of them again. So any 128 rows can be taken for an audit's sample: its interval is compared with the
Spearman of the job's scores with exact ones (full weight gradients, K-FAC's factors unprojected) over all of them.

    python -m benchmarks.quality.audit_coverage --data FOLDER --json build/quality/audit_coverage.json

Shapes: N candidates.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import job
from benchmarks.fidelity import as_messages, make_pairs
from benchmarks.quality import exact, figure, harness
from benchmarks.quality.harness import Float64, Interval
from prism_job.data import examples
from prism_job.evaluate import audit
from prism_job.extract import tokenise
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.plan.extractor import audit_spec
from prism_job.score.candidates import score_sample
from prism_job.score.direction import fold_directions
from prism_job.score.preference import preference
from prism_job.score.targets import sum_targets
from prism_job.spec.model import ModelSpec
from prism_job.storage import model_files
from prism_job.storage.address import open_store

NUM_EXAMPLES, NUM_PAIRS = 256, 32
SAMPLE, RESAMPLINGS = 128, 50
BUDGET = 0.1
CURVATURES = ("none", "kfac")

SHOWN = {
    "spearman_job_exact": "Spearman of the job's scores with exact ones, all rows",
    "spearman_audit_exact": "Spearman of the audit's scores with exact ones",
    "spearman_job_audit": "Spearman of job and audit",
    "spearman_mean": f"estimate of {RESAMPLINGS} audits of {SAMPLE} rows, mean",
    "spearman_covered": "how many of their intervals hold the truth",
    "spearman_mean_width": "mean width of the interval",
    "overlap_job_exact": f"overlap with exact scores at {BUDGET:.0%}, all rows",
    "overlap_mean": "estimate of the audits, mean",
    "overlap_covered": "how many of their intervals hold the truth",
}


def main() -> None:
    made = harness.parser(__doc__, seeds=1)
    made.add_argument("--curvature", action="append", choices=CURVATURES, help="repeatable; both without it")
    options = made.parse_args()
    settings = [model_files.identify(options.model), harness.constants(__name__)]
    kinds = options.curvature or list(CURVATURES)
    rankings = Rankings(options.work, options.model, options.data)
    figures: dict[str, Any] = {"examples": NUM_EXAMPLES, "resamplings": RESAMPLINGS}
    series: dict[str, list[Interval]] = {}
    for kind in kinds:
        path = options.work / "audit_coverage" / f"{kind}.json"
        found = harness.once(path, [kind, *settings], lambda kind=kind: rankings.of(kind))
        of_kind, estimates = compare(kind, *(np.array(found[name]) for name in ("job", "audit", "exact")))
        figures |= {f"{kind}/{name}": value for name, value in of_kind.items()}
        truth = of_kind["spearman_job_exact"]
        series |= {f"{kind}: audits": estimates, f"{kind}: the truth": [Interval(truth, truth, truth)] * len(estimates)}
    lines = [[name, *(f"{figures[f'{kind}/{key}']:.4g}" for kind in kinds)] for key, name in SHOWN.items()]
    print(harness.table(["", *(f"curvature: {kind}" for kind in kinds)], lines))
    job.write_json(options.json, figures)
    axes = ("audits, by their estimate", "Spearman with exact scores")
    figure.lines(options.figure, f"{RESAMPLINGS} audits of {SAMPLE} rows", axes, range(RESAMPLINGS), series)


def compare(kind: str, job_N: Float64, audit_N: Float64, exact_N: Float64) -> tuple[dict[str, float], list[Interval]]:
    """Figures of one kind of curvature, and each audit's Spearman with its interval, lowest first."""
    taken = round(BUDGET * len(job_N))
    figures: dict[str, float] = {
        "spearman_job_exact": audit.spearman(job_N, exact_N),
        "spearman_audit_exact": audit.spearman(audit_N, exact_N),
        "spearman_job_audit": audit.spearman(job_N, audit_N),
        "overlap_job_exact": len({*np.argsort(-job_N)[:taken]} & {*np.argsort(-exact_N)[:taken]}) / taken,
    }
    generator = np.random.default_rng(0)
    samples = [generator.permutation(len(job_N))[:SAMPLE] for _ in range(RESAMPLINGS)]
    audits = [audit.agreement(job_N[rows], audit_N[rows], BUDGET, "highest", kind) for rows in samples]
    for name in ("spearman", "overlap"):
        truth = figures[f"{name}_job_exact"]
        figures[f"{name}_covered"] = sum(one[f"{name}_low"] <= truth <= one[f"{name}_high"] for one in audits)
        figures[f"{name}_mean"] = float(np.mean([one[name] for one in audits]))
        figures[f"{name}_mean_width"] = float(np.mean([one[f"{name}_high"] - one[f"{name}_low"] for one in audits]))
    estimates = [Interval(one["spearman"], one["spearman_low"], one["spearman_high"]) for one in audits]
    return figures, sorted(estimates, key=lambda one: one.mean)


class Rankings:
    """Scores of the job, of its audit over all rows, and exact ones, of the distinct candidates in the audit's order."""

    def __init__(self, work: Path, model_uri: str, folder: Path) -> None:
        self.model_uri = model_uri
        rows = [json.loads(line) for line in (folder / "gsm8k_model_solutions.jsonl").open(encoding="utf-8")]
        rows.sort(key=lambda row: (len(row["question"] + row["solution"]), row["question"], row["solution"]))
        self.candidates = [as_messages(row) for row in rows[:NUM_EXAMPLES]]
        asked = {row["question"] for row in rows[:NUM_EXAMPLES]}
        self.pairs = make_pairs([row for row in rows if row["question"] not in asked], NUM_PAIRS)
        options = {"model": model_uri, "audit": NUM_EXAMPLES}
        self.run = harness.extract(work, "audit-coverage", self.candidates, self.pairs, **options)

    def of(self, kind: str) -> dict[str, list[float]]:
        run = self.run if kind == "kfac" else self.run.without_curvature()
        targets, store, places = run.targets, open_store(run.run.spec.store), run.plan.audit.positions
        _, facts = fold_directions(run.run.spec, run.plan, store, targets.layers, targets.directions_KLPP)
        lam = facts.get("lambda")
        found = {
            "job": run.scores(targets.preference_Q)[places],
            "audit": audit_scores(run, lam),
            "exact": exact_scores(self.model_uri, self.candidates, self.pairs, lam)[places],
        }
        return {name: values.tolist() for name, values in found.items()}


def audit_scores(run: harness.Extracted, lam: float | None) -> Float64:
    """The audit's scores of its rows, as the reduce stage takes them of a sample (with the job's λ)."""
    plan, store, form = run.plan, open_store(run.run.spec.store), audit_spec(run.run.spec)
    summed = sum_targets(form, plan, plan.audit, store)
    audited = plan.model_copy(update={"extractor": plan.audit.extractor, "factors": plan.audit.factors})
    directions_KD, _ = fold_directions(form, audited, store, summed.layers, summed.directions_KLPP, lam)
    return score_sample(form, plan.audit, store, summed.layers, directions_KD)[0]


def exact_scores(model_uri: str, candidates: harness.Rows, pairs: harness.Rows, lam: float | None) -> Float64:
    """From full weight gradients: plain inner products, or with K-FAC in the full space at this λ."""
    spec = ModelSpec(uri=model_uri, dtype="float32")
    tokenizer, model = load_tokenizer(spec), load_model(spec, torch.device("cpu"))
    layers = captured_layers(model, ("*",))
    direction: exact.Direction = {}
    for pair in pairs:
        encoded_sides = tokenise.encode_target(pair, tokenizer, 2048)
        sides = [exact.weight_gradient(model, layers, encoded_sides[side]) for side in tokenise.SIDES]
        weight = float(preference(np.array([sides[0][1]]), np.array([sides[1][1]]))[0]) / len(pairs)
        for name in layers.weights:
            part = weight * (sides[0][0][name] - sides[1][0][name])
            direction[name] = direction[name] + part if name in direction else part
    encoded = [tokenise.encode_candidate(examples.candidate_content(row), tokenizer, 2048) for row in candidates]
    if lam is not None:
        direction = exact.solve(direction, exact.factors(model, layers, encoded), lam)
    return exact.scores(model, layers, direction, encoded)


if __name__ == "__main__":
    main()
