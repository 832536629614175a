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
from prism_job.plan import Plan, check_bad_fraction, read_plan
from prism_job.reduce import curvature, manifest, memory
from prism_job.reduce.evaluate import evaluate_unpublished
from prism_job.reduce.preference import weigh_targets
from prism_job.reduce.publish import Reduced, publish
from prism_job.reduce.scoring import combine, score_candidates
from prism_job.reduce.selection import select
from prism_job.spec import RunSpec, SelectionRun
from prism_job.storage.objects import Store, open_store


def reduce(run: SelectionRun) -> dict[str, Any]:
    """Publish the selection that spec and store give. Returns the last words.

    Raises:
        RequestError: no plan, or nothing would be selected.
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
    directions_KD, curvature_facts = fold_directions(run.spec, plan, store, targets.layers, targets.directions_KLPP)
    scored = score_candidates(run.spec, plan, store, directions_KD)
    scores = combine(scored.scores, [one.signed_weight for one in run.spec.targets.as_sets()])
    memory.give_back_what_is_freed()
    check_bad_fraction([*plan.quarantine, *scored.quarantined], int(scored.usable_N.sum()), run.spec)
    chosen = select(scores.part(slice(0, len(scores))), scored.ids, scored.tokens, scored.usable_N, run.spec.selection)
    if not len(chosen.order):
        what = (
            f"nothing would be selected: the budget takes {chosen.num_taken} of {int(scored.usable_N.sum())} examples"
        )
        raise RequestError(what, where="spec.selection", fix="widen the budget, or drop less")
    found = Reduced(run, plan, store, targets, scored, scores, chosen, curvature_facts)
    if asked := run.spec.evaluation:
        found = replace(found, evaluation=evaluate_unpublished(found, asked))
    return publish(found, output, folder)


def fold_directions(
    spec: RunSpec, plan: Plan, store: Store, layers: list[str], directions_KLPP: NDArray[np.float64]
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(H + λI)⁻¹ g of each in the unfolded space, then in the form the rows are stored in.

    Float64 [K, D], and facts to publish.
    """
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind == "kfac":
        factors = curvature.merge_factors(plan, store, spec.extraction.projection.dim)
        damping = spec.scoring.curvature.damping
        lam = curvature.damping_value(factors, damping)
        facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
        directions_KLPP = curvature.solve(directions_KLPP, factors, damping)
    if spec.extraction.codec.kind == "float16":
        return directions_KLPP.reshape(len(directions_KLPP), -1), facts
    flat_KLM = directions_KLPP.reshape(*directions_KLPP.shape[:2], -1)
    seed, dims = spec.extraction.projection.seed, spec.extraction.codec.dims
    return np.stack([projection.fold(flat_LM, layers, seed, dims) for flat_LM in flat_KLM]), facts
