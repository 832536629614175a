"""`prism inspect`: which options reach the job, and colour in a terminal alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.fake_stages import INSPECTED, ROOT, RUN_MAIN, Rig, read_terminal


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["pool.jsonl"], ["--rows", "3", "--", "pool.jsonl"]),
        (["a.jsonl", "hf://b/c"], ["--rows", "3", "--", "a.jsonl", "hf://b/c"]),
        (["a.jsonl", "--line", "7"], ["--rows", "1", "--line", "7", "--", "a.jsonl"]),
        (["a.jsonl", "--line", "7", "--rows", "2"], ["--rows", "2", "--line", "7", "--", "a.jsonl"]),
        (
            ["a.jsonl", "--targets", "--model", "org/m", "--columns", "prompt: q", "--loss-on", "last"],
            [
                "--model",
                "org/m",
                "--columns",
                "prompt: q",
                "--loss-on",
                "last",
                "--targets",
                "--rows",
                "3",
                "--",
                "a.jsonl",
            ],
        ),
    ],
)
def test_options_reach_the_job(rig: Rig, given: list[str], passed: list[str]) -> None:
    code, stdout, stderr = rig.call("inspect", *given, "-o", "json")
    assert (code, json.loads(stdout), stderr) == (0, INSPECTED, "")
    assert rig.note("inspect")["arguments"] == passed


def test_a_slow_step_is_one_line_on_stderr(rig: Rig) -> None:
    code, stdout, stderr = rig.call("inspect", "pool.jsonl", "-o", "json", step="loading the tokenizer of org/m")
    assert (code, json.loads(stdout), stderr) == (0, INSPECTED, "loading the tokenizer of org/m\n")


def test_a_document_is_copied_and_takes_no_options_of_files(rig: Rig) -> None:
    assert rig.call("inspect", str(rig.document), "--all", "-o", "json")[0] == 0
    option, copy, *rest = rig.note("inspect")["arguments"]
    assert (option, rest) == ("--spec", ["--rows", "3", "--all"])
    assert copy != str(rig.document)
    code, _, stderr = rig.call("inspect", str(rig.document), "--model", "org/m")
    assert (code, "a selection.yaml stands alone" in stderr) == (2, True)
    code, _, stderr = rig.call("inspect", "nowhere.yaml")
    assert (code, "nowhere.yaml cannot be read" in stderr) == (2, True)
    for text in (b"spec: 1", "spec: ä".encode("latin-1")):
        rig.document.write_bytes(text)
        assert rig.call("inspect", str(rig.document))[0] == 3


def test_marks_are_characters_in_a_pipe_and_colours_in_a_terminal(rig: Rig) -> None:
    plain = "    │ a\\u27e6⟦ \\x1bb⟧\n"
    assert plain in rig.call("inspect", "pool.jsonl")[1]
    for settings, expected in (({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, False)):
        ours, theirs = os.openpty()
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_MAIN, str(rig.fake), "inspect", "pool.jsonl"],
            stdout=theirs,
            cwd=ROOT,
            env={**environment, "NOTES": str(rig.notes), **settings},
        )
        os.close(theirs)
        drawn = read_terminal(ours).replace("\r\n", "\n")
        assert process.wait(timeout=30) == 0
        assert ("    │ a\\u27e6\x1b[7;32m \\x1bb\x1b[0m\n" in drawn, plain in drawn) == (expected, not expected)


def test_a_terminal_that_is_not_utf8_gets_escapes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    code, stdout, stderr = rig.call("inspect", "pool.jsonl")
    assert (code, stderr) == (0, "")
    assert "    \\u2502 a\\u27e6\\u27e6 \\x1bb\\u27e7\n" in stdout
