"""The section `spec.extraction`: how an example becomes a row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from prism_job.spec.section import Section


class ProjectionSpec(Section):
    """Two-sided Rademacher projection of each layer's gradient to dim × dim numbers."""

    dim: int = Field(64, ge=2, le=512, description="Dims a side; 64 keeps K-FAC useful and costs 9 % of the FLOPs.")
    seed: int = Field(0, ge=0, lt=2**63, description="Another seed is another projection and reads no old shard.")


class CodecSpec(Section):
    """How a projected gradient becomes bytes."""

    kind: Literal["sign", "float16"] = Field(
        "sign", description="sign: folded, one bit a dim, a scale for each 256. float16: unfolded, the plain twin."
    )
    dims: int = Field(
        65_536, ge=256, le=2**24, description="Dims after folding, a power of two; used by codec sign only."
    )

    @model_validator(mode="after")
    def _power_of_two(self) -> CodecSpec:
        if self.dims & (self.dims - 1):
            raise ValueError(f"dims is {self.dims}; folding needs a power of two, e.g. 32768 or 65536")
        return self


class DeepSpeedSpec(Section):
    """How the weights are spread over the ranks of a world."""

    stage: Literal[0, 3] = Field(
        0, description="0: each rank holds the model. 3: ZeRO-3, each rank of a world holds a share."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where ZeRO-3 keeps weights not in use: on the device, in the node's memory, or on its disk.",
    )

    @model_validator(mode="after")
    def _offload_needs_shares(self) -> DeepSpeedSpec:
        if self.offload != "none" and self.stage != 3:
            raise ValueError(f"offload: {self.offload} needs stage: 3")
        return self


class ExtractionSpec(Section):
    """Everything about how a candidate becomes a row."""

    max_length: int = Field(2048, ge=2, le=2**20, description="Tokens an example is cut to, from its end.")
    tokens_per_batch: int = Field(
        4096,
        ge=1,
        le=2**24,
        description="Tokens, padding counted, of a micro-batch. Speed and memory only (135M parameters in float32 take "
        "1 to 2 MB a token); it changes no row. On a CPU 512 is faster, on a large GPU more.",
    )
    examples_per_shard: int = Field(
        1024, ge=1, le=65_536, description="Rows of a work unit: what a kill can cost, and what one object holds."
    )
    layers: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(min_length=1, max_length=64)
    ] = Field(("*",), description="Globs over names of linear layers; '*' is every one but the head, or the adapter's.")
    projection: ProjectionSpec = Field(ProjectionSpec(), description="The random projection.")
    codec: CodecSpec = Field(CodecSpec(), description="The form of a stored row.")
    deepspeed: DeepSpeedSpec = Field(DeepSpeedSpec(), description="Sharding of the weights.")
    step_timeout_seconds: float = Field(
        600, gt=0, description="A micro-batch that takes longer is taken for a hang: its rank ends with exit code 75."
    )
