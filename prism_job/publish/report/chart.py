"""Histograms, and shares side by side, as inline SVG. Labels must be safe HTML already."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PLOT_PX, HEADROOM_PX = 180, 26
"""Height of the bars' area, and of the room above it where vertical lines are labelled."""


@dataclass(frozen=True)
class Bar:
    """A column of a chart: position in percent of the plot's width, and (colour class, count) from the bottom up."""

    left: float
    width: float
    parts: tuple[tuple[str, int], ...]
    title: str


def chart(
    name: str,
    bars: list[Bar],
    ticks: list[tuple[float, str]],
    lines: list[tuple[float, str]],
    notes: list[tuple[str, str]],
) -> str:
    """Columns in an inline SVG. x in percent and y in pixels, so that letters keep their size at any width."""
    floor = HEADROOM_PX + PLOT_PX
    tallest = max(sum(count for _, count in bar.parts) for bar in bars)
    grid = [value for value, _ in ticks_between(0, tallest, 3) if value == int(value)]
    drawn = []
    for value in grid:
        y = floor - PLOT_PX * value / tallest
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{compact(round(value), 1e3)}</text>')
    for bar in bars:
        foot, rects = float(floor), ""
        for colour, count in bar.parts:
            if count:
                tall = max(1.5, PLOT_PX * count / tallest)  # one in a million still leaves a trace
                foot -= tall
                rects += (
                    f'<rect class="{colour}" data-count="{count}" x="{bar.left:.3f}%" width="{bar.width:.3f}%" '
                    f'y="{foot:.1f}" height="{tall:.1f}"/>'
                )
        drawn.append(f"<g><title>{bar.title}</title>{rects}</g>" if rects else "")
    drawn += [f'<text x="{at:.3f}%" y="{floor + 18}" text-anchor="middle">{label}</text>' for at, label in ticks]
    drawn += [
        f'<text x="{0 if end == "start" else 100}%" y="{floor + 36}" text-anchor="{end}">{label}</text>'
        for end, label in notes
    ]
    for at, label in lines:
        x, side, shift = f"{at:.3f}%", ("start" if at < 50 else "end"), (6 if at < 50 else -6)
        drawn.append(f'<line class="cut" x1="{x}" x2="{x}" y1="4" y2="{floor}"/>')
        drawn.append(f'<text class="cut" x="{x}" y="14" dx="{shift}" text-anchor="{side}">{label}</text>')
    title = "; ".join([f"histogram, {name}", *(label for _, label in lines)])
    height = floor + (42 if notes else 24)
    return f'<svg class="chart {name}" width="100%" height="{height}" role="img" aria-label="{title}">{"".join(drawn)}</svg>'


def view(summary: Mapping[str, float], cut: float | None) -> tuple[float, float]:
    """Score range drawn: all, or Tukey's outer fences (3 IQR) where tails are heavy; wider if under 10 IQR shows the cut."""
    low, lower, upper, high = (summary[name] for name in ("min", "lower_quartile", "upper_quartile", "max"))
    box = upper - lower
    if box > 0:
        wanted = 0.0 if cut is None else 1.2 * max(lower - cut, cut - upper)
        reach = max(3 * box, wanted if wanted < 10 * box else 0.0)
        low, high = max(low, lower - reach), min(high, upper + reach)
    middle, room = (low + high) / 2, (abs(low) or 1.0) / 2
    return (low, high) if high - low > 1e-9 * abs(middle) else (middle - room, middle + room)


def ticks_between(low: float, high: float, about: int = 5) -> list[tuple[float, str]]:
    """Round values from low to high, and their labels."""
    size = 10.0 ** np.floor(np.log10((high - low) / about))
    step = size * min((1, 2, 5, 10), key=lambda factor: abs(factor * size * about - (high - low)))
    places = int(max(0, -np.floor(np.log10(step) + 1e-9)))
    values = [n * step for n in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]
    plain = places <= 4 and max(abs(low), abs(high)) < 1e6
    return [(value, f"{value:,.{places}f}".replace("-", "−") if plain else number(value)) for value in values]


def number(value: float) -> str:
    return f"{value + 0.0:.4g}".replace("-", "−")


def compact(value: int, above: float = 1e6) -> str:
    """A count in three digits and a letter from `above` on, in full below."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, above):
            return f"{value / size:.3g}\u202f{letter}"
    return f"{value:,}"


@dataclass(frozen=True)
class Share:
    """A column from 0 to 1, with its interval where it has one."""

    colour: str
    value: float
    interval: tuple[float, float] | None
    title: str


@dataclass(frozen=True)
class Group:
    """Columns that stand side by side over one label."""

    label: str
    bars: tuple[Share, ...]


def shares(name: str, groups: list[Group]) -> str:
    """Groups of columns on a scale of 0 to 1 in an inline SVG; a thin line in the middle of a column is its interval."""
    top = 8
    floor = top + PLOT_PX

    def y(share: float) -> str:
        return f"{floor - PLOT_PX * share:.1f}"

    drawn = []
    for label in ("0", "0.25", "0.5", "0.75", "1"):
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y(float(label))}" y2="{y(float(label))}"/>')
        drawn.append(f'<text x="-8" y="{float(y(float(label))) + 4:.1f}" text-anchor="end">{label}</text>')
    room = 100 / len(groups) if groups else 100.0
    for number, group in enumerate(groups):
        width = 0.8 * room / len(group.bars)
        for nth, bar in enumerate(group.bars):
            left = number * room + 0.1 * room + nth * width
            whisker = ""
            if bar.interval:
                low, high = bar.interval
                middle = f"{left + width / 2:.3f}%"
                whisker = f'<line class="whisker" x1="{middle}" x2="{middle}" y1="{y(high)}" y2="{y(low)}"/>'
            drawn.append(
                f'<g><title>{bar.title}</title><rect class="{bar.colour}" x="{left:.3f}%" width="{width:.3f}%" '
                f'y="{y(bar.value)}" height="{PLOT_PX * bar.value:.1f}"/>{whisker}</g>'
            )
        drawn.append(
            f'<text x="{(number + 0.5) * room:.3f}%" y="{floor + 18}" text-anchor="middle">{group.label}</text>'
        )
    return (
        f'<svg class="chart" width="100%" height="{floor + 24}" role="img" aria-label="{name}">{"".join(drawn)}</svg>'
    )
