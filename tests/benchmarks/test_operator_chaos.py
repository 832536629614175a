"""A small seeded part of benchmarks/operator_chaos.py: every run ends as foretold, and nothing of it is left."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import pytest

from benchmarks import operator_chaos
from benchmarks.operator_chaos import FATES, Operators, draw_fate, run
from launcher.operator import controller


def test_every_run_ends_as_foretold_while_requests_operators_pods_and_nodes_go_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `prism operator` processes: the waits of their lease are too long for a test, as are those after failures."""
    monkeypatch.setenv("KUBECONFIG", "")  # set by the run, and put back here
    monkeypatch.setattr(Operators, "KINDS", (["thread"], ["thread"], ["thread", "thread"]))
    monkeypatch.setattr(controller, "LONGEST_RETRY_SECONDS", 2.0)
    monkeypatch.setattr(operator_chaos, "SETTLE_SECONDS", 0.5)
    chosen = argparse.Namespace(rounds=12, seed=7, real=0, at_once=12)
    with contextlib.ExitStack() as stack:
        figures, broken = run(tmp_path, chosen, stack)
    assert not broken, "\n".join(broken)
    assert figures["faults"]
    assert figures["jobs"] >= 12


def test_a_seed_draws_the_same_fates_and_two_hundred_rounds_draw_them_all() -> None:
    drawn = [draw_fate(1, number) for number in range(200)]
    assert drawn == [draw_fate(1, number) for number in range(200)]
    assert {fate.name for fate in drawn} == set(FATES)
