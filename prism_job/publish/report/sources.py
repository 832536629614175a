"""The sections of data: candidates by source, what rules of the selection changed, quarantined rows, ignored files."""

from collections import Counter
from typing import Any

import numpy as np

from prism_job.plan.plan import UNUSABLE_ROWS, Quarantined, SourceLayout
from prism_job.publish.report.contents import Report
from prism_job.publish.report.markup import MAX_ROWS, meter, more, path, percent, safe

MAX_REASONS = 12
"""Distinct quarantine reasons counted one by one; some carry details of their row, so there may be as many as rows."""


def sources_section(report: Report) -> str:
    usable_S, chosen_S = report.usable_by_source, report.selected_by_source
    num_selected = int(report.selected.sum())
    overall = num_selected / max(report.num_usable, 1)
    order = np.lexsort((-usable_S, -chosen_S))
    uris, read_as = report.sources, _read_as(report.layouts)
    rows = "".join(
        f"<tr><td>{path(uris[source])}{read_as.get(uris[source], '')}</td>"
        f"<td>{usable_S[source]:,}</td><td>{chosen_S[source]:,}</td>"
        f'<td><div class="wide">{meter(chosen_S[source] / max(usable_S[source], 1), "sel", overall)}'
        f"<b>{percent(int(chosen_S[source]), int(usable_S[source]))}</b></div></td></tr>"
        for source in order[:MAX_ROWS].tolist()
    )
    return (
        '<table class="sources"><thead><tr><th>Source</th><th>Candidates</th><th>Selected</th><th>Share selected</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>{more(len(order), 'sources')}"
        f'<p class="note">Candidates that were scored. The tick marks the share over all sources, '
        f"{percent(num_selected, report.num_usable)}.</p>{_targets(report.target_layouts)}"
    )


def _read_as(layouts: list[SourceLayout]) -> dict[str, str]:
    """Address of each file -> the layouts of its rows, and what carries the loss."""
    lines: dict[str, str] = {}
    for each in layouts:
        how = f"as {safe(each.layout)}; loss on {safe(each.loss)}"
        line = f'<p class="note">{each.rows:,} {"rows, none usable" if each.layout == UNUSABLE_ROWS else how}</p>'
        lines[each.uri] = lines.get(each.uri, "") + line
    return lines


def _targets(layouts: list[SourceLayout]) -> str:
    read_as = list(_read_as(layouts).items())
    if not read_as:
        return ""
    rows = "".join(f"<tr><td>{path(uri)}{lines}</td></tr>" for uri, lines in read_as[:MAX_ROWS])
    return (
        f'<table class="sources"><thead><tr><th>Files of targets</th></tr></thead><tbody>{rows}</tbody></table>'
        f"{more(len(read_as), 'files')}"
    )


def rules_section(report: Report) -> str:
    """What shares of the budget and `dedupe: near` moved. Needs `report.rules`."""
    rules = report.rules or {}
    done = "kept" if report.action.startswith("keep") else "dropped"
    notes = [
        f"The rules brought {rules['entered']:,} rows into the budget, which are {done} and would not be without them, and "
        f"took {rules['left']:,} out."
    ]
    if near := rules.get("near_duplicates"):
        notes.append(
            f"{near['left_out']:,} rows were left out because at least {near['agreement']:.3g} of their signs are those of "
            "a better ranked row that is kept; scores.parquet names it (duplicate_of)."
        )
    return "".join(f'<p class="note">{note}</p>' for note in notes) + _groups_table(rules)


def _groups_table(rules: dict[str, Any]) -> str:
    groups = rules.get("groups", [])
    if not groups:
        return ""
    whole = {name: sum(group[name] for group in groups) for name in ("pool", "without", "with")}
    rows = "".join(
        f"<tr><td>{'<i>no value</i>' if group['group'] is None else path(group['group'])}"
        f"{' (all it has: less than its min)' if group['below_min'] else ''}</td>"
        + "".join(f"<td>{percent(group[name], whole[name])}</td>" for name in whole)
        + f"<td>{group['with']:,}</td><td>{group['entered']:,}</td><td>{group['left']:,}</td></tr>"
        for group in groups[:MAX_ROWS]
    )
    return (
        '<table class="figures"><thead><tr><th>Group</th><th>Share of the pool</th><th>Of the budget without the rules</th>'
        f"<th>With them</th><th>{rules['unit'].capitalize()}</th><th>Rows entered</th><th>Rows left</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>{more(len(groups), 'groups')}"
        f'<p class="note">Shares are of {rules["unit"]}.</p>'
    )


def quarantine_section(rows: list[Quarantined]) -> str:
    if not rows:
        return '<p class="none">Every row could be read and scored.</p>'
    reasons = Counter(entry.reason for entry in rows).most_common()
    others = sum(count for _, count in reasons[MAX_REASONS:])
    counted = "".join(f"<tr><td>{safe(reason)}</td><td>{count:,}</td></tr>" for reason, count in reasons[:MAX_REASONS])
    counted += f"<tr><td>{len(reasons) - MAX_REASONS:,} other reasons</td><td>{others:,}</td></tr>" if others else ""
    listed = "".join(
        f"<tr><td>{path(entry.source)}</td><td>{entry.line}</td><td>{safe(entry.reason)}</td></tr>"
        for entry in rows[:MAX_ROWS]
    )
    return (
        f"<table><thead><tr><th>Reason</th><th>Rows</th></tr></thead><tbody>{counted}</tbody></table>"
        f'<table class="rows"><thead><tr><th>Source</th><th>Line</th><th>Reason</th></tr></thead><tbody>{listed}</tbody>'
        f"</table>{more(len(rows), 'rows')}"
    )


def ignored_section(names: list[str]) -> str:
    listed = "".join(f"<li><code>{safe(name)}</code></li>" for name in names[:MAX_ROWS])
    return f'<p class="note">Files beside the data that were not read.</p><ul>{listed}</ul>{more(len(names), "files")}'
