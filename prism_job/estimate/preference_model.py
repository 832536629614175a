"""What `scoring.preferenceModel` costs: forward passes of the pairs, and its memory, before the reference is loaded."""

from dataclasses import dataclass
from typing import Any

from prism_job.estimate import costs
from prism_job.estimate.model_shape import ModelShape, model_shape
from prism_job.estimate.workload import Pairs, measure_pairs
from prism_job.extract.load.model import load_tokenizer
from prism_job.plan.extractor import naming_preference_model
from prism_job.spec.document import RunSpec
from prism_job.spec.extraction import CodecSpec
from prism_job.spec.model import ModelSpec
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
        peak = gpu.float32_flops if self.model.dtype == "float32" else gpu.matrix_flops
        return self.flops / peak / utilisation / 3600

    def device_bytes(self, tokens: int, stage: int, ranks: int) -> float:
        """Peak bytes of a rank: its weights, those that ZeRO-3 gathers, one layer's activations, the logits and their log."""
        shape, size = self.shape, self.shape.dtype_bytes
        tokens = max(tokens, self.pairs.longest)
        whole = max(2 * shape.largest_block, shape.largest_tensor) if stage == 3 else shape.dequantised
        return (
            shape.weight_bytes / (ranks if stage == 3 else 1)
            + whole * size
            + shape.buffer_bytes
            + 4 * tokens * shape.widest_side * size
            + tokens * self.pairs.supervised_share * shape.vocabulary * (size + 2 * 4)
        )

    def facts(
        self, spec: RunSpec, gpu: costs.Gpu, utilisation: float, topology: costs.Topology | None
    ) -> dict[str, Any]:
        """Plain values. Memory is that in the world of the reference, if there is one, else on one card."""
        tokens = topology.tokens_per_batch if topology else spec.extraction.expected_tokens_per_batch
        offloaded = topology is not None and topology.offload != "none"
        needed = self.device_bytes(tokens, topology.stage if topology else 0, topology.gpus if topology else 1)
        needed -= self.shape.weight_bytes / (topology.gpus if topology else 1) if offloaded else 0
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
    # Nothing of it is captured: which layers the run captures, and how it folds rows, is about the reference.
    extraction = spec.extraction.model_copy(
        update={"layers": ("*",), "codec": CodecSpec.model_construct(kind="float16")}
    )
    with naming_preference_model():
        shape = model_shape(spec.model_copy(update={"model": model, "extraction": extraction}))
        path = model_files.fetch_config_and_tokenizer(model.uri, model.revision)
        return PreferenceWork(model, shape, measure_pairs(spec, load_tokenizer(model, path), sample))
