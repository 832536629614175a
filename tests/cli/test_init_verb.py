"""`prism init`: a valid document from three answers, after a look at the data; nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.exit_codes import PREFLIGHT_FAILED
from launcher.local.new_document import SMALL_BYTES, are_small, name_of, new_document, unusable_rows_advice
from prism_job.spec.document import parse_spec
from tests.cli.fake_stages import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_the_document_is_valid_and_names_what_was_given_and_the_data_are_inspected_first(
    rig: Rig, tmp_path: Path
) -> None:
    path, pairs = tmp_path / "new.yaml", tmp_path / "pairs.jsonl"
    pairs.write_text("{}")
    given = ["--model", "org/model", "--data", "My Pool.jsonl", "--data", "s3://b/c", "--targets", str(pairs)]
    code, stdout, stderr = rig.call("init", str(path), *given)
    assert (code, stdout) == (0, f"{path}\n"), stderr
    run = parse_spec(path.read_text(), str(path))
    assert run.metadata.name == "my-pool"
    assert (run.spec.model.uri, run.spec.candidates.uris) == ("org/model", ("My Pool.jsonl", "s3://b/c"))
    assert run.spec.targets.uris == (str(pairs),)
    arguments = ["--model", "org/model", "--targets", "--rows", "1", "--all", "--", str(pairs)]
    assert rig.note("inspect")["arguments"] == arguments, "of a small file all rows"
    assert stderr.count("/pool.jsonl: candidates") == 2, "what inspect printed, of candidates and of targets"
    assert stderr.endswith(f"next: prism estimate {path} && prism run {path}\n")


def test_pairs_that_are_not_there_yet_are_explained(rig: Rig, tmp_path: Path) -> None:
    given = ["--model", "m", "--data", "a.jsonl", "--targets", "pairs-to-come.jsonl"]
    code, _, stderr = rig.call("init", str(tmp_path / "new.yaml"), *given)
    assert code == 0
    assert '"chosen": "2 + 2 = 4.", "rejected": "2 + 2 = 5."' in stderr
    assert "next: write pairs-to-come.jsonl; then prism estimate" in stderr
    assert rig.note("inspect")["arguments"][-1] == "a.jsonl"


@pytest.mark.parametrize("verb", ["run", "estimate", "submit", "render"])
@pytest.mark.parametrize("targets", [None, {}, {"uris": []}, {"sets": None}])
def test_a_document_without_targets_is_told_what_a_pair_is(rig: Rig, tmp_path: Path, verb: str, targets: Any) -> None:
    spec = {"model": {"uri": "org/m"}, "candidates": {"uris": ["/pool"]}, "store": "/s", "output": "/o"}
    spec["selection"] = {"keep": "highest", "budget": {"count": 1}}
    document = {"apiVersion": "prism.dev/v1alpha1", "kind": "SelectionRun", "metadata": {"name": "a"}, "spec": spec}
    with_null = [document, document | {"spec": spec | {"targets": targets}}]
    for written in with_null if targets is None else with_null[1:]:
        path = tmp_path / "selection.yaml"
        path.write_text(json.dumps(written))
        code, _, stderr = rig.call(verb, str(path))
        assert code == PREFLIGHT_FAILED
        assert "spec.targets" in stderr.partition("hint:")[0]
        hint = stderr.partition("hint:")[2]
        examples = [json.loads(line) for line in hint.splitlines() if line.strip().startswith("{")]
        assert [pair.keys() for pair in examples] == [{"prompt", "chosen", "rejected"}] * 2
        assert "docs/choosing-targets.md" in hint


def test_other_errors_of_a_document_say_nothing_of_pairs(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "selection.yaml"
    path.write_text(json.dumps({"spec": {"targets": {"uris": ["a.jsonl"], "sets": []}}}))
    code, _, stderr = rig.call("run", str(path))
    assert (code, "a pair is" in stderr) == (PREFLIGHT_FAILED, False)


def test_nothing_is_overwritten_and_without_a_terminal_nothing_is_asked(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    path.write_text("mine")
    code, _, stderr = rig.call("init", str(path), "--model", "m", "--data", "a", "--targets", "b")
    assert (code, "is there already" in stderr, path.read_text()) == (2, True, "mine")
    code, _, stderr = rig.call("init", str(tmp_path / "no" / "a.yaml"), "--model", "m", "--data", "a", "--targets", "b")
    assert (code, "has no folder" in stderr) == (2, True)
    code, _, stderr = rig.call("init", str(tmp_path / "other.yaml"), "--model", "m")
    assert (code, "give --data, --targets:" in stderr, (tmp_path / "other.yaml").exists()) == (2, True, False)


def test_a_source_that_cannot_be_read_leaves_no_document(rig: Rig, tmp_path: Path) -> None:
    given = ["--model", "m", "--data", "a.jsonl", "--targets", "b.jsonl"]
    code, _, _ = rig.call("init", str(tmp_path / "new.yaml"), *given, at="inspect", exit=64, error="no such file")
    assert (code, (tmp_path / "new.yaml").exists()) == (100, False)


@pytest.mark.parametrize(
    ("role", "read", "unusable", "mentions"),
    [
        (
            "candidates",
            78,
            1,
            ["correct or remove 1 of the 78 rows of the candidates", "candidates.maxBadFraction (0.01)"],
        ),
        ("candidates", 100, 1, None),
        ("candidates", 3, 3, ["name the columns of the candidates in a.yaml"]),
        ("targets", 100, 1, ["correct or remove 1 of the 100 rows of the targets"]),
        ("targets", 100, 0, None),
    ],
)
def test_rows_that_would_stop_the_run_come_first_among_what_is_next(
    role: str, read: int, unusable: int, mentions: list[str] | None
) -> None:
    halves = [{"rows_read": read - 1, "rows_unusable": unusable - 1}, {"rows_read": 1, "rows_unusable": 1}]
    sources = [half | {"rows_of_pairs": 0} for half in (halves if unusable else halves[:1])]
    if not unusable:
        sources[0] |= {"rows_unusable": 0}
    advice = unusable_rows_advice({"sources": sources}, role, 0.01, "a.yaml")
    assert (advice is None) == (mentions is None), advice
    assert all(mention in str(advice) for mention in mentions or ())


def test_all_rows_are_read_of_small_files_on_this_disk_alone(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.jsonl").write_text("{}")
    (tmp_path / "pool" / "link").symlink_to(tmp_path / "nowhere")
    assert are_small([str(tmp_path / "pool"), str(tmp_path / "pool" / "a.jsonl")])
    assert not are_small([str(tmp_path / "pool"), "s3://bucket/pool"])
    (tmp_path / "pool" / "b.jsonl").write_bytes(b" " * SMALL_BYTES)
    assert not are_small([str(tmp_path / "pool")])


def test_without_a_gpu_the_document_asks_for_float32() -> None:
    for has_gpu, dtype in ((True, "bfloat16"), (False, "float32")):
        text = new_document("a", "org/m", ["a"], ["b"], has_gpu=has_gpu)
        assert parse_spec(text, "new").spec.model.dtype == dtype


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("build/My_Pool.v2.jsonl.gz", "my-pool"),
        ("s3://corpora/instruct/", "instruct"),
        ("hf://datasets/org/Name?split=train", "name"),
        ("s3://bucket", "bucket"),
        ("数据.jsonl", "selection"),
        ("a" * 80, "a" * 40),
    ],
)
def test_a_run_is_named_after_its_data(uri: str, name: str) -> None:
    assert name_of(uri) == name
    assert parse_spec(new_document(name, 'quo"ted: #1', [uri], ["b"]), "new").metadata.name == name
