"""The extract stage: for every unit that the store lacks, its rows through the model, and one atomic put a shard."""

import os
import time
from typing import Any

from prism_job.errors import DataError
from prism_job.extract.distributed.spawner import spawn_ranks
from prism_job.extract.distributed.watchdog import Watchdog
from prism_job.extract.distributed.world import Topology, World
from prism_job.extract.rank import Rank
from prism_job.extract.tasks import missing_tasks, preference_tasks
from prism_job.plan.extractor import extractor_digest, extractor_parts, preference_parts
from prism_job.plan.plan import Plan, read_plan
from prism_job.progress import Meter
from prism_job.score.preference import preference
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.spec.model import naming_preference_model


def extract(run: SelectionRun, topology: Topology, arguments: list[str]) -> dict[str, Any]:
    """Write the shards that the plan's store lacks: in this process, or in one process a rank. Returns the termination message.

    Args:
        arguments: those of this stage, handed to each rank as they are.

    Raises:
        RequestError: no plan, a model that cannot be captured, or an audit that does not fit into memory.
        DataError: the model changed since the plan; non-finite weights or gradients; too many bad rows; an unusable target.
        TransientError: a pass of ranks that share the weights does not fit into memory.
        RankFailed: a rank failed.
        Stopped: SIGTERM came; the current micro-batch is finished, the current unit is lost.
    """
    plan = read_plan(run)
    if not plan.num_missing:
        return {"units": 0, "examples": 0, "tokens": 0, "cut": 0, "seconds": 0.0, "auditSeconds": 0.0, "gpuSeconds": 0}
    if "RANK" not in os.environ:
        started = time.monotonic()
        _refuse_changed_model(run.spec, plan)
        topology = topology.with_ranks_of_this_node()
        if topology.ranks * topology.nodes > 1:
            outcome = spawn_ranks(arguments, topology)
        else:
            outcome = _extract_watched(run, plan, topology)
        return {**outcome, **topology.gpu_use(time.monotonic() - started)}
    return _extract_watched(run, plan, topology)


def _extract_watched(run: SelectionRun, plan: Plan, topology: Topology) -> dict[str, Any]:
    with Watchdog(run.spec.extraction.step_timeout_seconds) as watchdog:
        return _extract_as_rank(run, plan, topology, watchdog)


def _extract_as_rank(run: SelectionRun, plan: Plan, topology: Topology, watchdog: Watchdog) -> dict[str, Any]:
    spec = run.spec
    world = World.init(topology, spec.extraction.deepspeed, spec.extraction.step_timeout_seconds)
    of_preference, of_reference = preference_tasks(spec, plan), missing_tasks(spec, plan)
    meter = Meter("extract", sum(task.unit.num_rows for task in [*of_preference, *of_reference]))
    rank = Rank(run, plan, world, watchdog, meter, preference)
    # One model after the other: two are never in memory together.
    if plan.preference and spec.scoring.preference_model and of_preference:
        with naming_preference_model():
            rank.extract(spec.scoring.preference_model, plan.preference.extractor, of_preference, with_gradients=False)
    if of_reference:
        rank.extract(spec.model, plan.extractor, of_reference, with_gradients=not spec.scoring.is_forward_only)
    world.shutdown()
    meter.report()
    return {
        "units": rank.units,
        "examples": meter.done,
        "tokens": meter.tokens,
        "cut": rank.num_cut,
        "seconds": round(rank.seconds, 3),
        "auditSeconds": round(rank.audit_seconds, 3),
    }


def _refuse_changed_model(spec: RunSpec, plan: Plan) -> None:
    of_preference = plan.preference.extractor if plan.preference else None
    for model, parts, expected in (
        (spec.model, extractor_parts(spec), plan.extractor),
        (spec.scoring.preference_model, preference_parts(spec), of_preference),
    ):
        if model and parts and extractor_digest(parts) != expected:
            fix = "run the plan stage again: it finds what the new extractor lacks"
            raise DataError("the model or the extraction settings are not those of the plan", where=model.uri, fix=fix)
