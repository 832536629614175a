"""Laws of the image: what goes into it, and a real build where a builder is.

The build needs root, `buildah` and PRISM_TEST_BASE_IMAGE, a base image that this buildah knows. PRISM_TEST_BUILDAH is the
command with its storage options, PRISM_TEST_BUILD_ARGS what `buildah bud` needs besides (a secret, a network).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
UID = 10001

TARGETS = ("operator", "worker")
BASE_IMAGE = os.environ.get("PRISM_TEST_BASE_IMAGE", "")
BUILDAH = shlex.split(os.environ.get("PRISM_TEST_BUILDAH", "buildah"))


DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_every_install_is_pinned_and_takes_its_secrets_from_a_mount() -> None:
    installs = re.findall(r"^RUN .* install --.*", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 3
    assert all("-c constraints.txt" in it and "--mount=type=secret,id=pip.conf " in it for it in installs)


def test_both_images_state_the_version_of_the_project() -> None:
    assert DOCKERFILE.count(f"VERSION={PROJECT['version']}") == len(TARGETS)


def test_images_start_without_a_shell_as_a_numbered_user_and_install_nothing() -> None:
    """In shell form SIGTERM would not reach Python; Kubernetes refuses runAsNonRoot for a user's name."""
    runtime = DOCKERFILE.partition(" AS runtime\n")[2]
    assert re.findall(r"^USER .*", runtime, re.MULTILINE) == [f"USER {UID}:{UID}"]
    starts = ['ENTRYPOINT ["prism"]', 'CMD ["operator"]', 'ENTRYPOINT ["python", "-P", "-m", "prism_job"]']
    assert re.findall(r"^(?:ENTRYPOINT|CMD) .*", runtime, re.MULTILINE) == starts
    assert re.findall(r"^FROM .*", DOCKERFILE, re.MULTILINE)[-1] == "FROM runtime AS worker"
    assert not re.search(r"\b(pip|apt|apt-get|apk|curl|wget)\b", runtime)


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    """Whatever lies in the working tree, a secret say, stays out of the image."""
    copies = [line.split()[1:-1] for line in re.findall(r"^COPY .*", DOCKERFILE, re.MULTILINE) if "--from=" not in line]
    copied = {source for sources in copies for source in sources}
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"}
    needed |= {"prism_job", "launcher"}
    assert copied == needed
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    assert (patterns[0], patterns[-2:]) == ("*", ["**/__pycache__", "**/*.pyc"])
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


# The same, built and run

in_an_image = pytest.mark.skipif(
    not (BASE_IMAGE and shutil.which(BUILDAH[0]) and os.geteuid() == 0),
    reason="a real build needs root, buildah and PRISM_TEST_BASE_IMAGE",
)

READ_ONLY_ROOT = """
set -e
mount --bind "$1" "$1"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t tmpfs -o mode=1777 tmpfs "$1/cache"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
for name in null zero urandom; do touch "$1/dev/$name"; mount --bind /dev/$name "$1/dev/$name"; done
mkdir -m 1777 "$1/dev/shm"
mount -o remount,bind,ro "$1"
root=$1 user=$2; shift 2
exec chroot "$root" setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs --bounding-set=-all "$@"
"""
"""What a kubelet does with readOnlyRootFilesystem, two emptyDirs and all capabilities dropped; the command is process 1."""


class Image(NamedTuple):
    config: dict[str, Any]
    root: str

    def start(self, *command: str) -> subprocess.Popen[str]:
        within = ["unshare", "--mount", "--pid", "--fork", "--propagation", "private", "sh", "-c", READ_ONLY_ROOT]
        environment = dict(pair.split("=", 1) for pair in self.config["Env"])
        words = [*within, "sh", self.root, str(UID), *command]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *command: str) -> tuple[int, str]:
        process = self.start(*command)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said


def buildah(*words: str) -> str:
    return subprocess.run([*BUILDAH, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module", params=TARGETS)
def image(request: pytest.FixtureRequest) -> Iterator[Image]:
    name = f"localhost/prism-test-{request.param}"
    extra = shlex.split(os.environ.get("PRISM_TEST_BUILD_ARGS", ""))
    given = ["--isolation", "chroot", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", *extra]
    buildah("bud", *given, "--target", request.param, "--tag", name, ".")
    config = json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    container = buildah("from", name)
    yield Image(config, buildah("mount", container))
    buildah("rm", container)
    buildah("rmi", name)


@in_an_image
def test_the_image_runs_with_a_read_only_root(image: Image) -> None:
    assert image.config["User"] == f"{UID}:{UID}"
    is_worker = "prism_job" in image.config["Entrypoint"]
    imports = "import torch, transformers, deepspeed" if is_worker else "import launcher.cli.main, kubernetes"
    code, said = image.run("python", "-c", f"{imports}; print('imported')")
    assert (code, said.splitlines()[-1]) == (0, "imported"), said
    assert image.run("prism", "--version") == (0, f"prism {PROJECT['version']}\n")
    code, said = image.run(*image.config["Entrypoint"], "--help")
    assert code == 0, said
    code, said = image.run("sh", "-c", "touch /opt/prism/here /work/here /here; touch /tmp/here /cache/here && id -u")
    assert said.count("Read-only file system") == 3
    assert said.splitlines()[-1] == str(UID)


@in_an_image
def test_the_image_holds_no_compiler_and_no_set_uid_file(image: Image) -> None:
    tools = "cc gcc g++ c++ clang nvcc make ld"
    assert image.run("sh", "-c", f"for tool in {tools}; do command -v $tool; done; true") == (0, "")
    assert image.run("sh", "-c", "find / -xdev -type f -perm /6000 2> /dev/null; true") == (0, "")


@in_an_image
def test_sigterm_reaches_the_worker_as_process_1(image: Image) -> None:
    if "prism_job" not in image.config["Entrypoint"]:
        pytest.skip("the operator's stop is tested with the operator")
    # A document that never ends: the worker waits in open() with its handler in place.
    fifo = 'mkfifo /tmp/never; exec "$@" plan --spec /tmp/never'
    process = image.start("sh", "-c", fifo, "sh", *image.config["Entrypoint"])
    time.sleep(10)
    first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(first), 15)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
