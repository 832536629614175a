"""The section `spec.extraction`: how an example becomes a row."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from prism_job.spec.section import Section


class ProjectionSpec(Section):
    """Two-sided Rademacher projection of each layer's gradient to dim × dim numbers."""

    dim: int = Field(
        64,
        ge=2,
        le=512,
        description="Projected dimensions per side. 64 is enough for K-FAC and costs 9 % of the FLOPs.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the projection. Another seed extracts everything again.")


class CodecSpec(Section):
    """How a projected gradient is stored."""

    kind: Literal["sign", "float16"] = Field(
        "sign",
        description="sign: folded, one bit per dimension and a scale per 256. float16: not folded, much larger; to compare.",
    )
    dims: int = Field(
        65_536,
        ge=256,
        le=2**24,
        description="Dimensions after folding, a power of two; codec sign only. 65536 are about 8.7 kB a row.",
    )

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.dims & (self.dims - 1):
            raise ValueError(f"dims is {self.dims}; it must be a power of two, e.g. 32768 or 65536")
        return self


class DeepSpeedSpec(Section):
    """How the weights are distributed over the ranks of a world."""

    stage: Literal[0, 3] = Field(
        0,
        description="0: each rank holds the whole model. 3: ZeRO-3, each rank holds a share, for models larger than a GPU.",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where ZeRO-3 keeps weights not in use. none: on the GPU. cpu: in the node's memory. nvme: on its disk.",
    )

    @model_validator(mode="after")
    def _offload_needs_shares(self) -> Self:
        if self.offload != "none" and self.stage != 3:
            raise ValueError(f"offload: {self.offload} needs stage: 3")
        return self


AUTO: Literal["auto"] = "auto"
LARGEST_BATCH = 2**24
EXPECTED_BATCH = 4096
"""Of `auto`, in predictions."""


def _check_tokens(value: Any) -> Any:
    """As an API server, which takes null for a field that may be text or a number."""
    if value is None or value == AUTO:
        return AUTO
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 1 <= value <= LARGEST_BATCH and value % 1 == 0:
        return value
    raise ValueError(f"must be auto, or a whole number from 1 to {LARGEST_BATCH}, without quotes")


LossOn = Literal["assistant", "last"]

TokensPerBatch = Annotated[
    Annotated[int, Field(ge=1, le=LARGEST_BATCH)] | Literal["auto"], BeforeValidator(_check_tokens)
]


class ExtractionSpec(Section):
    """How an example becomes a row of the gradient store."""

    max_length: int = Field(
        2048,
        ge=2,
        le=2**20,
        description="Tokens; longer examples are truncated at the end. A row without a response token left is unusable.",
    )
    loss_on: LossOn = Field(
        "assistant",
        description="Turns of a conversation that carry loss. assistant: each assistant turn. last: only the last one, for "
        "chat templates that render earlier turns differently (those that drop their reasoning).",
    )
    tokens_per_batch: TokensPerBatch = Field(
        AUTO,
        description="Tokens of a micro-batch, with padding. Affects only speed and memory (135M parameters in float32 take "
        "1 to 2 MB per token), and rows by rounding alone. auto: a GPU measures a few sizes in seconds and keeps the best "
        "beside the plan, a CPU takes 1024. A number: two runs on the same hardware give the same bits even with two stores.",
    )
    examples_per_shard: int = Field(
        1024,
        ge=1,
        le=65_536,
        description="Rows of a work unit, which is one object of the store. A killed rank loses at most its current unit.",
    )
    layers: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(min_length=1, max_length=64)
    ] = Field(
        ("*",),
        description="Globs over the names of linear layers, routers and experts' parameters. '*' is all except the output "
        "head, or those of the adapter. '!GLOB' leaves out what it matches.",
    )
    projection: ProjectionSpec = Field(ProjectionSpec(), description="The random projection.")
    codec: CodecSpec = Field(CodecSpec(), description="How a row is stored.")
    deepspeed: DeepSpeedSpec = Field(DeepSpeedSpec(), description="Distribution of the weights over ranks.")
    step_timeout_seconds: float = Field(
        600,
        gt=0,
        description="Seconds; a micro-batch that takes longer counts as a hang, and its rank ends with exit code 75.",
    )

    @property
    def expected_tokens_per_batch(self) -> int:
        """For predictions made where the model cannot be run."""
        return EXPECTED_BATCH if isinstance(self.tokens_per_batch, str) else self.tokens_per_batch
