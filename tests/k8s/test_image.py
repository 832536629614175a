"""Laws of the image: what Dockerfile and .dockerignore may say, read as text; and one real build where a builder is.

The build needs root, `buildah` and PRISM_TEST_BASE_IMAGE, a base image that this buildah knows. PRISM_TEST_BUILDAH is the
command with its storage options, PRISM_TEST_BUILD_ARGS what `buildah bud` needs besides (a secret, a network).
"""

from __future__ import annotations

import fnmatch
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
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
UID = 10001

TARGETS = ("operator", "worker")
BASE_IMAGE = os.environ.get("PRISM_TEST_BASE_IMAGE", "")
BUILDAH = shlex.split(os.environ.get("PRISM_TEST_BUILDAH", "buildah"))


class Stage(NamedTuple):
    name: str
    base: str
    lines: list[tuple[str, str]]
    """(instruction, its rest), in order, continuation lines joined."""


def read_dockerfile() -> tuple[list[tuple[str, str]], list[Stage]]:
    """What stands before the first FROM, and the stages in order."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    before: list[tuple[str, str]] = []
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            stages.append(Stage(name, base, []))
        else:
            (stages[-1].lines if stages else before).append((instruction, rest))
    return before, stages


BEFORE, STAGES = read_dockerfile()
STAGE = {stage.name: stage for stage in STAGES}


def lines_of(target: str) -> list[tuple[str, str]]:
    """All that makes this image, with what it inherits from earlier stages."""
    stage = STAGE[target]
    return (lines_of(stage.base) if stage.base in STAGE else []) + stage.lines


def variables_of(target: str) -> dict[str, str]:
    pairs = [pair for instruction, rest in lines_of(target) if instruction == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def copied() -> list[str]:
    """What COPY takes from the build's context."""
    copies = [rest for stage in STAGES for instruction, rest in stage.lines if instruction == "COPY"]
    return [source for rest in copies if "--from=" not in rest for source in rest.split()[:-1]]


def is_kept(path: str) -> bool:
    """What .dockerignore says of a path: the last pattern that matches it or a folder above it decides."""
    kept = True
    folders = [path, *(str(parent) for parent in Path(path).parents)][:-1]
    for pattern in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        wanted = pattern.removeprefix("!")
        # `**/x` matches x at any depth, every other pattern from the root on; `*` stays within one name.
        names = [Path(folder).name for folder in folders] if wanted.startswith("**/") else folders
        wanted = wanted.removeprefix("**/")
        if any(name.count("/") == wanted.count("/") and fnmatch.fnmatch(name, wanted) for name in names):
            kept = pattern.startswith("!")
    return kept


def test_the_base_image_is_an_argument_with_a_default() -> None:
    assert [(instruction, rest.split("=")[0]) for instruction, rest in BEFORE] == [("ARG", "BASE_IMAGE")]
    assert BEFORE[0][1].split("=")[1]
    for number, stage in enumerate(STAGES):
        assert stage.base == "${BASE_IMAGE}" or stage.base in {one.name for one in STAGES[:number]}


def test_worker_is_what_a_build_without_a_target_makes() -> None:
    assert STAGES[-1].name == "worker"
    assert set(TARGETS) <= set(STAGE)


@pytest.mark.parametrize("target", TARGETS)
def test_the_user_is_a_number_and_not_root(target: str) -> None:
    # Kubernetes refuses runAsNonRoot for a name: it cannot know what number that is.
    users = [rest for instruction, rest in lines_of(target) if instruction == "USER"]
    assert users[-1] == f"{UID}:{UID}"


@pytest.mark.parametrize("target", TARGETS)
def test_what_ships_installs_nothing(target: str) -> None:
    runs = " ".join(rest for instruction, rest in lines_of(target) if instruction == "RUN")
    assert not re.search(r"\b(pip|apt|apt-get|apk|dnf|gcc|curl|wget)\b", runs)


@pytest.mark.parametrize("target", TARGETS)
def test_what_ships_starts_without_a_shell(target: str) -> None:
    # In shell form /bin/sh would be process 1, and SIGTERM would never reach Python.
    starts = [(instruction, rest) for instruction, rest in lines_of(target) if instruction in ("ENTRYPOINT", "CMD")]
    words = {instruction: json.loads(rest) for instruction, rest in starts}
    wanted = {
        "operator": {"ENTRYPOINT": ["prism"], "CMD": ["operator"]},
        "worker": {"ENTRYPOINT": ["python", "-P", "-m", "prism_job"]},
    }
    assert words == wanted[target]


@pytest.mark.parametrize("target", TARGETS)
def test_all_that_is_written_goes_below_cache_or_tmp(target: str) -> None:
    variables = variables_of(target)
    folders = {name: value for name, value in variables.items() if re.search(r"(_CACHE|HOME|_DIR|DIR)$", name)}
    assert folders.pop("TMPDIR") == "/tmp"
    needed = {"HOME", "XDG_CACHE_HOME", "PRISM_CACHE", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert needed | {"MPLCONFIGDIR", "TORCH_EXTENSIONS_DIR"} <= set(folders)
    assert all(value == "/cache" or value.startswith("/cache/") for value in folders.values()), folders
    assert variables["PYTHONDONTWRITEBYTECODE"] == variables["PYTHONUNBUFFERED"] == variables["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_dependencies_make_a_layer_below_the_code(target: str) -> None:
    sources = [rest.split()[0] for instruction, rest in STAGE[target].lines if instruction == "COPY"]
    assert sources == [f"--from={target}-packages", "--from=code"]
    above = " ".join(rest for instruction, rest in lines_of(f"{target}-packages") if instruction == "COPY")
    assert "prism_job" not in above
    assert "launcher " not in above


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_what_it_is(target: str) -> None:
    lines = STAGE[target].lines
    labels = dict(pair.split("=", 1) for kind, rest in lines if kind == "LABEL" for pair in shlex.split(rest))
    named = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert named["title"] == f"prism-{target}"
    assert named["licenses"] == PYPROJECT["project"]["license"]
    assert (named["version"], named["revision"]) == ("${VERSION}", "${REVISION}")
    arguments = dict(f"{rest}=".split("=")[:2] for kind, rest in lines if kind == "ARG")
    assert arguments["VERSION"] == PYPROJECT["project"]["version"]
    assert "REVISION" in arguments


def test_every_install_is_pinned_and_compiled_and_may_have_a_secret() -> None:
    installs = [rest for stage in STAGES for kind, rest in stage.lines if kind == "RUN" and " install --" in rest]
    assert len(installs) == 3
    for rest in installs:
        assert "-c constraints.txt" in rest
        assert "compileall" in rest
        assert (
            "unchecked-hash" in rest
        )  # dates change when an image is built again or copied; the bytecode still counts
        assert "--mount=type=secret,id=pip.conf " in rest
    assert variables_of("tools")["PIP_CONFIG_FILE"] == "/run/secrets/pip.conf"


def test_nothing_secret_and_no_address_stands_in_the_file() -> None:
    everything = [*BEFORE, *(line for stage in STAGES for line in stage.lines)]
    names = re.findall(r"(\w+)=", " ".join(rest for kind, rest in everything if kind in ("ARG", "ENV")))
    assert not [name for name in names if re.search(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY$", name)]
    assert not [rest for kind, rest in everything if kind == "ADD" or "://" in rest]


def test_every_file_that_is_copied_is_there_and_in_the_context() -> None:
    assert set(copied()) == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "prism_job", "launcher"}
    for source in copied():
        assert (ROOT / source).exists(), source
        assert is_kept(source), source
    for package in ("prism_job", "launcher"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert all(is_kept(str(path.relative_to(ROOT))) for path in files)


def test_the_wheel_needs_no_file_that_is_not_copied() -> None:
    project = PYPROJECT["project"]
    packages = [pattern.removesuffix("*") for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert {project["readme"], *project["license-files"], *packages} <= set(copied())


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".ci/run",
        "build/model/model.gguf",
        "tests/k8s/test_image.py",
        "docs/log.md",
        "data.jsonl",
        ".env",
        "prism_selection.egg-info/PKG-INFO",
        "prism_job/__pycache__/spec.cpython-311.pyc",
        "prism_job/extract/__pycache__/run.cpython-311.pyc",
        "launcher/cli.pyc",
    ],
)
def test_the_context_stays_small(path: str) -> None:
    assert not is_kept(path)


# The same, built and run.

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
    imports = "import torch, transformers, deepspeed" if is_worker else "import launcher.cli, kubernetes"
    code, said = image.run("python", "-c", f"{imports}; print('imported')")
    assert (code, said.splitlines()[-1]) == (0, "imported"), said
    assert image.run("prism", "--version") == (0, f"{PYPROJECT['project']['version']}\n")
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
