"""Predicts what a run will cost: tokens, FLOPs, bytes of store, memory of a rank, hours, a topology.

From the document, the model's config and tokenizer, and the listed data. Reads no weights and writes to no store.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.errors import RequestError
from prism_job.estimate import costs
from prism_job.estimate.model_shape import ModelShape, model_shape
from prism_job.estimate.preference_model import measure_preference
from prism_job.estimate.workload import Workload, measure
from prism_job.extract.load.model import load_tokenizer
from prism_job.plan.extractor import audit_spec
from prism_job.plan.plan import Block
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage import model_files
from prism_job.storage.folder import LocalFolder
from prism_job.store import codec, shards


def estimate(run: SelectionRun, gpu: str = "H100", utilisation: float = 0.35, sample: int = 1) -> dict[str, Any]:
    """The estimate as plain values; sizes in bytes, times in hours of wall clock or GPU hours.

    Args:
        gpu: a name of costs.GPUS.
        utilisation: share of the card's peaks that extraction reaches, above 0 and at most 1.
        sample: tokenise one row in this many, and scale.

    Raises RequestError, DataError: what plan and extract would raise, as far as that can be known without weights.
    """
    started = time.monotonic()
    if gpu not in costs.GPUS:
        raise RequestError(f"unknown GPU {gpu!r}", where="--gpu", fix=f"use one of {', '.join(costs.GPUS)}")
    card = costs.GPUS[gpu]
    if not 0 < utilisation <= 1 or sample < 1:
        fix = "use a utilisation above 0 and at most 1, and a sample of 1 or more"
        raise RequestError("an option is out of bounds", where="--utilisation, --sample", fix=fix)
    spec = run.spec
    shape = model_shape(spec)
    path = model_files.fetch_config_and_tokenizer(spec.model.uri, spec.model.revision)  # no weights
    work = measure(spec, load_tokenizer(spec.model, path), sample)
    of_preference = measure_preference(spec, sample)
    flops = costs.count_flops(shape, spec, work)
    store = store_bytes(shape, spec, work)
    cluster = spec.cluster
    gpus_per_node = cluster.gpus_per_node if cluster and cluster.gpus_per_node else costs.GPUS_PER_NODE
    topology = costs.choose_topology(shape, spec, work, card, gpus_per_node)
    groups = cluster.groups if cluster else 1
    hours = costs.gpu_hours(flops, card, spec.model, utilisation)
    hours += of_preference.gpu_hours(card, utilisation) if of_preference else 0
    return {
        "run": run.metadata.name,
        "model": spec.model.uri,
        "dtype": spec.model.dtype,
        "quantization": spec.model.quantization,
        "parameters": shape.parameters,
        "parameters_active": round(shape.active),
        "parameters_covered": shape.covered,
        "layers_captured": len(shape.sides),
        "forward_only": spec.scoring.is_forward_only,
        "coverage": round(shape.coverage, 4),
        "share_of_model": round(shape.share_of_model, 4),
        "num_examples": work.num_examples,
        "num_pairs": work.num_pairs,
        "bad_rows": work.num_bad,
        "bad_share": work.bad_share,
        "first_bad": work.first_bad and work.first_bad.model_dump(),
        "cut_rows": work.num_cut,
        "cut_pairs": work.num_cut_pairs,
        "max_bad_fraction": spec.candidates.max_bad_fraction,
        "units": len(work.candidates)
        + len(work.targets)
        + (len(work.sampled) + len(work.targets) if work.sampled else 0)
        + (len(work.targets) if of_preference else 0),
        "tokens": round(work.load.tokens),
        "tokens_of_audit": round(work.audit.tokens),
        "tokens_are_exact": work.is_exact,
        "tokens_padded": round(work.load.padded),
        "sample": sample,
        "flops_per_token": costs.flops_per_token(shape),
        "flops": {**asdict(flops), "total": flops.total},
        "store_bytes": sum(store.values()),
        "store": store,
        "gpu": gpu,
        "gpu_memory_bytes": card.memory_bytes,
        "utilisation": utilisation,
        "gpu_hours": hours,
        "price": spec.price_of(hours),
        "preference_model": of_preference and of_preference.facts(spec, card, utilisation, topology),
        "topology": None if topology is None else _topology_facts(topology, groups, hours),
        "memory": _memory_table(shape, spec, work, card, topology, gpus_per_node),
        "estimate_seconds": round(time.monotonic() - started, 3),
    }


def store_bytes(shape: ModelShape, spec: RunSpec, work: Workload) -> dict[str, int]:
    """Bytes that the run writes into an empty store, by part.

    Writes a shard of one row with the store's own code: each further row costs the bytes of that one, and the rest is header.
    Not counted: more digits of the numbers in a header, and the reasons of quarantined rows.
    """
    own = _shards_of_one_row(shape, spec)
    num_rows, candidate = _num_rows(work.candidates), own["candidates"]
    return {
        "rows": num_rows * candidate.bytes_of("signs", "values"),
        "scales": num_rows * candidate.bytes_of("scales", "unit"),
        "ids_and_numbers": num_rows * candidate.bytes_of("ids", *_NUMBERS),
        "headers": len(work.candidates) * candidate.header_bytes
        + len(work.targets) * own["targets"].header_bytes
        + len(work.factors) * own["factors"].header_bytes,
        "factors": len(work.factors) * own["factors"].bytes_of(),
        "target_pairs": _num_rows(work.targets) * own["targets"].bytes_of(),
        "audit": _audit_bytes(shape, spec, work) if spec.audit.examples else 0,
        **({"preference_model": _nll_bytes(own["nll"], work)} if spec.scoring.preference_model else {}),
        "staged_rows": work.staged_bytes,
    }


def _audit_bytes(shape: ModelShape, spec: RunSpec, work: Workload) -> int:
    """Shards of the sample, and of the targets' sums or rows. The sample's staged rows count among those of the run."""
    audit = _shards_of_one_row(shape, audit_spec(spec))
    candidate, factors, sums = audit["candidates"], audit["factors"], audit["sums"]
    if spec.scoring.preference_model:
        rows = codec.encode_float16(np.zeros((1, audit["targets"].arrays["rows"].shape[1]), np.float32))
        sums = _Shard({**audit["nll"].arrays, **rows}, sums.header_bytes)
    totals = sums.bytes_of("preference", "uniform") if not spec.scoring.preference_model else 0
    units_with_factors = len(work.sampled) if spec.scoring.curvature.kind == "kfac" else 0
    return (
        _num_rows(work.sampled) * candidate.bytes_of()
        + len(work.sampled) * candidate.header_bytes
        + units_with_factors * (factors.bytes_of() + factors.header_bytes)
        + _num_rows(work.targets) * (sums.bytes_of() - totals)
        + len(work.targets) * (totals + sums.header_bytes)
    )


def _nll_bytes(nll: "_Shard", work: Workload) -> int:
    return _num_rows(work.targets) * nll.bytes_of() + len(work.targets) * nll.header_bytes


_NUMBERS: dict[str, NDArray[Any]] = {
    "nll": np.zeros(1, np.float64),
    "tokens": np.zeros(1, np.int32),
    "norm": np.zeros(1, np.float32),
}
"""Stored beside the row of a candidate."""


@dataclass(frozen=True)
class _Shard:
    """A shard of one row: its arrays, and the bytes around them."""

    arrays: dict[str, NDArray[Any]]
    header_bytes: int

    def bytes_of(self, *names: str) -> int:
        """Of the arrays of these names that there are; without a name, of all arrays."""
        return sum(array.nbytes for name, array in self.arrays.items() if not names or name in names)


def _shards_of_one_row(shape: ModelShape, spec: RunSpec) -> dict[shards.Kind, _Shard]:
    layers, dim, kind = list(shape.sides), spec.extraction.projection.dim, spec.codec_kind
    unfolded = shape.head // shape.vocabulary if spec.scoring.is_forward_only else len(layers) * dim**2
    width = spec.extraction.codec.dims if kind == "sign" else unfolded
    pair: dict[str, NDArray[Any]] = {"ids": shards.id_bytes([digest("an example")])}
    for side in ("chosen", "rejected"):
        pair |= {f"{side}_nll": _NUMBERS["nll"], f"{side}_tokens": _NUMBERS["tokens"]}
    upper = np.zeros((len(layers), dim * (dim + 1) // 2), np.float32)
    row = np.zeros((1, unfolded), np.float32)
    of_layers: dict[str, Any] = {"layers": layers, "dim": 0, "cut": 10}
    if not spec.scoring.is_forward_only:
        of_layers |= {"dim": dim, "coverage": 0.9999, "share_of_model": 0.9999}
    contents: dict[shards.Kind, tuple[dict[str, NDArray[Any]], dict[str, Any]]] = {
        "candidates": (
            {"ids": pair["ids"], **_NUMBERS, **codec.zeros(kind, 1, width)},
            {"quarantined": {}, "cut": 1000, "layers": digest(layers)},
        ),
        "targets": ({**pair, "rows": row}, of_layers),
        "factors": ({"inputs": upper, "outputs": upper}, {"num_tokens": 10**6, "layers": digest(layers)}),
        "nll": (pair, {"dim": 0, "cut": 0}),
        "sums": ({**pair, "preference": row[0], "uniform": row[0]}, of_layers),
    }
    return {name: _Shard(arrays, _header_bytes(name, arrays, notes)) for name, (arrays, notes) in contents.items()}


def _header_bytes(kind: shards.Kind, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any]) -> int:
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        unit_id = digest("a unit")
        written = shards.write_shard(LocalFolder(folder), digest("an extractor"), kind, unit_id, arrays, notes)
    return written - sum(array.nbytes for array in arrays.values())


def _num_rows(units: Sequence[Block]) -> int:
    return sum(unit.num_rows for unit in units)


def _topology_facts(topology: costs.Topology, groups: int, hours: float) -> dict[str, Any]:
    return {
        "stage": topology.stage,
        "offload": topology.offload,
        "groups": groups,
        "nodes": topology.nodes,
        "gpus_per_node": topology.gpus_per_node,
        "tokens_per_batch": topology.tokens_per_batch,
        "device_bytes": round(topology.memory.device),
        "host_bytes": round(topology.memory.host),
        "nvme_bytes": round(topology.memory.nvme),
        # An offloaded run takes longer: every micro-batch waits for weights that come over PCIe.
        "hours": hours / (groups * topology.gpus),
    }


def _memory_table(
    shape: ModelShape,
    spec: RunSpec,
    work: Workload,
    card: costs.Gpu,
    topology: costs.Topology | None,
    gpus_per_node: int,
) -> list[dict[str, Any]]:
    """Stage 0 on one GPU; stage 3, which quantised weights do not have, in the chosen world, or on one full node, without and
    with offload."""
    world = topology.gpus if topology and topology.gpus > 1 else gpus_per_node
    budgets = costs.halved_budgets(spec.extraction.expected_tokens_per_batch, work.longest)
    tokens = topology.tokens_per_batch if topology else budgets[-1]
    settings: list[tuple[int, costs.Offload, int]] = [(0, "none", 1)]
    if not shape.is_quantised:
        settings += [(3, "none", world), (3, "cpu", world), (3, "nvme", world), (3, "cpu", 1)]
    table = []
    for stage, offload, ranks in settings:
        memory = costs.memory_of_rank(shape, spec, work, stage, offload, ranks, tokens)
        table.append(
            {
                "stage": stage,
                "offload": offload,
                "ranks": ranks,
                "tokens_per_batch": tokens,
                "fits": memory.device <= card.memory_bytes * (1 - costs.HEADROOM),
                "device_bytes": round(memory.device),
                **{f"{name}_bytes": round(value) for name, value in asdict(memory).items()},
            }
        )
    return table
