"""The extract stage: for every unit that the store lacks, its rows through the model, and one atomic put a shard."""

import os
from typing import Any

from prism_job.errors import DataError
from prism_job.extract.batch_size import BatchSize
from prism_job.extract.capture.layers import captured_layers, report
from prism_job.extract.capture.probe import used_layers
from prism_job.extract.distributed.spawner import spawn_ranks
from prism_job.extract.distributed.watchdog import Watchdog
from prism_job.extract.distributed.world import Topology, World, shard_weights, zero3_settings
from prism_job.extract.model import load_model, load_tokenizer
from prism_job.extract.model_config import load_config, refuse_unsuitable_settings
from prism_job.extract.tasks import missing_tasks
from prism_job.extract.uploads import Uploads
from prism_job.extract.worker import Worker
from prism_job.plan.extractor import extractor_digest, extractor_parts
from prism_job.plan.plan import Plan, read_plan
from prism_job.progress import Meter, event
from prism_job.score.preference import preference
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage.address import open_store


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
        return {"units": 0, "examples": 0, "tokens": 0, "cut": 0, "seconds": 0.0, "auditSeconds": 0.0}
    if "RANK" not in os.environ:
        _refuse_changed_model(run.spec, plan)
        topology = topology.with_ranks_of_this_node()
        if topology.ranks * topology.nodes > 1:
            return spawn_ranks(arguments, topology)
    with Watchdog(run.spec.extraction.step_timeout_seconds) as watchdog:
        return _extract_as_rank(run, plan, topology, watchdog)


def _extract_as_rank(run: SelectionRun, plan: Plan, topology: Topology, watchdog: Watchdog) -> dict[str, Any]:
    spec, deepspeed = run.spec, run.spec.extraction.deepspeed
    world = World.init(topology, deepspeed, spec.extraction.step_timeout_seconds)
    event("loading", model=spec.model.uri, device=str(world.device))
    load_config(spec.model)  # refuses what cannot be captured before gigabytes are downloaded
    tokenizer = load_tokenizer(spec.model)
    settings = zero3_settings(deepspeed, spec.model.dtype) if world.sharded else None
    model = load_model(spec.model, world.device, settings)
    layers = captured_layers(model, spec.extraction.layers)
    engine = shard_weights(model, settings) if settings else None  # kept: its hooks gather the weights
    model = model if engine is None else engine.module
    layers = used_layers(model, layers, world.any_rank)
    refuse_unsuitable_settings(spec.extraction, model.config, len(layers.weights))
    if not world.rank:
        report(layers)

    tasks = missing_tasks(spec, plan)
    num_rows = sum(task.unit.num_rows for task in tasks)
    batch_size = BatchSize(run, plan.extractor, world)
    meter = Meter("extract", num_rows)
    store = open_store(spec.store)
    uploads = Uploads(store)
    worker = Worker(
        spec, plan, world, store, tokenizer, model, layers, preference, batch_size, meter, watchdog, uploads
    )
    worker.run(world.assign(tasks), first=tasks[0])
    world.shutdown()
    meter.report()
    return {
        "units": uploads.num_written,
        "examples": meter.done,
        "tokens": meter.tokens,
        "cut": worker.num_cut,
        "seconds": round(worker.seconds, 3),
        "auditSeconds": round(worker.audit_seconds, 3),
    }


def _refuse_changed_model(spec: RunSpec, plan: Plan) -> None:
    if extractor_digest(extractor_parts(spec)) != plan.extractor:
        fix = "run the plan stage again: it finds what the new extractor lacks"
        raise DataError("the model or the extraction settings are not those of the plan", where=spec.model.uri, fix=fix)
