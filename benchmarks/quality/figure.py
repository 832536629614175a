"""Figures of the experiments as SVG files: lines with bands, bars with whiskers. The same figures give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.harness import Interval

TEXT = {"svg.hashsalt": "prism", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
AXES = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
Series = Mapping[str, Sequence[Interval]]
COLOURS = ("#1b6ca8", "#c8553d", "#4c956c", "#8d6b94", "#b08900", "#7a7a7a", "#2f4858")


def lines(path: Path | None, title: str, axes: tuple[str, str], places: Sequence[float], series: Series) -> None:
    """One line a series over `places`, its interval as a band; nothing without a path. `axes`: what x and y are."""
    if path is None:
        return
    figure, axis = _subplots(figsize=(6.4, 3.6))
    for (name, found), colour in zip(series.items(), COLOURS, strict=False):
        axis.plot(places, [one.mean for one in found], color=colour, marker="o", markersize=3, label=name)
        low, high = [one.low for one in found], [one.high for one in found]
        axis.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(title=title, xlabel=axes[0], ylabel=axes[1])
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def bars(path: Path | None, title: str, label: str, groups: Mapping[str, Mapping[str, Interval]]) -> None:
    """One panel a group, one bar a name, its interval as a whisker; nothing without a path."""
    if path is None:
        return
    figure, panels = _subplots(ncols=len(groups), figsize=(3.6 * len(groups) + 1, 3.2), squeeze=False)
    for axis, (group, found) in zip(panels[0], groups.items(), strict=True):
        means = [one.mean for one in found.values()]
        errors = [[one.mean - one.low for one in found.values()], [one.high - one.mean for one in found.values()]]
        axis.barh(range(len(found)), means, xerr=errors, color=COLOURS[0], ecolor="#444444", capsize=2, height=0.6)
        axis.set_yticks(range(len(found)), list(found))
        axis.invert_yaxis()
        axis.set(title=group, xlabel=label)
    figure.suptitle(title)
    _save(figure, path)


def _subplots(**options: Any) -> Any:
    from matplotlib import pyplot, rcParams

    rcParams.update(TEXT | AXES | {"grid.color": "#e6e6e6"})
    return pyplot.subplots(layout="constrained", **options)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
