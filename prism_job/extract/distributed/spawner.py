"""Starts the ranks of one node and answers for them: one exit code, one set of last words. Not: what ranks compute.

torchrun turns every failure into exit code 1. Here the first rank that fails hands on its own code and words, so that a
Job policy can tell a bad request from bad weather. The processes themselves are torch's (`start_processes`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, start_processes
from torch.distributed.elastic.multiprocessing.api import RunProcsResult

from prism_job.errors import RankFailed, Stopped
from prism_job.extract.distributed.watchdog import SPAWNER
from prism_job.extract.distributed.world import Topology

SHUTDOWN_GRACE_SECONDS = 20
"""From SIGTERM to SIGKILL: a rank finishes its micro-batch first."""

POLL_INTERVAL_SECONDS = 0.2
"""How often the ranks are looked at."""


def spawn_ranks(arguments: list[str], topology: Topology) -> dict[str, Any]:
    """Run `python -m prism_job extract <arguments>` once a rank and wait for all. Returns their last words, added up.

    Raises:
        RankFailed: a rank failed; carries the first one's exit code and words. The others are ended.
        Stopped: SIGTERM came; it was passed on, and the ranks have left.
    """
    host, _, port = topology.master.partition(":")
    port = port if topology.nodes > 1 else str(_free_port())
    with tempfile.TemporaryDirectory(prefix="prism-ranks-") as folder:
        words = {rank: Path(folder) / f"{rank}.json" for rank in range(topology.ranks)}
        shared = {
            SPAWNER: str(os.getpid()),
            "WORLD_SIZE": str(topology.ranks * topology.nodes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            # Ranks share the cores of their node; every one taking them all would make them wait for each other.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // topology.ranks)),
        }
        environments = {
            local: {
                **shared,
                "RANK": str(topology.node * topology.ranks + local),
                "LOCAL_RANK": str(local),
                "PRISM_TERMINATION_LOG": str(words[local]),
            }
            for local in words
        }
        command = ("-m", "prism_job", "extract", *arguments)
        context = start_processes(
            "extract",
            sys.executable,
            dict.fromkeys(words, command),
            environments,
            DefaultLogsSpecs(log_dir=folder),
        )
        try:
            result = _wait(context)
        except SignalException as caught:
            context.close(signal.SIGTERM, SHUTDOWN_GRACE_SECONDS)
            if caught.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            fix = "run again: finished units are kept, only each rank's unit in hand is computed anew"
            raise Stopped(f"stopped by {caught.sigval.name}", where="extract", fix=fix) from None
        finally:
            context.close(signal.SIGKILL, 1)
        if result.failures:
            raise _first_failure(result, words)
        return _added_up(words)


_STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)


def _wait(context: PContext) -> RunProcsResult:
    while True:
        result = context.wait(timeout=3600, period=POLL_INTERVAL_SECONDS)
        if result is not None:
            return result


def _first_failure(result: RunProcsResult, words: dict[int, Path]) -> RankFailed:
    # Ranks that were stopped because another failed come last; a rank whose peer is gone fails a moment later without
    # words of its own, so whoever said why comes first.
    said_by = {rank: _read(words[rank]) for rank in result.failures}
    first = min(
        result.failures.values(),
        key=lambda one: (one.exitcode in _STOPPED, "error" not in said_by[one.local_rank], one.timestamp),
    )
    code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    said = said_by[first.local_rank]
    return RankFailed(
        f"rank {first.local_rank} of this node: {said.get('error', f'ended with exit code {code} without saying why')}",
        where=str(said.get("where", "extract")),
        fix=str(said.get("fix", "look at its lines above; finished units are kept, run again to go on")),
        exit_code=code,
    )


def _added_up(words: dict[int, Path]) -> dict[str, Any]:
    said = [_read(path) for path in words.values()]
    counts = {key: sum(int(one.get(key, 0)) for one in said) for key in ("units", "examples", "tokens", "retries")}
    return counts | {key: round(sum(float(one.get(key, 0)) for one in said), 3) for key in ("seconds", "auditSeconds")}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _cores() -> int:
    return len(os.sched_getaffinity(0))
