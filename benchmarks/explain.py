"""What `prism explain` costs on a large store: seconds and peak memory for some examples, and for one pair over all rows.

The store is that of benchmarks/reduce.py, synthetic: 65,536 signs a row. The examples are drawn at random, so that they lie
in as many units as they can. Seconds are of the whole process.

    python -m benchmarks.explain --rows 1000000 --examples 1 1000 --folder /somewhere/with/11/GB --json explain.json
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from benchmarks.reduce import make_store


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--examples", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--layers", type=int, default=16, help="layers of the model; 16 is the least for 65,536 dims")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where the store is made, and deleted (default: TMPDIR)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("rows", "layers", "pairs")}
    with tempfile.TemporaryDirectory(prefix="prism-explain-", dir=arguments.folder) as folder:
        document, _ = make_store(Path(folder), arguments.rows, arguments.layers, arguments.pairs)
        figures["reduce_seconds"], reduced = job.run_stage("reduce", document)
        manifest = Path(reduced["manifest"])
        table = pq.read_table(manifest.parent / "scores.parquet", columns=["example_id", "score"])
        usable = [name for name, score in zip(*table.to_pydict().values(), strict=True) if score is not None]
        for count in arguments.examples:
            measure(figures, str(count), manifest, random.Random(0).sample(usable, count))
        measure(figures, "one_pair", manifest, ["--pair", "1", "--top", "10", "--bottom", "10"])
    job.write_json(arguments.json, figures)


def measure(figures: dict[str, Any], name: str, manifest: Path, options: list[str]) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "prism_job", "explain", str(manifest), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"explain {name} failed")
    found = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    figures |= {f"{measured}[{name}]": value for measured, value in found.items()}
    print(f"{name}: {', '.join(f'{measured} {value:,.3f}' for measured, value in found.items())}", flush=True)


if __name__ == "__main__":
    main()
