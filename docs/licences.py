"""Writes licences.md from the metadata of the installed packages: .venv/bin/python docs/licences.py > docs/licences.md"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

OF_NO_IMAGE = re.compile(r"""extra\s*==|==\s*['"](win32|Windows)['"]""")
"""In the marker of a requirement: extras that nobody asked for, and another system."""

HEAD = """# Licences of dependencies

What `pyproject.toml` requires, and what that requires, with the licence that each package states in its own metadata.
The versions are those of `constraints.txt`. PRISM itself is under Apache-2.0. Direct requirements are **bold**.

The command and the operator's image hold the packages marked `both`; `.[job]` and the worker's image hold all. Here
torch is the CPU build. Its CUDA build also requires NVIDIA's libraries (`nvidia-*`), which are under NVIDIA's own
terms. The images' base, Debian with Python, states its licences in `/usr/share/doc`.

`.venv/bin/python docs/licences.py > docs/licences.md` writes this page again. A test fails for a new dependency without
a row.

| package | licence | images |
|---|---|---|
"""


def page() -> str:
    operator, direct = closure(PROJECT["dependencies"]), {name_of(line) for line in requirements()}
    lines = []
    for name in sorted(closure(requirements()) | operator):
        title = f"**{name}**" if name in direct else name
        lines.append(f"| {title} | {licence_of(distribution(name))} | {'both' if name in operator else 'worker'} |\n")
    return HEAD + "".join(lines)


def requirements() -> list[str]:
    """Of the command and of the job; those for tests and docs are in no image."""
    return [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["job"]]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def closure(wanted: list[str]) -> set[str]:
    """Names of these packages and of all that they require here."""
    names: set[str] = set()
    waiting = [*wanted]
    while waiting:
        requirement = waiting.pop()
        name = name_of(requirement)
        if name in names or OF_NO_IMAGE.search(requirement) or not is_installed(name):
            continue
        names.add(name)
        waiting += distribution(name).requires or []
    return names


def is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:  # its marker names another system or an older Python
        return False
    return True


def licence_of(found: Distribution) -> str:
    """The licence expression, else the classifiers, else the licence field, which is often vague or a whole text."""
    classifiers = [line for line in found.metadata.get_all("Classifier", []) if line.startswith("License ::")]
    named = [line.rpartition(" :: ")[2] for line in classifiers if not line.endswith("OSI Approved")]
    texts = [found.metadata.get("License-Expression"), ", ".join(named), found.metadata.get("License")]
    short = [text.strip() for text in texts if text and "\n" not in text.strip() and text.strip().upper() != "UNKNOWN"]
    return short[0] if short else "not stated"


if __name__ == "__main__":
    print(page(), end="")
