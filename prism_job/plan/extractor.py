"""The extractor digest covers everything that changes a number in a row: not batch sizes, unit sizes, paths or world sizes.

The losses of a preference model have a digest of their own, of what changes a loss.
"""

from typing import Any

from prism_job import projection
from prism_job.plan.attention import attention_backend
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec
from prism_job.spec.extraction import ExtractionSpec
from prism_job.spec.model import ModelSpec, naming_preference_model
from prism_job.storage import model_files
from prism_job.store import shards

SHARING = frozenset({"zamba", "zamba2"})
"""`model_type` of the models in which several modules share a weight: versions before 0.2 wrote the row of one module alone."""

MASK_VERSION = 2
"""Of the rules that decide which tokens carry loss. 1, which stores before 0.2 do not name, read some rows wrongly: it learnt
empty turns and a second BOS, and knew neither `weight` nor `chat_template_kwargs`."""

HIDDEN_STATES = "last hidden states, weighted by position/1"
"""Rows of `score: representation`. The version changes with the meaning of a number in them."""

TEMPLATE_DATE = "2025-01-01"
"""The date that chat templates get as today's: a row must not depend on the day of its extraction."""


def extractor_parts(spec: RunSpec) -> dict[str, Any]:
    """What the digest covers, as the plan and the manifest list it."""
    if spec.scoring.is_forward_only:
        return {**_loss_parts(spec.model, spec.extraction), "rows": HIDDEN_STATES}
    return {
        **_loss_parts(spec.model, spec.extraction),
        "projection_version": projection.VERSION,
        # Only for bfloat16: float32 rows kept their numbers when this was added, and stores of them their digest.
        **({"products": spec.model.product_dtype} if spec.model.product_dtype != "float32" else {}),
        # Only for these: rows of others were right before.
        **(
            {"shared_weights": "summed"}
            if model_files.model_types(spec.model.uri, spec.model.revision) & SHARING
            else {}
        ),
        "layers": list(spec.extraction.layers),
        **projection_and_codec(spec),
    }


def preference_parts(spec: RunSpec) -> dict[str, Any] | None:
    """What the digest of `scoring.preferenceModel` covers: all that changes a loss. None where it is not set."""
    if spec.scoring.preference_model is None:
        return None
    with naming_preference_model():
        return _loss_parts(spec.scoring.preference_model, spec.extraction)


def _loss_parts(model: ModelSpec, extraction: ExtractionSpec) -> dict[str, Any]:
    return {
        "format": shards.FORMAT,
        "model": model_files.identify(model.uri, model.revision),
        "adapter": model_files.identify(model.adapter, is_adapter=True) if model.adapter else None,
        "dtype": model.dtype,
        # Only where set: all other stores keep their digest.
        **({"quantization": model.quantization} if model.quantization else {}),
        "attention": attention_backend(model),
        "loss_on": extraction.loss_on,
        "mask": MASK_VERSION,
        "template_date": TEMPLATE_DATE,
        "max_length": extraction.max_length,
    }


def extractor_digest(parts: dict[str, Any]) -> str:
    """The digest under which the shards of these `extractor_parts`, or `preference_parts`, lie."""
    return digest(parts)


def projection_and_codec(spec: RunSpec) -> dict[str, Any]:
    """The parts that differ between a run and its audit."""
    projected, codec = spec.extraction.projection, spec.extraction.codec
    return {
        "projection": projected.model_dump(),
        "codec": {"kind": codec.kind, "dims": codec.dims} if codec.kind == "sign" else {"kind": codec.kind},
    }


def audit_spec(spec: RunSpec) -> RunSpec:
    """The spec of the audit's rows: another seed, twice the dims.

    So each source of noise in a row (projection, folding, signs) is drawn again, with half its variance.
    """
    projected, codec = spec.extraction.projection, spec.extraction.codec
    extraction = spec.extraction.model_copy(
        update={
            "projection": projected.model_copy(update={"dim": 2 * projected.dim, "seed": (projected.seed + 1) % 2**63}),
            "codec": codec.model_copy(update={"dims": 2 * codec.dims}),
        }
    )
    return spec.model_copy(update={"extraction": extraction})
