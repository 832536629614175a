"""The sections of examples: those of the highest and of the lowest scores."""

from prism_job.publish.report.chart import number
from prism_job.publish.report.contents import PairBehind, ShownExample
from prism_job.publish.report.markup import percent, safe, shortened

MAX_TEXT = 1200
"""Characters of an example that are shown: about 20 lines of a card."""

MAX_BEHIND = 160
"""Characters of a pair beside an example: about three lines."""


def examples_section(shown: list[ShownExample]) -> str:
    return "".join(_card(rank, example) for rank, example in enumerate(shown, 1)) or '<p class="none">None.</p>'


def _card(rank: int, example: ShownExample) -> str:
    left_out = len(example.text) - MAX_TEXT
    more = f'<p class="note">{left_out:,} more characters are left out.</p>' if left_out > 0 else ""
    badge = '<span class="badge on">selected</span>' if example.selected else '<span class="badge">dropped</span>'
    return (
        f'<article><div class="head"><span class="rank">{rank}</span><b>{number(example.score)}</b>{badge}</div>'
        f"<pre>\n{safe(example.text[:MAX_TEXT]) or '<i>empty</i>'}</pre>{more}"
        f'<p class="place"><bdi>{safe(example.source)}</bdi>:{example.line}</p>'
        f"{''.join(_behind(pair, example.score) for pair in example.pairs)}</article>"
    )


def _behind(pair: PairBehind, score: float) -> str:
    """A pair, and its part of the score."""
    share = f" ({percent(pair.contribution, score)} of the score)" if score else ""
    return (
        f'<p class="note">pair {pair.number}: {number(pair.contribution)}{share}: '
        f"{safe(shortened(' '.join(pair.text.split()), MAX_BEHIND))}</p>"
    )
