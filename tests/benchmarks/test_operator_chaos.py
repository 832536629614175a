"""A small seeded part of benchmarks/operator_chaos.py: every run ends as predicted, and nothing of it is left."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import pytest

from benchmarks import operator_chaos
from benchmarks.operator_chaos import SCENARIOS, Operators, draw_scenario, run
from launcher.operator import controller


def test_every_run_ends_as_predicted_while_requests_operators_pods_and_nodes_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `prism operator` processes: the timeouts of their lease are too long for a test."""
    monkeypatch.setenv("KUBECONFIG", "")  # set by the run, and put back here
    monkeypatch.setattr(Operators, "KINDS", (["thread"], ["thread"], ["thread", "thread"]))
    monkeypatch.setattr(controller, "LONGEST_PAUSE_SECONDS", 2.0)
    monkeypatch.setattr(operator_chaos, "QUIET_SECONDS", 0.5)
    chosen = argparse.Namespace(rounds=12, seed=7, real=0, at_once=12)
    with contextlib.ExitStack() as stack:
        figures, violations = run(tmp_path, chosen, stack)
    assert not violations, "\n".join(violations)
    assert figures["faults"]
    assert figures["jobs"] >= 12


def test_a_seed_draws_the_same_scenarios_and_two_hundred_rounds_draw_all() -> None:
    drawn = [draw_scenario(1, number) for number in range(200)]
    assert drawn == [draw_scenario(1, number) for number in range(200)]
    assert {scenario.name for scenario in drawn} == set(SCENARIOS)
