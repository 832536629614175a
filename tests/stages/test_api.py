"""Laws of the Python API: it gives what the verbs give, raises what they report, and importing it is light."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from prism_job.api import DataError, RequestError, Selection, select
from prism_job.errors import SpecError
from tests.conftest import Job, Row, candidate, pair, table_of, write_jsonl


@pytest.fixture
def selection(job: Job) -> Selection:
    return Selection.load(job.run())


def test_a_selection_is_that_of_the_stages_and_a_second_call_returns_it(job: Job) -> None:
    made = select(job.document)
    assert made.uri == str(job.run()) == select(job.spec_path()).uri
    assert repr(made) == f"<Selection of 4 of 10 usable examples: {made.uri}>"


def test_examples_are_the_selected_rows_and_scores_the_whole_table(job: Job, selection: Selection) -> None:
    scores = table_of(job.run(), "scores")
    assert selection.scores().to_pylist() == scores
    rows = [json.loads(line) for line in (job.folder / "pool" / "a.jsonl").read_text().splitlines()]
    assert selection.examples().to_list() == [rows[score["line"] - 1] for score in scores if score["selected"]]


def test_examples_in_a_format_are_the_training_content_of_any_layout(job: Job) -> None:
    write_jsonl(
        job.folder / "pool" / "a.jsonl", [{"instruction": f"Say {n}", "output": str(n), "id": n} for n in range(10)]
    )
    (first, *_) = Selection.load(job.run()).examples(format="trl").to_list()
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert set(first) == {"messages"}


def test_what_a_run_warns_of_is_a_warning(job: Job) -> None:
    rows = [candidate(number) for number in range(200)]
    write_jsonl(job.folder / "pool" / "a.jsonl", [*rows, {"messages": []}])
    job.spec["targets"] = {"uris": [str(write_jsonl(job.folder / "same.jsonl", [pair(0), swapped(pair(0))]))]}
    with pytest.warns(UserWarning, match="unusable rows: 1"), pytest.warns(UserWarning, match="mean π"):
        select(job.document)


def swapped(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def test_contributions_of_an_example_add_up_to_its_score(selection: Selection) -> None:
    example = selection.scores().to_pylist()[3]
    (found,) = selection.explain(example["example_id"], pairs=2)["examples"]
    parts = [pair["contribution"] for pair in found["pairs"]] + [found["others"]["contribution"]]
    assert len(parts) == 3
    assert math.fsum(parts) == pytest.approx(example["score"], rel=1e-6)


def test_the_report_is_the_published_page_and_a_changed_one_is_refused(job: Job, selection: Selection) -> None:
    path = job.run().with_name("report.html")
    assert selection.report() == path.read_text()
    path.write_text("other")
    with pytest.raises(DataError, match=r"checksum mismatch: report\.html"):
        selection.report()


def test_errors_name_what_is_wrong_and_where(job: Job) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.yaml"):
        select("nowhere.yaml")
    with pytest.raises(RequestError, match="no manifest there"):
        Selection.load(job.folder / "manifest.json")
    with pytest.raises(SpecError, match=r"spec\.store"):
        select({**job.document, "spec": {**job.spec, "store": 1}})
    job.spec["targets"] = {"uris": [str(job.folder / "none.jsonl")]}
    with pytest.raises(RequestError, match=r"none\.jsonl"):
        select(job.document)


def test_importing_it_is_light() -> None:
    heavy = ("torch", "transformers", "deepspeed", "datasets", "pyarrow", "numpy")
    code = f"import sys, prism_job.api; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
