"""A command as a child process whose output is copied to ours and kept. Does not know what the command does, or where its
log is kept.

Not in the process of the stage itself: the log of a stage that crashes must be kept too. A stage that is killed out of
memory usually takes this process along, as Kubernetes kills all of a container then (docs/known-flaws.md).
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from prism_job.errors import PrismError, one_line
from prism_job.logs.bounded_log import MIB, BoundedLog

POLL_INTERVAL_SECONDS = 0.2
"""How often signals are passed on and the child's end is noticed while it is silent."""

FIRST_UPLOAD_SECONDS = 10.0
"""So early that a missing right is reported while the stage runs. At its end, a warning would hide a crash's last line."""

UPLOAD_INTERVAL_SECONDS, SECONDS_PER_MIB = 60.0, 30.0
"""The log is uploaded this often where it grew; a long one less often, since all of it is uploaded each time."""

LAST_UPLOAD_SECONDS = 8.0
"""After the child's end. A stage leaves within 20 of the 30 s from SIGTERM to SIGKILL."""


def run_and_keep(command: Sequence[str], environment: Mapping[str, str], put: Callable[[bytes], None]) -> int:
    """Run the command to its end. Returns its exit code, 128 + N where signal N ended it, as a container does.

    SIGTERM and SIGINT are passed on. stdout and stderr are copied as they come.

    Args:
        put: keeps the whole log so far. An error of it becomes one line on stderr.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, bufsize=0)
    log = BoundedLog()
    uploads = _Uploads(log, put)
    _copy_until_end(process, log, received, on_signal=uploads.hurry)
    log.finish()
    exit_code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    uploads.end(may_warn=exit_code == 0)
    return exit_code


def _copy_until_end(
    process: subprocess.Popen[bytes], log: BoundedLog, received: list[int], on_signal: Callable[[], None]
) -> None:
    """Also what is in the pipes when the process ends; not what processes that it leaves behind write later."""
    with selectors.DefaultSelector() as selector:
        for stream, copy in ((process.stdout, 1), (process.stderr, 2)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream.fileno(), selectors.EVENT_READ, copy)
        while True:
            while received:
                process.send_signal(received.pop(0))
                on_signal()
            has_ended = process.poll() is not None  # before the pipes are read
            if not selector.get_map():
                if has_ended:
                    return
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_INTERVAL_SECONDS)
                continue
            ready = selector.select(0 if has_ended else POLL_INTERVAL_SECONDS)
            for key, _ in ready:
                if chunk := os.read(key.fd, 2**16):
                    _write(key.data, chunk)
                    log.add(key.data, chunk)
                else:
                    selector.unregister(key.fd)
            if has_ended and not ready:
                return


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


class _Uploads:
    """Uploads a log now and then, in a thread: a store that does not answer never holds the output back."""

    def __init__(self, log: BoundedLog, put: Callable[[bytes], None]) -> None:
        self.log, self.put = log, put
        self.num_uploaded = 0
        self.error = ""
        self.has_warned = False
        self._is_over, self._now = False, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Upload now: the end may be near."""
        self._now.set()

    def end(self, *, may_warn: bool) -> None:
        """Upload the rest, within LAST_UPLOAD_SECONDS."""
        self._is_over = True
        self._now.set()
        self._thread.join(LAST_UPLOAD_SECONDS)
        if self._thread.is_alive():
            self.error = self.error or f"the last upload takes longer than {LAST_UPLOAD_SECONDS:g} s"
        if may_warn:
            self._warn()

    def _run(self) -> None:
        pause_seconds = FIRST_UPLOAD_SECONDS
        while True:
            self._now.wait(pause_seconds)
            self._now.clear()
            is_last = self._is_over
            num_bytes = self.log.num_bytes
            if num_bytes > self.num_uploaded:
                content = self.log.content()
                pause_seconds = max(UPLOAD_INTERVAL_SECONDS, SECONDS_PER_MIB * len(content) / MIB)
                try:
                    self.put(content)
                    self.num_uploaded, self.error = num_bytes, ""
                except PrismError as error:
                    self.error = f"{error.what} ({error.where}); {error.fix}"
                except Exception as error:  # nothing that concerns the log may end the stage
                    self.error = one_line(error)
            if is_last:
                return
            self._warn()

    def _warn(self) -> None:
        if self.error and not self.has_warned:
            self.has_warned = True
            print(f"warning: this log is not kept: {self.error}", file=sys.stderr, flush=True)
