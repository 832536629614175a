"""The package: sdist, wheel and what an install holds; the line of `prism --version`; licences of dependencies."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from launcher.cli.version import version_line
from prism_job import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("prism_job", "launcher")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*command: str, cwd: Path, **environment: str) -> str:
    process = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def package_files(folder: Path) -> set[str]:
    files = {file for package in PACKAGES for file in (folder / package).rglob("*") if file.is_file()}
    return {file.relative_to(folder).as_posix() for file in files if file.parent.name != "__pycache__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, as a package index or a distribution would, without the network."""
    folder = tmp_path_factory.mktemp("package")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, str(folder), cwd=folder / "tree")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(unpacked), cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that the wheel is installed into. Its dependencies are those of this environment."""
    folder = wheel.parent / "installed"
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--no-compile")
    run(sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(wheel), cwd=wheel.parent)
    return folder


def test_sdist_and_wheel_hold_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"prism_selection-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == package_files(ROOT)
    assert f"{info}licenses/LICENSE" in names
    assert {"prism_job/py.typed", "launcher/py.typed", "prism_job/publish/report/report.css"} <= names


def test_an_installed_wheel_runs_from_any_folder_and_finds_its_data(installed: Path, tmp_path: Path) -> None:
    prism, path = str(installed / "bin" / "prism"), {"PYTHONPATH": str(installed)}
    assert "selection" in run(prism, "--help", cwd=tmp_path, **path)
    assert run(prism, "--version", cwd=tmp_path, **path) == f"prism {__version__}\n"
    crd = run(prism, "crd", cwd=tmp_path, **path)
    assert crd.strip() == (ROOT / "k8s" / "crd.yaml").read_text(encoding="utf-8").strip()
    code = (
        "import importlib.resources as r, prism_job, launcher; print(prism_job.__file__, launcher.__file__); "
        "print(len(r.files('prism_job.publish.report').joinpath('report.css').read_text()))"
    )
    places, size = run(sys.executable, "-c", code, cwd=tmp_path, **path).splitlines()
    assert all(place.startswith(f"{installed}/") for place in places.split())
    assert int(size) > 0


def test_a_version_names_the_commit_of_a_git_install(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"
    shutil.copytree(installed, folder)
    (record,) = folder.glob("*.dist-info")
    given = {"url": "https://example.org/prism", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}
    (record / "direct_url.json").write_text(json.dumps(given))
    assert version_line(folder) == f"prism {__version__} (commit 0123456)"
    (record / "direct_url.json").write_text(json.dumps({"url": "file:///src", "dir_info": {}}))
    assert version_line(folder) == f"prism {__version__}"


def test_a_version_names_the_commit_of_the_source_tree_and_whether_it_is_changed(tmp_path: Path) -> None:
    assert version_line(tmp_path) == f"prism {__version__}", "no git, no record"
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    (tmp_path / "a").write_text("1")
    for command in (("init", "-q"), ("add", "a"), ("commit", "-qm", "a"), ("tag", "v9")):
        run(*git, *command, cwd=tmp_path)
    commit = run("git", "rev-parse", "--short=7", "HEAD", cwd=tmp_path).strip()
    assert version_line(tmp_path) == f"prism {__version__} (commit {commit})"
    (tmp_path / "a").write_text("2")
    assert version_line(tmp_path) == f"prism {__version__} (commit {commit}-dirty)"


def test_a_version_names_the_commit_that_an_image_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for revision, shown in ((COMMIT, " (commit 0123456)"), ("unknown", ""), ("", "")):
        monkeypatch.setenv("PRISM_REVISION", revision)
        assert version_line(tmp_path) == f"prism {__version__}{shown}"
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert len(re.findall(r"^ARG REVISION=unknown\nENV PRISM_REVISION=\$\{REVISION\}$", dockerfile, re.MULTILINE)) == 2


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "licences.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_dependency_has_a_row_with_the_licence_that_it_states(licences: ModuleType) -> None:
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\**[\w.-]+\**) \| (.+?) \|", text, re.MULTILINE))
    direct = {licences.name_of(line) for line in licences.requirements()}
    assert {name.strip("*") for name in rows if name.startswith("**")} == direct
    assert licences.closure(licences.requirements()) <= {name.strip("*") for name in rows}
    for name in filter(licences.is_installed, direct):
        assert rows[f"**{name}**"] == licences.licence_of(licences.distribution(name)), name
    assert "not stated" not in rows.values()
