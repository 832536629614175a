"""Figures of the experiments as SVG files: lines with bands, bars with whiskers. The same figures give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot, rcParams

from benchmarks.quality.harness import Interval

rcParams.update(
    {
        "svg.hashsalt": "prism",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
    }
)

COLOURS = ("#1b6ca8", "#c8553d", "#4c956c", "#8d6b94", "#b08900", "#7a7a7a", "#2f4858")


def lines(
    path: Path, title: str, axes: tuple[str, str], places: Sequence[float], series: Mapping[str, Sequence[Interval]]
) -> None:
    """One line a series over `places`, its interval as a band. `axes`: what x and y are."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, found), colour in zip(series.items(), COLOURS, strict=False):
        axis.plot(places, [one.mean for one in found], color=colour, marker="o", markersize=3, label=name)
        axis.fill_between(
            places, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.15, lw=0
        )
    axis.set(title=title, xlabel=axes[0], ylabel=axes[1])
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def bars(path: Path, title: str, label: str, groups: Mapping[str, Mapping[str, Interval]]) -> None:
    """One panel a group, one bar a name, its interval as a whisker."""
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(3.6 * len(groups) + 1, 3.2), layout="constrained", squeeze=False
    )
    for axis, (group, found) in zip(panels[0], groups.items(), strict=True):
        means = [one.mean for one in found.values()]
        errors = [[one.mean - one.low for one in found.values()], [one.high - one.mean for one in found.values()]]
        axis.barh(range(len(found)), means, xerr=errors, color=COLOURS[0], ecolor="#444444", capsize=2, height=0.6)
        axis.set_yticks(range(len(found)), list(found))
        axis.invert_yaxis()
        axis.set(title=group, xlabel=label)
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: pyplot.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
