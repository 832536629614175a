"""Laws of `inspect`: it shows rows, tokens and reasons as the run has them, and reads no more than it shows."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.follow.inspect_text import inspect_text
from prism_job.data.examples import candidate_content, target_content
from prism_job.extract.tokenise import encode_candidate, encode_target
from tests.conftest import Job, candidate, pair, turn, write_jsonl
from tests.models import CHAT_TEMPLATE, build_tokenizer, save_tiny_model

ROWS = [
    candidate(1),
    {"prompt": "七 and 八? ", "completion": "🎉 fifteen"},
    {"text": "Once upon a time"},
    {"instruction": "Add", "input": "7, 8", "output": "15\n"},
    {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]},
    {"messages": [turn("user", "Hi"), turn("assistant", "long " * 100)]},
]


def inspected(job: Job, *arguments: str) -> dict[str, Any]:
    return job.passes("inspect", *arguments)


def inspected_document(job: Job, *arguments: str) -> dict[str, Any]:
    return inspected(job, "--spec", str(job.spec_path()), *arguments)


@pytest.mark.parametrize("max_length", [24, 2048])
@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_tokens_and_loss_are_those_of_the_run_and_the_offsets_cut_the_text(
    job: Job, tiny_model: Path, max_length: int, loss_on: Any
) -> None:
    path = write_jsonl(job.folder / "rows.jsonl", ROWS)
    options = ("--max-length", str(max_length), "--loss-on", loss_on, "--rows", "9", "--model", str(tiny_model))
    (source,) = inspected(job, *options, str(path))["sources"]
    tokenizer = build_tokenizer()
    for row, facts in zip(ROWS, source["rows"], strict=True):
        if facts["reason"]:
            assert max_length == 24
            assert "no response token within maxLength 24" in facts["reason"]
            continue
        text = facts["texts"]["text"]
        encoded = encode_candidate(candidate_content(row), tokenizer, max_length, loss_on)
        assert (text["ids"], text["loss"], text["tokens_cut"]) == (encoded.ids, encoded.supervised, encoded.num_cut)
        assert (text["tokens"], text["tokens_with_loss"]) == (len(encoded.ids), encoded.num_supervised)
        assert text["text"] == tokenizer.decode(encoded.ids)
        pieces = [text["text"][begin:end] for begin, end in text["offsets"]]
        assert "".join(pieces) == text["text"]
        assert [piece for piece, token in zip(pieces, encoded.ids, strict=True) if token == 2] == [
            "<|im_end|>"
        ] * encoded.ids.count(2)


def test_a_person_sees_what_carries_loss_where_a_line_ends_and_what_is_cut(job: Job, tiny_model: Path) -> None:
    path = write_jsonl(job.folder / "rows.jsonl", [ROWS[3], ROWS[1], ROWS[5]])
    text = inspect_text(inspected(job, "--model", str(tiny_model), "--max-length", "64", str(path)))
    assert text == (
        f"{path}: candidates\n"
        "  line 1: instruction + output (Alpaca), loss on output; 29 tokens, 5 carry loss\n"
        "    │ <|im_start|>user\n"
        "    │ Add\n"
        "    │ 7, 8<|im_end|>\n"
        "    │ <|im_start|>assistant\n"
        "    │ ⟦15↵⟧\n"
        "    │ ⟦<|im_end|>↵⟧\n"
        "  line 2: prompt + completion, loss on completion; 21 tokens, 11 carry loss\n"
        "    │ 七 and 八? ⟦🎉 fifteen<|im_end|>⟧\n"
        "  line 3: messages, loss on the assistant's turns; 64 tokens, 46 carry loss; 356 more cut at maxLength 64\n"
        "    │ <|im_start|>user\n"
        "    │ Hi<|im_end|>\n"
        "    │ <|im_start|>assistant\n"
        "    │ ⟦long long long long long long long long long long long lon⟧\n"
        "  3 rows read: 1 as instruction + output (Alpaca), loss on output; 1 as prompt + completion, loss on completion; "
        "1 as messages, loss on the assistant's turns\n"
        "  114 tokens, 62 carry loss; 1 row cut at maxLength 64, by 356 tokens together"
    )


def test_a_pair_is_shown_once_up_to_where_its_sides_differ(job: Job, tiny_model: Path) -> None:
    row = {"prompt": "Capital? ", "chosen": "It is Paris", "rejected": "It is Rome"}
    path = write_jsonl(job.folder / "pairs.jsonl", [row, pair(1)])
    facts = inspected(job, "--targets", "--model", str(tiny_model), "--rows", "1", str(path))
    texts = facts["sources"][0]["rows"][0]["texts"]
    encoded = encode_target(target_content(row, needs_rejected=True), build_tokenizer(), 2048)
    assert {name: text["ids"] for name, text in texts.items()} == {name: each.ids for name, each in encoded.items()}
    first = next(
        index for index, (a, b) in enumerate(zip(*(each.ids for each in encoded.values()), strict=False)) if a != b
    )
    text = inspect_text(facts)
    assert f"both begin with the same {first} tokens:\n    │ Capital? ⟦It is ⟧\n" in text
    assert f"carry loss; from token {first + 1} on:\n    │ ⟦Paris<|im_end|>⟧\n    rejected: " in text
    assert text.count("Capital?") == 1


def test_what_inspect_calls_unusable_is_what_the_run_quarantines(job: Job) -> None:
    late = {"prompt": "long " * 200, "completion": "x"}
    loud = {"messages": [turn("user", "LOUD " * 200), turn("assistant", "x")]}
    model = save_tiny_model(job.folder / "model")
    refusal = "{% if 'LOUD' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + CHAT_TEMPLATE)
    job.spec["model"]["uri"] = str(model)
    bad = [{"prompt": "What?"}, late, {"text": 5}, {"conversations": []}, late, loud]
    rows = [row for number, row in enumerate(bad) for row in (candidate(number), row)]
    write_jsonl(job.folder / "pool" / "a.jsonl", rows)
    with (job.folder / "pool" / "a.jsonl").open("a") as file:
        file.write('{"text": "\\ud800"}\nnot JSON\n')
    job.spec["candidates"]["maxBadFraction"] = 0.9
    facts = inspected_document(job, "--all", "--rows", "20")
    manifest = job.run()
    quarantine = [json.loads(line) for line in (manifest.parent / "quarantine.jsonl").read_text().splitlines()]
    candidates = facts["sources"][0]
    found = {row["line"]: row["reason"] for row in candidates["rows"] if row["reason"]}
    assert found == {entry["line"]: entry["reason"] for entry in quarantine}
    assert candidates["rows_unusable"] == len(quarantine) == 8
    assert max(len(reason) for reason in found.values()) == 500, "what a template raises is cut"
    assert {reason["reason"]: reason["rows"] for reason in candidates["reasons"]}[found[4]] == 2
    # Where rows are counted that are not shown, their reasons are listed.
    text = inspect_text(inspected_document(job, "--all"))
    assert f"  unusable: 2 × {found[4]} (line 4, 10)" in text


def test_only_the_rows_that_are_shown_are_read(job: Job) -> None:
    # gzip finds the missing end only where the file is read to its end.
    path = job.folder / "short.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(20_000)))[:-20])
    facts = inspected(job, str(path))
    assert [row["line"] for row in facts["sources"][0]["rows"]] == [1, 2, 3]
    job.refuses(("inspect", "--all", str(path)), 65, "cannot be read as .jsonl.gz", "short.jsonl.gz")


def last_event_without_torch(*arguments: str) -> dict[str, Any]:
    """Of a verb in a process of its own, which imports neither torch nor transformers."""
    script = (
        "import sys; from prism_job.__main__ import main; main(sys.argv[1:]); "
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    process = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert not process.stderr.strip(), process.stderr
    event: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return event


def test_what_names_nothing_or_too_much_is_refused_before_torch_is_imported(job: Job) -> None:
    several = last_event_without_torch("inspect", "--spec", str(job.spec_path()), "--line", "6")
    assert "--line needs one file, and this names 2: " in several["error"]
    job.spec["model"]["uri"] = nowhere = str(job.folder / "nowhere")
    for verb in ("inspect", "estimate"):
        event = last_event_without_torch(verb, "--spec", str(job.spec_path()))
        assert (event["event"], event["exitCode"], event["where"]) == ("failed", 64, nowhere)


def test_without_a_model_neither_torch_nor_transformers_is_imported(job: Job) -> None:
    facts = last_event_without_torch("inspect", str(job.folder / "pool"))
    assert (facts["event"], facts["model"]) == ("done", None)
    assert "line 1: messages, loss on the assistant's turns\n    │ messages user: Say 0\n" in inspect_text(facts)


def test_a_line_is_shown_with_its_number(job: Job) -> None:
    path = job.folder / "rows.jsonl"
    path.write_text("\n" + "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(2, 9)))
    facts = inspected(job, "--line", "4", "--rows", "2", str(path))
    assert [(row["line"], row["content"]["text"]) for row in facts["sources"][0]["rows"]] == [
        (4, "row 4"),
        (5, "row 5"),
    ]
    job.refuses(("inspect", "--line", "9", str(path)), 64, "no such line", "rows.jsonl line 9")
    write_jsonl(job.folder / "pool" / "b.jsonl", ROWS)
    several = f"--line needs one file, and this names 2: {job.folder}/pool/a.jsonl, {job.folder}/pool/b.jsonl"
    job.refuses(("inspect", "--line", "2", str(job.folder / "pool")), 64, several, "give the file itself")


def test_a_document_gives_columns_model_and_settings_of_candidates_and_of_each_set(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "a.jsonl", [{"q": "What?", "a": "That", "text": "not this"}])
    write_jsonl(job.folder / "own.jsonl", [{"ask": "Is it? ", "good": "yes", "bad": "no"}])
    job.spec["candidates"]["columns"] = {"user": "q", "assistant": "a"}
    own = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    job.spec["targets"] = {
        "sets": [
            {"name": "plain", "uris": [str(job.folder / "targets.jsonl")]},
            {"name": "own", "uris": [str(job.folder / "own.jsonl")], "columns": own},
        ]
    }
    job.spec["extraction"]["lossOn"] = "last"
    facts = inspected_document(job, "--rows", "1")
    pool, plain, mine = facts["sources"]
    assert (facts["max_length"], facts["loss_on"], facts["model"]) == (128, "last", job.spec["model"]["uri"])
    assert [(each["role"], each["set"]) for each in facts["sources"]] == [
        ("candidates", ""),
        ("targets", "plain"),
        ("targets", "own"),
    ]
    assert "What?" in pool["rows"][0]["texts"]["text"]["text"]
    assert "not this" not in pool["rows"][0]["texts"]["text"]["text"]
    assert plain["rows"][0]["texts"].keys() == mine["rows"][0]["texts"].keys() == {"chosen", "rejected"}
    assert "targets of the set own" in inspect_text(facts)


def test_columns_are_given_as_in_the_document_with_or_without_braces(job: Job) -> None:
    path = str(write_jsonl(job.folder / "rows.jsonl", [{"q": "What?", "hint": "", "a": "That"}]))
    for columns in ("{prompt: [q, hint], completion: a}", "prompt: [q, hint], completion: a"):
        (source,) = inspected(job, "--columns", columns, path)["sources"]
        assert source["rows"][0]["content"] == {"prompt": "What?", "completion": "That"}
    job.refuses(("inspect", "--columns", "promt: q", path), 64, "did you mean 'prompt'?")
    job.refuses(("inspect", "--columns", "[q", path), 64, "not YAML", "--columns")


def test_a_row_that_stops_the_run_says_so_and_pairs_read_as_candidates_name_the_option(job: Job) -> None:
    path = str(write_jsonl(job.folder / "rows.jsonl", [{"text": "Add 7 and 8", "code": "7 + 8"}]))
    text = inspect_text(inspected(job, path))
    assert "line 1: this row stops the run: column 'code' stands beside 'text'" in text
    assert "columns: {user: text, assistant: code}" in text
    targets = str(job.folder / "targets.jsonl")
    assert "rows with chosen and rejected are targets: --targets reads them" in inspect_text(inspected(job, targets))
    broken = str(write_jsonl(job.folder / "broken.jsonl", [pair(1) | {"chosen": None}]))
    assert "line 1: this row stops the run: " in inspect_text(inspected(job, "--targets", broken))


def test_no_text_of_data_can_move_the_cursor_fake_a_line_or_a_mark(job: Job, tiny_model: Path) -> None:
    evil = "a\x1b[2J\r⟦b⟧\u202e\n  line 9: fine"
    rows = [{"messages": [turn("us\x1ber\n  line 2: fine", evil), turn("assistant", evil)]}, {f"{evil}": 1}]
    path = str(write_jsonl(job.folder / "rows.jsonl", rows))
    for options in ((), ("--model", str(tiny_model))):
        text = inspect_text(inspected(job, *options, path))
        assert not {"\x1b", "\r", "\u202e"} & set(text)
        assert "⟦b" not in text
        assert "a\\x1b[2J\\x0d\\u27e6b\\u27e7\\u202e\n" in text.replace("↵⟧", "")
        assert not [line for line in text.splitlines() if line.lstrip(" │").startswith("line 9") and "│" not in line]


def test_long_texts_are_shortened_for_a_person_and_whole_in_the_facts(job: Job) -> None:
    path = str(write_jsonl(job.folder / "rows.jsonl", [{"text": "begin " + "x" * 10_000 + " end"}]))
    facts = inspected(job, path)
    text = inspect_text(facts)
    assert "│ text: begin xxx" in text
    assert " … 9,210 characters … xxx" in text
    assert len(text) < 1500
    assert len(facts["sources"][0]["rows"][0]["content"]["text"]) == 10_010


def test_files_beyond_the_first_eight_are_counted_and_all_reads_them(job: Job) -> None:
    for number in range(11):
        write_jsonl(job.folder / "many" / f"{number:02}.jsonl", [{"text": "x"}] * 3)
    (job.folder / "many" / "README.md").write_text("hello")
    facts = inspected(job, "--rows", "1", str(job.folder / "many"))
    assert (len(facts["sources"]), facts["sources_left_out"]) == (8, 3)
    assert "3 more files: name one to see its rows; --all reads all of them" in inspect_text(facts)
    assert "README.md: not a kind of data file" in inspect_text(facts)
    facts = inspected(job, "--rows", "1", "--all", str(job.folder / "many"))
    assert [(source["rows_read"], len(source["rows"])) for source in facts["sources"]] == [(3, 1)] * 8 + [(3, 0)] * 3


def test_all_ends_with_the_counts_over_all_files_and_where_the_unusable_rows_are(job: Job) -> None:
    write_jsonl(job.folder / "many" / "a.jsonl", [candidate(1)] * 5)
    broken = write_jsonl(job.folder / "many" / "b.jsonl", [*[candidate(1)] * 6, {"text": ""}])
    text = inspect_text(inspected(job, "--all", str(job.folder / "many")))
    *_, head, counts, unusable, _ = text.splitlines()
    assert head == "2 files of candidates together:"
    assert counts == "  all 12 rows: 11 as messages, loss on the assistant's turns; 1 unusable"
    assert unusable.startswith("  unusable: 1 × ")
    assert unusable.endswith(f"(line 7 of {broken})")
    assert "together" not in inspect_text(inspected(job, str(job.folder / "many"))), "not of the first rows"


def test_an_object_on_s3_is_inspected(job: Job, s3: Any) -> None:
    s3.put_object(Bucket="corpora", Key="pool/a.jsonl", Body=b'{"text": "from the bucket"}\n')
    (source,) = inspected(job, "s3://corpora/pool/")["sources"]
    assert (source["uri"], source["rows"][0]["content"]) == ("s3://corpora/pool/a.jsonl", {"text": "from the bucket"})
    job.refuses(("inspect", "s3://corpora/nothing/"), 64, "nothing there")


@pytest.mark.parametrize(
    ("name", "content", "code", "mention"),
    [
        ("nowhere.jsonl", None, 64, "no such file"),
        ("picture.png", b"\x89PNG", 64, "not a kind of data file"),
        ("binary.parquet", b"\x00\x01" * 100, 65, "cannot be read as .parquet"),
        ("empty.jsonl", b"", 0, "  no rows"),
        ("binary.jsonl", b"\x93\xff\x01\n", 0, "line 1: unusable: not UTF-8"),
    ],
)
def test_what_a_stranger_gives_is_answered_by_name(
    job: Job, name: str, content: bytes | None, code: int, mention: str
) -> None:
    path = job.folder / name
    if content is not None:
        path.write_bytes(content)
    if code:
        job.refuses(("inspect", str(path)), code, mention, name)
    else:
        assert mention in inspect_text(inspected(job, str(path)))


def test_a_model_that_cannot_render_is_refused(job: Job) -> None:
    pool = str(job.folder / "pool")
    job.refuses(("inspect", "--model", str(job.folder / "nowhere"), pool), 64, "no such model")
    plain = str(save_tiny_model(job.folder / "plain", chat_template=False))
    job.refuses(("inspect", "--model", plain, pool), 64, "no chat template", "chat_template.jinja")
