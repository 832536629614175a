"""Every kind of bad input ends with its exit code and a message that says what, where and what to do."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from prism_job.data.examples import example_id, target_content
from prism_job.errors import SpecError
from prism_job.estimate.workload import measure
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.load.model import load_tokenizer
from prism_job.progress import write_termination_message
from prism_job.spec.document import parse_spec
from tests.conftest import STAGES, Job, candidate, pair, read_json, turn, write_jsonl
from tests.models import CHAT_TEMPLATE, save_tiny_adapter, save_tiny_model

WRONG_REQUEST, DAMAGED_DATA, TRY_AGAIN = 64, 65, 75


def sets(path: str, value: Any) -> Callable[[Job], None]:
    """Sets a field of the spec; FOLDER in its value is the job's folder."""

    def change(job: Job) -> None:
        *sections, name = path.split(".")
        section = job.spec
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = json.loads(json.dumps(value).replace("FOLDER", str(job.folder)))

    return change


def writes(name: str, content: str) -> Callable[[Job], object]:
    return lambda job: (job.folder / name).write_text(content)


def writes_targets(*rows: Any) -> Callable[[Job], object]:
    return lambda job: write_jsonl(job.folder / "targets.jsonl", list(rows))


def writes_pool(row: Any) -> Callable[[Job], object]:
    return lambda job: write_jsonl(pool(job, "a.jsonl"), [row] * 10)


def uses_model(change_folder: Callable[[Path], object], **options: Any) -> Callable[[Job], None]:
    """A tiny model of the job's own, changed."""

    def change(job: Job) -> None:
        folder = save_tiny_model(job.folder / "changed", **options)
        change_folder(folder)
        job.spec["model"]["uri"] = str(folder)

    return change


def uses_template(text: str) -> Callable[[Job], None]:
    return uses_model(lambda folder: (folder / "chat_template.jinja").write_text(text))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def rewrites_weight(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Job], None]:
    def rewrite(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return uses_model(rewrite)


def uses_adapter_as_model(job: Job) -> None:
    job.spec["model"]["uri"] = str(save_tiny_adapter(job.folder / "adapter"))


def names_nothing_but_mistakes(job: Job) -> None:
    sets("model.uri", "FOLDER/no-model")(job)
    sets("model.adapter", "FOLDER/no-adapter")(job)
    sets("scoring.preferenceModel", {"uri": "FOLDER/no-second"})(job)
    sets("candidates.uris", ["FOLDER/no-pool"])(job)
    sets("targets.uris", ["FOLDER/no-pairs"])(job)


def exchanges_data(job: Job) -> None:
    write_jsonl(job.folder / "targets.jsonl", [candidate(0)])
    write_jsonl(pool(job, "a.jsonl"), [pair(0)])


def pool(job: Job, name: str) -> Path:
    return job.folder / "pool" / name


PRETTY = json.dumps(candidate(1), indent=2)
IDENTICAL = pair(0) | {"rejected": pair(0)["chosen"]}
TOO_LONG = pair(1) | {"prompt": [turn("user", "why " * 200)]}
SAME_BEGINNING = pair(1) | {side: [turn("assistant", "so " * 200 + side)] for side in ("chosen", "rejected")}
NO_REJECTED = {key: pair(1)[key] for key in ("prompt", "chosen")}
DROP_LOWEST = {"drop": "lowest"}
TWO_IDENTICAL = (
    "plan 65: 2 unusable target(s): 2 × chosen | targets.jsonl line 1, | targets.jsonl line 3 | remove those"
)
REFUSED: list[tuple[str, Callable[[Job], object]]] = [
    ("plan 64: no.jsonl | nothing there", sets("candidates.uris", ["FOLDER/no.jsonl"])),
    (
        "plan 64: 5 addresses | no-model | no-adapter | no-second | no-pool | no-pairs",
        names_nothing_but_mistakes,
    ),
    ("plan 64: none is a data file", lambda job: pool(job, "a.jsonl").rename(pool(job, "a.md"))),
    ("plan 64: pool is empty", writes("pool/a.jsonl", "")),
    ("plan 65: b.jsonl line 1 | not JSON | maxBadFraction", writes("pool/b.jsonl", "{broken\n")),
    ("plan 65: pretty.json | one object over several lines", writes("pool/pretty.json", PRETTY)),
    ("plan 64: cannot be printed | b\\udcff.jsonl", writes("pool/b\udcff.jsonl", "")),
    ("plan 65: b.jsonl | does a link point to nothing", lambda job: pool(job, "b.jsonl").symlink_to("nowhere")),
    ("plan 64: spec.store | inside the data", sets("store", "FOLDER/pool/store")),
    ("plan 64: no targets | targets.uris | a pair is a prompt", writes_targets()),
    ("plan 64: targets.jsonl line 1 | no pairs | no 'chosen' | a pair is a prompt", writes_targets(candidate(0))),
    ('plan 64: no pairs: 2 row | "rejected": | choosing-targets.md', writes_targets({"text": "1"}, NO_REJECTED)),
    ("plan 64: no pairs | are candidates and targets exchanged? | a pair is a prompt", exchanges_data),
    ("plan 65: targets.jsonl line 2 | no 'chosen' | correct or remove", writes_targets(pair(0), candidate(0))),
    ("plan 65: targets.jsonl line 1 | chosen and rejected are identical", writes_targets(IDENTICAL)),
    (TWO_IDENTICAL, writes_targets(IDENTICAL, pair(1), IDENTICAL)),
    ("plan 65: 10 of 10 | 10 × text is a int | no row is usable | prism inspect", writes_pool({"text": 5})),
    ("extract 65: targets.jsonl line 2 | chosen response | maxLength", writes_targets(pair(0), TOO_LONG)),
    (
        "extract 65: 2 × its chosen | targets.jsonl line 1, | targets.jsonl line 3",
        writes_targets(TOO_LONG, pair(0), TOO_LONG),
    ),
    ("extract 65: targets.jsonl line 2 | identical up to maxLength 128", writes_targets(pair(0), SAME_BEGINNING)),
    ("plan 64: spec.extraction.tokenPerBatch | did you mean 'tokensPerBatch'?", sets("extraction.tokenPerBatch", 5)),
    ("plan 64: spec.selection.budget.fraction | less than or equal to 1", sets("selection.budget", {"fraction": 1.5})),
    ("reduce 64: 1000 | budget.count", sets("selection", DROP_LOWEST | {"budget": {"count": 1000}})),
    ("reduce 64: nothing would be selected", sets("selection", DROP_LOWEST | {"budget": {"fraction": 1.0}})),
    ("plan 64: no-model | no such model", sets("model.uri", "FOLDER/no-model")),
    ("plan 64: no .safetensors weights | pickled weights", uses_model(pickled)),
    ("plan 64: model.adapter", uses_adapter_as_model),
    ("extract 65: damaged weights | changed", uses_model(truncated)),
    (f"extract 65: {WEIGHT} | NaN", rewrites_weight(lambda by_name: by_name[WEIGHT].fill_(torch.nan))),
    (f"extract 65: {WEIGHT} | random", rewrites_weight(lambda by_name: by_name.pop(WEIGHT))),
    ("extract 64: chat template | chat_template.jinja", uses_model(lambda folder: None, chat_template=False)),
    ("extract 64: chat template does not work | chat_template.jinja", uses_template("{% if %}")),
    ("extract 64: chat template does not work | no_such_filter", uses_template("{{ messages | no_such_filter }}")),
    ("extract 64: 5000 | 4096", sets("extraction.maxLength", 5000)),
    ("extract 64: codec.dims | 896 | set it to 512 or less", sets("extraction.codec.dims", 65536)),
    ("plan 65: targets.jsonl line 2 | no 'rejected' | uniform", writes_targets(pair(0), NO_REJECTED)),
]
"""(failing stage and exit code: what the error mentions; the change that causes it)"""


NEEDS_WEIGHTS = ("no .safetensors weights", "damaged weights", "NaN", "random")
"""What an estimate, which reads no weights, cannot know."""


@pytest.mark.parametrize(("expected", "change"), REFUSED, ids=[expected for expected, _ in REFUSED])
def test_bad_input_is_refused_by_name_by_the_run_and_by_its_estimate(
    job: Job, expected: str, change: Callable[[Job], object]
) -> None:
    change(job)
    outcome, _, mentions = expected.partition(": ")
    stage, code = outcome.split()
    if not any(text in expected for text in NEEDS_WEIGHTS):
        job.refuses(("estimate", "--spec", str(job.spec_path())), int(code), *mentions.split(" | "))
    job.fails(stage, int(code), *mentions.split(" | "))


def test_a_wrong_address_decides_the_exit_code_whatever_else_is_wrong(job: Job) -> None:
    damaged = job.folder / "chained" / "manifest.json"
    damaged.parent.mkdir()
    damaged.write_text("{}")
    job.spec["candidates"]["uris"] = [str(damaged)]
    job.fails("plan", DAMAGED_DATA, str(damaged))
    job.spec["candidates"]["uris"] += [str(job.folder / f"no-{number}.jsonl") for number in range(12)]
    job.fails("plan", WRONG_REQUEST, "13 addresses", str(damaged), "no-8.jsonl", "and 3 more", "spec.candidates")


def test_a_file_that_is_not_what_its_name_says_is_refused(job: Job) -> None:
    for name, content in {
        "broken.parquet": b"PAR1 nothing of the kind",
        "broken.jsonl.gz": b"not gzip at all",
        "short.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 1000)[:-20],
        "broken.jsonl.zst": b"not zstd at all",
        "broken.json": b'[{"text": "one"}, ',
    }.items():
        path = job.folder / "broken" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        job.spec["candidates"]["uris"] = [str(path)]
        job.fails("plan", DAMAGED_DATA, name, "cannot be read")


def test_a_name_that_no_file_system_takes_is_refused_by_every_verb(job: Job) -> None:
    name = "x" * 300
    for verb in (("evaluate", f"/{name}/manifest.json"), ("export", str(job.run()), f"{job.folder}/{name}.jsonl")):
        job.refuses(verb, WRONG_REQUEST, "File name too long")


def test_a_termination_message_fits_in_any_script(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job.folder / "termination-message"
    monkeypatch.setenv("PRISM_TERMINATION_LOG", str(path))
    write_termination_message(
        {"verb": "plan", "error": "七" * 3000, "where": "八" * 3000, "fix": "九" * 3000, "exitCode": 64}
    )
    assert path.stat().st_size <= 4096
    said = json.loads(path.read_text())
    assert said["exitCode"] == 64
    assert said["error"].startswith("七七七")


def test_a_line_without_end_costs_bounded_memory(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_job.data.readers.MAX_LINE_BYTES", 2**20)
    rows = [json.dumps(candidate(number)) for number in range(3)]
    long = json.dumps({"text": "x" * 5 * 2**20})
    pool(job, "a.jsonl").write_text("\n".join([rows[0], long, rows[1], long, "", rows[2], long]))
    job.fails("plan", DAMAGED_DATA, "3 of 6", "a line of more than 1 MiB", "a.jsonl line 2", "a.jsonl line 4", "line 7")


def test_a_folder_that_cannot_be_listed_is_not_skipped(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(job, "locked").mkdir()
    listed = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    job.fails("plan", WRONG_REQUEST, "Permission denied", "pool")


def test_tools_as_json_text_and_as_json_are_the_same_example(job: Job) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    rows = [candidate(1) | {"tools": tools}, candidate(1) | {"tools": json.dumps(tools)}]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    job.spec["selection"]["budget"] = {"count": 1}
    assert read_json(job.run())["counts"]["duplicates"] == 1
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(1) | {"tools": "[{"}])
    job.fails("plan", DAMAGED_DATA, "tools is text, but not JSON")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", "digits"),
        ('{"\\ud800": 1}', "columns found"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "surrogate"),
        ({"prompt": "What?"}, "no completion"),
        ({"prompt": "What?", "completion": "  "}, "completion is empty"),
        ({"messages": [turn("user", "Hi")]}, "no turn of role 'assistant'"),
        ({"question": "What?"}, "columns found: 'question'"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "no turn of role 'assistant'"),
        ({"instruction": "Add", "input": "", "output": ""}, "output is empty"),
        ({"\x1b[2J" * 9: 1, **dict.fromkeys("abcdefgh", 1)}, "and 1 more"),
        ({"text": 5}, "text is a int"),
        ([1, 2], "not an object"),
    ],
)
def test_a_row_that_cannot_be_used_is_quarantined_with_line_and_reason(job: Job, row: object, reason: str) -> None:
    with pool(job, "a.jsonl").open("a") as file:
        file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    job.fails("plan", DAMAGED_DATA, "a.jsonl line 11", reason)
    job.spec["candidates"]["maxBadFraction"] = 0.1
    manifest = job.run()
    quarantine = [json.loads(line) for line in (manifest.parent / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["line"], reason in entry["reason"]) for entry in quarantine] == [(11, True)]
    assert read_json(manifest)["counts"]["quarantined"] == 1


def test_rows_cut_at_max_length_are_counted(job: Job) -> None:
    job.spec["audit"] = {"examples": 8}  # its sample is the same rows, which count once
    rows = [candidate(number) for number in range(10)]
    rows[3]["messages"][1]["content"] += " and so on" * 60
    write_jsonl(pool(job, "a.jsonl"), rows)
    write_jsonl(job.folder / "targets.jsonl", [pair(0), pair(1) | {"chosen": [turn("assistant", "so " * 200)]}])
    spec = job.parsed().spec
    predicted = measure(spec, load_tokenizer(spec.model))
    assert (predicted.num_cut, predicted.num_cut_pairs) == (1, 1)
    job.passes("plan")
    assert job.passes("extract")["cut"] == 2
    reduced = job.passes("reduce")
    counts = read_json(Path(reduced["manifest"]))["counts"]
    assert (reduced["cutRows"], counts["cut"], counts["cut_pairs"]) == (1, 1, 1)
    assert "Cut at maxLength" in (Path(reduced["manifest"]).parent / "report.html").read_text()


def test_ignored_files_are_listed_in_the_plan(job: Job) -> None:
    pool(job, "README.md").write_text("hello")
    assert read_json(job.run().parent / "plan.json")["ignored"] == [str(job.folder / "pool/README.md")]


DATA = (
    json.dumps(candidate(1)),
    f"\n{json.dumps(candidate(1))}\n{json.dumps(candidate(2))}",
    json.dumps([candidate(1)], indent=1),
    '{"text": "' + "long " * 2**18 + '"}\n' + '{"text": "short"}\n' * 2**17,
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("metadata: {name: {2020-01-01: 1}}", "metadata.name"),
        ("metadata: &m {name: *m}", "'*m': YAML aliases are not supported; write out"),
        (f"spec: {{store: {'x' * 300}}}", "longer than the 255 bytes"),
        ("spec: {store: ~/store}", "'~' is not expanded"),
        ("spec: {extraction: {deepspeed: {offload: cpu}}}", "offload: cpu needs stage: 3"),
        ("spec: {candidates: {uris: ['gs://a/b']}}", "gs://' is not supported"),
        *[(text, "this looks like data, not like a document") for text in DATA],
        *[(text, "selection.yaml") for text in ("[1, 2]", "a: [", "apiVersion: other/v1\nkind: SelectionRun", "")],
    ],
)
def test_wrong_fields_and_texts_that_are_no_document_are_refused_once_each(text: str, says: str) -> None:
    with pytest.raises(SpecError) as refusal:
        parse_spec(text, "selection.yaml")
    assert says in str(refusal.value)
    assert "at least 1 item" not in refusal.value.what, "one mistake is reported once"


@pytest.mark.parametrize("name", ["pool.csv", "pool/A.JSONL", "pairs.json.gz"])
def test_a_document_with_the_name_of_data_is_refused_whatever_it_holds(name: str) -> None:
    with pytest.raises(SpecError, match="looks like data") as refusal:
        parse_spec("question,answer\n", name)
    assert "`prism inspect FILE`" in refusal.value.fix


def test_a_document_of_json_in_one_line_is_no_data(job: Job) -> None:
    text = json.dumps(job.document)
    assert parse_spec(text, "selection.json") == parse_spec(f"\n{json.dumps(job.document, indent=1)}", "-")


def test_a_stricter_bad_fraction_is_checked_again_after_publication(job: Job) -> None:
    write_jsonl(pool(job, "b.jsonl"), [{"messages": [turn("user", "long " * 200), turn("assistant", "yes")]}])
    job.spec["candidates"]["maxBadFraction"] = 0.2
    assert job.run().exists()
    job.spec["candidates"]["maxBadFraction"] = 0.0
    job.fails("reduce", DAMAGED_DATA, "maxBadFraction 0")


def test_yaml_aliases_and_huge_documents_are_refused_at_once() -> None:
    # "Billion laughs": ten levels of ten aliases would be 10**10 words.
    laughs = "\n".join(f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]" for before, one in pairwise("abcdefghijk"))
    began = time.process_time()
    with pytest.raises(SpecError, match="aliases are not supported"):
        parse_spec(f"a: &a [x, x, x, x, x, x, x, x, x, x]\n{laughs}", "selection.yaml")
    with pytest.raises(SpecError, match="has 3,000,000 characters; at most 1,048,576"):
        parse_spec("x: " * 1_000_000, "selection.yaml")
    assert time.process_time() < began + 2  # written out, the aliases are 10**10 words: hours


def test_plain_text_needs_no_chat_template(job: Job) -> None:
    job.spec["model"]["uri"] = str(save_tiny_model(job.folder / "plain", chat_template=False))
    write_jsonl(job.folder / "pool" / "a.jsonl", [{"text": f"Once {number}"} for number in range(5)])
    write_jsonl(job.folder / "targets.jsonl", [{"prompt": "Is it? ", "chosen": "yes", "rejected": "no"}])
    assert job.run().exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_stage_with_try_again(job: Job, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for before in STAGES[: STAGES.index(stage)]:
        job.passes(before)
    there = {path for path in job.folder.rglob("*") if path.is_file()} | {job.folder / "selection.yaml"}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        job.refuses(stage, TRY_AGAIN, "no space left")
    assert {path for path in job.folder.rglob("*") if path.is_file()} == there, "nothing half written is left"
    assert job.run().exists()


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, TRY_AGAIN), (errno.ESTALE, TRY_AGAIN), (errno.EACCES, WRONG_REQUEST)]
)
def test_an_object_that_cannot_be_read_is_named(
    job: Job, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refusing(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "a.jsonl":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refusing)
    job.fails("plan", code, "a.jsonl", os.strerror(number))


def test_a_stop_while_a_library_loads_the_model_is_a_stop(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    job.plan()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", interrupted)
    code, words = job.stage("extract")
    assert (code, words["exitCode"]) == (143, 143), words
    assert "stopped by SIGTERM" in words["error"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_extraction_keeps_its_finished_units(job: Job, sent: signal.Signals, code: int) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(400)])
    job.plan()
    command = [sys.executable, "-m", "prism_job", "extract", "--spec", str(job.spec_path())]
    # A shell's background job ignores SIGINT, and its children with it: this child begins with the default again.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL)
    )
    assert process.stdout is not None
    for line in process.stdout:
        if '"shard"' in line:
            break
    process.send_signal(sent)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 20
    kept = list((job.folder / "store").rglob("*.safetensors"))
    assert kept
    assert not list((job.folder / "store").rglob(".put-*"))
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert job.run().exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == times


@pytest.mark.parametrize(
    ("file", "code", "says"),
    [
        ("../holes/model.safetensors", WRONG_REQUEST, "the index names ../holes/model.safetensors"),
        ("weights.bin", WRONG_REQUEST, "the index names weights.bin"),
        (None, DAMAGED_DATA, "not an index"),
    ],
    ids=["elsewhere", "a pickle", "no index"],
)
def test_an_index_may_name_only_safetensors_of_its_own_folder(job: Job, file: str | None, code: int, says: str) -> None:
    folder = save_tiny_model(job.folder / "sharded")
    (folder / "weights.bin").write_bytes(b"a pickle")
    index = {"weight_map": {"model.norm.weight": file}} if file else ["weight_map"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    job.spec["model"]["uri"] = str(folder)
    job.fails("plan", code, says, "model.safetensors.index.json")


def test_an_adapter_gives_its_own_rows_and_one_that_does_not_fit_is_refused(job: Job) -> None:
    folder = save_tiny_adapter(job.folder / "adapter")
    job.spec["model"]["adapter"] = str(folder)
    assert job.run().exists()
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "zz_proj"): weight for name, weight in weights.items()}
    safetensors.torch.save_file(renamed, folder / "adapter_model.safetensors")
    job.fails("extract", DAMAGED_DATA, "do not match", "proj")


def test_a_plan_of_another_document_under_the_same_name_is_refused(job: Job) -> None:
    job.plan()
    write_jsonl(job.folder / "others.jsonl", [pair(7)])
    job.copy(targets={"uris": [str(job.folder / "others.jsonl")]}).refuses("extract", WRONG_REQUEST, "another document")


def test_stages_without_a_plan_are_refused(job: Job) -> None:
    job.refuses("reduce", WRONG_REQUEST, "plan stage")


def test_a_turn_of_tool_calls_alone_is_shown_in_the_report(job: Job) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    row = {"messages": [turn("user", "Add"), call | {"content": ""}, turn("tool", "3"), turn("assistant", "Three")]}
    bare = {"messages": [turn("user", "Add"), call, turn("tool", "3"), turn("assistant", "Three")]}
    writes_calls = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{{ message.tool_calls or '' }}"
    )
    uses_template(writes_calls)(job)
    write_jsonl(job.folder / "pool" / "b.jsonl", [row, bare])
    job.spec["selection"] = {"keep": "highest", "budget": {"count": 12}}
    assert "Three" in (job.run().parent / "report.html").read_text()


def test_csv_as_pandas_and_excel_write_it_and_json_with_a_byte_order_mark_are_read(job: Job) -> None:
    rows = json.dumps([candidate(number) for number in range(10)])
    pool(job, "a.jsonl").unlink()
    pool(job, "a.json").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    pool(job, "pandas.csv").write_text(",prompt,completion\n0,Say,one\n1,Say,two\n2,Say,three\n")
    pool(job, "excel.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\nSay,four\nSay,five\n")
    assert job.plan()["examples"] == 15


def test_a_model_changed_between_plan_and_extraction_is_refused(job: Job) -> None:
    folder = save_tiny_model(job.folder / "model")
    job.spec["model"]["uri"] = str(folder)
    job.plan()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_end|> "))
    job.refuses("extract", DAMAGED_DATA, str(folder), "plan stage again")
    assert not list((job.folder / "store").rglob("*.safetensors"))
    assert job.run().exists(), "what the message advises works"


@pytest.mark.parametrize("field", ["norm_B", "nll_B"])
def test_a_gradient_that_is_not_finite_is_refused_and_not_stored(
    job: Job, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = GradientCapture.gradients_of

    def spoiled(capture: GradientCapture, *arguments: Any, **named: Any) -> Any:
        (result,) = plain(capture, *arguments, **named)
        return [dataclasses.replace(result, **{field: getattr(result, field) * torch.nan})]

    job.plan()
    monkeypatch.setattr(GradientCapture, "gradients_of", spoiled)
    words = job.refuses("extract", DAMAGED_DATA, "not finite", "targets.jsonl, unit ")  # pairs come first
    ids = [example_id(target_content(pair(number), needs_rejected=True)) for number in range(3)]
    assert any(known in words["error"] for known in ids), "the first that was computed is named"
    assert not list((job.folder / "store").rglob("*.safetensors"))
