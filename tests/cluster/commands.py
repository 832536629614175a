"""Commands of people and of the operator's image as processes, against a rig: `prism` as a service account, kubectl as the
administrator. Does not know what is tested.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.rig import Rig

ROOT = Path(__file__).parents[2]


def kubeconfig_for(rig: Rig, arguments: tuple[str, ...]) -> Path:
    """The operator's for `operator`, the driver's for what may drive a run, a user's for all else."""
    if arguments[0] == "operator":
        return rig.as_operator()
    return rig.as_driver() if "--wait" in arguments else rig.as_user()


def environment(rig: Rig, kubeconfig: Path) -> dict[str, str]:
    return {**os.environ, **rig.environment, "KUBECONFIG": str(kubeconfig)}


def prism(rig: Rig, *arguments: str, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`prism` with these arguments until it ends, as the account that `kubeconfig_for` chooses unless one is given."""
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    env = environment(rig, kubeconfig or kubeconfig_for(rig, arguments))
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)


def shell(rig: Rig, script: str, *, kubeconfig: Path) -> str:
    """What a script of `prism` and kubectl prints, stderr too, in the rig's folder. An assertion error where one fails."""
    folders = [str(Path(sys.executable).parent), os.environ["PATH"], os.environ.get("KUBEBUILDER_ASSETS", "")]
    env = {**environment(rig, kubeconfig), "PATH": os.pathsep.join(filter(None, folders))}
    command = ["bash", "-euc", script]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **streams, text=True, cwd=rig.folder, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextlib.contextmanager
def running(rig: Rig, *arguments: str, kubeconfig: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """`prism` with these arguments while the block lasts; killed then."""
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    env = environment(rig, kubeconfig or kubeconfig_for(rig, arguments))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kubectl(rig: Rig, *arguments: str, kubeconfig: Path | None = None) -> str:
    """What kubectl prints; as the administrator unless a kubeconfig is given. An assertion error where it fails."""
    folders = [os.environ.get("PATH", ""), os.environ.get("KUBEBUILDER_ASSETS", "")]
    if (binary := shutil.which("kubectl", path=os.pathsep.join(filter(None, folders)))) is None:
        pytest.skip("kubectl is neither on the PATH nor in KUBEBUILDER_ASSETS")
    command = [binary, "--kubeconfig", str(kubeconfig or rig.kubeconfig), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(port: int, path: str) -> str:
    """What an operator's own server answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        return str(answer.read().decode())


def need_real(rig: Rig, reason: str) -> None:
    """Skip a test of what the fake control plane has not: `reason` says what."""
    if not rig.is_real:
        pytest.skip(f"the fake control plane has {reason}")


@contextlib.contextmanager
def deployed(rig: Rig, *arguments: str) -> Iterator[None]:
    """As a Deployment has it: a process that ends is started again. An operator ends where it has lost its lease."""
    over = threading.Event()
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    env = environment(rig, kubeconfig_for(rig, arguments))

    def keep() -> None:
        while not over.is_set():
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=env)
            while process.poll() is None and not over.wait(0.2):
                pass
            process.terminate()  # it gives its lease back
            process.wait(timeout=30)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=60)
