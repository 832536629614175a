"""Layouts through the plan stage: a bad row of each is named by file and line, and what was read is stated once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Job, Row, candidate, pair, read_json, turn, write_jsonl


def said(sender: str | None, value: str) -> Row:
    return {"from": sender, "value": value}


def answer(number: int) -> str:
    return f"number {number}"


def good(layout: str, number: int) -> Row:
    question, text = f"Say {number}", answer(number)
    return {
        "messages": {"messages": [turn("user", question), turn("assistant", text)]},
        "parts": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": question}]}, turn("assistant", text)]
        },
        "prompt": {"prompt": question, "completion": text},
        "text": {"text": text},
        "sharegpt": {"conversations": [said("human", question), said("gpt", text)]},
        "alpaca": {"instruction": "Say", "input": str(number), "output": text},
        "columns": {"question": question, "answer": text},
        "pairs": pair(number),
        "whole": {side: [turn("user", question), turn("assistant", text + side)] for side in ("chosen", "rejected")},
        "hh": {side: f"\n\nHuman: {question}\n\nAssistant: {text}{side}" for side in ("chosen", "rejected")},
        "sharegpt pairs": {
            "conversations": [said("human", question)],
            "chosen": said("gpt", text),
            "rejected": said("gpt", "no"),
        },
        "alpaca pairs": {"instruction": question, "chosen": text, "rejected": "no"},
        "orca": {"system": "", "question": question, "chosen": text, "rejected": "no"},
    }[layout]


BROKEN: list[tuple[str, Row, str, str]] = [
    ("messages", {"messages": [turn("user", "Hi"), turn("assistant", " ")]}, "messages[1]", "remove the row"),
    ("messages", {"messages": [turn("user", "Hi"), turn("assistant", ""), turn("user", "?"), turn("assistant", "Hi")]},
     "messages[1]", "remove the turn"),
    ("parts", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'", "remove rows with other parts"),
    ("prompt", {"prompt": "Say", "completion": ""}, "completion is empty", "correct those rows"),
    ("text", {"text": 5}, "text is a int", "correct those rows"),
    ("sharegpt", {"conversations": [said(None, "Hi")]}, "conversations[0] has no role", "it may be human, user"),
    ("alpaca", {"instruction": "Say", "input": "5"}, "columns found: 'instruction', 'input'", "candidates.columns"),
    ("columns", {"question": "Say"}, "no 'answer', which columns names", "correct those rows"),
    ("pairs", {"prompt": "Say", "chosen": "yes"}, "no 'rejected'", "targets.columns: {user: QUESTION"),
    ("whole", {side: [turn("assistant", side)] for side in ("chosen", "rejected")}, "message in common", "targets.columns"),
    ("hh", {side: f"\n\nHuman: Hi\n\nAssistant:{end}" for side, end in (("chosen", ""), ("rejected", " no"))},
     "chosen is the beginning of rejected", "add the prompt"),
    ("sharegpt pairs", {"conversations": [], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}, "no message", "remove"),
    ("alpaca pairs", {"instruction": "Say", "chosen": "yes", "rejected": "yes"}, "identical", "correct or remove those rows"),
    ("orca", {"question": ["Say"], "chosen": "yes", "rejected": "no"}, "question is a list", "correct or remove those rows"),
]  # fmt: skip
"""(layout, a row of it that cannot be used, what the error says, what it says to do)"""

FIRST_OF_TARGETS = [name for name, *_ in BROKEN].index("pairs")
NAMED = {"user": "question", "assistant": "answer"}


@pytest.mark.parametrize(("layout", "row", "what", "fix"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_one_broken_row_of_each_layout_is_named_by_file_and_line_with_what_to_do(
    job: Job, layout: str, row: Row, what: str, fix: str
) -> None:
    is_target = [name for name, *_ in BROKEN].index(layout) >= FIRST_OF_TARGETS
    if layout == "columns":
        job.spec["candidates"]["columns"] = NAMED
    path = job.folder / ("targets.jsonl" if is_target else "pool/a.jsonl")
    write_jsonl(path, [good(layout, number) for number in range(6)])
    job.plan()
    write_jsonl(path, [*(good(layout, number) for number in range(6)), row, good(layout, 7)])
    job.refuses("plan", 65, f"{path.name} line 7", what, fix)


CASES: list[tuple[str, str, Row, tuple[str, ...]]] = [
    ("mbpp", "pool/a.jsonl", {"text": "Add one.", "code": "x + 1"}, ("'code' stands beside", "{user: text, assistant: code}")),
    ("two", "pool/a.jsonl", candidate(1) | {"text": "Say one."}, ("'messages' and 'text'", "{messages: messages}")),
    ("orca", "targets.jsonl", {"input": "Is it so?", "chosen": "yes", "rejected": "no"}, ("in 'input'", "{user: input")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "mentions"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_row_of_two_readings_stops_the_run_at_its_line_however_many_bad_rows_are_allowed(
    job: Job, name: str, row: Row, mentions: tuple[str, ...]
) -> None:
    job.spec["candidates"]["maxBadFraction"] = 1
    write_jsonl(job.folder / name, [pair(0) if name == "targets.jsonl" else candidate(0), row])
    job.refuses("plan", 64, f"{Path(name).name} line 2", *mentions)


def test_every_source_states_its_layouts_and_what_carries_the_loss_in_event_plan_manifest_and_report(job: Job) -> None:
    write_jsonl(
        job.folder / "pool" / "b.jsonl", [good(layout, 9) for layout in ("text", "prompt", "columns", "alpaca")]
    )
    job.spec["candidates"]["columns"] = NAMED
    job.plan()
    uris = [str(job.folder / name) for name in ("pool/a.jsonl", "pool/b.jsonl", "targets.jsonl")]
    named = "columns: {user: question, assistant: answer}"
    wanted = [
        {"uri": uris[0], "layout": "messages", "rows": 10, "loss": "the assistant's turns"},
        {"uri": uris[1], "layout": "text", "rows": 1, "loss": "the whole text"},
        {"uri": uris[1], "layout": "prompt + completion", "rows": 1, "loss": "completion"},
        {"uri": uris[1], "layout": named, "rows": 1, "loss": "assistant"},
        {"uri": uris[1], "layout": "instruction + output (Alpaca)", "rows": 1, "loss": "output"},
    ]
    of_targets = {"uri": uris[2], "layout": "prompt + chosen + rejected", "rows": 3, "loss": "chosen and rejected"}
    events = [event for event in job.events if event["event"] == "layout"]
    assert [{key: event[key] for key in of_targets} for event in events] == [of_targets, *wanted]
    manifest = job.run()
    for document in (read_json(manifest), read_json(manifest.parent / "plan.json")):
        assert (document["layouts"], document["target_layouts"]) == (wanted, [of_targets])
    page = (manifest.parent / "report.html").read_text()
    for each in [of_targets, *wanted]:
        assert f"{each['rows']:,} as {each['layout']}; loss on".replace("'", "&#x27;") in page


def test_the_same_rows_by_columns_are_the_same_work(job: Job) -> None:
    """Units and work digest are those of the content, not of the layout it was read from."""
    write_jsonl(job.folder / "pool" / "a.jsonl", [good("messages", number) for number in range(6)])
    wanted = planned(job)
    job.spec["candidates"]["columns"] = NAMED
    write_jsonl(job.folder / "pool" / "a.jsonl", [good("columns", number) for number in range(6)])
    assert planned(job) == wanted


def planned(job: Job) -> list[Any]:
    job.plan()
    plan = job.planned()
    stripped = plan.model_copy(update={"layouts": [], "target_layouts": []})
    assert plan.layouts
    assert plan.work_digest() == stripped.work_digest()
    return [unit.id for unit in plan.candidates]


def test_with_the_last_turn_alone_the_loss_is_said_to_be_there(job: Job) -> None:
    job.spec["extraction"]["lossOn"] = "last"
    job.plan()
    assert [each.loss for each in job.planned().layouts] == ["the assistant's last turn"]


def test_a_file_without_a_good_row_is_stated_though_few_bad_rows_are_allowed(job: Job) -> None:
    write_jsonl(job.folder / "pool" / "b.jsonl", [{"ask": "Two?", "tell": "4"}])
    job.spec["candidates"]["maxBadFraction"] = 0.2
    job.plan()
    bad = {"uri": str(job.folder / "pool" / "b.jsonl"), "layout": "unusable rows", "rows": 1, "loss": "nothing"}
    assert job.planned().layouts[-1].model_dump() == bad


def test_columns_that_no_row_has_are_refused(job: Job) -> None:
    job.spec["candidates"]["columns"] = {"messages": "massages"}
    job.refuses("plan", 64, "no row has the columns that candidates.columns names", "messages", "correct the names")
    del job.spec["candidates"]["columns"]
    job.spec["targets"]["columns"] = {"user": "ask", "chosen": "good", "rejected": "bad"}
    job.refuses(
        "plan", 64, "no row has the columns that targets.columns names, {user: ask, chosen: good, rejected: bad}"
    )
    two = {"name": "two", **job.spec["targets"]}
    job.spec["targets"] = {"sets": [{"name": "one", "uris": list(two["uris"])}, two]}
    job.refuses("plan", 64, "no row has the columns that targets.columns names, {user: ask")
