"""The fake API server for each test, and short pauses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.operator import controller as hosts
from launcher.operator import events, informer
from launcher.resource.crd import crd
from tests.cluster.rig import variables
from tests.cluster.server.apiserver import ApiServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as server:
        server.create(crd())
        with variables(KUBECONFIG=str(server.kubeconfig(tmp_path / "kubeconfig"))):
            yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "LONGEST_PAUSE_SECONDS", 0.4)
    monkeypatch.setattr(informer, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(events, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(hosts, "OPERATOR_SECONDS", 2.0)
