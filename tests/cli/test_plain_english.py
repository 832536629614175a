"""Everything that a person reads is plain English: no retired word in help, errors, logs, docs or the CRD."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from launcher.cli.main import app

ROOT = Path(__file__).parents[2]
MAX_MARKDOWN_COLUMNS = 120

RETIRED = re.compile(
    r"\b(weather|mend(s|ed|ing)?|patiently|foretold|foretells?|papers|last[ -]words|vouch(es|ed)?|promises broken"
    r"|asked again|(carr(y|ies|ied)) (a|the|its) run on|carries it on|carried on by)\b|\bto do:",
    re.IGNORECASE,
)
"""Each had a plain word: transient error, fix, retried, predicted, config and tokenizer, termination message, hint: …"""

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("k8s/**/*.yaml")])
"""k8s/crd.yaml holds the descriptions of every field."""

MODULES = sorted([*ROOT.glob("prism_job/**/*.py"), *ROOT.glob("launcher/**/*.py")])


def help_pages(command: click.Command, path: str = "prism") -> Iterator[tuple[str, str]]:
    """(verb, text of its --help), of a command and all below it."""
    yield path, command.get_help(click.Context(command, info_name=path))
    for name, child in getattr(command, "commands", {}).items():
        yield from help_pages(child, f"{path} {name}")


def string_literals(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every string of a module: messages, names of log events, docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def comments(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if "#" in line:
            yield f"{path.relative_to(ROOT)}:{number}", line.partition("#")[2]


def retired_words(texts: Iterator[tuple[str, str]]) -> list[str]:
    return [f"{place}: {match[0]!r}" for place, text in texts for match in RETIRED.finditer(" ".join(text.split()))]


def test_help_pages_hold_no_retired_word() -> None:
    pages = dict(help_pages(typer.main.get_command(app)))
    assert {"prism run", "prism store prune", "prism doctor"} <= pages.keys()
    assert not retired_words(iter(pages.items()))


def test_strings_and_comments_hold_no_retired_word() -> None:
    assert MODULES
    assert not [
        found for path in MODULES for texts in (string_literals, comments) for found in retired_words(texts(path))
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_hold_no_retired_word(path: Path) -> None:
    assert not retired_words(iter([(path.name, path.read_text())]))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_lines_of_prose_fit_a_review(path: Path) -> None:
    lines = prose(path.read_text())
    assert not [f"{path.name}:{number}" for number, line in lines if len(line) > MAX_MARKDOWN_COLUMNS]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) outside code blocks, tables and HTML comments; targets of links left out."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.lstrip().startswith(("|", "<!--")):
            yield number, re.sub(r"\]\([^)]*\)", "]()", line)


def test_a_retired_word_is_found_wherever_it_stands(tmp_path: Path) -> None:
    assert len(retired_words(iter([("", "Bad WEATHER: vouched.\n  to do: it mends\nthe last\nwords")]))) == 5
    assert not retired_words(iter([("", "amend recommended newspapers, what to do, at last")]))
    assert [number for number, _ in prose("a\n```\nb\n```\n| c |\nd")] == [1, 6]
