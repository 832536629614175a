"""What `scoring.preferenceModel` costs: forward passes of the pairs, and its memory, before the reference is loaded."""

from dataclasses import dataclass
from typing import Any

from prism_job.estimate import costs
from prism_job.estimate.model_shape import ModelShape, model_shape
from prism_job.estimate.workload import Pairs, measure_pairs
from prism_job.extract.load.model import load_tokenizer
from prism_job.spec.document import RunSpec
from prism_job.spec.model import ModelSpec, naming_preference_model
from prism_job.spec.ranking import ScoringSpec
from prism_job.storage import model_files


@dataclass(frozen=True)
class PreferenceWork:
    """The model, its shape, and what goes through it."""

    model: ModelSpec
    shape: ModelShape
    pairs: Pairs

    @property
    def flops(self) -> float:
        return costs.forward_flops(self.shape, self.pairs.load)

    def gpu_hours(self, gpu: costs.Gpu, utilisation: float) -> float:
        return costs.gpu_hours(costs.Flops(self.flops, 0, 0, 0), gpu, self.model, utilisation)

    def facts(
        self, spec: RunSpec, gpu: costs.Gpu, utilisation: float, topology: costs.Topology | None
    ) -> dict[str, Any]:
        """Plain values. Memory is that in the world of the reference, if there is one, else on one card."""
        tokens = topology.tokens_per_batch if topology else spec.extraction.expected_tokens_per_batch
        world: tuple[int, costs.Offload, int] = (
            (topology.stage, topology.offload, topology.gpus) if topology else (0, "none", 1)
        )
        needed = costs.forward_memory(self.shape, self.pairs, *world, tokens).device
        return {
            "model": self.model.uri,
            "dtype": self.model.dtype,
            "quantization": self.model.quantization,
            "parameters": self.shape.parameters,
            "weight_bytes": round(self.shape.weight_bytes),
            "tokens": round(self.pairs.load.tokens),
            "flops": self.flops,
            "gpu_hours": self.gpu_hours(gpu, utilisation),
            "device_bytes": round(needed),
            "fits": needed <= gpu.memory_bytes * (1 - costs.HEADROOM),
        }


def measure_preference(spec: RunSpec, sample: int = 1) -> PreferenceWork | None:
    """None where the document names no preference model. Reads its config and tokenizer, and the targets; no weights.

    Raises RequestError, DataError: what plan and extract would raise, as far as that can be known without weights.
    """
    model = spec.scoring.preference_model
    if model is None:
        return None
    # Like a model of hidden states, it makes forward passes alone: nothing is captured, so no layer can be refused.
    scoring = ScoringSpec(score="representation")
    with naming_preference_model():
        shape = model_shape(spec.model_copy(update={"model": model, "scoring": scoring}))
        path = model_files.fetch_config_and_tokenizer(model.uri, model.revision)
        return PreferenceWork(model, shape, measure_pairs(spec, load_tokenizer(model, path), sample))
