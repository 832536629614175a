"""A finding of `prism doctor`, and how findings are printed. Runs no check."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.follow.terminal_text import one_line
from launcher.kube.errors import ClusterError, Refused

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: error: a run would fail; warning: it may fail, or this could not be checked.
        check: what was checked, in a word or two.
        detail: what was found.
        fix: what to do; empty if ok.
    """

    level: Level
    check: str
    detail: str
    fix: str = ""


def ok(check: str, detail: str) -> Finding:
    return Finding("ok", check, detail)


def warning(check: str, detail: str, fix: str) -> Finding:
    return Finding("warning", check, detail, fix)


def error(check: str, detail: str, fix: str) -> Finding:
    return Finding("error", check, detail, fix)


def run_check(check: str, check_it: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; a warning instead if it is not allowed, or the API server does not answer."""
    try:
        yield from list(check_it())
    except ClusterError as failed:
        fix = "ask for the right to read it, or ask someone who has it" if isinstance(failed, Refused) else failed.fix
        yield warning(check, f"not checked: {failed.what}", fix)


def findings_table(findings: Iterable[Finding]) -> str:
    """One line per finding, its hint beneath it; totals at the end."""
    findings = list(findings)
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<7}  {finding.check:<{width}}  {one_line(finding.detail)}")
        if finding.fix:
            lines.append(f"{'':<7}  {'':<{width}}  hint: {one_line(finding.fix)}")
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    totals = [f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count]
    return "\n".join([*lines, "", ", ".join(totals) or "no problems found"])
