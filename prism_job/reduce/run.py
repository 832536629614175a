"""The reduce stage: weigh the targets, merge factors, apply curvature, fold, score, select, publish.

Streams the shards; of a candidate it holds a byte in memory, its score while all are ranked, a few numbers in scratch files,
never its row.

Shapes: N candidates in plan order, L layers, P projected dims a side, D stored dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job import projection
from prism_job.errors import RequestError
from prism_job.plan import Plan, audit_spec, check_bad_fraction, read_plan
from prism_job.reduce import audit, curvature, manifest, memory
from prism_job.reduce.column import parts
from prism_job.reduce.preference import Targets, weigh_targets
from prism_job.reduce.publish import Reduced, publish
from prism_job.reduce.scoring import Scored, score_candidates
from prism_job.reduce.selection import Selected, select
from prism_job.spec import RunSpec, SelectionRun
from prism_job.storage.objects import Store, open_store


def reduce(run: SelectionRun) -> dict[str, Any]:
    """Publish the selection that spec and store give. Returns the last words.

    Raises:
        RequestError: no plan.
        DataError: a shard is missing or damaged, too many bad rows, or a damaged selection is in the way.
    """
    memory.share_one_heap()
    plan = read_plan(run)
    output, store = open_store(run.spec.output), open_store(run.spec.store)
    folder = manifest.folder_key(run, manifest.selection_id(run, plan))
    published = manifest.find_published(output, folder)
    if published is not None:
        return {**published.manifest.outcome(published.uri), "unchanged": True}

    targets = weigh_targets(run.spec, plan, store)
    direction_D, curvature_facts = fold_direction(run.spec, plan, store, targets)
    scored = score_candidates(run.spec, plan, store, direction_D)
    memory.give_back_what_is_freed()
    check_bad_fraction([*plan.quarantine, *scored.quarantined], int(scored.usable_N.sum()), run.spec)
    chosen = select(
        scored.scores.part(slice(0, len(scored.scores))), scored.ids, scored.tokens, scored.usable_N, run.spec.selection
    )
    if not len(chosen.order):
        what = (
            f"nothing would be selected: the budget takes {chosen.num_taken} of {int(scored.usable_N.sum())} examples"
        )
        raise RequestError(what, where="spec.selection", fix="widen the budget, or drop less")
    audited = audit_ranking(run.spec, plan, store, scored, chosen, curvature_facts.get("lambda"))
    return publish(Reduced(run, plan, store, targets, scored, chosen, curvature_facts, audited), output, folder)


def fold_direction(
    spec: RunSpec, plan: Plan, store: Store, targets: Targets | audit.SummedTargets, lam: float | None = None
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(H + λI)⁻¹ g in the unfolded space, then in the form the rows are stored in. Float64 [D], and facts to publish.

    Args:
        lam: λ where it is given, in place of `damping` times the mean eigenvalue.
    """
    direction = targets.direction_LPP
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind == "kfac":
        factors = curvature.merge_factors(plan, store, spec.extraction.projection.dim)
        damping = spec.scoring.curvature.damping
        if lam is not None:
            damping = lam / curvature.damping_value(factors, 1.0)
        lam = curvature.damping_value(factors, damping)
        facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
        direction = curvature.solve(direction, factors, damping)
    if spec.extraction.codec.kind == "float16":
        return direction.reshape(-1), facts
    flat = direction.reshape(len(targets.layers), -1)
    seed, dims = spec.extraction.projection.seed, spec.extraction.codec.dims
    return projection.fold(flat, targets.layers, seed, dims), facts


def audit_ranking(
    spec: RunSpec, plan: Plan, store: Store, scored: Scored, chosen: Selected, lam: float | None
) -> dict[str, Any] | None:
    """The sample scored in the audit's form along a direction of its own, and how far the two rankings agree.

    None where the audit is switched off. `token_share`: of all response tokens that the run asks for, those of the audit.

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
        direction_D, _ = fold_direction(form, audited_plan, store, targets, lam)
        audit_scores_N, tokens_N = audit.score_sample(form, plan.audit, store, direction_D)
        # A row may fit into memory at one size of its sketches and not at the other.
        usable_N = usable_N & (tokens_N > 0)
        ranked = int(scored.usable_N.sum()) - int(chosen.duplicate_N.sum())
        figures = audit.agreement(
            scored.scores.at(places)[usable_N],
            audit_scores_N[usable_N],
            chosen.num_taken / ranked,
            str(spec.selection.keep or spec.selection.drop),
        )
    audit_tokens = int(tokens_N.sum(dtype=np.int64)) + targets.num_tokens
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
