"""Predicts what a selection with a 70B model over ten million examples costs: GPU hours, bytes, dollars.

Uses the functions of `prism estimate` on a config.json (Llama-3-70B's, as published) and an assumed workload. Every assumption
is an option or a name below; `prism estimate` does the same for real data.

    python -m benchmarks.on_paper --json on_paper.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from prism_job.estimate import costs
from prism_job.estimate.estimate import store_bytes
from prism_job.estimate.model_shape import ModelShape, model_shape
from prism_job.estimate.workload import Load, Workload
from prism_job.plan.plan import Block, Unit
from prism_job.plan.units import FACTOR_UNIT_SHARE, PAIRS_PER_UNIT
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec, parse_spec
from tests.estimate.test_estimate import LLAMA_3_70B

PRICES = {"H100": 2.5, "H200": 3.5, "L40S": 1.0}
"""Dollars a GPU hour: round numbers, assumed; give your own with --price."""
STORE_PRICE = 0.023
"""Dollars a GB and month of object storage: assumed."""
LINK_BYTES_A_SECOND = {"H100": 450e9, "H200": 450e9, "L40S": 32e9}
"""Between the cards of a node, one way, assumed reached. NVLink 4: 900 GB/s both ways together; L40S: PCIe 4.0 x16."""
STAGED_BYTES_A_TOKEN = 2.0
"""Of the rows as the plan stages them, JSON lines under zstd: a token of English is 4 to 5 characters, halved. Assumed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=1000, help="of each example and each side of a pair: no padding")
    parser.add_argument("--response", type=float, default=0.5, help="share of the tokens that carries loss")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of a card's published peaks")
    parser.add_argument("--price", type=float, help="dollars a GPU hour, for all cards")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = document(Path(folder))
        shape = model_shape(spec)
        work = workload(chosen, spec)
        flops = costs.count_flops(shape, spec, work)
        parts = store_bytes(shape, spec, work)
    figures = {"tokens": work.load.tokens, "flops": flops.total, "store_bytes": sum(parts.values())}
    print(f"{chosen.examples:,} examples of {chosen.tokens:,} tokens, {shape.parameters:,} parameters")
    print(
        "FLOPs: "
        + ", ".join(f"{name} {value:.4g}" for name, value in asdict(flops).items())
        + f", in all {flops.total:.4g}"
    )
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
            f"{gpu}: stage {topology.stage}, {topology.nodes} x {topology.gpus_per_node}, "
            f"tokensPerBatch {topology.tokens_per_batch:,}; {hours:,.0f} GPU hours, {dollars[0]:,.0f} dollars; "
            f"with all gathering waited for {hours + moved:,.0f} and {dollars[1]:,.0f}"
        )
        figures |= {f"gpu_hours[{gpu}]": hours, f"gather_gpu_hours[{gpu}]": moved, f"dollars[{gpu}]": dollars[0]}
        figures |= {f"dollars_with_gathering[{gpu}]": dollars[1], f"gpus[{gpu}]": topology.gpus}
        figures |= {f"tokens_per_batch[{gpu}]": topology.tokens_per_batch}
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1))


def document(folder: Path) -> RunSpec:
    """The defaults of a selection.yaml over a model folder that holds nothing but its config.json."""
    (folder / "config.json").write_text(json.dumps(LLAMA_3_70B))
    text = f"""
    apiVersion: prism.dev/v1alpha1
    kind: SelectionRun
    metadata: {{name: on-paper}}
    spec:
      model: {{uri: "{folder}", dtype: bfloat16}}
      candidates: {{uris: ["{folder}/pool"]}}
      targets: {{uris: ["{folder}/targets"]}}
      store: {folder}/store
      output: {folder}/output
      selection: {{keep: highest, budget: {{fraction: 0.05}}}}
    """
    return parse_spec(text, "on-paper").spec


def workload(chosen: argparse.Namespace, spec: RunSpec) -> Workload:
    """That of equal texts: units, loads and extremes as `workload.measure` would count them."""
    one = Load(1, chosen.tokens, chosen.tokens, chosen.tokens**2, chosen.tokens * chosen.response)
    size, sampled = spec.extraction.examples_per_shard, spec.audit.examples
    candidates = [_unit("candidates", number, count) for number, count in enumerate(_cut(chosen.examples, size))]
    targets = [_unit("targets", number, count) for number, count in enumerate(_cut(chosen.pairs, PAIRS_PER_UNIT))]
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
        largest_batch=max(1, spec.extraction.tokens_per_batch // chosen.tokens),
        supervised_share=chosen.response,
        is_exact=True,
        sampled=[Block(id=unit.id, rows=unit.rows, num_rows=unit.num_rows) for unit in _sample(sampled, size)],
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


def _cut(rows: int, size: int) -> list[int]:
    return [min(size, rows - start) for start in range(0, rows, size)]


def _sample(rows: int, size: int) -> list[Unit]:
    return [_unit("audit", number, count) for number, count in enumerate(_cut(rows, size))]


def _unit(kind: str, number: int, rows: int) -> Unit:
    name = digest([kind, number])
    return Unit(id=name, rows=name, num_rows=rows, source=0, lines=[(0, rows)])


if __name__ == "__main__":
    main()
