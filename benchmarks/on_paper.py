"""Predicts what a selection with a large model over ten million examples costs: GPU hours, bytes, dollars.

Uses the functions of `prism estimate` on a published config.json (Llama-3-70B's) and an assumed workload. Every assumption is
an option or a name below; `prism estimate` does the same for real data.

    python -m benchmarks.on_paper --json on_paper.json
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from prism_job.estimate import costs
from prism_job.estimate.estimate import store_bytes
from prism_job.estimate.model_shape import ModelShape, model_shape
from prism_job.estimate.workload import Load, Workload
from prism_job.plan.plan import Block, Unit
from prism_job.plan.units import FACTOR_UNIT_SHARE, PAIRS_PER_UNIT
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec, parse_spec
from tests.estimate.test_published_models import LLAMA_3_70B, PUBLISHED

CONFIGS = {"Llama-3-70B": LLAMA_3_70B} | {name: config for name, (config, *_) in PUBLISHED.items()}
PRICES = {"H100": 2.5, "H200": 3.5, "L40S": 1.0}
"""Dollars a GPU hour: round numbers, assumed; give your own with --price."""
STORE_PRICE = 0.023
"""Dollars a GB and month of object storage: assumed."""
LINK_BYTES_A_SECOND = {"H100": 450e9, "H200": 450e9, "L40S": 32e9}
"""Between the cards of a node, one way, assumed reached. NVLink 4: 900 GB/s both ways together; L40S: PCIe 4.0 x16."""
STAGED_BYTES_A_TOKEN = 2.0
"""Of the rows as the plan stages them, JSON lines under zstd: a token of English is 4 to 5 characters, halved. Assumed."""


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=1000, help="of each example and each side of a pair: no padding")
    parser.add_argument("--response", type=float, default=0.5, help="share of the tokens that carries loss")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of a card's published peaks")
    parser.add_argument("--price", type=float, help="dollars a GPU hour, for all cards")
    parser.add_argument("--model", choices=CONFIGS, default="Llama-3-70B")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = document(Path(folder), CONFIGS[chosen.model], chosen.quantization)
        started = time.monotonic()
        shape = model_shape(spec)
        seconds = time.monotonic() - started
        work = workload(chosen, spec)
        flops = costs.count_flops(shape, spec, work)
        parts = store_bytes(shape, spec, work)
    figures = {"tokens": work.load.tokens, "flops": flops.total, "store_bytes": sum(parts.values())}
    per_token = costs.flops_per_token(shape)
    print(f"{chosen.examples:,} examples of {chosen.tokens:,} tokens")
    print(f"{chosen.model}: {shape.parameters:,} parameters, {shape.active:,.0f} used for a token", end=", ")
    print(f"{per_token:.4g} FLOPs a token forward, {shape.coverage:.2%} captured; counted in {seconds:.1f} s")
    figures |= {"parameters": shape.parameters, "parameters_active": shape.active, "flops_per_token": per_token}
    figures |= {"coverage": shape.coverage, "seconds": seconds}
    each_part = ", ".join(f"{name} {value:.4g}" for name, value in asdict(flops).items())
    print(f"FLOPs: {each_part}, in all {flops.total:.4g}")
    print("bytes: " + ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in parts.items()))
    print(f"in all {sum(parts.values()) / 1e9:,.1f} GB, {sum(parts.values()) / 1e9 * STORE_PRICE:,.2f} dollars a month")
    for gpu, price in PRICES.items():
        card = costs.GPUS[gpu]
        topology = costs.choose_topology(shape, spec, work, card)
        if topology is None:
            print(f"{gpu}: no topology fits")
            continue
        hours = costs.gpu_hours(flops, card, spec.model, chosen.utilisation)
        moved = gather_hours(shape, topology, work, LINK_BYTES_A_SECOND[gpu])
        dollars = [each * (chosen.price or price) for each in (hours, hours + moved)]
        print(
            f"{gpu}: stage {topology.stage}, offload {topology.offload}, {topology.nodes} x {topology.gpus_per_node}, "
            f"tokensPerBatch {topology.tokens_per_batch:,}; {hours:,.0f} GPU hours, {dollars[0]:,.0f} dollars; "
            f"with all gathering waited for {hours + moved:,.0f} and {dollars[1]:,.0f}"
        )
        figures |= {f"gpu_hours[{gpu}]": hours, f"gather_gpu_hours[{gpu}]": moved, f"dollars[{gpu}]": dollars[0]}
        figures |= {f"dollars_with_gathering[{gpu}]": dollars[1], f"gpus[{gpu}]": topology.gpus}
        figures |= {f"tokens_per_batch[{gpu}]": topology.tokens_per_batch}
    job.write_json(chosen.json, figures)


def document(folder: Path, config: dict[str, Any], quantization: str | None) -> RunSpec:
    """The defaults of a selection.yaml over a model folder that holds nothing but its config.json."""
    job.write_json(folder / "config.json", config)
    model = {"uri": str(folder), "dtype": "bfloat16", "quantization": quantization}
    spec = job.selection(folder, model=model, audit={})
    return parse_spec(job.write_document(folder / "on-paper.yaml", "on-paper", spec).read_text(), "on-paper").spec


def workload(chosen: argparse.Namespace, spec: RunSpec) -> Workload:
    """That of equal texts: units, loads and extremes as `workload.measure` would count them."""
    one = Load(1, chosen.tokens, chosen.tokens, chosen.tokens**2, chosen.tokens * chosen.response)
    size, sampled = spec.extraction.examples_per_shard, spec.audit.examples
    candidates, targets = _units("candidates", chosen.examples, size), _units("targets", chosen.pairs, PAIRS_PER_UNIT)
    factors = candidates[::FACTOR_UNIT_SHARE]
    pairs = one.times(2 * chosen.pairs)
    return Workload(
        candidates=candidates,
        targets=targets,
        factors=[unit.id for unit in factors],
        num_examples=chosen.examples,
        num_pairs=chosen.pairs,
        num_bad=0,
        staged_bytes=round(STAGED_BYTES_A_TOKEN * chosen.tokens * (chosen.examples + 2 * chosen.pairs)),
        pool=one.times(chosen.examples),
        pairs=pairs,
        factor_load=one.times(sum(unit.num_rows for unit in factors)),
        longest=chosen.tokens,
        largest_batch=max(1, spec.extraction.expected_tokens_per_batch // chosen.tokens),
        supervised_share=chosen.response,
        is_exact=True,
        sampled=[Block(id=unit.id, rows=unit.rows, num_rows=unit.num_rows) for unit in _units("audit", sampled, size)],
        audit=one.times(sampled).plus(pairs),
        audit_factor_load=one.times(sampled),
    )


def gather_hours(shape: ModelShape, topology: costs.Topology, work: Workload, link: float) -> float:
    """GPU hours in which a rank of ZeRO-3 receives what it lacks of the weights: twice a pass, forward and backward."""
    if topology.stage == 0:
        return 0.0
    lacking = shape.parameters * shape.dtype_bytes * (1 - 1 / topology.gpus)
    texts_a_pass = max(1, topology.tokens_per_batch // work.longest)
    return 2 * lacking / link * work.load.texts / texts_a_pass / 3600


def _units(kind: str, num_rows: int, size: int) -> list[Unit]:
    names = [digest([kind, number]) for number in range(-(-num_rows // size))]
    sizes = [min(size, num_rows - start) for start in range(0, num_rows, size)]
    return [
        Unit(id=name, rows=name, num_rows=rows, source=0, lines=[(0, rows)])
        for name, rows in zip(names, sizes, strict=True)
    ]


if __name__ == "__main__":
    main()
