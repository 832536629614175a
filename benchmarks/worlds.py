"""Rows of ZeRO-3 worlds of several ranks beside those of one process: the largest difference of any row, and what ranks hold.

Runs the extract stage on a GGUF model (SmolLM2), converted to a folder of safetensors first, since a GGUF file is not loaded in
shares. Codec float16 and unfolded target rows; float32 weights; gloo on CPU ranks.

    python benchmarks/worlds.py --data FOLDER/gsm8k_train.jsonl --examples 12 --ranks 2 4 --json worlds.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prism_job.plan.plan import read_plan
from prism_job.spec.document import parse_spec
from prism_job.storage.address import open_store
from prism_job.store import codec, shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prompt/completion rows")
    parser.add_argument("--model", type=Path, default=Path("build/model/SmolLM2-135M-Instruct.gguf"))
    parser.add_argument("--examples", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    figures: dict[str, float] = {"examples": chosen.examples}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        convert(chosen.model, place / "model")
        rows = chosen.data.read_text().splitlines()[: chosen.examples + 3]
        (place / "pool.jsonl").write_text("\n".join(rows[3:]))
        pairs = [json.loads(row) for row in rows[:3]]
        targets = [
            {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
            for one, other in zip(pairs, pairs[1:] + pairs[:1], strict=True)
        ]
        (place / "targets.jsonl").write_text("\n".join(map(json.dumps, targets)))
        alone, _, seconds = extract(place, 1)
        figures["seconds[1]"] = seconds
        for ranks in chosen.ranks:
            found, shares, seconds = extract(place, ranks)
            figures[f"largest_difference[{ranks}]"] = difference(found, alone)
            figures[f"largest_share[{ranks}]"] = max(share["held"] / share["parameters"] for share in shares)
            figures[f"seconds[{ranks}]"] = seconds
    for name, value in figures.items():
        print(f"{name:<28}{value:.4g}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1))


def convert(gguf: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def extract(folder: Path, ranks: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], float]:
    """Rows by example id (targets unfolded, candidates decoded), the ranks' shares, and the seconds it took."""
    document = {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": f"world-{ranks}"},
        "spec": {
            "model": {"uri": str(folder / "model"), "dtype": "float32"},
            "candidates": {"uris": [str(folder / "pool.jsonl")]},
            "targets": {"uris": [str(folder / "targets.jsonl")]},
            "store": str(folder / f"store-{ranks}"),
            "output": str(folder / "output"),
            "extraction": {
                "tokensPerBatch": 1024,
                "examplesPerShard": 5,  # so that the last unit is small and ranks have unlike work
                "codec": {"kind": "float16"},
                "deepspeed": {"stage": 3 if ranks > 1 else 0},
            },
            "scoring": {"curvature": {"kind": "none"}},
            "audit": {"examples": 0},
            "selection": {"keep": "highest", "budget": {"count": 1}},
        },
    }
    path = folder / "selection.yaml"
    path.write_text(yaml.safe_dump(document))
    started = time.monotonic()
    for stage in (["plan"], ["extract", f"--ranks={ranks}"]):
        command = [sys.executable, "-m", "prism_job", stage[0], "--spec", str(path), *stage[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{stage[0]} failed:\n{done.stdout[-3000:]}")
    seconds = time.monotonic() - started
    run = parse_spec(path.read_text(), str(path))
    plan, store = read_plan(run), open_store(run.spec.store)
    rows: dict[str, np.ndarray] = {}
    kinds: list[tuple[shards.Kind, str]] = [("candidates", unit.id) for unit in plan.candidates]
    kinds += [("targets", unit.id) for unit in plan.targets]
    for kind, unit in kinds:
        arrays = shards.read_shard(store, plan.extractor, kind, unit).arrays
        values = codec.decode_float16(arrays) if kind == "candidates" else arrays["rows"]
        rows |= {f"{kind} {name}": row for name, row in zip(shards.hex_ids(arrays["ids"]), values, strict=True)}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows, [line for line in lines if line["event"] == "shares"], seconds


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest ‖found − wanted‖ / ‖wanted‖ of a target row; candidates' rows must fit to float16's own 5e-4."""
    assert found.keys() == wanted.keys()
    largest = {"candidates": 0.0, "targets": 0.0}
    for name, row in wanted.items():
        kind = name.split()[0]
        largest[kind] = max(largest[kind], float(np.linalg.norm(found[name] - row) / np.linalg.norm(row)))
    assert largest["candidates"] < 5e-4, largest
    return largest["targets"]


if __name__ == "__main__":
    main()
