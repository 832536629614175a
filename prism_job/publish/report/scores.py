"""The section of scores: their histogram, and where the budget cut.

Shapes: N candidates in plan order, B bins.
"""

import numpy as np
from numpy.typing import NDArray

from prism_job.publish.report.chart import Bar, chart, number, ticks_between, view
from prism_job.publish.report.contents import Report
from prism_job.score.column import Column, parts


def scores_section(report: Report) -> str:
    chosen_N, cut = report.selected, report.threshold
    num_usable = report.num_usable
    if not num_usable:
        return '<p class="none">No usable candidate, so no scores.</p>'
    low, high = view(report.summary, cut)
    edges = np.linspace(low, high, int(np.clip(2 * num_usable**0.5, 10, 48)) // 2 * 2)
    # Counts of the rows under the view, of each bar, and over the view: all of them, and those selected.
    everyone = _binned(report.scores, edges, report.usable)
    picked = _binned(report.scores, edges, chosen_N)
    below, above = everyone[0], everyone[-1]
    first, last = (6.0 if below else 0.0), (94.0 if above else 100.0)

    def position(score: float) -> float:
        """Percent of the plot's width; beyond the view: the middle of the overflow bar."""
        inside = first + (last - first) * (score - low) / (high - low)
        return 2.0 if score < low else 98.0 if score > high else inside

    def bar(left: float, width: float, bin_: int, span: str) -> Bar:
        chosen, other = picked[bin_], everyone[bin_] - picked[bin_]
        return Bar(left, width, (("sel", chosen), ("rest", other)), f"{span}: {chosen:,} selected, {other:,} not")

    width = (last - first) / (len(edges) - 1)
    bars = [
        bar(first + width * n, width, n + 1, f"{number(edges[n])} to {number(edges[n + 1])}")
        for n in range(len(edges) - 1)
    ]
    ends = []
    if below:
        bars.append(bar(0, 4, 0, f"under {number(low)}"))
        ends.append(("start", f"◂ {below:,} lower"))
    if above:
        bars.append(bar(96, 4, -1, f"over {number(high)}"))
        ends.append(("end", f"{above:,} higher ▸"))
    lines = [] if cut is None else [(position(cut), f"cut {number(cut)}")]
    ticks = [(position(tick), label) for tick, label in ticks_between(low, high)]
    low_all, middle, high_all = (number(report.summary[name]) for name in ("min", "median", "max"))
    notes = [f"Lowest {low_all}, median {middle}, highest {high_all}."]
    if num_usable > 1 and report.summary["min"] == report.summary["max"]:
        notes.append(f"All {num_usable:,} scores are equal.")
    notes += ["The budget took no row, so there is no cut."] if cut is None else []
    notes += ["Scores far out are gathered in the bars at the edge."] if ends else []
    notes += ["So is the cut."] if cut is not None and not low <= cut <= high else []
    if report.counts["duplicates"]:
        notes.append(f"The {report.counts['duplicates']:,} duplicates count as not selected, wherever they score.")
    negative = any(each.sign < 0 for each in report.sets)
    away = ", and away from those of the sets with a negative weight" if negative else ""
    return (
        f'<p class="note">A high score: training on the example moves the model toward the chosen responses{away}.</p>'
        '<p class="legend"><span class="sel"></span>selected <span class="rest"></span>not selected</p>'
        f'{chart("scores", bars, ticks, lines, ends)}<p class="note">{" ".join(notes)}</p>'
    )


def _binned(scores: Column, edges: NDArray[np.float64], among_N: NDArray[np.bool_]) -> list[int]:
    """Rows under the first edge, from each edge to the next (the last bin holds its upper edge), over the last edge."""
    counts_B = np.zeros(len(edges) + 1, np.int64)
    for part in parts(len(scores)):
        values = scores.part(part)[among_N[part]]
        bin_N = np.searchsorted(edges, values, side="right")
        bin_N[values == edges[-1]] -= 1
        counts_B += np.bincount(bin_N, minlength=len(counts_B))
    return counts_B.tolist()
