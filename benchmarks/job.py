"""The job as users run it: a document, and its stages as processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_document(path: Path, name: str, spec: dict[str, Any]) -> Path:
    run = {"apiVersion": "prism.dev/v1alpha1", "kind": "SelectionRun", "metadata": {"name": name}, "spec": spec}
    path.write_text(yaml.safe_dump(run))
    return path


def command(stage: str, document: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "prism_job", stage, "--spec", str(document), *arguments]


def run_stage(stage: str, document: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of the process by the clock, and its termination message."""
    started = time.monotonic()
    done = subprocess.run(
        command(stage, document), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stdout[-3000:]}")
    return seconds, json.loads(done.stdout.splitlines()[-1])
