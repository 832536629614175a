"""The demo: run the selection on real weights, say how well it did, and where everything is. Called by `make demo`.

The last line printed is the manifest's path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SPEC = "examples/facts/selection.yaml"


def main() -> None:
    run = prism("run", SPEC)
    manifest = Path(run["manifest"])
    quality = prism("evaluate", str(manifest), "--label", "label")
    scores = pq.read_table(manifest.parent / "scores.parquet").sort_by("score").slice(0, 10).to_pylist()
    rows = [json.loads(line) for line in Path(scores[0]["source"]).read_text(encoding="utf-8").splitlines()]

    print(
        f"\n{quality['num_examples']} statements, {quality['num_examples'] - quality['num_positive']} of them wrong; "
        f"{quality['taken_by_budget']} dropped as the lowest\n"
    )
    print(f"{'':<28}{'AUROC':>8}  {'95 % interval':<16}{'of the dropped, wrong':>22}")
    for name, prefix in (("PRISM score", ""), ("own loss, token mean", "loss_"), ("own loss, sum", "loss_sum_")):
        low, high = quality[f"{prefix}auroc_low"], quality[f"{prefix}auroc_high"]
        share = quality[f"{prefix}precision_at_budget"]
        print(f"{name:<28}{quality[f'{prefix}auroc']:>8.3f}  {f'{low:.3f} to {high:.3f}':<16}{share:>22.1%}")
    print("\nThe ten lowest scores")
    for score in scores:
        row = rows[score["line"] - 1]
        verdict = "right" if row["label"] else "wrong"
        print(f"  {score['score']:>12.4g}  {verdict}  {row['messages'][-1]['content']}")
    print(f"\nreport:   {manifest.parent / 'report.html'}\nmanifest:")
    print(manifest)


def prism(*arguments: str) -> dict[str, Any]:
    """Call the command of this environment; its words go to the terminal, its JSON comes back."""
    command = [str(Path(sys.executable).with_name("prism")), *arguments, "-o", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
