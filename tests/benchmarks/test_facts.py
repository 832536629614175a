"""Laws of the demo's data: as many wrong as right rows, and nothing but the answer reveals the label."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prism_job.data.examples import candidate_content, example_id, target_content
from prism_job.spec.document import parse_spec

FACTS = Path(__file__).parents[2] / "examples" / "facts"
CAPITALS: dict[str, str] = runpy.run_path(str(FACTS / "capitals.py"))["CAPITALS"]
NAMES = ("candidates.jsonl", "targets.jsonl")

Row = dict[str, Any]


def _write(folder: Path, seed: int) -> Path:
    command = [sys.executable, str(FACTS / "make_data.py"), "--out", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="module", params=[0, 1, 2])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], list[Row]]:
    """Candidates and targets."""
    folder = _write(tmp_path_factory.mktemp("facts"), request.param)
    candidates, targets = ((folder / name).read_text(encoding="utf-8").splitlines() for name in NAMES)
    return [json.loads(line) for line in candidates], [json.loads(line) for line in targets]


def _fact(question: str, answer: str) -> tuple[Any, str, str]:
    """What is asked (a country, or both operands in order), the answer given, and the answer by list or arithmetic."""
    if question.startswith("What is the capital of "):
        country, city = re.fullmatch(r"The capital of (.+) is (.+)\.", answer).groups()  # type: ignore[union-attr]
        assert question == f"What is the capital of {country}?"
        return country, city, CAPITALS[country]
    a, b, total = re.fullmatch(r"(\d\d) \+ (\d\d) = (\d+)\.", answer).groups()  # type: ignore[union-attr]
    assert question == f"What is {a} + {b}?"
    return tuple(sorted((int(a), int(b)))), total, str(int(a) + int(b))


def _candidate_fact(row: Row) -> tuple[Any, str, str]:
    question, answer = row["messages"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    return _fact(question["content"], answer["content"])


def _target_facts(row: Row) -> tuple[tuple[Any, str, str], tuple[Any, str, str]]:
    (question,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
    return _fact(question["content"], chosen["content"]), _fact(question["content"], rejected["content"])


def test_the_same_seed_writes_the_same_bytes_and_another_seed_writes_others(tmp_path: Path) -> None:
    first, again, other = _write(tmp_path / "a", 0), _write(tmp_path / "b", 0), _write(tmp_path / "c", 1)
    for name in NAMES:
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


def test_half_of_each_kind_is_wrong(data: tuple[list[Row], list[Row]]) -> None:
    candidates, targets = data
    counts = Counter((row["kind"], row["label"]) for row in candidates)
    assert counts == {(kind, label): 60 for kind in ("capital", "sum") for label in (0, 1)}
    assert Counter(row["kind"] for row in targets) == {"capital": 30, "sum": 30}


def test_labels_and_pairs_agree_with_the_list_and_with_arithmetic(data: tuple[list[Row], list[Row]]) -> None:
    for row in data[0]:
        _, given, right = _candidate_fact(row)
        assert row["label"] == int(given == right), row
    for row in data[1]:
        (_, chosen, right), (_, rejected, _) = _target_facts(row)
        assert chosen == right != rejected, row


def test_wrong_answers_are_plausible(data: tuple[list[Row], list[Row]]) -> None:
    facts = [_candidate_fact(row) for row in data[0]] + [_target_facts(row)[1] for row in data[1]]
    for asked, given, right in facts:
        if isinstance(asked, str):
            assert given in CAPITALS.values()
        else:
            assert abs(int(given) - int(right)) in (0, 1, 2, 10)


def test_no_fact_and_no_example_id_occurs_twice(data: tuple[list[Row], list[Row]]) -> None:
    candidates, targets = data
    asked = [_candidate_fact(row)[0] for row in candidates] + [_target_facts(row)[0][0] for row in targets]
    ids = [example_id(candidate_content(row)) for row in candidates]
    ids += [example_id(target_content(row, needs_rejected=True)) for row in targets]
    assert len(set(asked)) == len(asked) == len(set(ids)) == 300


def test_the_frequency_of_a_city_does_not_reveal_the_label(data: tuple[list[Row], list[Row]]) -> None:
    candidates, targets = data
    named = Counter(given for asked, given, _ in map(_candidate_fact, candidates) if isinstance(asked, str))
    chosen, rejected = (
        Counter(_target_facts(row)[side][1] for row in targets if row["kind"] == "capital") for side in (0, 1)
    )
    assert set(named.values()) == {1}
    assert chosen == rejected
    assert not named.keys() & chosen.keys()


def test_a_capital_belongs_to_one_country() -> None:
    assert len(set(CAPITALS.values())) == len(CAPITALS)


def test_the_demo_document_reads_what_the_script_writes_by_default() -> None:
    path = FACTS / "selection.yaml"
    spec = parse_spec(path.read_text(encoding="utf-8"), str(path)).spec
    assert spec.candidates.uris == ("build/facts/candidates.jsonl",)
    assert spec.targets.uris == ("build/facts/targets.jsonl",)
    assert (spec.selection.drop, spec.selection.budget.fraction) == ("lowest", 0.5)
