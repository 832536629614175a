"""report.html: one self-contained page about a finished selection.

Knows only the `Report` it is given: no store, no clock, no network, so the same contents give the same bytes. Candidates are
untrusted text: every string from data passes through `markup.safe` on its way into the page.
"""

from importlib import resources
from typing import Any

from prism_job.publish.report.audit import audit_section
from prism_job.publish.report.chart import compact
from prism_job.publish.report.contents import Report
from prism_job.publish.report.diff import diff_section
from prism_job.publish.report.evaluation import evaluation_sections
from prism_job.publish.report.examples import examples_section
from prism_job.publish.report.markup import flat, percent, safe, section
from prism_job.publish.report.scores import scores_section
from prism_job.publish.report.sources import ignored_section, quarantine_section, rules_section, sources_section
from prism_job.publish.report.targets import contribution_section, preference_section, sets_section


def render(report: Report) -> str:
    """The page, as text that encodes to UTF-8 whatever the data held. Counts named in `Report` must be there (KeyError)."""
    sections = [
        section("Scores", scores_section(report)),
        section("Targets: sets", sets_section(report.sets)) if report.sets else "",
        section("How far the ranking can be trusted", audit_section(report.audit, report.no_audit))
        if report.audit or report.no_audit
        else "",
        f'<div class="two">{section("Targets: π", preference_section(report))}'
        f"{section('Targets: contribution', contribution_section(report.contribution, report.pairs))}</div>",
        section("What was chosen, by source", sources_section(report)),
        section("What the rules changed", rules_section(report)) if report.rules else "",
        section("What changed since the selection before", diff_section(report.diff)) if report.diff else "",
        evaluation_sections(report.evaluation) if report.evaluation else "",
        f'<div class="two">{section("Highest scores", examples_section(report.highest))}'
        f"{section('Lowest scores', examples_section(report.lowest))}</div>",
        section("Quarantine", quarantine_section(report.quarantine)),
        section("Ignored files", ignored_section(report.ignored)) if report.ignored else "",
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
    action = f"{ {'drop': 'Dropped', 'keep': 'Kept'}[verb] } the {counts['taken_by_budget']:,} {end}-scoring"
    rest = f", which leaves <b>{counts['selected']:,} selected</b>" if verb == "drop" else ""
    mean = f"mean π {report.preference.mean():.2f}" if len(report.preference) else "no π"
    everyone, usable = counts["candidates"], report.num_usable
    tiles = [
        ("Candidates", everyone, f"{usable:,} usable"),
        ("Selected", counts["selected"], f"{percent(counts['selected'], usable)} of the usable"),
        (
            "Tokens selected",
            counts["selected_tokens"],
            f"{percent(counts['selected_tokens'], counts['tokens'])} of all",
        ),
        ("Target pairs", counts["target_pairs"], mean),
        ("Duplicates", counts["duplicates"], f"{percent(counts['duplicates'], usable)} of the usable"),
        ("Quarantined", counts["quarantined"], f"{percent(counts['quarantined'], everyone)} of all"),
    ]
    if counts["cut"] or counts["cut_pairs"]:
        cut = f"{percent(counts['cut'], usable)} of the usable; {counts['cut_pairs']:,} pairs"
        tiles.append(("Cut at maxLength", counts["cut"], cut))
    shown = "".join(
        f'<div class="tile{" key" if name == "Selected" else ""}"><dt>{name}</dt>'
        f'<dd title="{value:,}">{compact(value)}</dd><dd class="sub">{note}</dd></div>'
        for name, value, note in tiles
    )
    return (
        f'<header><p class="eyebrow"><i></i>PRISM selection report</p><h1>{safe(report.run)}</h1>'
        f'<p class="lead">{safe(action)} of {ranked:,} ranked candidates{rest}.</p>'
        f'<dl class="facts"><div><dt>Action</dt><dd>{safe(report.action)}</dd></div><div><dt>Model</dt>'
        f"<dd><code>{safe(report.model)}</code></dd></div><div><dt>Selection</dt>"
        f'<dd><code>{safe(report.selection_id)}</code></dd></div></dl><dl class="tiles">{shown}</dl></header>'
    )


def _settings(settings: dict[str, str | dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{safe(name)}</th><td><code>{safe(flat(value))}</code></td></tr>" for name, value in settings.items()
    )
    return f'<table class="settings"><tbody>{rows}</tbody></table>'


_CSS = resources.files("prism_job.publish.report").joinpath("report.css").read_text(encoding="utf-8")
