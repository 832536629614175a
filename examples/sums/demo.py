"""The demo: run the selection on real weights, then print how good it is and where its files are. Called by `make demo`.

The last line printed is the manifest's path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

SPEC = "examples/sums/selection.yaml"


def main() -> None:
    manifest = Path(prism("run", SPEC))
    opening, rankings, differences, *_ = prism("evaluate", str(manifest), "--label", "label").split("\n\n")
    scores = pq.read_table(manifest.parent / "scores.parquet").sort_by("score").slice(0, 5).to_pylist()
    rows = [json.loads(line) for line in Path(scores[0]["source"]).read_text(encoding="utf-8").splitlines()]

    print(f"\n{opening}\n\n{rankings}\n\n{differences}")
    print("\nThe five lowest scores")
    for score in scores:
        row = rows[score["line"] - 1]
        verdict = "right" if row["label"] else "wrong"
        question = row["prompt"].splitlines()[0]
        print(f"  {score['score']:>12.4g}  {verdict}  {question}{row['completion']}")
    print(f"\nreport:   {manifest.parent / 'report.html'}\nmanifest:")
    print(manifest)


def prism(*arguments: str) -> str:
    """Run the command of this environment. Returns its stdout; its stderr goes to the terminal."""
    command = [str(Path(sys.executable).with_name("prism")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.rstrip("\n")


if __name__ == "__main__":
    main()
