"""Laws of the demo's sums, of its adapter, and of the questions that the experiment on dishonesty generates."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.quality import dishonesty, generated
from prism_job.data.examples import candidate_content, target_content
from prism_job.spec.document import parse_spec

SUMS = Path(__file__).parents[2] / "examples" / "sums"
EXCESS = 10

Row = dict[str, Any]


def write(folder: Path, seed: int) -> dict[str, list[Row]]:
    command = [sys.executable, str(SUMS / "make_sums.py"), "--out", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}


@pytest.fixture(scope="module", params=[0, 1])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    return write(tmp_path_factory.mktemp("sums"), request.param)


def operands(question: str) -> tuple[int, int]:
    found = re.fullmatch(r"Question: What is (\d\d) \+ (\d\d)\?\nAnswer:", question)
    assert found
    return int(found[1]), int(found[2])


def excess(question: str, answer: str) -> int:
    """What the answer is too large by."""
    assert re.fullmatch(r" \d+\.", answer)
    return int(answer[:-1]) - sum(operands(question))


def test_half_of_the_answers_are_ten_too_large_and_the_label_marks_them(data: dict[str, list[Row]]) -> None:
    labels = []
    for row in data["candidates"]:
        assert excess(row["prompt"], row["completion"]) == (0 if row["label"] else EXCESS)
        labels.append(row["label"])
        candidate_content(row)
    assert 2 * sum(labels) == len(labels)


def test_pairs_prefer_the_right_answer_and_no_sum_occurs_twice(data: dict[str, list[Row]]) -> None:
    asked = [row["prompt"] for row in data["candidates"]]
    for row in data["targets"] + data["held_out"]:
        assert excess(row["prompt"], row["chosen"]) == 0
        assert excess(row["prompt"], row["rejected"]) == EXCESS
        target_content(row, needs_rejected=True)
        asked.append(row["prompt"])
    assert len({tuple(sorted(operands(question))) for question in asked}) == len(asked)


def test_the_same_seed_writes_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    first, second, other = (write(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first == second != other


def test_the_demos_documents_are_valid_and_the_adapter_is_small_and_of_the_base_they_name() -> None:
    for name in ("selection.yaml", "cluster.yaml"):
        spec = parse_spec((SUMS / name).read_text(), name).spec
        assert spec.model.adapter is not None
        assert spec.scoring.preference_model is not None
        assert spec.scoring.preference_model.uri == spec.model.uri, "π comes from the model before tuning"
        assert str(spec.model) == f"{spec.model.uri} with the adapter {spec.model.adapter}"
    weights = load_file(SUMS / "adapter" / "adapter_model.safetensors")
    assert sum(weight.numel() * weight.element_size() for weight in weights.values()) < 2_000_000
    # 30 layers, seven matrices, A and B.
    assert len(weights) == 30 * 7 * 2
    assert all(float(weight.float().abs().sum()) > 0 for weight in weights.values())


@pytest.mark.parametrize("task", generated.TASKS)
def test_generated_questions_suffice_for_a_cell_and_their_answers_differ(task: str) -> None:
    questions = generated.TASKS[task](random.Random(f"{task} 0"))
    assert len(questions) >= dishonesty.NUM_ROWS + dishonesty.NUM_PAIRS + dishonesty.NUM_HELD
    assert len({one.prompt for one in questions}) == len(questions)
    assert all(one.honest != one.dishonest for one in questions)
    assert questions == generated.TASKS[task](random.Random(f"{task} 0"))
