"""The sections of targets: named sets, preference π, and the contribution of each pair."""

import numpy as np
from numpy.typing import NDArray

from prism_job.publish.manifest import TargetSetFacts
from prism_job.publish.report.chart import Bar, chart, number
from prism_job.publish.report.contents import Report, ShownPair
from prism_job.publish.report.markup import meter, percent, safe, shortened

MAX_PAIR_TEXT = 300
"""Characters of a target pair that are shown: a reminder of which pair it is."""
DOMINANT_SHARE = 0.2
"""A pair above this share of the direction is pointed out: the selection then rests on one example."""
DOMINANT_SET_SHARE = 0.8
"""A set above this share of the direction is pointed out where others were wanted: they then hardly count."""


def sets_section(sets: list[TargetSetFacts]) -> str:
    rows = "".join(
        f"<tr><td>{safe(each.name)}</td><td>{each.pairs:,}</td><td>{number(each.sign * each.weight)}</td>"
        f"<td>{_two_digits(each.preference.get('mean'))}</td><td>{number(each.norm)}</td>"
        f"<td>{_share(each.share)}</td></tr>"
        for each in sets
    )
    share, name = max((each.share or 0.0, each.name) for each in sets)
    warning = (
        f'<p class="warn">The set {safe(name)} holds {percent(share, 1)} of the direction: the others hardly '
        "count. Lower its weight, or raise theirs.</p>"
        if len(sets) > 1 and share > DOMINANT_SET_SHARE
        else ""
    )
    return (
        '<p class="note">Each set is scored by itself (score_… in scores.parquet); the ranking is by the sum of weight × '
        f"score.</p>{warning}"
        '<table class="sets"><thead><tr><th>Set</th><th>Pairs</th><th>Weight</th><th>Mean π</th><th>Norm</th>'
        f"<th>Share of the direction</th></tr></thead><tbody>{rows}</tbody></table>"
        '<p class="note">Norm: of the mean row of the set, before its weight. Share: of the combined direction, before '
        "curvature; a set with a negative share points against the combined direction.</p>"
    )


def _share(share: float | None) -> str:
    return "–" if share is None else f'<div class="wide">{meter(share, "pi")}<b>{percent(share, 1)}</b></div>'


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def preference_section(report: Report) -> str:
    pi = report.preference
    missing = report.counts["target_pairs"] - len(pi)
    if report.no_audit:
        return '<p class="none">This run compares hidden states and does not use π.</p>'
    if not len(pi):
        return '<p class="none">No target pair has a rejected response, so none has a preference π.</p>'
    counts_B, edges = np.histogram(pi, 20, (0.0, 1.0))
    bars = [
        Bar(5.0 * n, 5.0, (("pi", int(count)),), f"π {edges[n]:.2f} to {edges[n + 1]:.2f}: {count:,} pairs")
        for n, count in enumerate(counts_B)
    ]
    used = {
        "preference": "This run weights pairs by π, so those near 0 get little weight.",
        "uniform": "This run weights all pairs alike and does not use π.",
    }[str(report.settings["weighting"])]
    gap = f" {missing:,} pairs have no rejected response and no π." if missing else ""
    ticks = [(25.0 * n, f"{n / 4:g}") for n in range(5)]
    mean = float(pi.mean())
    warning = "".join(f'<p class="warn">{safe(each[0].upper() + each[1:])}</p>' for each in report.warnings)
    whose = ""
    if report.preference_model:
        whose = f"π comes from <code>{safe(report.preference_model)}</code>, gradients from <code>{safe(report.model)}</code>"
        whose = f'<p class="note">{whose}, whose own mean π is {_two_digits(report.reference_preference)}.</p>'
    return (
        f"{warning}{whose}"
        '<p class="note">π near 1: the model already prefers the chosen response. π near 0: it prefers the rejected one. '
        f"{used}</p>{chart('pi', bars, ticks, [(100 * mean, f'mean {mean:.2f}')], [])}"
        f'<p class="note">{int((pi < 0.5).sum()):,} of {len(pi):,} lie under 0.5.{gap}</p>'
    )


def contribution_section(share_Q: NDArray[np.float64], pairs: list[ShownPair]) -> str:
    if np.isnan(share_Q).any():
        return '<p class="none">Candidates are compared with the nearest response, so no response has a share.</p>'
    if not share_Q.any():
        return '<p class="none">No pair contributes: together they give no direction.</p>'
    largest = pairs[0]
    rows = "".join(
        f"<li><span>pair {pair.number:,}</span>{meter(pair.share / largest.share, 'pi')}"
        f"<b>{percent(pair.share, 1)}</b><pre>\n{safe(shortened(pair.text, MAX_PAIR_TEXT))}</pre></li>"
        for pair in pairs
    )
    half = int(np.argmax(np.cumsum(np.sort(share_Q)[::-1]) >= 0.5)) + 1
    notes = [
        f"An even share would be {percent(1, len(share_Q))}; half is held by the largest {half:,} of {len(share_Q):,} pairs."
    ]
    if len(share_Q) > len(pairs):
        shown = sum(pair.share for pair in pairs)
        notes.append(f"The other {len(share_Q) - len(pairs):,} add {percent(1 - shown, 1)}.")
    if (share_Q < 0).any():
        against = share_Q[share_Q < 0]
        notes.append(f"{len(against):,} point against the direction ({percent(float(against.sum()), 1)} together).")
    warning = (
        f'<p class="warn">Pair {largest.number:,} alone holds {percent(largest.share, 1)} of the direction.</p>'
        if largest.share > DOMINANT_SHARE
        else ""
    )
    return (
        f'<p class="note">Share of the direction that scores are measured along. Pairs are numbered as the rows of '
        f'targets.parquet, from 1.</p>{warning}<ol class="pairs">{rows}</ol><p class="note">{" ".join(notes)}</p>'
    )
