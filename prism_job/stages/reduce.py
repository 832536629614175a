"""The reduce stage: weigh the targets, merge factors, apply curvature, fold, score, select, publish.

Streams the shards and keeps no row. Memory holds a byte a candidate, and its score during ranking; other columns are on disk.

Shapes: N candidates in plan order, K target sets, D stored dims.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from prism_job.errors import RequestError
from prism_job.evaluate import audit
from prism_job.evaluate.comparison import compare
from prism_job.plan.checks import check_bad_fraction, nothing_selected
from prism_job.plan.extractor import audit_spec
from prism_job.plan.plan import Plan, read_plan
from prism_job.publish.manifest import Used, folder_key, selection_id
from prism_job.publish.publish import publish
from prism_job.publish.published import find_published
from prism_job.publish.reduced import Reduced
from prism_job.score import malloc
from prism_job.score.candidates import Directions, Scored, combine, score_candidates, score_sample
from prism_job.score.column import Column, parts
from prism_job.score.contributions import explain_ends
from prism_job.score.direction import Folding, fold_directions, read_folding
from prism_job.score.groups import read_groups
from prism_job.score.selection import Selected, select
from prism_job.score.targets import Targets, sum_targets, wanted_responses, weigh_targets
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.spec.ranking import EvaluationSpec
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store


def reduce(run: SelectionRun, gpu_seconds: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """Publish the selection that follows from the spec and the store. Returns the outcome.

    Args:
        gpu_seconds: what the run has used, and `gpu` the name of its GPUs: for the manifest. None: not known.

    Raises:
        RequestError: no plan, or nothing would be selected.
        DataError: a shard is missing or damaged, too many bad rows, or the selection is published already and damaged.
    """
    malloc.share_one_heap()
    plan = read_plan(run)
    output, store = open_store(run.spec.output), open_store(run.spec.store)
    folder = folder_key(run, selection_id(run, plan))
    published = find_published(output, folder)
    if published is not None:
        return {**published.manifest.outcome(published.uri), "unchanged": True}

    targets, directions_KD, folding = _directions(run.spec, plan, store)
    curvature_facts: dict[str, Any] = folding.facts if folding else {"kind": "none"}
    scored = score_candidates(run.spec, plan, store, targets.layers, directions_KD)
    scores = combine(scored.scores, [target_set.signed_weight for target_set in run.spec.targets.as_sets()])
    malloc.return_freed_memory()
    check_bad_fraction([*plan.quarantine, *scored.quarantined], int(scored.usable_N.sum()), run.spec)
    groups = read_groups(run.spec.selection, plan, store)
    scores_N = scores.part(slice(0, len(scores)))
    chosen = select(scores_N, scored.ids, scored.tokens, scored.usable_N, run.spec.selection, groups, scored.signs)
    del scores_N
    if not len(chosen.order):
        raise nothing_selected(chosen.num_taken, int(scored.usable_N.sum()))
    audited = audit_ranking(run.spec, plan, store, scored, scores, chosen, curvature_facts.get("lambda"))
    ends = [*chosen.highest, *chosen.lowest]
    contribution_EQ = explain_ends(plan, store, folding, targets.weight_Q, targets.set_Q, ends) if folding else None
    used = _used(run.spec, gpu_seconds, gpu)
    reduced = Reduced(
        run, plan, store, targets, scored, scores, chosen, curvature_facts, audited, contribution_EQ, used
    )
    if run.spec.evaluation:
        reduced = replace(reduced, evaluation=_evaluate(reduced, run.spec.evaluation))
    return publish(reduced, output, folder)


def _used(spec: RunSpec, gpu_seconds: int | None, gpu: str | None) -> Used | None:
    if gpu_seconds is None:
        return None
    gpu_hours = gpu_seconds / 3600
    return Used(gpu_hours=round(gpu_hours, 4), gpu=gpu, price=spec.price_of(gpu_hours))


def _directions(spec: RunSpec, plan: Plan, store: Store) -> tuple[Targets, Directions, Folding | None]:
    """The targets, and what candidates are scored along. Of hidden states nothing is folded."""
    if spec.scoring.is_forward_only:
        return *wanted_responses(spec, plan, store), None
    targets = weigh_targets(spec, plan, store)
    folding = read_folding(spec, plan, store, targets.layers)
    return targets, folding(targets.directions_KLPP), folding


def _evaluate(reduced: Reduced, evaluation: EvaluationSpec) -> dict[str, Any]:
    """The selection compared with its labels. A label never ends a selection: where the ranked rows allow no figures, which no
    plan can foresee, only `reason` is there and names the cause."""
    try:
        return compare(reduced.outcome(), reduced.plan, reduced.store, reduced.run.spec, evaluation)
    except RequestError as error:
        return {"reason": error.what}


def audit_ranking(
    spec: RunSpec, plan: Plan, store: Store, scored: Scored, scores: Column, chosen: Selected, lam: float | None
) -> dict[str, Any] | None:
    """The sample scored with the audit's projection along a direction of its own, and how far the two rankings agree.

    None where the audit is switched off. `token_share`: of all response tokens that the run asks for, those that the audit
    takes through the model again: its sample's.

    Args:
        lam: the job's λ. The mean eigenvalue falls as the dims grow, so the same `damping` would be another λ here.
    """
    if plan.audit is None:
        return None
    as_audit = audit_spec(spec)
    rows = np.array(plan.audit.positions, np.int64)
    usable_N = scored.usable_N[rows]
    figures = audit.too_few(int(usable_N.sum()))
    targets = sum_targets(as_audit, plan, plan.audit, store)
    tokens_N = scored.tokens.at(rows)
    if usable_N.sum() >= audit.MIN_ROWS:
        audited_plan = plan.model_copy(update={"extractor": plan.audit.extractor, "factors": plan.audit.factors})
        directions_KD, _ = fold_directions(as_audit, audited_plan, store, targets.layers, targets.directions_KLPP, lam)
        audit_scores_N, tokens_N = score_sample(as_audit, plan.audit, store, targets.layers, directions_KD)
        # A row may fit into memory at one size of its sketches and not at the other.
        usable_N = usable_N & (tokens_N > 0)
        ranked = int(scored.usable_N.sum()) - int(chosen.duplicate_N.sum())
        figures = audit.agreement(
            scores.at(rows)[usable_N],
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
        "examples": len(rows),
        "usable": int(usable_N.sum()),
        "dim": as_audit.extraction.projection.dim,
        "seed": as_audit.extraction.projection.seed,
        "token_share": audit_tokens / (audit_tokens + own_tokens),
        **figures,
    }
