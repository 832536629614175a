"""Laws of the demo's data, read from the files that the script writes: as many wrong as right, and nothing leaks."""

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


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=[0, 1, 2])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("facts"), request.param)


@pytest.fixture(scope="module")
def candidates(folder: Path) -> list[Row]:
    return _read(folder / NAMES[0])


@pytest.fixture(scope="module")
def targets(folder: Path) -> list[Row]:
    return _read(folder / NAMES[1])


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


def test_half_of_each_kind_is_wrong(candidates: list[Row], targets: list[Row]) -> None:
    counts = Counter((row["kind"], row["label"]) for row in candidates)
    assert counts == {(kind, label): 60 for kind in ("capital", "sum") for label in (0, 1)}
    assert Counter(row["kind"] for row in targets) == {"capital": 30, "sum": 30}


def test_a_label_says_what_the_list_and_the_arithmetic_say(candidates: list[Row]) -> None:
    for row in candidates:
        _, given, right = _candidate_fact(row)
        assert row["label"] == int(given == right), row


def test_every_pair_wants_the_right_answer_and_rejects_a_wrong_one(targets: list[Row]) -> None:
    for row in targets:
        (_, chosen, right), (_, rejected, _) = _target_facts(row)
        assert chosen == right != rejected, row


def test_wrong_answers_are_plausible(candidates: list[Row], targets: list[Row]) -> None:
    facts = [_candidate_fact(row) for row in candidates] + [_target_facts(row)[1] for row in targets]
    for asked, given, right in facts:
        if isinstance(asked, str):
            assert given in CAPITALS.values()
        else:
            assert abs(int(given) - int(right)) in (0, 1, 2, 10)


def test_no_fact_stands_twice_and_no_target_asks_what_a_candidate_tells(
    candidates: list[Row], targets: list[Row]
) -> None:
    asked = [_candidate_fact(row)[0] for row in candidates] + [_target_facts(row)[0][0] for row in targets]
    assert len(set(asked)) == len(asked) == 300


def test_how_often_a_city_is_named_gives_no_label_away(candidates: list[Row], targets: list[Row]) -> None:
    told = Counter(given for asked, given, _ in map(_candidate_fact, candidates) if isinstance(asked, str))
    wanted = Counter(_target_facts(row)[0][1] for row in targets if row["kind"] == "capital")
    unwanted = Counter(_target_facts(row)[1][1] for row in targets if row["kind"] == "capital")
    assert set(told.values()) == {1}
    assert wanted == unwanted
    assert not told.keys() & wanted.keys()


def test_every_row_is_usable_and_no_two_have_the_same_id(candidates: list[Row], targets: list[Row]) -> None:
    ids = [example_id(candidate_content(row)) for row in candidates]
    ids += [example_id(target_content(row, needs_rejected=True)) for row in targets]
    assert len(set(ids)) == 300


def test_a_capital_belongs_to_one_country() -> None:
    assert len(set(CAPITALS.values())) == len(CAPITALS)


def test_the_demo_document_reads_what_the_script_writes_by_default() -> None:
    path = FACTS / "selection.yaml"
    spec = parse_spec(path.read_text(encoding="utf-8"), str(path)).spec
    assert spec.candidates.uris == ("build/facts/candidates.jsonl",)
    assert spec.targets.uris == ("build/facts/targets.jsonl",)
    assert (spec.selection.drop, spec.selection.budget.fraction) == ("lowest", 0.5)
