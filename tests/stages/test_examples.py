"""The notebook and the training script of examples/, and the README's own commands, on small selections."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Job, read_json, turn, write_jsonl
from tests.models import save_tiny_gguf

EXAMPLES = Path(__file__).parents[2] / "examples"
README = EXAMPLES.parent / "README.md"


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


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_model_is_trained_with_trl_on_conversations_with_several_answers(
    job: Job, tiny_model: Path, kind: str
) -> None:
    """Whatever the chat template is: that of the tiny model, as those of most models, does not mark what is learnt."""
    assert "generation %}" not in (tiny_model / "chat_template.jinja").read_text()
    asked = [{"from": "human", "value": "Say a number"}, {"from": "gpt", "value": "number 7"}]
    more = [{"from": "human", "value": "And one more"}, {"from": "gpt", "value": "number 8"}]
    write_jsonl(job.folder / "pool" / "a.jsonl", [{"conversations": asked + more * (n % 3)} for n in range(10)])
    job.spec["selection"] = {"keep": "highest", "budget": {"fraction": 1.0}}
    manifest, out = job.run(), job.folder / "tuned"
    model = tiny_model if kind == "folder" else save_tiny_gguf(job.folder / "tiny.gguf")
    command = [sys.executable, str(EXAMPLES / "train" / "sft.py"), str(manifest), "--model", str(model)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, out))
    assert any((before[name].float() != after[name].float()).any() for name in before if name in after)
    assert done.stdout.splitlines()[-1] == f"the tuned model is in {out}"
    assert not list(out.glob("checkpoint-*"))


def test_training_refuses_wrong_options_before_it_loads_anything(job: Job, tiny_model: Path) -> None:
    manifest, full = str(job.run()), job.folder / "full"
    write_jsonl(full / "rows.jsonl", [{}])
    script, new, model = EXAMPLES / "train" / "sft.py", str(job.folder / "new"), str(tiny_model)
    for given, code, mentions in (
        (
            (manifest, model, str(full)),
            2,
            ("error: --out", f"{full} is there already and not empty: name a new folder"),
        ),
        (
            (str(full / "rows.jsonl"), model, new),
            64,
            ("error: no manifest there", f"{full}/rows.jsonl", "ends in /manifest.json"),
        ),
        ((manifest, f"{new}.gguf", new), 64, ("error: no such GGUF file", f"{new}.gguf")),
        ((manifest, f"{new}/model", new), 64, ("error: no such model", f"{new}/model")),
        ((manifest, str(full), new), 64, ("error: there is no config.json", str(full))),
    ):
        command = [sys.executable, "-X", "importtime", str(script), given[0], "--model", given[1], "--out", given[2]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == code, lines
        assert all(mention in "\n".join(lines) for mention in mentions), lines
        assert "Traceback" not in done.stderr
        assert not re.search(r"\| +(torch|transformers|trl)$", done.stderr, re.MULTILINE), "nothing is loaded"
        assert not Path(new).exists()


def test_each_learnt_answer_is_a_row_for_trl_with_all_that_stands_before_it() -> None:
    answers = runpy.run_path(str(EXAMPLES / "train" / "sft.py"))["answers"]
    turns = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    turns += [turn("assistant", "d") | {"weight": 0}, turn("user", "e"), turn("assistant", "f") | {"weight": None}]
    found = answers({"messages": turns, "tools": "[]"}, "assistant")
    assert found == [{"tools": "[]", "prompt": turns[:place], "completion": [turns[place]]} for place in (2, 6)]
    assert answers({"messages": turns, "tools": "[]"}, "last") == found[-1:]
    assert answers({"messages": None, "text": "t"}, "assistant") == [{"text": "t"}]


def test_the_five_steps_of_the_readme_work_as_they_stand(tiny_model: Path, tmp_path: Path) -> None:
    """Its document, its pair and its commands, with a model that is here in place of the hub's."""
    steps = README.read_text(encoding="utf-8").split("## Your own data in five steps")[1].split("\n## ")[0]
    assert steps.count("HuggingFaceTB/SmolLM2-135M-Instruct") == 2
    steps = steps.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model))
    blocks = re.findall(r"```(\w+)\n(.*?)```", steps, re.DOTALL)
    (pair,) = re.findall(r'`(\{"prompt".*?\})`', steps)
    commands = "".join(text for kind, text in blocks if kind == "sh")
    (document,), (python,) = ([text for kind, text in blocks if kind == wanted] for wanted in ("yaml", "python"))

    write_jsonl(tmp_path / "pairs.jsonl", [json.loads(pair)] * 3)
    rows = [{"prompt": f"{n} + 2 =", "completion": f" {n + 2 + n % 2}", "label": 1 - n % 2} for n in range(40)]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    small = "  extraction: {codec: {dims: 32768}}\n"  # the model here has 57,344 dims in all
    (tmp_path / "selection.yaml").write_text(document + small)
    (tmp_path / "train.py").write_text(f"{python}\nprint(dataset.column_names, len(dataset))\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = f"set -euo pipefail\n{commands}\npython train.py"
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "['prompt', 'completion'] 2", "5 % of 40 rows"
    exported = [json.loads(line) for line in (tmp_path / "subset.jsonl").read_text().splitlines()]
    assert [set(row) for row in exported] == [{"prompt", "completion"}] * 2
