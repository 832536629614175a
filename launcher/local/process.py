"""One verb of the job as a process: start it, read its events, stop it, explain its failure.

A verb writes JSON lines on stdout; the last one is its outcome (docs/architecture.md, Contracts). If the launcher is
killed with SIGKILL, the verb meets a broken pipe at its next line and ends too.
"""

import os
import queue
import signal
import subprocess
import sysconfig
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import prism_job
from launcher.follow.bars import Display
from launcher.follow.event_text import parse_event
from launcher.local.signals import Signals, kill_group, stop_process

Facts = dict[str, Any]

POLL_INTERVAL_SECONDS = 0.2
"""How often signals are checked while a verb is silent."""

MAX_TAIL_LINES = 200
"""Lines of a verb's other output kept, to be shown if it ends without an outcome."""

QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}
"""Defaults of a verb's environment; what the user has set wins."""


class NotInstalledError(Exception):
    """The job's packages are not in this Python environment; only the launcher's are."""

    def __init__(self, package: str) -> None:
        super().__init__(f"the job's packages are not installed here: no module named '{package}'")


class StageError(Exception):
    """A stage or verb failed. `tail` holds its other output if it ended without an outcome."""

    def __init__(
        self, stage: str, exit_code: int, what: str, *, where: str, fix: str, tail: Sequence[str] = ()
    ) -> None:
        self.stage, self.exit_code, self.tail = stage, exit_code, tuple(tail)
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    @property
    def is_about_an_option(self) -> bool:
        """Whether what is wrong is an option of the command line, which only the verb itself can judge."""
        return self.where.startswith("--")


def run_process(
    command: Sequence[str],
    verb: str,
    display: Display,
    signals: Signals,
    *,
    verbose: bool,
    variables: Mapping[str, str] | None = None,
) -> Facts:
    """Run a verb to its end and return its outcome. After a signal the return value is meaningless: check `signals`.

    Raises:
        StageError: it failed, or ended without an outcome.
        NotInstalledError: it lacks a package.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.PIPE,
        env=environment({**os.environ, **(variables or {})}),
        # A session of its own: Ctrl-C in the terminal reaches only the launcher, which decides what to forward.
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        outcome, tail = _read_events(process, display, signals)
    finally:
        kill_group(process)
    if signals.wants_stop() or (process.returncode == 0 and outcome.get("event") == "done"):
        return outcome
    raise _failure(verb, process.returncode, outcome, tail)


def stream_events(command: Sequence[str], verb: str) -> Iterator[Facts]:
    """The events of a verb as it writes them; where the reader is slow, it waits. For any thread. Raises as run_process."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(os.environ),
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    outcome: Facts = {}
    tail: deque[str] = deque(maxlen=MAX_TAIL_LINES)
    with process:
        try:
            for line in process.stdout or ():
                if (event := parse_event(line)) is None:
                    tail.append(line.rstrip("\n"))
                elif event["event"] in ("done", "failed"):
                    outcome = event
                else:
                    yield event
            process.wait()
        finally:
            kill_group(process)
    if process.returncode or outcome.get("event") != "done":
        raise _failure(verb, process.returncode, outcome, list(tail))


def environment(user: Mapping[str, str]) -> dict[str, str]:
    """The environment of a verb: the user's, quieter, and able to import prism_job from a checkout."""
    settings = {**QUIET_ENVIRONMENT, **user}
    code = str(Path(prism_job.__file__).parents[1])
    if code not in sysconfig.get_paths().values():
        settings["PYTHONPATH"] = os.pathsep.join([code, *filter(None, [user.get("PYTHONPATH")])])
    return settings


def _read_events(process: subprocess.Popen[str], display: Display, signals: Signals) -> tuple[Facts, list[str]]:
    """Read until the process and everything it started have ended. Returns its outcome and its other output."""
    lines: queue.Queue[str | None] = queue.Queue()
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    for stream in streams:
        threading.Thread(target=_enqueue_lines, args=(stream, lines), daemon=True).start()
    num_open, is_stopping = len(streams), False
    outcome: Facts = {}
    progress_of_rank: dict[int, Facts] = {}
    tail: deque[str] = deque(maxlen=MAX_TAIL_LINES)
    while num_open:
        try:
            line = lines.get(timeout=POLL_INTERVAL_SECONDS)
        except queue.Empty:
            if process.poll() is not None:
                kill_group(process)  # its orphans would hold the pipe open
        else:
            if line is None:
                num_open -= 1
            elif (event := parse_event(line)) is None:
                tail.append(line.rstrip("\n"))
            elif event["event"] in ("done", "failed"):
                outcome = event
            elif event["event"] == "progress":
                progress_of_rank[event.get("rank", 0)] = event
                display.show(sum_of_ranks(event, progress_of_rank.values()))
            else:
                display.show(event)
        if signals.wants_stop():
            stop_process(process, display, signals, is_stopping=is_stopping)
            is_stopping = True
    process.wait()
    return outcome, list(tail)


def sum_of_ranks(event: Facts, of_ranks: Iterable[Facts]) -> Facts:
    """The progress of a stage: each rank counts its own examples and tokens, out of one common total."""
    of_ranks = list(of_ranks)
    return {**event, **{name: sum(progress[name] for progress in of_ranks) for name in ("done", "tokens")}}


def _enqueue_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    try:
        for line in stream:
            lines.put(line)
    finally:
        lines.put(None)


def _failure(verb: str, exit_code: int, outcome: Facts, tail: list[str]) -> Exception:
    if "error" in outcome:
        # One line, or indented further than ours: text from data must not look like lines of ours.
        what, where = (" ".join(str(outcome[part]).splitlines()) for part in ("error", "where"))
        fix = "\n    ".join(line.strip() for line in str(outcome["fix"]).splitlines())
        return StageError(verb, exit_code, what, where=where, fix=fix)
    missing = [line for line in tail if line.startswith("ModuleNotFoundError: No module named ")]
    if missing:
        return NotInstalledError(missing[-1].split("'")[1])
    what = f"`{verb}` ended with exit code {exit_code} without an error message"
    fix = "read its own output above; this may be a bug of PRISM"
    if exit_code < 0:
        what = f"`{verb}` was killed by signal {-exit_code}"
        fix = "run the same command again; units that were finished are kept"
    if exit_code == -signal.SIGKILL:
        what += ", often out of memory"
        fix = "free memory, or lower extraction.tokensPerBatch, and run again; units that were finished are kept"
    return StageError(verb, exit_code, what, where=f"python -m prism_job {verb}", fix=fix, tail=tail)
