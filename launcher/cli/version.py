"""The line of `prism --version`: the package's version, and the commit it was made from where that is recorded."""

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import prism_job

DISTRIBUTION = "prism-selection"


def version_line(root: Path = Path(prism_job.__file__).parents[1]) -> str:
    """For example `prism 0.1.0 (commit 49d534e)`, or `prism 0.1.0` where no commit is known.

    Args:
        root: the folder that the packages lie in: a source tree, or site-packages.
    """
    commit = commit_of_tree(root) or commit_of_image(os.environ.get("PRISM_REVISION", "")) or commit_of_install(root)
    return f"prism {prism_job.__version__}" + (f" (commit {commit})" if commit else "")


def commit_of_tree(root: Path) -> str | None:
    """Of a git checkout that the packages are imported from, as after `pip install -e .`; `-dirty` with changes."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def commit_of_image(revision: str) -> str | None:
    """Of the build argument REVISION, which the Dockerfile keeps in PRISM_REVISION."""
    return revision[:7] if revision not in ("", "unknown") else None


def commit_of_install(root: Path) -> str | None:
    """Of `pip install git+…`, which records it in direct_url.json beside the packages (PEP 610)."""
    for found in importlib.metadata.distributions(name=DISTRIBUTION, path=[str(root)]):
        commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
        return str(commit)[:7] if commit else None
    return None
