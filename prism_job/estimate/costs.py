"""Model shape and workload -> FLOPs, bytes of memory, hours, and a topology that fits. Does not import torch or read files.

One multiply and add counts as two FLOPs. A micro-batch of t tokens, padding counted; P projected dims a side.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from prism_job.estimate.model_shape import ModelShape
from prism_job.estimate.workload import Load, Pairs, Workload
from prism_job.plan.units import PAIRS_PER_UNIT
from prism_job.spec.document import RunSpec
from prism_job.spec.extraction import AUTO
from prism_job.spec.model import ModelSpec


@dataclass(frozen=True)
class Gpu:
    """Published figures of a card: dense matrix peak in bfloat16 (float16 is the same) and float32 peak, FLOP/s; bytes."""

    matrix_flops: float
    float32_flops: float
    memory_bytes: float


GPUS = {
    # NVIDIA A100 Tensor Core GPU datasheet (2022), A100 80GB SXM: BFLOAT16 312 TFLOPS, FP32 19.5 TFLOPS, 80 GB.
    "A100-80GB": Gpu(312e12, 19.5e12, 80e9),
    # NVIDIA H100 Tensor Core GPU datasheet, H100 SXM: BFLOAT16 1,979 TFLOPS with sparsity (half without), FP32 67, 80 GB.
    "H100": Gpu(989.5e12, 67e12, 80e9),
    # NVIDIA H200 Tensor Core GPU datasheet, H200 SXM: BFLOAT16 1,979 TFLOPS with sparsity, FP32 67, 141 GB.
    "H200": Gpu(989.5e12, 67e12, 141e9),
    # NVIDIA L4 Tensor Core GPU datasheet: BFLOAT16 242 TFLOPS with sparsity, FP32 30.3 TFLOPS, 24 GB.
    "L4": Gpu(121e12, 30.3e12, 24e9),
    # NVIDIA L40S GPU datasheet: BFLOAT16 362.05 TFLOPS without sparsity, FP32 91.6 TFLOPS, 48 GB.
    "L40S": Gpu(362.05e12, 91.6e12, 48e9),
}

HEADROOM = 0.15
"""Share of a card's memory left free for the CUDA context, NCCL's buffers and fragmentation. Chosen, not measured."""

GPUS_PER_NODE = 8
MAX_NODES = 8
"""The largest world that is considered: 64 GPUs hold any present model."""

LARGEST_AUTO_BATCH = 2**15
"""The largest of the sizes that extraction tries on a GPU."""

NVME_BUFFERS, NVME_BUFFER_ELEMENTS = 5, 100_000_000
"""DeepSpeed's defaults of offload_param buffer_count and buffer_size; a buffer must hold the largest tensor."""

Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of a load, by part. The projection runs in bfloat16 where the model does, else in float32; sketches, the
    factor sums among them, in float32."""

    forward: float
    backward: float
    projection: float
    sketches: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.projection + self.sketches


def flops_per_token(shape: ModelShape) -> float:
    """Forward, with logits, without what grows with the length of a text."""
    return 2 * (shape.matrices + shape.head) + shape.products.per_token


def forward_flops(shape: ModelShape, load: Load) -> float:
    """2 · matrices · t for products with weights, what was counted of two activations (in attention QKᵀ and AV, the whole
    square, which a masked kernel computes), 2 · head · supervised tokens for the logits."""
    products = shape.products.per_token * load.padded + shape.products.per_square * load.squares
    return 2 * shape.matrices * load.padded + products + 2 * shape.head * load.supervised


def backward_flops(shape: ModelShape, load: Load) -> float:
    """Only gradients of activations: a product with a weight costs as much as forward, one of two activations twice as much
    (in attention dQ, dK, dV and the gradient of the scores). Weight gradients, which would cost as much again, are not
    computed."""
    products = shape.products.per_token * load.padded + shape.products.per_square * load.squares
    return 2 * shape.matrices * load.padded + 2 * products + 2 * shape.head * load.supervised


def projection_flops(shape: ModelShape, dim: int, load: Load) -> float:
    """Over captured weights: 2 · (inputs + outputs) · P a row for both sides."""
    numbers = sum(it.inputs * it.inputs_projected + it.outputs * it.outputs_projected for it in shape.sides.values())
    return 2 * numbers * dim * load.padded


def sketch_flops(shape: ModelShape, dim: int, load: Load, factor_load: Load) -> float:
    """Over captured weights: 2 · P² a row, and 4 · P² in units that carry factors."""
    return shape.sketched_rows * dim**2 * (2 * load.padded + 4 * factor_load.tokens)


def count_flops(shape: ModelShape, spec: RunSpec, work: Workload) -> Flops:
    """FLOPs of the whole extraction into an empty store."""
    if spec.scoring.is_forward_only:
        return Flops(forward_flops(shape, work.load), 0, 0, 0)
    dim, own = spec.extraction.projection.dim, work.pool.plus(work.pairs)
    return Flops(
        forward_flops(shape, work.load),
        backward_flops(shape, work.load),
        projection_flops(shape, dim, own) + projection_flops(shape, 2 * dim, work.audited),
        sketch_flops(shape, dim, own, work.factor_load)
        + sketch_flops(shape, 2 * dim, work.audited, work.audit_factor_load),
    )


def gpu_hours(flops: Flops, gpu: Gpu, model: ModelSpec, utilisation: float) -> float:
    """Hours of one card that reaches `utilisation` of its peaks; what runs in float32 has the float32 peak.

    Not counted: reading data, loading weights, gathering partitioned weights, and memory stalls of products with P columns."""
    peak, product_peak = (
        gpu.float32_flops if dtype == "float32" else gpu.matrix_flops for dtype in (model.dtype, model.product_dtype)
    )
    seconds = (flops.forward + flops.backward) / peak + flops.projection / product_peak
    return (seconds + flops.sketches / gpu.float32_flops) / utilisation / 3600


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank, term by term; `host` and `nvme` are outside the card."""

    weights: float  # its share: parameters / ranks under ZeRO-3, all of them under stage 0, none when offloaded
    gathered: float  # ZeRO-3's whole layers in use: the current block and the next, or the largest tensor if larger; or what is
    # dequantised
    activations: float  # what the backward pass needs of all layers
    logits: float  # of supervised positions: themselves and their gradient in the model's type, thrice float32: a bound
    captured: float  # projected inputs that wait for their gradients, also those for the audit's rows of a pair
    projections: float  # ±1 matrices (2 bytes a sign for bfloat16 models, else 4) and fold tables, of run and audit
    rows: float  # rows of the micro-batch and one layer's sketches; the sums of factors
    workspace: float  # one layer's gradients, for float16 one side in float32, copies of both projected sides
    buffers: float  # of the model, beside its weights
    host: float = 0
    nvme: float = 0

    @property
    def device(self) -> float:
        return sum(asdict(self).values()) - self.host - self.nvme


def activation_bytes(shape: ModelShape, tokens: int, longest: int) -> float:
    """What autograd keeps of `tokens` in texts of at most `longest`, as counted on the meta device. Attention in one kernel
    (sdpa) keeps no probabilities; eager attention keeps t² of each head and layer."""
    return tokens * (shape.kept.per_token + shape.kept.per_square * longest)


def memory_of_rank(
    shape: ModelShape, spec: RunSpec, work: Workload, stage: int, offload: Offload, ranks: int, tokens: int
) -> Memory:
    """Peak bytes of a rank in a world of `ranks` with micro-batches of `tokens` (or one text, if that is longer)."""
    if spec.scoring.is_forward_only:
        hidden = shape.head / shape.vocabulary
        # The hidden states in float32, and their means.
        rows = 4 * hidden * (max(tokens, work.longest) + work.largest_batch)
        return replace(forward_memory(shape, work, stage, offload, ranks, tokens), rows=rows)
    codec, size = spec.extraction.codec, shape.dtype_bytes
    product_size = 4 if spec.model.product_dtype == "float32" else 2
    own_dim = spec.extraction.projection.dim
    dims = [own_dim, 2 * own_dim] if spec.audit.examples else [own_dim]
    dim = dims[-1]  # the audit's sketches are larger; passes over pairs make both
    tokens = max(tokens, work.longest)
    layers, sides = len(shape.sides), sum(it.inputs + it.outputs for it in shape.sides.values())
    most_rows = max(it.rows for it in shape.sides.values())
    share = shape.weight_bytes / (ranks if stage == 3 else 1)
    whole = max(2 * shape.largest_block, shape.largest_tensor) if stage == 3 else shape.dequantised
    folded = codec.dims * dim // own_dim if codec.kind == "sign" else layers * dim**2
    pairs = min(work.largest_batch, 2 * PAIRS_PER_UNIT) * layers * sum(each**2 for each in dims)
    widest_row = max(work.largest_batch * folded, pairs)
    buffered = NVME_BUFFERS * max(NVME_BUFFER_ELEMENTS, shape.largest_tensor) * size
    return Memory(
        weights=share if offload == "none" else 0,
        gathered=whole * size,
        activations=activation_bytes(shape, tokens, work.longest),
        logits=tokens * work.supervised_share * shape.vocabulary * (size + 3 * 4),
        captured=tokens * shape.sketched_rows * sum(dims) * product_size,
        projections=sum(
            sides * each * product_size + (layers * each**2 * 12 if codec.kind == "sign" else 0) for each in dims
        ),
        rows=4 * (widest_row + 2 * work.largest_batch * dim**2 + 2 * layers * dim**2),
        workspace=tokens
        * (shape.widest_side * (2 * size + (4 if spec.model.dtype == "float16" else 0)) + 24 * dim * most_rows),
        buffers=shape.buffer_bytes,
        host={"none": 0.0, "cpu": share, "nvme": buffered}[offload],
        nvme=share if offload == "nvme" else 0,
    )


def forward_memory(
    shape: ModelShape, work: Workload | Pairs, stage: int, offload: Offload, ranks: int, tokens: int
) -> Memory:
    """The same for forward passes that give losses alone: of activations, at most what a backward pass would keep of two
    blocks."""
    size, tokens = shape.dtype_bytes, max(tokens, work.longest)
    of_two_blocks = min(1.0, 2 * shape.largest_block / shape.matrices)
    share = shape.weight_bytes / (ranks if stage == 3 else 1)
    buffered = NVME_BUFFERS * max(NVME_BUFFER_ELEMENTS, shape.largest_tensor) * size
    return Memory(
        weights=share if offload == "none" else 0,
        gathered=(max(2 * shape.largest_block, shape.largest_tensor) if stage == 3 else shape.dequantised) * size,
        activations=activation_bytes(shape, tokens, work.longest) * of_two_blocks,
        logits=tokens * work.supervised_share * shape.vocabulary * (size + 2 * 4),
        captured=0,
        projections=0,
        rows=0,
        workspace=tokens * shape.widest_side * 2 * size,
        buffers=shape.buffer_bytes,
        host={"none": 0.0, "cpu": share, "nvme": buffered}[offload],
        nvme=share if offload == "nvme" else 0,
    )


@dataclass(frozen=True)
class Topology:
    """One group's world, and the tokens of a micro-batch that fits."""

    stage: int
    offload: Offload
    nodes: int
    gpus_per_node: int
    tokens_per_batch: int
    memory: Memory

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def choose_topology(
    shape: ModelShape, spec: RunSpec, work: Workload, gpu: Gpu, gpus_per_node: int = GPUS_PER_NODE
) -> Topology | None:
    """The first that fits with HEADROOM; None where one text alone is too long for the card.

    In this order: one node with the fewest GPUs (stage 0 on one, else stage 3), at the document's token budget, then at half of
    it and so on, as a run does when it is out of memory; then more nodes; then one GPU with weights in CPU memory; then on
    NVMe. Smaller micro-batches come before more nodes: between nodes, gathering weights costs more than it saves. Quantised
    weights cannot be partitioned: each GPU holds all of them. `tokensPerBatch: auto` is taken as the number that predictions
    expect, and then doubled while there is room.
    """
    room = gpu.memory_bytes * (1 - HEADROOM)
    tokens = spec.extraction.expected_tokens_per_batch
    for nodes, gpus, stage, offload, budget in _worlds(gpus_per_node, tokens, work.longest):
        if stage == 3 and shape.is_quantised:
            continue
        memory_at = partial(memory_of_rank, shape, spec, work, stage, offload, nodes * gpus)
        if memory_at(budget).device <= room:
            if spec.extraction.tokens_per_batch == AUTO:
                while budget < LARGEST_AUTO_BATCH and memory_at(2 * budget).device <= room:
                    budget *= 2
            return Topology(stage, offload, nodes, gpus, budget, memory_at(budget))
    return None


def halved_budgets(tokens: int, longest: int) -> list[int]:
    """`tokens`, half of it and so on, as long as the longest text fits into a micro-batch."""
    budgets = [tokens]
    while budgets[-1] // 2 >= longest and budgets[-1] > 1:
        budgets.append(budgets[-1] // 2)
    return budgets


def _worlds(gpus_per_node: int, tokens: int, longest: int) -> Iterator[tuple[int, int, int, Offload, int]]:
    budgets = halved_budgets(tokens, longest)
    within = [1, *(count for count in (2, 4, 8, 16) if count < gpus_per_node)]
    within += [gpus_per_node] if gpus_per_node > 1 else []
    for budget in budgets:
        for gpus in within:
            yield 1, gpus, 0 if gpus == 1 else 3, "none", budget
    for budget in budgets:
        for nodes in range(2, MAX_NODES + 1):
            yield nodes, gpus_per_node, 3, "none", budget
    offloads: tuple[Offload, ...] = ("cpu", "nvme")
    for offload in offloads:
        for budget in budgets:
            yield 1, 1, 3, offload, budget
