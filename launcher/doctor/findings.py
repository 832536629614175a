"""What `prism doctor` finds, one thing each, and how it is printed. Not: what is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.follow.terminal_text import one_line
from launcher.kube.errors import ClusterError, Refused

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        level: error: a run would not get through; warning: it may not, or this could not be looked at.
        check: what was looked at, in a word or two.
        detail: what was seen.
        fix: what to do; empty where all is well.
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


def looked(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a check finds; where it may not look, or the API server is in bad weather, a warning that says so."""
    try:
        yield from list(look())
    except Refused as refused:
        yield warning(
            check, f"not checked: {refused.what}", "ask for the right to look, or have somebody look who has it"
        )
    except ClusterError as failed:
        yield warning(check, f"not checked: {failed.what}", failed.fix)


def findings_table(findings: Iterable[Finding]) -> str:
    """A finding a line, what to do beneath it; a sum at the end."""
    found = list(findings)
    width = max((len(one.check) for one in found), default=0)
    lines = []
    for one in found:
        lines.append(f"{one.level:<7}  {one.check:<{width}}  {one_line(one.detail)}")
        if one.fix:
            lines.append(f"{'':<7}  {'':<{width}}  hint: {one_line(one.fix)}")
    counts = {level: sum(one.level == level for one in found) for level in ("error", "warning")}
    words = [f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count]
    return "\n".join([*lines, "", ", ".join(words) or "all is well"])
