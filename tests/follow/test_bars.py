"""The progress of `prism run`: its text, its lines in a log."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.follow.bars import Lines
from launcher.follow.event_text import note_text, progress_text
from launcher.follow.terminal_text import printable


def test_characters_that_reverse_the_reading_order_are_escaped() -> None:
    assert printable("a\u202eb\u2028c") == "a\\u202eb\\u2028c"


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
        ({"stage": "extract", "done": 7, "total": 186, "tokens": 0, "seconds": 180.0}, "7/186 examples, 0.039/s"),
    ],
)
def test_progress_as_text(event: dict[str, Any], expected: str) -> None:
    assert progress_text(event) == expected


def test_what_is_to_be_extracted_is_one_line_that_says_what_for() -> None:
    event = {"event": "missing", "pairs": 32, "candidates": 77, "audit": 77}
    assert note_text(event) == "186 to extract: 77 candidates, 32 pairs, 77 of the audit's sample"
    event = {"event": "missing", "candidates": 10, "audit": 106}
    expected = "116 to extract: 10 candidates, 106 of the audit's sample (audit.examples: 0 leaves it out)"
    assert note_text(event) == expected, "where the larger part is the audit's"


def test_what_is_captured_is_one_line_that_names_what_is_not() -> None:
    event = {"event": "layers", "captured": 24, "coverage": 0.985, "share_of_model": 0.031}
    assert note_text({**event, "unseen": [], "left_out": []}) == (
        "gradients of 24 weights, 98.5% of those asked for, 3.1% of the model's matrices"
    )
    assert note_text({**event, "unseen": ["a.dt_proj"], "left_out": ["model.visual"]}).endswith(
        "; not captured: a.dt_proj; no text passes through model.visual"
    )


def test_what_is_quantised_is_one_line_that_names_the_largest_weight_that_is_not() -> None:
    event = {
        "event": "quantised",
        "share": 0.93,
        "parameters": 10**9,
        "bytes": 5 * 10**8,
        "largest_others": ["lm_head"],
    }
    assert note_text(event) == "93.0% of the weights are quantised, 0.5 GB; the largest that is not: lm_head"


def test_what_is_not_captured_of_an_adapter_is_named() -> None:
    event = {"event": "adapter", "not_captured": ["lm_head.lora_A"], "note": "embeddings and head are not captured"}
    assert note_text(event) == "not captured of the adapter: lm_head.lora_A (embeddings and head are not captured)"


def test_plain_progress_lines_are_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.start("extract")
    for done in range(100):
        lines.show({"event": "progress", "stage": "extract", "done": done, "total": 100, "tokens": 9, "seconds": 1.0})
    assert capsys.readouterr().err == "extract: started\n"


def test_a_file_without_a_good_row_says_so_and_nothing_of_a_layout() -> None:
    event = {"event": "layout", "uri": "a.jsonl", "layout": "unusable rows", "rows": 32, "loss": "nothing"}
    assert note_text(event) == "a.jsonl: 32 rows, none usable"


def test_the_layout_of_a_file_is_one_line_that_says_what_carries_the_loss() -> None:
    event = {"event": "layout", "uri": "s3://pool/a.jsonl", "layout": "text", "rows": 1200, "loss": "the whole text"}
    assert note_text(event) == "s3://pool/a.jsonl: 1,200 rows as text; loss on the whole text"
