"""The API server of our own answers what a real one was recorded to answer, and a real one still answers that.

Compared are status, the headers that the launcher reads, and the whole body; trimming.py states what is replaced first.
Where KUBEBUILDER_ASSETS names the binaries of a control plane, the same requests go to that one.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.real import RealServer, missing_binaries
from tests.cluster.recording.recorder import FOLDER, START, path_of, play, play_start, prepare, read
from tests.cluster.recording.session import SCENARIOS, Door
from tests.cluster.server.apiserver import ApiServer

ALL = {**SCENARIOS, START.name: START}


@pytest.fixture(scope="module", params=["fake", "real"])
def door(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "real" and (reason := missing_binaries()):
        pytest.skip(f"no real control plane: {reason}")
    with RealServer(folder) if request.param == "real" else ApiServer() as server:
        door = Door.of(server, folder / "kubeconfig")
        prepare(door)
        yield door


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_server_answers_as_recorded(name: str, door: Door) -> None:
    recorded, answered = read(SCENARIOS[name]), json.loads(json.dumps(play(SCENARIOS[name], door)))
    for number, (answer, record) in enumerate(zip(answered, recorded, strict=True)):
        assert answer["request"] == record["request"], f"{name}, request {number}: record the scenario anew"
        assert answer == record, f"{name}, request {number}: {answer['request']}"


def test_a_server_that_starts_answers_as_recorded(tmp_path: Path) -> None:
    """The fake gives some of the recorded answers, and none but those."""
    with ApiServer() as server:
        door = Door.of(server, tmp_path / "kubeconfig")
        prepare(door)
        answered = play_start(server, door, stay_seconds=0.5)
    assert {exchange["status"] for exchange in answered} >= {403, 503}
    # Not every answer names the roles that are not read yet.
    known, found = (
        [json.loads(re.sub(": RBAC: <.*?> not found", "", json.dumps(each))) for each in exchanges]
        for exchanges in (read(START), answered)
    )
    assert [exchange for exchange in found if exchange not in known] == []


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_scenario_names_functions_of_the_launcher_that_need_its_answers(name: str) -> None:
    assert ALL[name].needed_by
    for function in ALL[name].needed_by:
        assert callable(pkgutil.resolve_name(f"launcher.{function}")), function


def test_every_scenario_has_a_record_and_every_record_a_scenario() -> None:
    assert set(FOLDER.rglob("*.yaml")) == {path_of(scenario) for scenario in ALL.values()}
