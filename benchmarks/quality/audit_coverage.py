"""Does the audit's interval hold the true agreement with exact scores? 50 audits of 128 rows, on GSM8K solutions.

The job extracts the 384 shortest solutions of gsm8k_model_solutions.jsonl and 32 pairs (right, wrong) to other questions, and
its audit extracts all of them again; exact scores come from full weight gradients. So any 128 rows can be taken for an
audit's sample: its interval is compared with the Spearman of the job's scores with the exact ones over all of them.

    python -m benchmarks.quality.audit_coverage --data ../shared/data --json build/quality/audit_coverage.json

Shapes: N candidates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity import as_messages, make_pairs, spearman
from benchmarks.quality import exact, harness
from prism_job import examples
from prism_job.extract import data
from prism_job.extract.model import captured_layers, load_model, load_tokenizer
from prism_job.plan import audit_spec
from prism_job.reduce import audit
from prism_job.reduce.preference import preference
from prism_job.reduce.run import fold_directions
from prism_job.spec import ModelSpec
from prism_job.storage.objects import open_store

NUM_EXAMPLES, NUM_PAIRS = 384, 32
SAMPLE, RESAMPLINGS = 128, 50
BUDGET = 0.1


def main() -> None:
    options = harness.parser(__doc__, seeds=1).parse_args()
    settings = [NUM_EXAMPLES, NUM_PAIRS, options.model]
    path = options.work / "audit_coverage" / "scores.json"
    found = harness.once(path, settings, lambda: three_rankings(options.work, options.model, options.data))
    job_N, audit_N, exact_N = (np.array(found[name]) for name in ("job", "audit", "exact"))
    truth = spearman(job_N, exact_N)
    taken = round(BUDGET * len(job_N))
    overlap = len({*np.argsort(-job_N)[:taken]} & {*np.argsort(-exact_N)[:taken]}) / taken
    generator = np.random.default_rng(0)
    audits = []
    for _ in range(RESAMPLINGS):
        rows = generator.permutation(len(job_N))[:SAMPLE]
        audits.append(audit.agreement(job_N[rows], audit_N[rows], BUDGET, "highest"))
    figures: dict[str, Any] = {
        "examples": len(job_N),
        "spearman_job_exact": truth,
        "spearman_audit_exact": spearman(audit_N, exact_N),
        "spearman_job_audit": spearman(job_N, audit_N),
        "overlap_job_exact": overlap,
        "resamplings": RESAMPLINGS,
    }
    for name, value in (("spearman", truth), ("overlap", overlap)):
        held = [one[f"{name}_low"] <= value <= one[f"{name}_high"] for one in audits]
        figures[f"{name}_covered"] = int(np.sum(held))
        figures[f"{name}_mean"] = float(np.mean([one[name] for one in audits]))
        figures[f"{name}_mean_width"] = float(np.mean([one[f"{name}_high"] - one[f"{name}_low"] for one in audits]))
    lines = [
        [f"Spearman of job and exact, {NUM_EXAMPLES} rows", f"{truth:.4f}"],
        ["Spearman of the audit's scores and exact", f"{figures['spearman_audit_exact']:.4f}"],
        ["Spearman of job and audit", f"{figures['spearman_job_audit']:.4f}"],
        [f"what {RESAMPLINGS} audits of {SAMPLE} rows say, mean", f"{figures['spearman_mean']:.4f}"],
        ["of them, the interval holds the truth", f"{figures['spearman_covered']}"],
        ["mean width of the interval", f"{figures['spearman_mean_width']:.3f}"],
        [
            f"overlap with exact at {BUDGET:.0%}, all rows; the audits' mean",
            f"{overlap:.2f}; {figures['overlap_mean']:.2f}",
        ],
        ["of them, the interval holds the truth", f"{figures['overlap_covered']}"],
    ]
    print(harness.table(["", "figure"], lines))
    harness.write_json(options.json, figures)
    if options.figure:
        from benchmarks.quality import figure

        by_value = sorted(audits, key=lambda one: one["spearman"])
        said = [harness.Interval(one["spearman"], one["spearman_low"], one["spearman_high"]) for one in by_value]
        series = {"what an audit says": said, "the truth": [harness.Interval(truth, truth, truth)] * len(said)}
        axes = ("audits, by what they say", "Spearman with exact scores")
        figure.lines(options.figure, "50 audits of 128 rows", axes, range(len(said)), series)


def three_rankings(work: Path, model_uri: str, folder: Path) -> dict[str, list[float]]:
    """Scores of the job, of its audit over all rows, and exact ones: plain dot products, in the candidates' order."""
    rows = [json.loads(line) for line in (folder / "gsm8k_model_solutions.jsonl").open(encoding="utf-8")]
    shortest = sorted(
        range(len(rows)), key=lambda place: (len(rows[place]["question"] + rows[place]["solution"]), place)
    )
    chosen = sorted(shortest[:NUM_EXAMPLES])
    asked = {rows[place]["question"] for place in chosen}
    rest = [rows[place] for place in shortest if rows[place]["question"] not in asked]
    candidates, pairs = [as_messages(rows[place]) for place in chosen], make_pairs(rest, NUM_PAIRS)
    run = harness.extract(work, "audit-coverage", candidates, pairs, model=model_uri, audit=NUM_EXAMPLES).with_damping(
        None
    )
    job_N = run.scores(run.targets.preference_Q)
    return {
        "job": job_N.tolist(),
        "audit": audit_scores(run).tolist(),
        "exact": exact_scores(model_uri, candidates, pairs).tolist(),
    }


def audit_scores(run: harness.Extracted) -> np.ndarray:
    """The audit's scores of all rows, in plan order, as the reduce stage takes them of a sample."""
    plan, store, form = run.plan, open_store(run.run.spec.store), audit_spec(run.run.spec)
    assert plan.audit is not None
    summed = audit.summed_targets(form, plan, plan.audit, store)
    directions_KD, _ = fold_directions(form, plan, store, summed.layers, summed.directions_KLPP)
    scores_N, _ = audit.score_sample(form, plan.audit, store, directions_KD)
    in_order = np.full(plan.num_examples, np.nan)
    in_order[plan.audit.places] = scores_N
    assert np.isfinite(in_order).all(), "two solutions are the same: the audit takes one of them"
    return in_order


def exact_scores(model_uri: str, candidates: harness.Rows, pairs: harness.Rows) -> np.ndarray:
    spec = ModelSpec(uri=model_uri, dtype="float32")
    tokenizer, model = load_tokenizer(spec), load_model(spec, torch.device("cpu"))
    layers = captured_layers(model, ("*",))
    total: exact.Direction = {}
    for pair in pairs:
        sides = [
            exact.weight_gradient(
                model, layers, data.encode_response(pair["prompt"], pair[side], None, tokenizer, 2048)
            )
            for side in ("chosen", "rejected")
        ]
        weight = float(preference(np.array([sides[0][1]]), np.array([sides[1][1]]))[0]) / len(pairs)
        for name in layers.modules:
            part = weight * (sides[0][0][name] - sides[1][0][name])
            total[name] = total[name] + part if name in total else part
    encoded = [data.encode_candidate(examples.candidate_content(row), tokenizer, 2048) for row in candidates]
    return exact.scores(model, layers, total, encoded)


if __name__ == "__main__":
    main()
