from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.follow.logs import merged_logs
from tests.follow.log_server import LogServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogServer]:
    monkeypatch.setattr("launcher.follow.logs.pod_log.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(merged_logs, "POLL_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(merged_logs, "WATCH_SECONDS", 1)
    with LogServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server
