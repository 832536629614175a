"""The job as users run it (a document, and its stages as processes), and what every benchmark has: `--json FILE`."""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MODEL = "build/model/SmolLM2-135M-Instruct.gguf"


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures there, flat")
    return made


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {name: None if value != value else value for name, value in figures.items()}  # JSON knows no NaN
        path.write_text(json.dumps(known, indent=1))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def selection(folder: Path, **sections: Any) -> dict[str, Any]:
    """The spec of a run over the files of a folder; `sections` replace these or add to them."""
    return {
        "model": {"uri": str(folder / "model")},
        "candidates": {"uris": [str(folder / "pool.jsonl")]},
        "targets": {"uris": [str(folder / "targets.jsonl")]},
        "store": str(folder / "store"),
        "output": str(folder / "output"),
        "audit": {"examples": 0},
        "selection": {"keep": "highest", "budget": {"fraction": 0.5}},
        **sections,
    }


def write_document(path: Path, name: str, spec: dict[str, Any]) -> Path:
    run = {"apiVersion": "prism.dev/v1alpha1", "kind": "SelectionRun", "metadata": {"name": name}, "spec": spec}
    path.write_text(yaml.safe_dump(run))
    return path


def command(stage: str, document: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "prism_job", stage, "--spec", str(document), *arguments]


def run_stage(stage: str, document: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of the process by the clock, and its termination message."""
    started = time.monotonic()
    done = subprocess.run(command(stage, document), stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{stage} of {document} failed:\n{done.stdout[-3000:]}")
    return seconds, json.loads(done.stdout.splitlines()[-1])


def cpu_seconds() -> float:
    """Of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
