"""The extractor digest: everything that changes a number in a row. Batch sizes, unit sizes, paths and world sizes do not."""

from __future__ import annotations

from typing import Any

from prism_job import projection
from prism_job.spec.document import RunSpec
from prism_job.storage import model_files
from prism_job.store import shards

TEMPLATE_DATE = "2025-01-01"
"""What chat templates that print today's date are told: a row must not depend on the day of its extraction."""


def extractor_parts(spec: RunSpec) -> dict[str, Any]:
    """Everything that changes a number in a row. Not: batch sizes, unit sizes, paths, world sizes."""
    extraction = spec.extraction
    return {
        "format": shards.FORMAT,
        "projection_version": projection.VERSION,
        "model": model_files.identify(spec.model.uri, spec.model.revision),
        "adapter": model_files.identify(spec.model.adapter, is_adapter=True) if spec.model.adapter else None,
        "dtype": spec.model.dtype,
        # Told of bfloat16 alone: float32 rows kept their numbers, and stores of them their digest.
        **({"products": spec.model.product_dtype} if spec.model.product_dtype != "float32" else {}),
        "attention": spec.model.attention,
        "loss_on": "assistant",
        "template_date": TEMPLATE_DATE,
        "max_length": extraction.max_length,
        "layers": list(extraction.layers),
        **projection_and_codec(spec),
    }


def projection_and_codec(spec: RunSpec) -> dict[str, Any]:
    projected, codec = spec.extraction.projection, spec.extraction.codec
    return {
        "projection": projected.model_dump(),
        "codec": {"kind": codec.kind, "dims": codec.dims} if codec.kind == "sign" else {"kind": codec.kind},
    }


def audit_spec(spec: RunSpec) -> RunSpec:
    """The request in the audit's form: another seed, twice the dims. So each source of noise in a row (projection, folding,
    signs) is drawn anew, with half its variance."""
    projected, codec = spec.extraction.projection, spec.extraction.codec
    extraction = spec.extraction.model_copy(
        update={
            "projection": projected.model_copy(update={"dim": 2 * projected.dim, "seed": (projected.seed + 1) % 2**63}),
            "codec": codec.model_copy(update={"dims": 2 * codec.dims}),
        }
    )
    return spec.model_copy(update={"extraction": extraction})
