"""What `prism evaluate` prints for a person: five tables with an empty line between them."""

from typing import Any

from launcher.follow.terminal_text import printable

RANKINGS = {"PRISM's score": "", "own loss, token mean": "loss_", "own loss, sum": "loss_sum_"}
"""Ranking that is shown at several budgets -> prefix of its figures' names."""

MAX_SOURCES = 50
MAX_SOURCE_CHARACTERS = 48
"""The end of a longer URI is shown."""


def metrics_table(metrics: dict[str, Any]) -> str:
    """Agreement with the label by ranking, PRISM less each of them, by budget, by source; then how reliable π is."""
    # Precision and recall, named by what the budget did.
    names = ("good of the kept", "kept of all good")
    if not metrics["action"].startswith("keep"):
        names = ("bad of the dropped", "dropped of all bad")
    parts = (_rankings(metrics, names[0]), _budgets(metrics, names), _sources(metrics, names[0]), _preference(metrics))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _rankings(metrics: dict[str, Any], precision: str) -> list[str]:
    """PRISM's score, then its rivals, and the difference to each."""
    lines = [
        f"{metrics['num_examples']:,} examples, {metrics['num_positive']:,} of them good by '{printable(metrics['label'])}'; "
        f"the budget took {metrics['taken_by_budget']:,} ({metrics['action']})",
        "",
        f"{'ranked by':<26}{'AUROC':>6}  {'95 % interval':<16}{precision:>20}  95 % interval",
    ]
    reversed_lines = []
    below = [f"{'AUROC of PRISM less that of':<30}{'':>6}  95 % interval, in paired resamples"]
    for rival in [{"name": "PRISM's score", "prefix": "", "reason": None}, *metrics["rivals"]]:
        name, prefix = rival["name"], rival["prefix"]
        if rival["reason"] is not None:
            lines.append(f"{name:<26}not computed: {printable(rival['reason'])}")
            continue
        auroc, at_budget = (_cells(metrics, f"{prefix}{measure}") for measure in ("auroc", "precision_at_budget"))
        lines.append(f"{name:<26}{auroc[0]:>6}  {auroc[1]:<16}{at_budget[0]:>20}  {at_budget[1]}")
        if metrics[f"{prefix}auroc"] is not None and metrics[f"{prefix}auroc_high"] < 0.5:
            reversed_lines.append(f"{name}: {_reversed(metrics, prefix)}")
        if prefix:
            value, low, high = (metrics[f"auroc_over_{prefix[:-1]}{end}"] for end in ("", "_low", "_high"))
            verdict = "PRISM is better" if low > 0 else "PRISM is worse" if high < 0 else "neither is better"
            below.append(f"{name:<30}{value:>+6.3f}  {f'{low:+.3f} to {high:+.3f}':<18}{verdict}")
    return [*lines, *reversed_lines, "", *below]


def _reversed(metrics: dict[str, Any], prefix: str) -> str:
    """What to make of a ranking whose whole interval is under one half."""
    if prefix:
        return f"under 0.5 with its whole interval; read the other way round it is {1 - metrics[f'{prefix}auroc']:.3f}"
    return (
        "the reverse of the label: are chosen and rejected swapped, is the wrong end kept or dropped, or does another value of "
        "the label mean good (--positive)?"
    )


def _budgets(metrics: dict[str, Any], measures: tuple[str, str]) -> list[str]:
    """One row per budget: precision and recall of PRISM with intervals, of the baselines without."""
    lines = [f"{'budget':<8}{'rows':>10}  {measures[0]:<38}{measures[1]}"]
    heads = f"{'PRISM':<7}{'95 % interval':<16}{'mean':>5}{'sum':>7}   "
    lines.append(f"{'':<8}{'':>10}  {heads}{heads}".rstrip())
    names = sorted((name.removeprefix("taken_at_") for name in metrics if name.startswith("taken_at_")), key=int)
    budgets = [(name, metrics[f"taken_at_{name}"]) for name in names]
    for name, num_rows in [*budgets, ("budget", metrics["taken_by_budget"])]:
        cells = ""
        for measure in ("precision", "recall"):
            score, mean, total = (_cells(metrics, f"{prefix}{measure}_at_{name}") for prefix in RANKINGS.values())
            cells += f"{score[0]:<7}{score[1]:<16}{mean[0]:>5}{total[0]:>7}   "
        lines.append(f"{'the run' if name == 'budget' else f'{name} %':<8}{num_rows:>10,}  {cells}".rstrip())
    return [*lines, "mean and sum: ranked by the candidate's own loss, low first, averaged over its tokens or summed"]


def _sources(metrics: dict[str, Any], precision: str) -> list[str]:
    lines = [f"{'candidates':>10}{'good':>10}{'selected':>10}{precision:>20}{'AUROC':>8}  source"]
    for row in metrics["by_source"][:MAX_SOURCES]:
        shares = f"{_share(row['precision']):>20}{_share(row['auroc']):>8}"
        is_long = len(row["source"]) > MAX_SOURCE_CHARACTERS
        source = f"…{row['source'][-MAX_SOURCE_CHARACTERS:]}" if is_long else row["source"]
        lines.append(f"{row['candidates']:>10,}{row['good']:>10,}{row['selected']:>10,}{shares}  {printable(source)}")
    left_out = len(metrics["by_source"]) - MAX_SOURCES
    return [*lines, f"{left_out:,} more sources; -o json lists all"] if left_out > 0 else lines


def _preference(metrics: dict[str, Any]) -> list[str]:
    """How reliable π is; without labels of the pairs, every pair is assumed correct."""
    if not metrics["num_pairs"]:
        return ["no target pair has a preference π"]
    common = (
        f"mean {_share(metrics['preference_mean'])}, above one half {_share(metrics['preference_above_half'])}, "
        f"Brier score {_share(metrics['preference_brier'])}"
    )
    if metrics["target_label"] is None:
        return [f"π of {metrics['num_pairs']:,} pairs, all assumed correct (no --target-label): {common}"]
    lines = [
        f"π of {metrics['num_pairs']:,} pairs, {metrics['num_pairs_right']:,} of them correct by "
        f"'{printable(metrics['target_label'])}': {common}, calibration error {_share(metrics['preference_ece'])}, "
        f"AUROC {_share(metrics['preference_auroc'])}",
        "",
        f"{'π':<12}{'pairs':>10}{'mean π':>9}{'correct':>9}  95 % interval",
    ]
    for row in metrics["reliability"]:
        span, interval = f"{row['from']:.1f} to {row['to']:.1f}", f"{row['right_low']:.3f} to {row['right_high']:.3f}"
        lines.append(f"{span:<12}{row['pairs']:>10,}{row['mean']:>9.3f}{row['right']:>9.3f}  {interval}")
    return lines


def _cells(metrics: dict[str, Any], name: str) -> tuple[str, str]:
    """A figure and its interval."""
    value, low, high = (metrics[f"{name}{end}"] for end in ("", "_low", "_high"))
    return ("–", "–") if value is None else (f"{value:.3f}", f"{low:.3f} to {high:.3f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
