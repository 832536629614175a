"""The reduce stage: weigh the targets, merge factors, apply curvature, fold, score, select, publish.

Streams the shards; of a candidate it holds the score in memory, a few numbers more in scratch files, never its row.

Shapes: N candidates in plan order, L layers, P projected dims a side, D stored dims.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_job import projection
from prism_job.errors import RequestError
from prism_job.plan import Plan, check_bad_fraction, read_plan
from prism_job.reduce import curvature, manifest
from prism_job.reduce.preference import Targets, weigh_targets
from prism_job.reduce.publish import Reduced, publish
from prism_job.reduce.scoring import score_candidates
from prism_job.reduce.selection import select
from prism_job.spec import RunSpec, SelectionRun
from prism_job.storage.objects import Store, open_store


def reduce(run: SelectionRun) -> dict[str, Any]:
    """Publish the selection that spec and store give. Returns the last words.

    Raises:
        RequestError: no plan.
        DataError: a shard is missing or damaged, too many bad rows, or a damaged selection is in the way.
    """
    plan = read_plan(run)
    output, store = open_store(run.spec.output), open_store(run.spec.store)
    folder = manifest.folder_key(run, manifest.selection_id(run, plan))
    published = manifest.find_published(output, folder)
    if published is not None:
        return {**published.manifest.outcome(published.uri), "unchanged": True}

    targets = weigh_targets(run.spec, plan, store)
    direction_D, curvature_facts = fold_direction(run.spec, plan, store, targets)
    scored = score_candidates(run.spec, plan, store, direction_D)
    _give_back_freed_memory()
    check_bad_fraction([*plan.quarantine, *scored.quarantined], int(scored.usable_N.sum()), run.spec)
    chosen = select(scored.scores_N, scored.ids, scored.tokens, scored.usable_N, run.spec.selection)
    if not len(chosen.order):
        what = (
            f"nothing would be selected: the budget takes {chosen.num_taken} of {int(scored.usable_N.sum())} examples"
        )
        raise RequestError(what, where="spec.selection", fix="widen the budget, or drop less")
    return publish(Reduced(run, plan, store, targets, scored, chosen, curvature_facts), output, folder)


def _give_back_freed_memory() -> None:
    """Let what the shards took, and from now on whatever is freed, go back to the machine. Changes no number.

    glibc keeps freed blocks of up to 32 MB, in each thread, and pyarrow's own allocator keeps more: together 100 MB that nobody
    used, measured at a million rows. While shards are read that is right (without it reading was a third as fast), but not for
    the arrays that ranking and writing take once. Other C libraries lack these settings.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**21)
        libc.malloc_trim(0)


def fold_direction(
    spec: RunSpec, plan: Plan, store: Store, targets: Targets
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(H + λI)⁻¹ g in the unfolded space, then in the form the rows are stored in. Float64 [D], and facts to publish."""
    direction = targets.direction_LPP
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind == "kfac":
        factors = curvature.merge_factors(plan, store, spec.extraction.projection.dim)
        damping = spec.scoring.curvature.damping
        lam = curvature.damping_value(factors, damping)
        facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
        direction = curvature.solve(direction, factors, damping)
    if spec.extraction.codec.kind == "float16":
        return direction.reshape(-1), facts
    flat = direction.reshape(len(targets.layers), -1)
    seed, dims = spec.extraction.projection.seed, spec.extraction.codec.dims
    return projection.fold(flat, targets.layers, seed, dims), facts
