"""Laws of the process that keeps a stage's log: it changes neither output nor exit code, whatever happens to the log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.rig import eventually

ROOT = Path(__file__).parents[2]

KEEPER = """
import sys, time
from pathlib import Path
from prism_job.errors import RequestError
from prism_job.logs import keeper

def put(content):
    if sys.argv[2] == "refuse":
        raise RequestError("access denied", where="s3://there", fix="ask for it")
    if sys.argv[2] == "hang":
        time.sleep(60)
    path = Path(sys.argv[1])
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)

keeper.FIRST_UPLOAD_SECONDS = keeper.UPLOAD_INTERVAL_SECONDS = float(sys.argv[3])
keeper.LAST_UPLOAD_SECONDS = 2.0
sys.exit(keeper.run_and_keep([sys.executable, "-c", sys.argv[4]], {"PYTHONUNBUFFERED": "1"}, put))
"""


@contextlib.contextmanager
def started(log: Path, code: str, store: str = "works", pause: float = 60) -> Iterator[subprocess.Popen[bytes]]:
    """A keeper whose child runs this Python code."""
    command = [sys.executable, "-c", KEEPER, str(log), store, str(pause), code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(log: Path, code: str, store: str = "works") -> tuple[int, bytes, bytes]:
    with started(log, code, store) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


SPEAK = "import os; os.write(1, b'one\\n\\xff\\x00two\\r\\n' * 30000); os.write(2, b'to stderr, without an end')"


def test_output_is_passed_on_and_kept_byte_for_byte(tmp_path: Path) -> None:
    said = b"one\n\xff\x00two\r\n" * 30000
    assert finished(tmp_path / "log", SPEAK) == (0, said, b"to stderr, without an end")
    kept = (tmp_path / "log").read_bytes()
    assert kept.replace(b"to stderr, without an end", b"") == said
    assert len(kept) == len(said) + len(b"to stderr, without an end")


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("pass", 0),
        ("raise SystemExit(64)", 64),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139),
    ],
)
@pytest.mark.parametrize("store", ["works", "refuse", "hang"])
def test_the_exit_code_is_the_childs_whether_the_log_is_kept_or_not(
    tmp_path: Path, code: str, exit_code: int, store: str
) -> None:
    found, out, _ = finished(tmp_path / "log", f"print('said', flush=True); {code}", store)
    assert (found, out) == (exit_code, b"said\n")
    assert (tmp_path / "log").exists() == (store == "works")


def test_a_log_that_cannot_be_kept_is_one_warning(tmp_path: Path) -> None:
    code, _, err = finished(tmp_path / "log", "print(1)", "refuse")
    assert code == 0
    assert err == b"warning: this log is not kept: access denied (s3://there); ask for it\n"


def test_the_last_line_of_a_crash_stays_the_last(tmp_path: Path) -> None:
    """It is the termination message where a stage leaves none."""
    code, _, err = finished(tmp_path / "log", "raise KeyError('why')", "refuse")
    assert code == 1
    assert err.splitlines()[-1] == b"KeyError: 'why'"


def test_a_refused_upload_is_reported_while_the_stage_runs(tmp_path: Path) -> None:
    with started(tmp_path / "log", "import time; print(1); time.sleep(60)", "refuse", pause=0.1) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"warning: this log is not kept")


WAIT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("stopping"), sys.exit(143)))
print("ready")
time.sleep(60)
"""


def test_sigterm_reaches_the_child_and_its_last_lines_are_kept(tmp_path: Path) -> None:
    with started(tmp_path / "log", WAIT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert (tmp_path / "log").read_bytes() == b"ready\nstopping\n"


def test_what_was_said_before_a_kill_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log, "import time; print('ready'); time.sleep(60)", pause=0.1) as process:
        eventually(log.exists, 30)
        process.kill()
    assert log.read_bytes() == b"ready\n"


def test_sigterm_uploads_at_once_for_the_grace_period_may_not_suffice(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(60)"
    log = tmp_path / "log"
    with started(log, deaf) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        eventually(log.exists, 30)
        process.kill()
    assert log.read_bytes() == b"ready\n"


def test_a_process_that_the_stage_leaves_behind_does_not_hold_its_end(tmp_path: Path) -> None:
    code = "import subprocess; print('said'); subprocess.Popen(['sleep', '30'])"
    before = time.monotonic()
    with started(tmp_path / "log", code) as process:
        assert process.wait(30) == 0
    assert time.monotonic() - before < 25
    assert (tmp_path / "log").read_bytes() == b"said\n"
