"""The section of changes: examples and inputs, against the selection before this one."""

from typing import Any

from prism_job.publish.report.markup import MAX_ROWS, more, path, percent, safe


def diff_section(facts: dict[str, Any]) -> str:
    """Of the facts of compare/diff.py, or the reason why there are none."""
    before = f'<p class="note">Compared with selection <code>{safe(facts["old"]["selection_id"])}</code>.</p>'
    if "reason" in facts:
        return f"{before}<p>Not known: {safe(facts['reason'])}.</p>"
    changes = "".join(f"<li>{safe(change['sentence'])}</li>" for change in facts["changes"])
    moved = [it for it in facts["by_source"] if it["added"] + it["removed"]]
    rows = "".join(_row(path(it["source"]), it) for it in moved[:MAX_ROWS])
    sample = "" if facts["spearman_rows"] == facts["common"] else f" (over {facts['spearman_rows']:,} of them)"
    return (
        f"<p>Churn {percent(facts['churn'], 1)}: {facts['added']:,} examples added, {facts['removed']:,} removed, "
        f"{facts['kept']:,} kept. Rank correlation of the scores of the {facts['common']:,} examples in both pools{sample}: "
        f"{_number(facts['spearman'])}.</p>"
        f"<ul>{changes or '<li>No input changed.</li>'}</ul>"
        '<table class="figures"><thead><tr><th>Source</th><th>Before</th><th>Now</th><th>Kept</th><th>Added</th>'
        "<th>of these new in the pool</th><th>Removed</th><th>of these gone from the pool</th><th>Churn</th>"
        f"<th>Rank correlation</th></tr></thead><tbody>{_row('<b>all</b>', facts)}{rows}</tbody></table>"
        f"{more(len(moved), 'sources that changed')}"
        f'<p class="note">Churn is (added + removed) / (before + now).</p>{before}'
    )


def _row(name: str, it: dict[str, Any]) -> str:
    counts = ("before", "after", "kept", "added", "new_in_pool", "removed", "gone_from_pool")
    cells = "".join(f"<td>{it[name]:,}</td>" for name in counts)
    return f"<tr><td>{name}</td>{cells}<td>{percent(it['churn'], 1)}</td><td>{_number(it['spearman'])}</td></tr>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
