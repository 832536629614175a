"""The demo on a cluster of processes: `make cluster-demo`. Needs kubectl; no Kubernetes, no Docker.

The tests' own API server, Job controller and kubelet stand in for a cluster, moto's server for S3; everything else is real:
the operator process, the workers, the model. It ends by comparing the selection with the one that `prism run` makes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.cluster.rig import Rig, rig  # noqa: E402

SPEC = ROOT / "examples/sums/cluster.yaml"
MODEL = ROOT / "build/model/SmolLM2-135M-Instruct.gguf"
ADAPTER = ROOT / "examples/sums/adapter"
BUCKET = "prism-demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # moto's server would print every request
    with tempfile.TemporaryDirectory(prefix="prism-cluster-") as folder, rig(Path(folder), MODEL) as cluster:
        figures = run_demo(cluster, Path(folder))
    for name, value in figures.items():
        print(f"{name:<24}{value}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1))
    if not figures["same_bytes"]:
        sys.exit("the cluster's selection is not that of `prism run`")


def run_demo(cluster: Rig, folder: Path) -> dict[str, Any]:
    """Apply the document, wait for its condition, and make the same selection on this machine."""
    cluster.client.create_bucket(Bucket=BUCKET)
    for name in ("candidates.jsonl", "targets.jsonl"):
        cluster.client.upload_file(str(ROOT / "build/sums" / name), BUCKET, f"sums/{name}")
    for file in (MODEL, *ADAPTER.iterdir()):
        cluster.client.upload_file(str(file), BUCKET, f"{file.parent.name}/{file.name}")
    everybody = {**os.environ, **cluster.environment, "KUBECACHEDIR": str(folder / "kubectl")}
    user = {**everybody, "KUBECONFIG": str(cluster.as_user())}

    def call(*command: str) -> str:
        done = subprocess.run(command, env=user, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
        return done.stdout

    prism = [sys.executable, "-m", "launcher.cli.main"]
    environment = {**everybody, "KUBECONFIG": str(cluster.as_operator())}
    operator = subprocess.Popen([*prism, "operator", "--port", "0"], env=environment, cwd=ROOT)
    started = time.monotonic()
    try:
        print(call("kubectl", "apply", "-f", str(SPEC)), end="")
        print(call("kubectl", "wait", "--for=condition=Complete", "--timeout=30m", "selectionrun/sums"), end="")
        seconds = time.monotonic() - started
        print(call("kubectl", "get", "selectionruns"))
        print(call(*prism, "status", "sums"))
        status = json.loads(call(*prism, "status", "sums", "-o", "json"))
    finally:
        operator.terminate()
        operator.wait()
    here = yaml.safe_load(SPEC.read_text())
    here["spec"] |= {"store": f"s3://{BUCKET}/here/store", "output": f"s3://{BUCKET}/here/selections"}
    (folder / "here.yaml").write_text(yaml.safe_dump(here))
    local = json.loads(call(*prism, "run", str(folder / "here.yaml"), "-o", "json"))
    evaluated = json.loads(call(*prism, "evaluate", status["manifest"], "--label", "label", "-o", "json"))
    return {
        "phase": status["phase"],
        "manifest": status["manifest"],
        "seconds": round(seconds, 1),
        "restarts": status["restarts"],
        "auroc": round(evaluated["auroc"], 3),
        "same_bytes": selected(cluster, status["manifest"]) == selected(cluster, local["manifest"]),
    }


def selected(cluster: Rig, manifest: str) -> bytes:
    key = manifest.removeprefix(f"s3://{BUCKET}/").replace("manifest.json", "selected.parquet")
    return bytes(cluster.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())


if __name__ == "__main__":
    main()
