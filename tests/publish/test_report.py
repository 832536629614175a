"""Laws of report.html: untrusted text stays text, nothing is fetched, nothing is lost from the charts, any report renders."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from prism_job.plan.plan import Quarantined, SourceLayout
from prism_job.publish.manifest import TargetSetFacts, summary
from prism_job.publish.report.chart import PLOT_PX
from prism_job.publish.report.contents import PairBehind, Report, ShownExample, ShownPair
from prism_job.publish.report.examples import MAX_TEXT
from prism_job.publish.report.markup import MAX_ROWS
from prism_job.publish.report.page import render
from prism_job.publish.report.targets import DOMINANT_SHARE, MAX_PAIR_TEXT
from prism_job.score.column import Column

HOSTILE = "<script src=\"http://evil/x.js\">alert('1')</script><img src=x onerror=alert(1)> & \ud800 \x00 \u202e </pre></style>"
BUDGETED = [f"{ranking}{measure}" for ranking in ("", "loss_", "loss_sum_") for measure in ("precision", "recall")]
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
NONE = np.zeros(0, np.int64)
VOID = {"meta", "br", "hr", "img", "link", "input"}
ALLOWED = """html head meta title style body main header section article div span bdi h1 h2 p b i s code pre dl dt dd ol ul li
table thead tbody tr th td svg g rect line text"""


class Page(HTMLParser):
    """The page as a browser takes it apart: elements, their attributes, their text; unbalanced elements are an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.pre: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.pre += [""] if tag == "pre" else []
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "pre" in self.open:
            self.pre[-1] += data

    def counted(self, *colours: str) -> int:
        """Sum of the counts behind the bars of these colours."""
        return sum(int(of["data-count"]) for tag, of in self.elements if tag == "rect" and of["class"] in colours)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def column_of(values: np.ndarray) -> Column:
    column = Column("f8")
    column.append(values)
    return column


def shown(number: int, text: str | None = None) -> ShownExample:
    text = text or f"text of {number}"
    return ShownExample(
        number / 7, f"s3://pool/{number}.jsonl", number, number % 2 == 0, text, [PairBehind(3, number / 14, text)]
    )


def pairs_of(share: list[float] | np.ndarray) -> list[ShownPair]:
    """The two pairs of the largest shares."""
    largest = np.argsort(-np.asarray(share))[:2].tolist()
    return [ShownPair(place + 1, share[place], f"prompt {place}") for place in largest]


def report_of(scores: list[float] | np.ndarray, **changes: object) -> Report:
    """A plain report of these scores, highest half selected, with some fields replaced."""
    values = np.asarray(scores, np.float64)
    half = float(np.median(values)) if len(values) else None
    chosen = values >= (half or 0.0)
    report = Report(
        run="curate",
        selection_id="0123abcd",
        model="org/model",
        settings={"weighting": "preference", "curvature": {"kind": "kfac", "damping": 0.1}},
        counts={"candidates": len(values), "quarantined": 0, "duplicates": 0, "target_pairs": 4}
        | dict.fromkeys(("taken_by_budget", "selected"), int(chosen.sum()))
        | {"selected_tokens": 10, "tokens": 20, "cut": 0, "cut_pairs": 0},
        threshold=half,
        action="keep highest",
        scores=column_of(values),
        usable=np.ones(len(values), np.bool_),
        summary=summary(values.copy()),
        selected=chosen,
        preference=np.array([0.1, 0.5, 0.5, 1.0]),
        contribution=np.array([0.1, 0.4, 0.7, -0.2]),
        sets=[],
        pairs=pairs_of([0.1, 0.4, 0.7, -0.2]),
        sources=["s3://pool/a.jsonl", "s3://pool/b.jsonl"],
        usable_by_source=np.array([len(values), 0]),
        selected_by_source=np.array([int(chosen.sum()), 0]),
        highest=[shown(number) for number in range(3)],
        lowest=[shown(number) for number in range(10, 13)],
        quarantine=[Quarantined(source="s3://pool/a.jsonl", line=3, reason="not JSON")],
        ignored=["s3://pool/README"],
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def heavy_tails(num: int) -> np.ndarray:
    return np.random.default_rng(0).standard_cauchy(num)


def figures_of(
    label: str = "label", target_label: str | None = "right", source: str = "s3://pool/a.jsonl"
) -> dict[str, Any]:
    """Figures of an evaluation, each different from the others."""
    figures: dict[str, Any] = {
        "label": label,
        "num_examples": 1234,
        "num_positive": 617,
        "action": "drop lowest",
        "taken_by_budget": 246,
        "taken_at_5": 62,
        "auroc_over_loss": 0.084,
        "auroc_over_loss_low": -0.021,
        "auroc_over_loss_high": 0.167,
        "auroc_over_loss_sum": 0.195,
        "auroc_over_loss_sum_low": 0.123,
        "auroc_over_loss_sum_high": 0.246,
        "rivals": [
            {"name": "own loss, token mean", "prefix": "loss_", "reason": None},
            {"name": "own loss, sum", "prefix": "loss_sum_", "reason": None},
            {"name": "BM25", "prefix": "bm25_", "reason": f"too many words in {label}"},
        ],
        "target_label": target_label,
        "num_pairs": 8,
        "num_pairs_right": 5,
        "preference_mean": 0.611,
        "preference_above_half": 0.75,
        "preference_brier": 0.123,
        "preference_auroc": 0.877,
        "preference_ece": 0.066,
        "reliability": [
            {"from": 0.3, "to": 0.4, "pairs": 3, "mean": 0.35, "right": 0.0, "right_low": 0.0, "right_high": 0.562},
            {"from": 0.9, "to": 1.0, "pairs": 5, "mean": 0.95, "right": 1.0, "right_low": 0.566, "right_high": 1.0},
        ],
        "by_source": [
            {"source": source, "candidates": 1200, "good": 600, "selected": 980, "precision": 0.811, "auroc": 0.722},
            {"source": source, "candidates": 34, "good": 17, "selected": 34, "precision": None, "auroc": None},
        ],
    }
    measures = ("auroc", "precision_at_5", "precision_at_budget", "recall_at_5", "recall_at_budget")
    for number, ranking in enumerate(("", "loss_", "loss_sum_")):
        for place, measure in enumerate(measures):
            for end, by in (("", 0), ("_low", -0.05), ("_high", 0.04)):
                figures[f"{ranking}{measure}{end}"] = 0.9 - number / 10 - place / 100 + by
    return figures


def hostile_report() -> Report:
    return report_of(
        heavy_tails(50),
        run=HOSTILE,
        selection_id=HOSTILE,
        model=HOSTILE,
        action=f"keep {HOSTILE}",
        settings={HOSTILE: HOSTILE, "weighting": "uniform"},
        sources=[HOSTILE, HOSTILE],
        highest=[replace(shown(1, HOSTILE), source=HOSTILE)],
        sets=[
            TargetSetFacts(name=HOSTILE, pairs=1, weight=2.0, sign=-1, preference={}, norm=0.0, share=1.5),
            TargetSetFacts(name=HOSTILE, pairs=3, weight=1.0, sign=1, preference={"mean": 0.5}, norm=1e-9, share=-0.5),
        ],
        pairs=[ShownPair(3, 0.7, HOSTILE)],
        quarantine=[Quarantined(source=HOSTILE, line=1, reason=HOSTILE)],
        ignored=[HOSTILE],
        layouts=[SourceLayout(uri=HOSTILE, layout=HOSTILE, rows=50, loss=HOSTILE)],
        target_layouts=[SourceLayout(uri=HOSTILE, layout=HOSTILE, rows=4, loss=HOSTILE)],
        evaluation=figures_of(HOSTILE, HOSTILE, HOSTILE),
    )


def test_untrusted_text_stays_text_wherever_it_stands() -> None:
    page = Page(render(hostile_report()).encode().decode())
    assert {tag for tag, _ in page.elements} <= set(ALLOWED.split())
    safe = HOSTILE.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    assert [text.strip() for text in page.pre[:2]] == [safe.strip()] * 2  # the pair, the highest example
    # title, h1, lead, action, model, selection, setting's two sides, quarantine's reason twice, ignored, both,
    # and of the evaluation the label, that of the targets, and two sources; layout and loss of two files, one a target's
    assert "".join(page.text).count("alert('1')</script>") >= 22


def test_untrusted_text_adds_no_element_and_no_attribute() -> None:
    plain_report = report_of(heavy_tails(50), evaluation=figures_of())
    plain, hostile = (Page(render(report)) for report in (plain_report, hostile_report()))
    names = [{(tag, name) for tag, of in page.elements for name in of} for page in (plain, hostile)]
    assert names[1] <= names[0]


@pytest.mark.parametrize("report", [report_of(heavy_tails(300)), hostile_report()], ids=["plain", "hostile"])
def test_the_page_fetches_nothing(report: Report) -> None:
    text = render(report)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "a", "form", "image", "use"}
        assert not {"src", "srcset", "href", "xlink:href", "action", "data", "poster"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": CSP}) in page.elements
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert not any(word in style for word in ("url(", "@import", "@font-face", "http", "//"))


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(heavy_tails(1000), id="heavy tails"),
        pytest.param(np.random.default_rng(1).normal(size=777), id="normal"),
        pytest.param(np.zeros(5), id="all zero"),
        pytest.param(np.full(40, -3.5e-9), id="all equal"),
        pytest.param(np.array([7.25]), id="one"),
        pytest.param(np.array([0.0] * 300 + [1e6]), id="one far out"),
        pytest.param(np.array([1e9, 1e9 + 1e-6, 1e9 + 2e-6]), id="almost equal"),
        pytest.param(np.arange(100.0), id="on bin edges"),
        pytest.param(np.array([-1e-12, 2e-12, 1e-12]), id="tiny"),
    ],
)
def test_bars_count_every_example_once(scores: np.ndarray) -> None:
    report = report_of(scores)
    page = Page(render(report))
    assert page.counted("sel") == int(report.selected.sum())
    assert page.counted("rest") == int((~report.selected).sum())
    assert page.counted("pi") == len(report.preference)
    assert all(0 <= float(of["x"].rstrip("%")) <= 100 for tag, of in page.elements if tag == "rect")


def test_rows_that_are_not_usable_are_in_no_bar_and_no_count() -> None:
    scores = np.arange(100.0)
    usable = scores >= 30  # the score of a row that is not usable means nothing
    page = Page(render(replace(report_of(scores), usable=usable, summary=summary(scores[usable]))))
    assert (page.counted("sel"), page.counted("rest")) == (50, 20)
    assert "70 usable" in page.words()


@pytest.mark.parametrize(
    ("changes", "stated", "not_there"),
    [
        ({"threshold": None}, "there is no cut", " cut 1"),
        ({"preference": np.array([])}, "none has a preference", "π near 1"),
        ({"settings": {"weighting": "uniform"}}, "does not use π", "by π"),
        ({"settings": {"weighting": "preference"}}, "weights pairs by π", "does not use π"),
        ({"evaluation": {"reason": HOSTILE}}, "Agreement with a label Not known: <script src=", "AUROC"),
        ({}, "Quarantine", "Agreement"),
        ({"contribution": np.zeros(4)}, "No pair contributes", "An even share"),
    ],
)
def test_missing_figures_are_named_and_not_drawn(changes: dict[str, object], stated: str, not_there: str) -> None:
    words = Page(render(report_of([1.0, 2.0], **changes))).words()
    assert stated in words
    assert not_there not in words


def test_bars_at_the_edge_count_what_lies_beyond() -> None:
    scores = np.concatenate([np.linspace(-1, 1, 200), [-500.0] * 3, [900.0] * 2])
    words = Page(render(report_of(scores))).words()
    assert "3 lower" in words
    assert "2 higher" in words


@pytest.mark.parametrize("cut", [0.4, -1e9, 1e9])
def test_the_cut_is_drawn_and_labelled_inside_the_plot(cut: float) -> None:
    page = Page(render(report_of(heavy_tails(500), threshold=cut)))
    lines = [of for tag, of in page.elements if tag == "line" and of["class"] == "cut"]
    assert len(lines) == 2  # the cut, and the mean of π
    assert all(0 <= float(of["x1"].rstrip("%")) <= 100 for of in lines)
    assert any(text.startswith("cut ") for text in page.text)


@pytest.mark.parametrize("largest", [DOMINANT_SHARE - 0.01, DOMINANT_SHARE + 0.01])
def test_a_dominant_pair_is_pointed_out(largest: float) -> None:
    share = np.full(50, (1 - largest) / 49)
    share[30] = largest
    words = Page(render(report_of([1.0, 2.0], contribution=share, pairs=pairs_of(share)))).words()
    assert ("Pair 31 alone holds" in words) == (largest > DOMINANT_SHARE)


def test_every_figure_of_an_evaluation_is_on_the_page() -> None:
    figures = figures_of()
    page = Page(render(report_of(heavy_tails(50), evaluation=figures)))
    words = page.words()
    for name, value in figures.items():
        if isinstance(value, float) and name != "preference_above_half":
            assert f"{value:.3f}" in words, name
    assert "(-0.021 to +0.167) neither is better" in words
    assert "(+0.123 to +0.246) PRISM is better" in words
    assert "BM25 not computed: too many words in label" in words
    assert "75.0 % of the pairs above 0.5" in words
    for row in figures["reliability"]:
        assert f"π {row['from']:.1f} to {row['to']:.1f}: {row['pairs']} pairs" in words
        assert f"{row['right_low']:.3f} to {row['right_high']:.3f}" in words
    assert "1,200 600 980 0.811 0.722" in words
    assert "34 17 34 – –" in words


def test_bars_of_shares_are_as_tall_as_their_figures() -> None:
    figures = figures_of()
    page = Page(render(report_of(heavy_tails(50), evaluation=figures)))

    def heights(colour: str) -> list[float]:
        drawn = [of for tag, of in page.elements if tag == "rect" and of["class"] == colour]
        assert all(float(of["y"]) + float(of["height"]) == pytest.approx(PLOT_PX + 8) for of in drawn), "from the floor"
        assert all(0 <= float(of["x"].rstrip("%")) <= 100 for of in drawn)
        return [float(of["height"]) / PLOT_PX for of in drawn]

    for prefix, colour in {"": "score", "loss_": "loss mean", "loss_sum_": "loss sum"}.items():
        wanted = [
            figures[f"{prefix}{measure}_at_{at}"] for measure in ("precision", "recall") for at in ("5", "budget")
        ]
        assert heights(colour) == pytest.approx(wanted, abs=0.05 / PLOT_PX)  # a tenth of a pixel is written
    assert heights("claimed") == pytest.approx([0.35, 0.95], abs=0.05 / PLOT_PX)
    assert heights("found") == [0.0, 1.0]


def test_pairs_that_no_column_judges_are_said_to_be_taken_as_right() -> None:
    unjudged = figures_of(target_label=None) | {"preference_ece": None, "preference_auroc": None, "reliability": []}
    words = Page(render(report_of([1.0, 2.0], evaluation=unjudged))).words()
    assert "All 8 pairs are taken as right" in words
    assert "Brier score 0.123 against 1" in words


NO_CANDIDATE: dict[str, object] = {
    **dict.fromkeys(("selected", "usable"), np.zeros(0, np.bool_)),
    "scores": np.zeros(0),
    **dict.fromkeys(("usable_by_source", "selected_by_source"), NONE),
    "sources": [],
    "summary": {},
}


def with_evaluation(**changes: object) -> dict[str, object]:
    return {"evaluation": figures_of() | changes}


@pytest.mark.parametrize(
    "changes",
    [
        with_evaluation(num_pairs=0, preference_mean=None, preference_brier=None, reliability=[]),
        with_evaluation(
            taken_by_budget=0,
            **{f"{name}_at_budget{end}": None for name in BUDGETED for end in ("", "_low", "_high")},
        ),
        with_evaluation(by_source=[], preference_auroc=None),
        {"quarantine": [], "ignored": []},
        {"highest": [], "lowest": []},
        NO_CANDIDATE,
        {"preference": np.array([]), "contribution": np.array([1.0]), "pairs": pairs_of([1.0])},
        {"preference": np.array([0.0, 1.0])},
    ],
)
def test_reports_of_little_or_nothing_render(changes: dict[str, object]) -> None:
    words = Page(render(replace(report_of([1.0, 2.0]), **changes))).words()  # type: ignore[arg-type]
    assert not {"nan", "inf"} & set(words.lower().split())
    assert "None" not in words.replace("None.", "")


@pytest.mark.parametrize("extra", [0, 1, 100_000])
def test_a_long_text_is_cut_and_says_what_is_left_out(extra: int) -> None:
    page = Page(render(report_of([1.0, 2.0], highest=[shown(0, "é" * (MAX_TEXT + extra))], lowest=[])))
    assert page.pre[2].strip() == "é" * MAX_TEXT
    assert (f"{extra:,} more characters are left out." in page.words()) == (extra > 0)
    assert (
        Page(render(report_of([1.0], pairs=[ShownPair(3, 0.7, "é" * 10_000)]))).pre[0].strip()
        == "é" * MAX_PAIR_TEXT + " …"
    )


def test_a_long_quarantine_is_cut_counted_and_complete_by_reason() -> None:
    rows = [Quarantined(source="a.jsonl", line=line, reason=f"reason {line % 30}") for line in range(MAX_ROWS + 70)]
    words = Page(render(report_of([1.0, 2.0], quarantine=rows))).words()
    assert "70 more rows are not listed." in words
    assert "18 other reasons 72" in words  # 30 reasons of 4 rows, 12 counted by name
