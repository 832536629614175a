"""What `prism diff` prints: a table for a person, and markdown for a pull request."""

from typing import Any

from launcher.follow.terminal_text import aligned, one_line, printable

MAX_SOURCES = 20
MAX_SOURCE_CHARACTERS = 60
"""The end of a longer URI is shown."""

HEAD = [
    "selected",
    "before",
    "now",
    "kept",
    "added",
    "new in pool",
    "removed",
    "gone from pool",
    "overlap",
    "churn",
    "rank corr.",
]
COUNTS = ("before", "after", "kept", "added", "new_in_pool", "removed", "gone_from_pool")


def diff_table(facts: dict[str, Any]) -> str:
    """Both selections, the figures of all sources and of each that changed, examples, and which inputs changed."""
    lines = [
        *(f"{end}  {it['run']} {it['selection_id']}  {it['manifest']}" for end, it in _ends(facts)),
        "",
        *aligned(_rows(facts), right=True),
        *_left_out(facts),
        "",
        f"kept {facts['kept_share']:.1%} of the old selection; {_correlation(facts)}",
        *_examples(facts),
        "",
        *_changes(facts),
    ]
    return "\n".join(map(_kept_line, lines))


def diff_markdown(facts: dict[str, Any]) -> str:
    """The same as a comment of a pull request. Text from data is written as code: no markup, mention or link comes of it."""
    old, new = facts["old"], facts["new"]
    head, *rows = _rows(facts)
    named = [[f"**{rows[0][0]}**", *rows[0][1:]], *([_code(name), *cells] for name, *cells in rows[1:])]
    lines = [
        f"### Selection {_code(new['run'])}: churn {facts['churn']:.1%}",
        "",
        f"{facts['added']:,} examples added, {facts['removed']:,} removed, {facts['kept']:,} kept "
        f"({facts['kept_share']:.1%} of the old selection). {_correlation(facts).capitalize()}.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(cells)} |" for cells in named),
        *_left_out(facts),
        "",
        "**What changed**",
        "",
        *(f"- {it['input']}: {_code(it['sentence'])}" for it in facts["changes"]),
        *(["- No input changed."] if not facts["changes"] else []),
        "",
        f"Old: {_code(old['manifest'])}<br>New: {_code(new['manifest'])}",
    ]
    return "\n".join(lines)


def _ends(facts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("old", facts["old"]), ("new", facts["new"])]


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    """The head, all examples together, and the sources that changed."""
    moved = [it for it in facts["by_source"] if it["added"] + it["removed"]]
    if len(facts["by_source"]) == 1:
        moved = []  # it would be the same row again
    named = [("all", facts), *((_short(it["source"]), it) for it in moved[:MAX_SOURCES])]
    return [
        HEAD,
        *(
            [
                name,
                *(f"{it[count]:,}" for count in COUNTS),
                f"{it['overlap']:.1%}",
                f"{it['churn']:.1%}",
                "–" if it["spearman"] is None else f"{it['spearman']:.3f}",
            ]
            for name, it in named
        ),
    ]


def _left_out(facts: dict[str, Any]) -> list[str]:
    num_left = sum(1 for it in facts["by_source"] if it["added"] + it["removed"]) - MAX_SOURCES
    return [f"{num_left:,} more sources changed; -o json lists all"] if num_left > 0 else []


def _correlation(facts: dict[str, Any]) -> str:
    if facts["spearman"] is None:
        return f"no rank correlation over the {facts['common']:,} examples in both pools"
    over = f"{facts['common']:,} examples in both pools"
    if facts["spearman_rows"] != facts["common"]:
        over = f"{facts['spearman_rows']:,} scored ones of the {over}"
    return f"rank correlation of the scores {facts['spearman']:.3f}, over {over}"


def _examples(facts: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("added", "removed"):
        shown = facts[f"{name}_first"]
        all_or_first = f"the {len(shown)} that rank first of" if len(shown) < facts[name] else "all"
        lines += [f"{name}, {all_or_first} {facts[name]:,}:"] if shown else []
        lines += [f"  {it['example_id']}  {it['score']:.4g}  {_short(it['source'])}:{it['line']}" for it in shown]
    return lines


def _changes(facts: dict[str, Any]) -> list[str]:
    if not facts["changes"]:
        return ["no input changed"]
    return ["changed inputs:", *(f"  {it['input']:<9} {it['sentence']}" for it in facts["changes"])]


def _kept_line(line: str) -> str:
    """The line without breaks and control characters of text from data, its own indentation and columns kept."""
    return printable(" ".join(line.splitlines()))


def _short(source: str) -> str:
    source = one_line(source)
    return source if len(source) <= MAX_SOURCE_CHARACTERS else f"…{source[-MAX_SOURCE_CHARACTERS:]}"


def _code(text: str) -> str:
    """Text from data as code that a table may hold."""
    plain = one_line(text).replace("`", "'").replace("|", "/")
    return f"`{plain}`"
