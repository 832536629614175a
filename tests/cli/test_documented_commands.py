"""Every command `prism …` in README and docs has a verb and options that exist. What the verbs do is tested beside them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from launcher.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTROL = {"|", "&&", ";", "||", ")", ">", "2>", "<"}


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words after `prism`) of each call in the page's shell blocks, also within `$( )`, pipes and lists."""
    language = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            language = line.removeprefix("```").strip() if language is None else None
        elif language in ("sh", "bash", "console"):
            for call in re.findall(r"(?:^|[|&;(]|\$ )\s*prism (.*)", line):
                words = shlex.split(re.sub(r"([|;&)]+)", r" \1 ", call.split(" #")[0]))
                end = next((at for at, word in enumerate(words) if word in CONTROL), len(words))
                yield number, words[:end]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_can_be_parsed(page: Path) -> None:
    root = typer.main.get_command(app)
    for line, words in commands(page):
        command, context = root, typer.Context(root, info_name="prism")
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page.name}:{line}: no verb {words[0]}"
            command = command.commands[words.pop(0)]
            context = typer.Context(command, info_name=command.name, parent=context)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        unknown = [option for option in given if option not in known | {"--help"}]
        assert not unknown, f"{page.name}:{line}: {command.name} has no {unknown}"


def test_the_readme_shows_the_whole_way() -> None:
    verbs = {words[0] for _, words in commands(ROOT / "README.md")}
    assert {"inspect", "run", "estimate", "evaluate", "export", "explain", "submit", "watch"} <= verbs
