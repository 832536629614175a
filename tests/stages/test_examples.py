"""The notebook and the training script of examples/, on a small selection."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Job, read_json, write_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_notebook_runs(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    cells = read_json(EXAMPLES / "notebook.ipynb")["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum("examples/sums/selection.yaml" in cell for cell in code) == 1
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "commit it without outputs"
    names: dict[str, object] = {}
    for cell in code:
        exec(cell.replace("examples/sums/selection.yaml", str(job.spec_path())), names)
    assert len(names["dataset"]) == 4  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("pair ") == 3


def test_a_model_is_trained_with_trl_on_a_selection_of_any_layout(job: Job, tiny_model: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"Say {n}"}, {"from": "gpt", "value": f"number {n}"}]}
        for n in range(10)
    ]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    manifest, out = job.run(), job.folder / "tuned"
    command = [sys.executable, str(EXAMPLES / "train" / "sft.py"), str(manifest), "--model", str(tiny_model)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, out))
    assert any((before[name].float() != after[name].float()).any() for name in before if name in after)
