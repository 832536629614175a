"""The API server of our own answers what a real one was recorded to answer, and the records are what a real one answers now.

Compared are status, the headers that the launcher reads, and the whole body; recorder.py states what is trimmed first, and why.
Where KUBEBUILDER_ASSETS names the binaries of a control plane, the same requests go to that one.
"""

from __future__ import annotations

import json
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.real import RealServer, missing_binaries
from tests.cluster.recording import scenarios
from tests.cluster.recording.recorder import (
    FOLDER,
    SCENARIOS,
    START,
    Door,
    Scenario,
    play,
    play_start,
    prepare,
    read,
    table,
)
from tests.cluster.server.apiserver import ApiServer

assert scenarios.__name__, "imported so that its scenarios are registered"


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
    wanted = read(SCENARIOS[name])["exchanges"]
    found = json.loads(json.dumps(play(SCENARIOS[name], door)))
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one["request"] == other["request"], f"{name}, request {number}: record the scenario anew"
        assert one == other, f"{name}, request {number}: {one['request']['method']} {one['request']['path']}"


def test_a_server_that_starts_answers_as_recorded() -> None:
    """The fake gives some of the recorded answers, and none but those."""
    wanted = read(START)["exchanges"]
    with ApiServer() as server, tempfile.TemporaryDirectory() as folder:
        door = Door.of(server, Path(folder) / "kubeconfig")
        prepare(door)
        found = play_start(server, door, stay_seconds=0.5)
    assert {exchange["status"] for exchange in found} >= {403, 503}
    # Which roles are not read yet, or that some are not, is not said each time.
    known, said = (re.sub(": RBAC: <.*?> not found", "", json.dumps(each)) for each in (wanted, found))
    assert [exchange for exchange in json.loads(said) if exchange not in json.loads(known)] == []


@pytest.mark.parametrize("scenario", [*SCENARIOS.values(), START], ids=lambda scenario: scenario.name)
def test_every_record_names_functions_of_the_launcher_that_need_it(scenario: Scenario) -> None:
    assert read(scenario)["needed by"] == ", ".join(scenario.needed_by)
    for function in scenario.needed_by:
        assert callable(pkgutil.resolve_name(f"launcher.{function}")), function


def test_no_record_is_left_of_a_scenario_that_is_gone() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*SCENARIOS, START.name}


def test_the_table_of_records_is_the_one_printed() -> None:
    assert table() in (Path(FOLDER) / "README.md").read_text(), "python -m tests.cluster.recording.recorder --table"
