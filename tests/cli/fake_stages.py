"""The command in a process of its own, over fake stages.

The fake is a small script: a real process that the launcher starts, stops and reads. The environment variable FAKE sets
what it does; it notes what happened to it in files of the folder NOTES.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.resource import field_reference

ROOT = Path(__file__).parents[2]
FACTS = {"auroc": 0.9, "label": "good"}
"""What evaluate, estimate and store report."""

INSPECTED = {
    "model": "/model",
    "max_length": 64,
    "loss_on": "assistant",
    "sources": [
        {
            "uri": "/pool.jsonl",
            "role": "candidates",
            "set": "",
            "rows_read": 1,
            "is_whole": False,
            "layouts": [{"layout": "text", "rows": 1, "loss": "text"}],
            "rows_unusable": 0,
            "reasons": [],
            "rows_of_pairs": 0,
            "rows_cut": 0,
            "tokens": 3,
            "tokens_with_loss": 2,
            "tokens_cut": 0,
            "rows": [
                {
                    "line": 1,
                    "layout": "text",
                    "loss": "text",
                    "reason": None,
                    "stops_run": False,
                    "content": {"text": "a\u27e6 b"},
                    "texts": {
                        "text": {
                            "text": "a\u27e6 \x1bb",
                            "tokens": 3,
                            "tokens_with_loss": 2,
                            "tokens_cut": 0,
                            "ids": [1, 2, 3],
                            "offsets": [[0, 2], [2, 4], [4, 5]],
                            "loss": [False, True, True],
                        }
                    },
                }
            ],
        }
    ],
    "sources_left_out": 0,
    "ignored": {},
}
"""What inspect reports."""

FAKE_JOB = (
    f"FACTS = {FACTS!r}; INSPECTED = {INSPECTED!r}"
    + """
import json, os, pathlib, signal, subprocess, sys, time
verb, arguments = sys.argv[1], sys.argv[2:]
notes = pathlib.Path(os.environ["NOTES"])
plan = json.loads(os.environ.get("FAKE", "{}"))
(notes / verb).write_text(json.dumps({"arguments": arguments, "pid": os.getpid(), "environment": dict(os.environ)}))
words = {
    "plan": {"units": 3, "missing": 2, "examples": 40, "pairs": 8, "badRows": 1, "extractor": "e"},
    "extract": {"units": 2, "examples": 48, "tokens": 100, "seconds": 4.0, "auditSeconds": 1.0},
    "reduce": {"manifest": "/out/manifest.json", "selected": 20, "candidates": 40, "badRows": 2, "audit": "It agrees."},
    "evaluate": FACTS,
    "export": {"written": "/out/subset.jsonl", "rows": 20},
    "diff": {"churn": 0.25},
    "explain": FACTS,
    "estimate": FACTS,
    "inspect": INSPECTED,
    "store": FACTS,
}[verb]
words.update(plan.get(verb, {}))
def say(event, **fields):
    print(json.dumps({"event": event, "time": 0, **fields}), flush=True)
def on_sigterm(*_):
    time.sleep(0.3)  # the micro-batch in hand
    (notes / "finished").write_text("after SIGTERM")
    say("failed", verb=verb, error="stopped by SIGTERM", where="extract", fix="run again", exitCode=143)
    sys.exit(143)
signal.signal(signal.SIGTERM, on_sigterm)
if verb == "extract":
    signal.signal(signal.SIGINT, lambda *_: (notes / "interrupted").write_text("SIGINT reached the stage"))
    say("progress", stage="extract", done=10, total=48, tokens=50, seconds=2.0)
if "step" in plan:
    say("step", text=plan["step"])
print("a library talks on stdout")
print("a library warns on stderr", file=sys.stderr, flush=True)
if plan.get("at") == verb:
    if "kill" in plan:
        os.kill(os.getpid(), plan["kill"])
    if plan.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if plan.get("orphan"):
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (notes / "orphan").write_text(str(orphan.pid))
        os._exit(1)
    if "sleep" in plan:
        (notes / "asleep").write_text("")
        until = time.monotonic() + plan["sleep"]
        while time.monotonic() < until:
            time.sleep(0.05)
            say("progress", stage=verb, done=11, total=48, tokens=50, seconds=2.0)
    if "raise" in plan:
        raise eval(plan["raise"])
    if "exit" in plan:
        if "error" in plan:
            where = plan.get("where", "spec.model.uri")
            say("failed", verb=verb, error=plan["error"], where=where, fix="correct it", exitCode=plan["exit"])
        sys.exit(plan["exit"])
say("done", verb=verb, **words)
"""
)

RUN_MAIN = "import sys; from launcher.cli.main import main; main(sys.argv[2:], job=[sys.executable, sys.argv[1]])"


class Rig:
    """The command in a process of its own, over the fake stages."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.fake = folder / "fake.py"
        self.fake.write_text(FAKE_JOB)
        self.document = folder / "selection.yaml"
        self.document.write_text(field_reference.SMALLEST)

    def start(self, *arguments: str, **plan: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RUN_MAIN, str(self.fake), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "NOTES": str(self.notes), "FAKE": json.dumps(plan)},
            # A shell that started pytest with & has SIGINT ignored, nohup has SIGHUP ignored, and that is inherited.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
        )

    def call(self, *arguments: str, **plan: Any) -> tuple[int, str, str]:
        process = self.start(*arguments, **plan)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def run(self, *options: str, **plan: Any) -> tuple[int, str, str]:
        return self.call("run", str(self.document), *options, **plan)

    def started(self) -> set[str]:
        return {path.name for path in self.notes.iterdir()} & {"plan", "extract", "reduce"}

    def note(self, name: str) -> dict[str, Any]:
        noted: dict[str, Any] = json.loads((self.notes / name).read_text())
        return noted

    def wait_for(self, name: str) -> None:
        wait_until(lambda: (self.notes / name).exists())


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_terminal(end: int) -> str:
    """All that is drawn until the last process at the other end is gone; Linux says so with EIO."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(end, 4096):
            parts.append(part)
    os.close(end)
    return b"".join(parts).decode()


def is_alive(pid: int) -> bool:
    try:
        # A zombie that nobody has reaped yet is dead to us.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
