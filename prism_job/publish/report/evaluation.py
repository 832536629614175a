"""The report's sections about labels: precision and recall at budgets, reliability of π, agreement by source.

Knows only the figures of `evaluate.comparison.compare`. Labels and sources are untrusted text.
"""

from typing import Any

from prism_job.publish.report.chart import Group, Share, shares
from prism_job.publish.report.markup import MAX_ROWS, more, path, percent, safe, section

Figures = dict[str, Any]

RANKINGS = {"": "score", "loss_": "loss mean", "loss_sum_": "loss sum"}
"""How the figures of a ranking begin, and its colour classes: a kind and, for the losses, which."""
NAMES = {"": "PRISM's score", "loss_": "own loss, token mean", "loss_sum_": "own loss, sum"}


def evaluation_sections(figures: Figures) -> str:
    """All of them, as HTML; where there are no figures, why."""
    if "reason" in figures:
        return section("Agreement with a label", f'<p class="none">Not known: {safe(figures["reason"])}.</p>')
    keeps = figures["action"].startswith("keep")
    right, taken = ("good", "kept") if keeps else ("bad", "dropped")
    precision, recall = f"Share of {right} ones among the {taken}", f"Share of all {right} ones that are {taken}"
    return (
        section("Agreement with a label", _rankings(figures, precision, recall, keeps))
        + f'<div class="two">{section(precision, _budgets(figures, "precision"))}'
        f"{section(recall, _budgets(figures, 'recall'))}</div>"
        + section("Reliability of π", _reliability(figures))
        + section("Agreement with the label, by source", _sources(figures, precision))
    )


def _rankings(figures: Figures, precision: str, recall: str, keeps: bool) -> str:
    rows = _ranking(figures, "PRISM's score", "")
    rows += "".join(_ranking(figures, rival["name"], rival["prefix"], rival["reason"]) for rival in figures["rivals"])
    return (
        f'<p class="note">Column <code>{safe(figures["label"])}</code> calls {figures["num_positive"]:,} of the '
        f"{figures['num_examples']:,} ranked candidates good. The label did not influence the selection. "
        "AUROC is the probability that a good one ranks above a bad one; the shares are at this run's budget of "
        f"{figures['taken_by_budget']:,} rows. In brackets: 95 % intervals.</p>"
        f'<table class="figures"><thead><tr><th>Ranked by</th><th>AUROC</th><th>{precision}</th><th>{recall}</th>'
        "<th>AUROC of PRISM less it</th><th></th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
        '<p class="note">The last difference is taken in the same resamples. Where its interval holds 0, neither is better by '
        "this measure; whether two intervals of AUROC overlap does not decide it.</p>"
        + (
            '<p class="note">These figures are of the ranking alone. Of the rows that the budget took within the groups\' '
            f"limits, {figures['precision_within_shares']:.3f} are {'good' if keeps else 'bad'}.</p>"
            if "precision_within_shares" in figures
            else ""
        )
    )


def _ranking(figures: Figures, name: str, prefix: str, reason: str | None = None) -> str:
    if reason is not None:
        return f'<tr><td>{safe(name)}</td><td colspan="5">not computed: {safe(reason)}</td></tr>'
    cells = [_with_interval(figures, f"{prefix}{of}") for of in ("auroc", "precision_at_budget", "recall_at_budget")]
    if prefix:
        difference = f"auroc_over_{prefix[:-1]}"
        low, high = figures[f"{difference}_low"], figures[f"{difference}_high"]
        verdict = "PRISM is better" if low > 0 else "PRISM is worse" if high < 0 else "neither is better"
        cells += [_with_interval(figures, difference, "+"), verdict]
    return f"<tr><td>{safe(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _with_interval(figures: Figures, name: str, sign: str = "") -> str:
    value, low, high = (figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "–" if value is None else f"<b>{value:{sign}.3f}</b> ({low:{sign}.3f} to {high:{sign}.3f})"


def _budgets(figures: Figures, measure: str) -> str:
    taken = {name.removeprefix("taken_at_"): rows for name, rows in figures.items() if name.startswith("taken_at_")}
    taken = dict(sorted(taken.items(), key=lambda item: int(item[0])))
    if figures["taken_by_budget"]:
        taken["budget"] = figures["taken_by_budget"]
    groups = []
    for budget, rows in taken.items():
        label = "this run" if budget == "budget" else f"{budget}\u202f%"
        bars = []
        for prefix, colour in RANKINGS.items():
            value, low, high = (figures[f"{prefix}{measure}_at_{budget}{end}"] for end in ("", "_low", "_high"))
            title = f"{NAMES[prefix]}, {label} ({rows:,} rows): {value:.3f}, 95 % interval {low:.3f} to {high:.3f}"
            bars.append(Share(colour, value, (low, high), title))
        groups.append(Group(label, tuple(bars)))
    legend = " ".join(f'<span class="{colour}"></span>{NAMES[prefix]}' for prefix, colour in RANKINGS.items())
    return f'<p class="legend">{legend}</p>{shares(f"{measure} at budgets", groups)}'


def _reliability(figures: Figures) -> str:
    num_pairs, label = figures["num_pairs"], figures["target_label"]
    if not num_pairs:
        return '<p class="none">No target pair has a preference π.</p>'
    common = (
        f"Mean π {figures['preference_mean']:.3f}; {percent(figures['preference_above_half'], 1)} of the pairs above 0.5; "
        f"Brier score {figures['preference_brier']:.3f}"
    )
    if label is None:
        return (
            f'<p class="note">All {num_pairs:,} pairs are taken as right: no column of labels was named '
            f"(<code>evaluation.targetLabel</code>). {common} against 1.</p>"
        )
    groups = []
    for row in figures["reliability"]:
        claimed = f"π {row['from']:.1f} to {row['to']:.1f}: {row['pairs']:,} pairs, mean π {row['mean']:.3f}"
        bounds = row["right_low"], row["right_high"]
        found = f"right: {row['right']:.3f} of {row['pairs']:,} pairs, 95 % interval {bounds[0]:.3f} to {bounds[1]:.3f}"
        bars = (Share("claimed", row["mean"], None, claimed), Share("found", row["right"], bounds, found))
        groups.append(Group(f"{(row['from'] + row['to']) / 2:.2f}", bars))
    auroc = "" if figures["preference_auroc"] is None else f"; AUROC of π {figures['preference_auroc']:.3f}"
    return (
        f'<p class="note">Column <code>{safe(label)}</code> calls {figures["num_pairs_right"]:,} of {num_pairs:,} pairs right. '
        "If π is calibrated, both bars of a bin are equally high. Bins are a tenth wide and named by their middle.</p>"
        '<p class="legend"><span class="claimed"></span>mean π <span class="found"></span>share of right pairs</p>'
        f'{shares("reliability of π", groups)}<p class="note">{common}; expected calibration error '
        f"{figures['preference_ece']:.3f}{auroc}.</p>"
    )


def _sources(figures: Figures, precision: str) -> str:
    rows = "".join(
        f"<tr><td>{path(row['source'])}</td><td>{row['candidates']:,}</td><td>{row['good']:,}</td><td>{row['selected']:,}</td>"
        f"<td>{_share(row['precision'])}</td><td>{_share(row['auroc'])}</td></tr>"
        for row in figures["by_source"][:MAX_ROWS]
    )
    return (
        '<table class="figures"><thead><tr><th>Source</th><th>Candidates</th><th>Good</th><th>Selected</th>'
        f"<th>{precision}</th><th>AUROC</th></tr></thead><tbody>{rows}</tbody></table>"
        f"{more(len(figures['by_source']), 'sources')}"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
