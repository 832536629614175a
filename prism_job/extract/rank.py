"""One rank of the extract stage: loads a model, writes the shards of its tasks, and frees the model again.

Does not know which models there are, or in which order they come.
"""

import gc
from dataclasses import dataclass

import torch

from prism_job.extract.batch_size import BatchSize
from prism_job.extract.capture.layers import captured_layers, report
from prism_job.extract.capture.probe import used_layers
from prism_job.extract.capture.representations import refuse_looking_ahead
from prism_job.extract.distributed.watchdog import Watchdog
from prism_job.extract.distributed.world import World, release_weights, shard_weights, zero3_settings
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.extract.load.model_config import load_config, refuse_long_texts, refuse_unsuitable_settings
from prism_job.extract.tasks import Task
from prism_job.extract.uploads import Uploads
from prism_job.extract.work_unit import Preference
from prism_job.extract.worker import Worker
from prism_job.plan.plan import Plan
from prism_job.progress import Meter, event
from prism_job.spec.document import SelectionRun
from prism_job.spec.model import ModelSpec
from prism_job.storage.address import open_store


@dataclass
class Rank:
    """One rank, and what it has done."""

    run: SelectionRun
    plan: Plan
    world: World
    watchdog: Watchdog
    meter: Meter
    preference: Preference
    units: int = 0  # that it wrote
    num_cut: int = 0  # candidates and pairs of the reference that go on beyond maxLength
    seconds: float = 0.0  # of the passes
    audit_seconds: float = 0.0  # of these, the passes that only the audit needs

    def extract(self, spec: ModelSpec, extractor: str, tasks: list[Task], *, with_gradients: bool) -> None:
        """Write this rank's part of these tasks, all of one model. For its errors see `stages/extract.py`.

        Args:
            extractor: digest under which the shards lie.
            with_gradients: else the tasks want losses or hidden states, and each pass is forward only.
        """
        self.watchdog.loading()
        self._extract(spec, extractor, tasks, with_gradients)
        gc.collect()  # hooks and modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _extract(self, spec: ModelSpec, extractor: str, tasks: list[Task], with_gradients: bool) -> None:
        extraction, world = self.run.spec.extraction, self.world
        event("loading", model=spec.uri, device=str(world.device))
        load_config(spec)  # refuses what cannot be captured before gigabytes are downloaded
        tokenizer = load_tokenizer(spec)
        settings = zero3_settings(extraction.deepspeed, spec.dtype) if world.sharded else None
        model = load_model(spec, world.device, settings)
        layers = captured_layers(model, extraction.layers) if with_gradients else None
        engine = shard_weights(model, settings) if settings else None  # kept: its hooks gather the weights
        model = model if engine is None else engine.module
        if layers:
            layers = used_layers(model, layers, world.any_rank)
            refuse_unsuitable_settings(extraction, model.config, len(layers.weights))
            if not world.rank:
                report(layers)
        else:
            refuse_long_texts(extraction, model.config)
            refuse_looking_ahead(model, world.device)

        store = open_store(self.run.spec.store)
        worker = Worker(
            self.run.spec,
            self.plan,
            world,
            store,
            tokenizer,
            model,
            layers,
            self.preference,
            BatchSize(self.run, extractor, world),
            self.meter,
            self.watchdog,
            Uploads(store),
        )
        worker.run(world.assign(tasks), first=tasks[0])
        if engine is not None:
            release_weights(engine)
        self.units += worker.uploads.num_written
        self.num_cut += worker.num_cut if extractor == self.plan.extractor else 0
        self.seconds += worker.seconds
        self.audit_seconds += worker.audit_seconds
