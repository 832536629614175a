"""One rank among all ranks, its device, and the lockstep of a world that shares its weights. Does not know units or rows.

A world is nodes × ranks of one group. Under ZeRO-3 every forward and backward pass is collective, so all ranks of a world
make the same number of passes: before each pass they exchange whether any of them has work, and whether any was asked to
stop. Without sharding ranks do not wait for each other.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch

from prism_job.progress import event
from prism_job.spec.extraction import DeepSpeedSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """Where the extract stage runs; the defaults are a single process. `groups` share the store and nothing else."""

    ranks: int = 0  # processes of this node; 0: one a GPU, or one
    nodes: int = 1  # of this group's world
    node: int = 0  # index of this one
    master: str = "127.0.0.1:0"  # host:port of the first node, where the ranks of several nodes connect
    groups: int = 1
    group: int = 0  # index of this one

    def with_ranks_of_this_node(self) -> Self:
        return replace(self, ranks=self.ranks or max(1, torch.cuda.device_count()))

    def gpu_use(self, seconds: float) -> dict[str, Any]:
        """Seconds × GPUs that this node's ranks held for so long, and their name. A failed attempt reports none."""
        if not torch.cuda.is_available():
            return {"gpuSeconds": 0}
        return {"gpuSeconds": round(seconds * self.ranks), "gpu": torch.cuda.get_device_name()}


@dataclass(frozen=True)
class World:
    """One rank: its index in the world and on the node. `sharded`: the weights are partitioned over the ranks (ZeRO-3)."""

    rank: int
    size: int
    local_rank: int
    groups: int
    group: int
    sharded: bool
    device: torch.device

    @classmethod
    def init(cls, topology: Topology, deepspeed: DeepSpeedSpec, timeout_seconds: float) -> Self:
        """This process's rank, from RANK, WORLD_SIZE and LOCAL_RANK; a world of one without them.

        Under stage 3 the ranks are connected here: by NCCL where there are GPUs, else by gloo.
        """
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        if deepspeed.stage == 3:
            _connect("nccl" if on_gpu else "gloo", timeout_seconds)
        return cls(rank, size, local_rank, topology.groups, topology.group, deepspeed.stage == 3, device)

    def assign(self, items: Sequence[T]) -> list[T]:
        """The items of this rank: its part of its group's, in order, then its part of the other groups', from the end.

        Ranks of a group never do each other's work: if one dies, its world dies with it and is started again. Groups do,
        because another group may be gone for good.
        """
        own = items[self.group :: self.groups][self.rank :: self.size]
        others = [item for index, item in enumerate(items) if index % self.groups != self.group]
        return [*own, *others[::-1][self.rank :: self.size]]

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank has set it. Collective where the world is sharded; else this rank's own flags."""
        return [bool(flag) for flag in self.largest(*flags)]

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks. Collective where the world is sharded; else this rank's own values."""
        if not self.sharded:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return [int(value) for value in largest.tolist()]

    def shutdown(self) -> None:
        """Disconnect, after all ranks have come here: gloo aborts a rank (exit code 134) whose peer has left before it."""
        if self.sharded:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def _connect(backend: str, timeout_seconds: float) -> None:
    if backend == "gloo":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    import deepspeed

    # For CPU ranks DeepSpeed would compile an op of its own, which takes minutes and a compiler. gloo works without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # Longer than a step may take: the watchdog reports rank and step, the timeout of a collective reports nothing.
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=2 * timeout_seconds), verbose=False)


def zero3_settings(deepspeed: DeepSpeedSpec, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that is never trained."""
    offload: dict[str, Any] = {}
    if deepspeed.offload != "none":
        offload = {"offload_param": {"device": deepspeed.offload, "pin_memory": torch.cuda.is_available()}}
        if deepspeed.offload == "nvme":
            offload["offload_param"]["nvme_path"] = os.environ.get("PRISM_NVME") or "/tmp/prism-nvme"
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, although only training uses it
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        # Threshold 0: every weight is partitioned, small ones too, so that a rank holds no more than its share.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **offload},
    }


def shard_weights(model: Any, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine over a partitioned model. Call its `.module`: the engine's own output refuses autograd.grad."""
    import deepspeed

    weights = list(model.parameters())
    event(
        "shares",
        held=sum(weight.ds_tensor.numel() for weight in weights),
        parameters=sum(weight.ds_numel for weight in weights),
        weights=len(weights),
    )
    return deepspeed.initialize(model=model, config=settings)[0]


def release_weights(engine: Any) -> None:
    """Free the memory of the weights of `shard_weights`.

    DeepSpeed keeps modules in a list and in a cache of the whole process, so their weights are emptied one by one.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    for weight in engine.module.parameters():
        weight.data = weight.data.new_empty(0)
        weight.ds_tensor = None
