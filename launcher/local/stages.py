"""Runs the job's verbs as processes on this machine, and stops them politely. Not: what they compute, how it is shown.

A stage speaks in JSON lines on stdout; the last one is its outcome (DESIGN, section 6). If this launcher is killed
hard, the stage meets a broken pipe at its next line and ends too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import prism_job
from launcher.follow.display import Display, share_of_audit
from prism_job.spec.document import parse_spec

Words = dict[str, Any]

JOB = (sys.executable, "-P", "-m", "prism_job")
"""-P: no module of the folder that the user happens to stand in is taken for a library's."""

STAGES = ("plan", "extract", "reduce")

JOB_PACKAGES = ("numpy", "pyarrow", "torch", "transformers")
"""Asked for before anything starts: a plan may take minutes, and only extract would miss torch."""

PATIENCE_SECONDS = 20.0
"""From SIGTERM to SIGKILL: extract ends its micro-batch first, a few seconds even on a slow CPU."""

SAME_PRESS_SECONDS = 0.5
"""Wrappers (uv run, make) pass on a Ctrl-C that the terminal has already sent: that is no second one."""

POLL_INTERVAL_SECONDS = 0.2
"""How often we look for signals while a stage is silent."""

MAX_TAIL_LINES = 200
"""Lines of a stage's own chatter kept, to be shown if it ends without saying why."""

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}
"""Set for the stages where the user has not."""


class NotInstalledError(Exception):
    """The job's packages are not in this Python environment; only the launcher's are."""

    def __init__(self, package: str) -> None:
        self.package = package
        super().__init__(f"the job's packages are not installed here: no module named '{package}'")


class StageError(Exception):
    """A stage failed. `tail` holds its own chatter where it ended without saying why."""

    def __init__(
        self, stage: str, exit_code: int, what: str, *, where: str, fix: str, tail: Sequence[str] = ()
    ) -> None:
        self.stage, self.exit_code, self.what, self.where, self.fix, self.tail = (
            stage,
            exit_code,
            what,
            where,
            fix,
            tuple(tail),
        )
        super().__init__(what)


class StopError(Exception):
    """The user, or the machine, asked us to stop, and the stage has ended."""

    def __init__(self, stage: str, number: int) -> None:
        self.stage, self.number = stage, number
        super().__init__(f"stopped by signal {number}")

    @property
    def is_stage(self) -> bool:
        return self.stage in STAGES


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered. One that is ignored (nohup, a script's `&`) stays so."""

    def __init__(self) -> None:
        self.received: list[tuple[int, float]] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append((number, time.monotonic()))

    def asked_to_stop(self) -> bool:
        return bool(self.received)

    def asked_to_kill(self, now: float) -> bool:
        """A second signal came, or the patience with the first is over."""
        first = self.received[0][1]
        return now > first + PATIENCE_SECONDS or self.received[-1][1] > first + SAME_PRESS_SECONDS


def run_stages(text: str, where: str, display: Display, *, job: Sequence[str] = JOB, verbose: bool = False) -> Words:
    """Plan, extract what the store lacks, reduce. Returns the facts of the run, the manifest's address among them.

    Args:
        text: the document. A copy of it is handed to each stage, so that the text checked is the text run.
        where: what to call the document in errors, usually its path.
        display: shows the stages to a person.
        job: the command that a stage's name and arguments are added to.
        verbose: let the stages' own stderr through.

    Raises:
        SpecError: before any process starts.
        NotInstalledError, StageError, StopError: see there.
    """
    started = time.monotonic()
    run = parse_spec(text, where)
    refuse_missing_packages(job)
    with tempfile.TemporaryDirectory(prefix="prism-") as folder, Signals() as signals:
        document = Path(folder) / "selection.yaml"
        document.write_text(text, encoding="utf-8")

        def stage(name: str) -> Words:
            return run_verb(name, ["--spec", str(document)], display, signals, job=job, verbose=verbose)

        plan = stage("plan")
        if plan["missing"]:
            words = stage("extract")
            extracted, audit_share = words["units"], share_of_audit(words)
        else:
            extracted, audit_share = 0, 0.0
            display.say(f"0 units extracted: the store holds all {plan['units']}")
        reduced = stage("reduce")
        if reduced.get("audit"):
            display.say(f"audit: {reduced['audit']}")
        if reduced["badRows"]:
            display.say(f"unusable rows: {reduced['badRows']:,}; quarantine.jsonl beside the manifest lists them")
    return {
        "manifest": reduced["manifest"],
        "run": run.metadata.name,
        "examples": plan["examples"],
        "pairs": plan["pairs"],
        "units": plan["units"],
        "extracted": extracted,
        "auditShare": audit_share,
        "selected": reduced["selected"],
        "badRows": reduced["badRows"],
        "unchanged": reduced.get("unchanged", False),
        "seconds": round(time.monotonic() - started, 3),
    }


@contextlib.contextmanager
def checked_copy(text: str, where: str) -> Iterator[str]:
    """The path of a copy of the document, so that the text checked is the text a verb reads. Raises SpecError."""
    parse_spec(text, where)
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        document = Path(folder) / "selection.yaml"
        document.write_text(text, encoding="utf-8")
        yield str(document)


def refuse_missing_packages(job: Sequence[str] = JOB) -> None:
    """Raises NotInstalledError where our own job could not start; imports nothing."""
    for package in JOB_PACKAGES if job is JOB else ():
        if importlib.util.find_spec(package) is None:
            raise NotInstalledError(package)


def run_verb(
    verb: str,
    arguments: Sequence[str],
    display: Display,
    signals: Signals,
    *,
    job: Sequence[str] = JOB,
    verbose: bool = False,
) -> Words:
    """Run one verb to its end and return its last words.

    Raises:
        StageError: it failed, or ended without last words.
        StopError: a signal came; the process is gone.
        NotInstalledError: it lacks a package.
    """
    if signals.asked_to_stop():
        raise StopError(verb, signals.received[0][0])
    display.start(verb)
    process = subprocess.Popen(
        [*job, verb, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.PIPE,
        env=environment(os.environ),
        # A session of its own: Ctrl-C in the terminal reaches only us, and we decide what the stage hears.
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        words, tail = _listen(process, display, signals)
    finally:
        _kill_group(process)
    if signals.asked_to_stop():
        raise StopError(verb, signals.received[0][0])
    if process.returncode == 0 and words.get("event") == "done":
        display.finish(verb, words)
        return words
    raise _explain(verb, process.returncode, words, tail)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage: the user's, quieter, and able to find prism_job in a checkout never installed."""
    settings = {**QUIET, **given}
    code = str(Path(prism_job.__file__).parents[1])
    if code not in sysconfig.get_paths().values():
        settings["PYTHONPATH"] = os.pathsep.join([code, *filter(None, [given.get("PYTHONPATH")])])
    return settings


def _listen(process: subprocess.Popen[str], display: Display, signals: Signals) -> tuple[Words, list[str]]:
    """Read until the process and all that it started have ended. Returns its last words and its last chatter."""
    lines: queue.Queue[str | None] = queue.Queue()
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    for stream in streams:
        threading.Thread(target=_pump, args=(stream, lines), daemon=True).start()
    num_open, told = len(streams), False
    words: Words = {}
    by_rank: dict[int, Words] = {}
    tail: deque[str] = deque(maxlen=MAX_TAIL_LINES)
    while num_open:
        try:
            line = lines.get(timeout=POLL_INTERVAL_SECONDS)
        except queue.Empty:
            if process.poll() is not None:
                _kill_group(process)  # What it left behind would hold the pipe open.
        else:
            if line is None:
                num_open -= 1
            elif (event := _parse(line)) is None:
                tail.append(line.rstrip("\n"))
            elif event["event"] in ("done", "failed"):
                words = event
            elif event["event"] == "progress":
                by_rank[event.get("rank", 0)] = event
                display.show(_together(event, by_rank.values()))
            else:
                display.show(event)
        told = _pass_on(signals, process, display, told)
    process.wait()
    return words, list(tail)


def _together(event: Words, of_ranks: Iterable[Words]) -> Words:
    """The progress of a stage: each rank counts its own examples and tokens of one total."""
    of_ranks = list(of_ranks)
    return {**event, **{name: sum(one[name] for one in of_ranks) for name in ("done", "tokens")}}


def _pass_on(signals: Signals, process: subprocess.Popen[str], display: Display, told: bool) -> bool:
    """Tell the process of the first signal, once, as SIGTERM; kill at the second. Returns whether it has been told."""
    if not signals.asked_to_stop():
        return False
    if not told:
        display.say("stopping: the work in hand is finished first (Ctrl-C again: at once)")
        process.terminate()
    if signals.asked_to_kill(time.monotonic()):
        _kill_group(process)
    return True


def _pump(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    try:
        for line in stream:
            lines.put(line)
    finally:
        lines.put(None)


def _parse(line: str) -> Words | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and all that it started; nothing happens where all have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS answers PermissionError where only a zombie is left.
        return


def _explain(verb: str, exit_code: int, words: Words, tail: list[str]) -> Exception:
    if "error" in words:
        # One line each: text from data must not look like lines of ours.
        what, where, fix = (" ".join(str(words[part]).splitlines()) for part in ("error", "where", "fix"))
        return StageError(verb, exit_code, what, where=where, fix=fix)
    lacking = [line for line in tail if line.startswith("ModuleNotFoundError: No module named ")]
    if lacking:
        return NotInstalledError(lacking[-1].split("'")[1])
    where = f"python -m prism_job {verb}"
    if exit_code < 0:
        what = f"the {verb} stage was killed by signal {-exit_code}"
        fix = "run the same command again: finished units are kept"
        if exit_code == -signal.SIGKILL:
            what += ", often out of memory"
            fix = "lower extraction.tokensPerBatch, or free memory, and run again: finished units are kept"
        return StageError(verb, exit_code, what, where=where, fix=fix, tail=tail)
    what = f"the {verb} stage ended with exit code {exit_code} without saying why"
    return StageError(
        verb, exit_code, what, where=where, fix="read its own lines above; this may be a flaw of PRISM", tail=tail
    )
