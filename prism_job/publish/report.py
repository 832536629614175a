"""report.html: one self-contained page about a finished selection: charts, examples, quarantine, settings.

Owns the words and the look. Knows only the `Report` it is handed: no store, no clock, no network, so the same report gives
the same bytes. Candidates are untrusted text: every string from data passes through `markup.safe` on its way into the page.

Shapes: N candidates in plan order, Q target pairs, B bars, S sources.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.evaluate import audit
from prism_job.publish.chart import Bar, chart, compact, number, ticks_between, view
from prism_job.publish.evaluation_sections import evaluation_sections
from prism_job.publish.markup import MAX_ROWS, flat, meter, more, path, percent, safe, section, shortened
from prism_job.score.column import Column, parts

Float64 = NDArray[np.float64]
MAX_TEXT = 1200
"""Characters of an example that are shown: about 20 lines of a card."""
MAX_PAIR_TEXT = 300
"""Characters of a target pair that are shown: a reminder of which pair it is."""
MAX_REASONS = 12
"""Distinct quarantine reasons counted one by one; some carry details of their row, so there may be as many as rows."""
DOMINANT_SHARE = 0.2
"""A pair above this share of the direction is pointed out: the selection then rests on one example."""
DOMINANT_SET_SHARE = 0.8
"""A set above this share of the direction is pointed out where others were wanted: they then hardly count."""


@dataclass(frozen=True)
class ShownExample:
    """One example as the report prints it."""

    score: float
    source: str
    line: int
    selected: bool
    text: str


@dataclass(frozen=True)
class ShownPair:
    """One target pair as the report prints it. `number`: its row in targets.parquet, from 1. `share` of the direction."""

    number: int
    share: float
    text: str


@dataclass(frozen=True)
class ShownSet:
    """One named set of targets as the report prints it. `weight` is signed, `share` of the combined direction.

    `mean_preference`: of its pairs that have a π, None where none has.
    """

    name: str
    num_pairs: int
    weight: float
    mean_preference: float | None
    norm: float
    share: float


@dataclass(frozen=True)
class Report:
    """All that the page shows. N candidates in plan order, Q target pairs.

    Attributes:
        counts: candidates, quarantined, duplicates, taken_by_budget, selected, selected_tokens, tokens, target_pairs.
        threshold: score of the last row that the budget took; None where it took none.
        action: the verb and the end, such as "drop lowest".
        scores: finite, float64 [N], of which the `usable` bool [N] count, and the `selected` bool [N] are chosen.
        summary: what `manifest.summary` makes of the usable scores.
        usable_by_source, selected_by_source: how many of the usable, and of those selected, each source holds, int [S].
        preference: π of the pairs that have one, float64 [at most Q].
        contribution: each pair's share of the direction, float64 [Q]; sums to 1, or all zero where there is no direction.
        sets: named sets of targets, in order; empty where they are not named.
        pairs: the pairs of the largest shares, largest first.
        quarantine: (source, line, reason) of each unusable row.
        evaluation: what `evaluate.compare` says, where the document asks for it.
        audit: the manifest's figures on how far the ranking can be trusted; None where that is switched off.
    """

    run: str
    selection_id: str
    model: str
    settings: dict[str, str]
    counts: dict[str, int]
    threshold: float | None
    action: str
    scores: Column
    usable: NDArray[np.bool_]
    summary: dict[str, float]
    selected: NDArray[np.bool_]
    preference: Float64
    contribution: Float64
    sets: list[ShownSet]
    pairs: list[ShownPair]
    sources: list[str]
    usable_by_source: NDArray[np.int64]
    selected_by_source: NDArray[np.int64]
    highest: list[ShownExample]
    lowest: list[ShownExample]
    quarantine: list[tuple[str, int, str]]
    ignored: list[str]
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    @property
    def num_usable(self) -> int:
        return int(self.usable.sum())


def render(report: Report) -> str:
    """The page, as text that encodes to UTF-8 whatever the data held. Counts named in `Report` must be there (KeyError)."""
    sections = [
        section("Scores", _scores(report)),
        section("Targets: sets", _sets(report.sets)) if report.sets else "",
        section("How far the ranking can be trusted", _audit(report.audit)) if report.audit else "",
        f'<div class="two">{section("Targets: π", _preferences(report))}'
        f"{section('Targets: contribution', _contributions(report.contribution, report.pairs))}</div>",
        section("What was chosen, by source", _sources(report)),
        evaluation_sections(report.evaluation) if report.evaluation else "",
        f'<div class="two">{section("Highest scores", _cards(report.highest))}'
        f"{section('Lowest scores', _cards(report.lowest))}</div>",
        section("Quarantine", _quarantine(report.quarantine)),
        section("Ignored files", _ignored(report.ignored)) if report.ignored else "",
        section("Settings", _settings(report.settings)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(report.run)} · PRISM selection</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join([_header(report), *filter(None, sections)])
        + "\n</main></body></html>\n"
    )


def _header(report: Report) -> str:
    counts = report.counts
    verb, _, end = report.action.partition(" ")
    ranked = report.num_usable - counts["duplicates"]
    said = f"{ {'drop': 'Dropped', 'keep': 'Kept'}.get(verb, verb) } the {counts['taken_by_budget']:,} {end}-scoring"
    rest = f", which leaves <b>{counts['selected']:,} selected</b>" if verb == "drop" else ""
    mean = f"mean π {report.preference.mean():.2f}" if len(report.preference) else "no π"
    everyone = counts["candidates"]
    tiles = [
        ("Candidates", everyone, f"{report.num_usable:,} usable"),
        ("Selected", counts["selected"], f"{percent(counts['selected'], everyone)} of all"),
        (
            "Tokens selected",
            counts["selected_tokens"],
            f"{percent(counts['selected_tokens'], counts['tokens'])} of all",
        ),
        ("Target pairs", counts["target_pairs"], mean),
        ("Duplicates", counts["duplicates"], f"{percent(counts['duplicates'], everyone)} of all"),
        ("Quarantined", counts["quarantined"], f"{percent(counts['quarantined'], everyone)} of all"),
    ]
    shown = "".join(
        f'<div class="tile{" key" if name == "Selected" else ""}"><dt>{name}</dt>'
        f'<dd title="{value:,}">{compact(value)}</dd><dd class="sub">{note}</dd></div>'
        for name, value, note in tiles
    )
    return (
        f'<header><p class="eyebrow"><i></i>PRISM selection report</p><h1>{safe(report.run)}</h1>'
        f'<p class="lead">{safe(said)} of {ranked:,} ranked candidates{rest}.</p>'
        f'<dl class="facts"><div><dt>Action</dt><dd>{safe(report.action)}</dd></div><div><dt>Model</dt>'
        f"<dd><code>{safe(report.model)}</code></dd></div><div><dt>Selection</dt>"
        f'<dd><code>{safe(report.selection_id)}</code></dd></div></dl><dl class="tiles">{shown}</dl></header>'
    )


def _scores(report: Report) -> str:
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

    def place(score: float) -> float:
        """Percent of the plot's width; beyond the view: the middle of the overflow bar."""
        inside = first + (last - first) * (score - low) / (high - low)
        return 2.0 if score < low else 98.0 if score > high else inside

    def bar(left: float, width: float, place: int, span: str) -> Bar:
        chosen, other = picked[place], everyone[place] - picked[place]
        return Bar(left, width, (("sel", chosen), ("rest", other)), f"{span}: {chosen:,} selected, {other:,} not")

    width = (last - first) / (len(edges) - 1)
    bars = [
        bar(first + width * n, width, n + 1, f"{number(edges[n])} to {number(edges[n + 1])}")
        for n in range(len(edges) - 1)
    ]
    notes = []
    if below:
        bars.append(bar(0, 4, 0, f"under {number(low)}"))
        notes.append(("start", f"◂ {below:,} lower"))
    if above:
        bars.append(bar(96, 4, -1, f"over {number(high)}"))
        notes.append(("end", f"{above:,} higher ▸"))
    lines = [] if cut is None else [(place(cut), f"cut {number(cut)}")]
    ticks = [(place(tick), label) for tick, label in ticks_between(low, high)]
    low_all, middle, high_all = (number(report.summary[name]) for name in ("min", "median", "max"))
    said = [f"Lowest {low_all}, median {middle}, highest {high_all}."]
    said += (
        [f"All {num_usable:,} scores are equal."]
        if num_usable > 1 and report.summary["min"] == report.summary["max"]
        else []
    )
    said += ["The budget took no row, so there is no cut."] if cut is None else []
    said += ["Scores far out are gathered in the bars at the edge."] if notes else []
    said += ["So is the cut."] if cut is not None and not low <= cut <= high else []
    if report.counts["duplicates"]:
        said.append(f"The {report.counts['duplicates']:,} duplicates count as not selected, wherever they score.")
    away = (
        ", and away from those of the sets with a negative weight" if any(one.weight < 0 for one in report.sets) else ""
    )
    return (
        f'<p class="note">A high score: training on the example moves the model toward the wanted responses{away}.</p>'
        '<p class="legend"><span class="sel"></span>selected <span class="rest"></span>not selected</p>'
        f'{chart("scores", bars, ticks, lines, notes)}<p class="note">{" ".join(said)}</p>'
    )


def _binned(scores: Column, edges: Float64, among_N: NDArray[np.bool_]) -> list[int]:
    """Rows under the first edge, from each edge to the next (the last bin holds its upper edge), over the last edge."""
    counts_B = np.zeros(len(edges) + 1, np.int64)
    for part in parts(len(scores)):
        values = scores.part(part)[among_N[part]]
        bin_N = np.searchsorted(edges, values, side="right")
        bin_N[values == edges[-1]] -= 1
        counts_B += np.bincount(bin_N, minlength=len(counts_B))
    return counts_B.tolist()


def _audit(figures: dict[str, Any]) -> str:
    said = audit.sentence(figures)
    told = [
        f"{figures['usable']:,} candidates, drawn by their ids, were extracted again with other random projections of "
        f"{figures['dim']} dims a side, {percent(figures['token_share'], 1)} of the response tokens of this run; the "
        "targets' rows of that form came out of their own passes."
    ]
    if figures["spearman_between"] is not None:
        rho, share = f"{figures['spearman_between']:.3f}", percent(figures["overlap_between"], 1)
        told.append(
            f"The two rankings agree at Spearman {rho}, and share {share} of the {figures['taken']:,} that the budget would "
            "take of these. Brackets hold 95 % intervals."
        )
        if not audit.is_noise(figures):
            told.append("Both are noisy, so each is nearer to the exact ranking than to the other.")
    told.append(
        "Noise of projection, folding and signs is what this measures: not whether the targets show what is wanted, or the "
        "model is fit to judge."
    )
    look = "warn" if audit.is_low(figures) else "lead"
    return f'<p class="{look}">{safe(said)}</p><p class="note">{safe(" ".join(told))}</p>'


def _preferences(report: Report) -> str:
    pi = report.preference
    missing = report.counts["target_pairs"] - len(pi)
    if not len(pi):
        return '<p class="none">No target pair has a rejected response, so none has a preference π.</p>'
    counts_B, edges = np.histogram(pi, 20, (0.0, 1.0))
    bars = [
        Bar(5.0 * n, 5.0, (("pi", int(count)),), f"π {edges[n]:.2f} to {edges[n + 1]:.2f}: {count:,} pairs")
        for n, count in enumerate(counts_B)
    ]
    weighting = report.settings.get("weighting")
    used = {
        "preference": "This run weighs pairs by π, so those near 0 get little weight.",
        "uniform": "This run weighs all pairs alike: π is shown, not used. Preference weighting would give those "
        "near 0 little weight.",
    }.get(weighting or "", "Under preference weighting those near 0 get little weight.")
    gap = f" {missing:,} pairs have no rejected response and no π." if missing else ""
    ticks = [(25.0 * n, f"{n / 4:g}") for n in range(5)]
    mean = float(pi.mean())
    return (
        '<p class="note">π near 1: the model already prefers the wanted response. π near 0: it prefers the other. '
        f"{used}</p>{chart('pi', bars, ticks, [(100 * mean, f'mean {mean:.2f}')], [])}"
        f'<p class="note">{int((pi < 0.5).sum()):,} of {len(pi):,} lie under 0.5.{gap}</p>'
    )


def _contributions(share_Q: Float64, pairs: list[ShownPair]) -> str:
    if not share_Q.any():
        return '<p class="none">No pair contributes: together they give no direction.</p>'
    largest = pairs[0]
    rows = "".join(
        f"<li><span>pair {pair.number:,}</span>{meter(pair.share / largest.share, 'pi')}"
        f"<b>{percent(pair.share, 1)}</b><pre>\n{safe(shortened(pair.text, MAX_PAIR_TEXT))}</pre></li>"
        for pair in pairs
    )
    half = int(np.argmax(np.cumsum(np.sort(share_Q)[::-1]) >= 0.5)) + 1
    said = [
        f"An even share would be {percent(1, len(share_Q))}; half is held by the largest {half:,} of {len(share_Q):,} pairs."
    ]
    if len(share_Q) > len(pairs):
        shown = sum(pair.share for pair in pairs)
        said.append(f"The other {len(share_Q) - len(pairs):,} add {percent(1 - shown, 1)}.")
    if (share_Q < 0).any():
        against = share_Q[share_Q < 0]
        said.append(f"{len(against):,} pull against the direction ({percent(float(against.sum()), 1)} together).")
    warning = (
        f'<p class="warn">Pair {largest.number:,} alone holds {percent(largest.share, 1)} of the direction.</p>'
        if largest.share > DOMINANT_SHARE
        else ""
    )
    return (
        f'<p class="note">Share of the direction that scores are measured along. Pairs are numbered as the rows of '
        f'targets.parquet, from 1.</p>{warning}<ol class="pairs">{rows}</ol><p class="note">{" ".join(said)}</p>'
    )


def _sets(sets: list[ShownSet]) -> str:
    rows = "".join(
        f"<tr><td>{safe(one.name)}</td><td>{one.num_pairs:,}</td><td>{number(one.weight)}</td>"
        f"<td>{'–' if one.mean_preference is None else f'{one.mean_preference:.2f}'}</td><td>{number(one.norm)}</td>"
        f'<td><div class="wide">{meter(one.share, "pi")}<b>{percent(one.share, 1)}</b></div></td></tr>'
        for one in sets
    )
    largest = max(sets, key=lambda one: one.share)
    warning = (
        f'<p class="warn">The set {safe(largest.name)} holds {percent(largest.share, 1)} of the direction: the others hardly '
        "count. Give it a smaller weight, or them a larger one.</p>"
        if len(sets) > 1 and largest.share > DOMINANT_SET_SHARE
        else ""
    )
    return (
        '<p class="note">Each set is scored by itself (score_… in scores.parquet); the ranking is by the sum of weight × '
        f"score.</p>{warning}"
        '<table class="sets"><thead><tr><th>Set</th><th>Pairs</th><th>Weight</th><th>Mean π</th><th>Norm</th>'
        f"<th>Share of the direction</th></tr></thead><tbody>{rows}</tbody></table>"
        '<p class="note">Norm: of the mean gradient of the set, before its weight. Share: of the combined direction, before '
        "curvature; a set with a negative one is outweighed by sets that pull the other way.</p>"
    )


def _sources(report: Report) -> str:
    usable_S, chosen_S = report.usable_by_source, report.selected_by_source
    num_selected = int(report.selected.sum())
    overall = num_selected / max(report.num_usable, 1)
    order = np.lexsort((-usable_S, -chosen_S))
    rows = "".join(
        f"<tr><td>{path(report.sources[place])}</td><td>{usable_S[place]:,}</td><td>{chosen_S[place]:,}</td>"
        f'<td><div class="wide">{meter(chosen_S[place] / max(usable_S[place], 1), "sel", overall)}'
        f"<b>{percent(int(chosen_S[place]), int(usable_S[place]))}</b></div></td></tr>"
        for place in order[:MAX_ROWS].tolist()
    )
    return (
        '<table class="sources"><thead><tr><th>Source</th><th>Candidates</th><th>Selected</th><th>Share selected</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>{more(len(order), 'sources')}"
        f'<p class="note">Candidates that were scored. The tick marks the share over all sources, '
        f"{percent(num_selected, report.num_usable)}.</p>"
    )


def _cards(shown: list[ShownExample]) -> str:
    return "".join(_card(rank, example) for rank, example in enumerate(shown, 1)) or '<p class="none">None.</p>'


def _card(rank: int, example: ShownExample) -> str:
    left_out = len(example.text) - MAX_TEXT
    more = f'<p class="note">{left_out:,} more characters are left out.</p>' if left_out > 0 else ""
    badge = '<span class="badge on">selected</span>' if example.selected else '<span class="badge">dropped</span>'
    return (
        f'<article><div class="head"><span class="rank">{rank}</span><b>{number(example.score)}</b>{badge}</div>'
        f"<pre>\n{safe(example.text[:MAX_TEXT]) or '<i>empty</i>'}</pre>{more}"
        f'<p class="place"><bdi>{safe(example.source)}</bdi>:{example.line}</p></article>'
    )


def _quarantine(rows: list[tuple[str, int, str]]) -> str:
    if not rows:
        return '<p class="none">Every row could be read and scored.</p>'
    reasons = Counter(reason for _, _, reason in rows).most_common()
    others = sum(count for _, count in reasons[MAX_REASONS:])
    counted = "".join(f"<tr><td>{safe(reason)}</td><td>{count:,}</td></tr>" for reason, count in reasons[:MAX_REASONS])
    counted += f"<tr><td>{len(reasons) - MAX_REASONS:,} other reasons</td><td>{others:,}</td></tr>" if others else ""
    listed = "".join(
        f"<tr><td>{path(source)}</td><td>{line}</td><td>{safe(reason)}</td></tr>"
        for source, line, reason in rows[:MAX_ROWS]
    )
    return (
        f"<table><thead><tr><th>Reason</th><th>Rows</th></tr></thead><tbody>{counted}</tbody></table>"
        f'<table class="rows"><thead><tr><th>Source</th><th>Line</th><th>Reason</th></tr></thead><tbody>{listed}</tbody>'
        f"</table>{more(len(rows), 'rows')}"
    )


def _ignored(names: list[str]) -> str:
    listed = "".join(f"<li><code>{safe(name)}</code></li>" for name in names[:MAX_ROWS])
    return f'<p class="note">Found beside the data and not read.</p><ul>{listed}</ul>{more(len(names), "files")}'


def _settings(settings: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{safe(name)}</th><td><code>{safe(flat(value))}</code></td></tr>" for name, value in settings.items()
    )
    return f'<table class="settings"><tbody>{rows}</tbody></table>'


_CSS = resources.files("prism_job.publish").joinpath("report.css").read_text(encoding="utf-8")
