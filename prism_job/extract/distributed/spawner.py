"""Starts the ranks of one node and reports for them: one exit code, one termination message. Does not know what they compute.

torchrun turns every failure into exit code 1. Here the exit code and message of the first rank that fails become those of
the node, so that a Job policy can tell a bad request from a transient error. torch starts the processes (`start_processes`).
"""

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
"""How often the ranks are checked."""


def spawn_ranks(arguments: list[str], topology: Topology) -> dict[str, Any]:
    """Run `python -m prism_job extract <arguments>` once a rank and wait for all. Returns their termination messages, summed.

    Raises:
        RankFailed: a rank failed; carries the exit code and message of the first. The others are stopped.
        Stopped: SIGTERM came; it was passed on, and the ranks have ended.
    """
    host, _, port = topology.master.partition(":")
    port = port if topology.nodes > 1 else str(_free_port())
    with tempfile.TemporaryDirectory(prefix="prism-ranks-") as folder:
        messages = {rank: Path(folder) / f"{rank}.json" for rank in range(topology.ranks)}
        cores = len(os.sched_getaffinity(0))
        shared = {
            SPAWNER: str(os.getpid()),
            "WORLD_SIZE": str(topology.ranks * topology.nodes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            # Ranks share the cores of their node; if each used all of them, they would wait for each other.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // topology.ranks)),
        }
        environments = {
            local: {
                **shared,
                "RANK": str(topology.node * topology.ranks + local),
                "LOCAL_RANK": str(local),
                "PRISM_TERMINATION_LOG": str(messages[local]),
            }
            for local in messages
        }
        command = ("-m", "prism_job", "extract", *arguments)
        context = start_processes(
            "extract", sys.executable, dict.fromkeys(messages, command), environments, DefaultLogsSpecs(log_dir=folder)
        )
        try:
            result = _wait(context)
        except SignalException as caught:
            context.close(signal.SIGTERM, SHUTDOWN_GRACE_SECONDS)
            if caught.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            fix = "run again: finished units are kept, only the current unit of each rank is computed again"
            raise Stopped(f"stopped by {caught.sigval.name}", where="extract", fix=fix) from None
        finally:
            context.close(signal.SIGKILL, 1)
        if result.failures:
            raise _first_failure(result, messages)
        return _summed(messages)


_STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)


def _wait(context: PContext) -> RunProcsResult:
    while True:
        result = context.wait(timeout=3600, period=POLL_INTERVAL_SECONDS)
        if result is not None:
            return result


def _first_failure(result: RunProcsResult, paths: dict[int, Path]) -> RankFailed:
    # Ranks that were stopped because another failed come last. A rank whose peer is gone fails a moment later and leaves no
    # message, so a rank that left one comes first.
    messages = {rank: _read(paths[rank]) for rank in result.failures}
    first = min(
        result.failures.values(),
        key=lambda failure: (
            failure.exitcode in _STOPPED,
            "error" not in messages[failure.local_rank],
            failure.timestamp,
        ),
    )
    code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    message = messages[first.local_rank]
    return RankFailed(
        f"rank {first.local_rank} of this node: {message.get('error', f'exit code {code} without a termination message')}",
        where=str(message.get("where", "extract")),
        fix=str(message.get("fix", "see its log lines above; finished units are kept, run again to continue")),
        exit_code=code,
    )


def _summed(paths: dict[int, Path]) -> dict[str, Any]:
    messages = [_read(path) for path in paths.values()]
    names = ("units", "examples", "tokens", "cut", "retries")
    counts = {key: sum(int(each.get(key, 0)) for each in messages) for key in names}
    seconds = {key: round(sum(float(each.get(key, 0)) for each in messages), 3) for key in ("seconds", "auditSeconds")}
    return counts | seconds


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
