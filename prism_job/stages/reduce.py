"""The reduce stage: weigh the targets, merge factors, apply curvature, fold, score, select, publish.

Streams the shards; of a candidate it holds a byte in memory, its score while all are ranked, a few numbers in scratch files,
never its row.

Shapes: N candidates in plan order, K target sets, L layers, P projected dims a side, D stored dims.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job import projection
from prism_job.errors import RequestError
from prism_job.evaluate import audit
from prism_job.evaluate.evaluate import evaluate_unpublished
from prism_job.plan.checks import check_bad_fraction
from prism_job.plan.extractor import audit_spec
from prism_job.plan.plan import Plan, read_plan
from prism_job.publish import manifest
from prism_job.publish.publish import Reduced, publish
from prism_job.score import curvature, malloc
from prism_job.score.column import Column, parts
from prism_job.score.preference import weigh_targets
from prism_job.score.scoring import Scored, combine, score_candidates
from prism_job.score.selection import Selected, select
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store


def reduce(run: SelectionRun) -> dict[str, Any]:
    """Publish the selection that spec and store give. Returns the last words.

    Raises:
        RequestError: no plan, or nothing would be selected.
        DataError: a shard is missing or damaged, too many bad rows, or a damaged selection is in the way.
    """
    malloc.share_one_heap()
    plan = read_plan(run)
    output, store = open_store(run.spec.output), open_store(run.spec.store)
    folder = manifest.folder_key(run, manifest.selection_id(run, plan))
    published = manifest.find_published(output, folder)
    if published is not None:
        return {**published.manifest.outcome(published.uri), "unchanged": True}

    targets = weigh_targets(run.spec, plan, store)
    directions_KD, curvature_facts = fold_directions(run.spec, plan, store, targets.layers, targets.directions_KLPP)
    scored = score_candidates(run.spec, plan, store, directions_KD)
    scores = combine(scored.scores, [one.signed_weight for one in run.spec.targets.as_sets()])
    malloc.give_back_what_is_freed()
    check_bad_fraction([*plan.quarantine, *scored.quarantined], int(scored.usable_N.sum()), run.spec)
    chosen = select(scores.part(slice(0, len(scores))), scored.ids, scored.tokens, scored.usable_N, run.spec.selection)
    if not len(chosen.order):
        what = (
            f"nothing would be selected: the budget takes {chosen.num_taken} of {int(scored.usable_N.sum())} examples"
        )
        raise RequestError(what, where="spec.selection", fix="widen the budget, or drop less")
    audited = audit_ranking(run.spec, plan, store, scored, scores, chosen, curvature_facts.get("lambda"))
    found = Reduced(run, plan, store, targets, scored, scores, chosen, curvature_facts, audited)
    if asked := run.spec.evaluation:
        found = replace(found, evaluation=evaluate_unpublished(found, asked))
    return publish(found, output, folder)


def fold_directions(
    spec: RunSpec,
    plan: Plan,
    store: Store,
    layers: list[str],
    directions_KLPP: NDArray[np.float64],
    lam: float | None = None,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(H + λI)⁻¹ g of each in the unfolded space, then in the form the rows are stored in.

    Float64 [K, D], and facts to publish.

    Args:
        lam: λ where it is given, in place of `damping` times the mean eigenvalue.
    """
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind == "kfac":
        factors = curvature.merge_factors(plan, store, spec.extraction.projection.dim)
        damping = spec.scoring.curvature.damping
        if lam is not None:
            damping = lam / curvature.damping_value(factors, 1.0)
        lam = curvature.damping_value(factors, damping)
        facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
        directions_KLPP = curvature.solve(directions_KLPP, factors, damping)
    if spec.extraction.codec.kind == "float16":
        return directions_KLPP.reshape(len(directions_KLPP), -1), facts
    flat_KLM = directions_KLPP.reshape(*directions_KLPP.shape[:2], -1)
    seed, dims = spec.extraction.projection.seed, spec.extraction.codec.dims
    return np.stack([projection.fold(flat_LM, layers, seed, dims) for flat_LM in flat_KLM]), facts


def audit_ranking(
    spec: RunSpec, plan: Plan, store: Store, scored: Scored, scores: Column, chosen: Selected, lam: float | None
) -> dict[str, Any] | None:
    """The sample scored in the audit's form along a direction of its own, and how far the two rankings agree.

    None where the audit is switched off. `token_share`: of all response tokens that the run asks for, those that the audit
    takes through the model again: its sample's.

    Args:
        lam: the job's λ. The mean eigenvalue falls as the dims grow, so the same `damping` would be another λ here.
    """
    if plan.audit is None:
        return None
    form = audit_spec(spec)
    projected = form.extraction.projection
    places = np.array(plan.audit.places, np.int64)
    usable_N = scored.usable_N[places]
    figures = audit.too_few(int(usable_N.sum()))
    targets = audit.summed_targets(form, plan, plan.audit, store)
    tokens_N = scored.tokens.at(places)
    if usable_N.sum() >= audit.MIN_ROWS:
        audited_plan = plan.model_copy(update={"extractor": plan.audit.extractor, "factors": plan.audit.factors})
        directions_KD, _ = fold_directions(form, audited_plan, store, targets.layers, targets.directions_KLPP, lam)
        audit_scores_N, tokens_N = audit.score_sample(form, plan.audit, store, directions_KD)
        # A row may fit into memory at one size of its sketches and not at the other.
        usable_N = usable_N & (tokens_N > 0)
        ranked = int(scored.usable_N.sum()) - int(chosen.duplicate_N.sum())
        figures = audit.agreement(
            scores.at(places)[usable_N],
            audit_scores_N[usable_N],
            chosen.num_taken / ranked,
            str(spec.selection.keep or spec.selection.drop),
            spec.scoring.curvature.kind,
        )
    audit_tokens = int(tokens_N.sum(dtype=np.int64))
    own_tokens = targets.num_tokens + sum(
        int(scored.tokens.part(part).sum(dtype=np.int64)) for part in parts(len(scored.usable_N))
    )
    return {
        "examples": len(places),
        "usable": int(usable_N.sum()),
        "dim": projected.dim,
        "seed": projected.seed,
        "token_share": audit_tokens / (audit_tokens + own_tokens),
        **figures,
    }
