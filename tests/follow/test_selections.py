"""What `prism diff` and `prism explain` print: every figure is there, and text from data stays text."""

from __future__ import annotations

import re
from typing import Any

from launcher.follow.selections.diff_text import MAX_SOURCES, diff_markdown, diff_table
from launcher.follow.selections.explain_text import MAX_CHARACTERS, explain_text

HOSTILE = "s3://pool/\x1b[2J|`@user`<img src=x>\n## b.jsonl"


def figures(added: int, removed: int) -> dict[str, Any]:
    counts = {"before": 10 + removed, "after": 10 + added, "kept": 10, "added": added, "removed": removed}
    counts |= {"new_in_pool": 1, "gone_from_pool": 0, "common": 3000, "pool_before": 3001, "pool_after": 3002}
    return {**counts, "overlap": 0.5, "kept_share": 0.75, "churn": 0.25, "spearman": 0.875}


def facts_of(sources: list[str], **changes: Any) -> dict[str, Any]:
    named = {"run": "math", "selection_id": "0123", "manifest": "s3://out/math/0123/manifest.json"}
    return {
        "old": named,
        "new": named | {"selection_id": "4567"},
        **figures(4, 2),
        "spearman_rows": 3000,
        "by_source": [{"source": source, **figures(2, 1)} for source in sources],
        "added_first": [{"example_id": "ab" * 16, "source": sources[0], "line": 7, "score": 1234.5}],
        "removed_first": [],
        "changes": [{"input": "settings", "sentence": f"uris changed from a to {HOSTILE}."}],
        **changes,
    }


def test_the_table_has_a_row_for_all_and_for_each_source_that_changed() -> None:
    facts = facts_of(["a.jsonl", HOSTILE])
    facts["by_source"].append({"source": "still.jsonl", **figures(0, 0)})
    lines = diff_table(facts).splitlines()
    assert lines[0] == "old  math 0123  s3://out/math/0123/manifest.json"
    cells = [line.split() for line in lines[3:7]]
    assert cells[1] == ["all", "12", "14", "10", "4", "1", "2", "0", "50.0%", "25.0%", "0.875"]
    assert cells[2] == ["a.jsonl", "11", "12", "10", "2", "1", "1", "0", "50.0%", "25.0%", "0.875"]
    assert not any("still.jsonl" in line for line in lines)
    assert "kept 75.0% of the old selection; rank correlation of the scores 0.875" in lines[8]
    assert f"  {'ab' * 16}  1234  a.jsonl:7" in lines
    assert "added, the 1 that rank first of 4:" in lines
    assert lines[-2] == "changed inputs:"
    # Text from data moves no cursor and ends no line, so the page has as many lines as without it.
    assert "\x1b" not in "".join(lines)
    assert len(lines) == len(diff_table(facts_of(["a.jsonl", "b.jsonl"])).splitlines())


def test_what_is_not_known_and_what_is_left_out_is_said() -> None:
    sources = [f"{number}.jsonl" for number in range(MAX_SOURCES + 3)]
    shown = diff_table(facts_of(sources, spearman=None, changes=[], added_first=[]))
    assert "3 more sources changed" in shown
    assert "no rank correlation over the 3,000 examples in both pools" in shown
    assert shown.endswith("no input changed")
    assert "2,000 scored ones of the 3,000 examples in both pools" in diff_table(facts_of(["a"], spearman_rows=2000))


def test_text_from_data_is_no_markup_in_a_comment() -> None:
    lines = diff_markdown(facts_of(["a.jsonl", HOSTILE])).splitlines()
    assert lines[0] == "### Selection `math`: churn 25.0%"
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(table[0].split("|")) - 1}
    assert table[2].startswith("| **all** | 12 | 14 |")
    assert not any(line.startswith("## ") for line in lines)
    outside_code = re.sub("`[^`]*`", "", "\n".join(lines))
    assert "- settings: `uris changed from a to s3://pool/" in "\n".join(lines)
    for raw in ("s3://pool", "<img", "@user", "x> ##"):
        assert raw not in outside_code, raw


EXAMPLE = {"example_id": "ab" * 16, "source": HOSTILE, "line": 7, "score": 200.0, "selected": True, "text": "z" * 999}
PAIR = {
    "pair": 4,
    "example_id": "cd" * 16,
    "set": "math",
    "preference": 0.75,
    "weight": 0.75,
    "text": f"chosen: {HOSTILE}",
}


def test_contributions_are_listed_with_their_share_of_the_score() -> None:
    example = {
        **EXAMPLE,
        "sets": [{"set": "math", "contribution": 150.0}, {"set": "toxic", "contribution": 50.0}],
        "pairs": [{"pair": 4, "contribution": 250.0}],
        "others": {"pairs": 1234, "contribution": -50.0},
    }
    lines = explain_text({"examples": [example], "pairs": [PAIR]}).splitlines()
    assert lines[0].startswith(f"score 200  selected  {'ab' * 16}  s3://pool/")
    assert lines[1] == f"  {'z' * MAX_CHARACTERS} …"
    assert [line.split()[:4] for line in lines[2:4]] == [
        ["+150", "+75.0%", "set", "math"],
        ["+50", "+25.0%", "set", "toxic"],
    ]
    assert lines[4].split()[:8] == ["+250", "+125.0%", "pair", "4", "of", "set", "math,", "π"]
    assert "## b.jsonl" in lines[4]
    assert lines[5].split() == ["-50", "-25.0%", "the", "other", "1,234", "pairs", "together"]
    assert len(lines) == 8
    # A score of zero has no shares, and a pair without a rejected response no preference.
    nothing = {**example, "score": 0.0, "selected": False, "sets": [], "others": {"pairs": 0, "contribution": 0.0}}
    lines = explain_text({"examples": [nothing], "pairs": [{**PAIR, "preference": None}]}).splitlines()
    assert lines[0].startswith("score 0  not selected")
    assert lines[2].split()[:7] == ["+250", "–", "pair", "4", "of", "set", "math:"]


def test_a_pair_lists_the_examples_at_both_of_its_ends() -> None:
    ends = {"for": [{**EXAMPLE, "contribution": 3.0}], "against": [{**EXAMPLE, "contribution": -5.0}]}
    lines = explain_text({"pair": PAIR, **ends}).splitlines()
    assert lines[0] == "pair 4 of set math, π 0.75"
    assert [line.split()[:3] for line in (lines[4], lines[8])] == [["3", "200", "ab" * 16], ["-5", "200", "ab" * 16]]
    assert len(explain_text({"pair": PAIR, "for": [], "against": []}).splitlines()) == 2
