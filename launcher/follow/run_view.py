"""What `prism watch` knows of a run: its status and its pods' events, folded into rows. Pure. Not: their source, drawing.

Each rank counts what it did itself, out of the work of all ranks of all groups: counts of ranks and groups add up, totals
don't. What an earlier attempt wrote is skipped by the next one: it is taken off its total.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.follow.display import note_of, outcome_words, printable, progress_words
from launcher.resource.status import StageStatus, Status

Place = tuple[str, int]
"""(stage, group)."""

PREFIX = re.compile(r"(?P<stage>[a-z]+)(-(?P<group>\d+))?(\.(?P<attempt>\d+))?(/(?P<node>\d+))?$")
"""As `launcher.logs.prefix_of` writes it."""

MAX_UNITS, MAX_RANKS, MAX_PLACES = 100_000, 4096, 4096
"""Of each are remembered: whatever a pod writes, this process does not grow without an end."""

LARGEST = 10**12
"""A count, or seconds, from here on is not believed, and can be no overflow of ours."""


@dataclass(frozen=True)
class Row:
    """A line of the view: a stage, a group of the extract stage, or all its groups together.

    Attributes:
        state: as in the status; empty for a sum over groups.
        done, total: of the bar; a total of 0: nothing was counted yet.
        words: what it does, why it waits, or how it ended; as a terminal may show it.
    """

    place: str
    state: str
    attempt: int
    done: int
    total: int
    words: str


@dataclass(frozen=True)
class Count:
    """How far the ranks of one attempt are."""

    done: int = 0
    total: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Count) -> Count:
        """Of two that work at the same time on the same whole."""
        return Count(
            self.done + other.done,
            max(self.total, other.total),
            self.tokens + other.tokens,
            max(self.seconds, other.seconds),
        )

    def words(self, stage: str) -> str:
        return progress_words({"stage": stage, **vars(self)})

    def share_words(self) -> str:
        """Of a group beside others: how much of the whole it will get to is not known."""
        if not self.seconds or not self.done:
            return f"{self.done:,} examples"
        return f"{self.done:,} examples, {self.done / self.seconds:,.3g}/s, {self.tokens / self.seconds:,.0f} tokens/s"


@dataclass
class _Told:
    """What the pods of one round said."""

    counts: dict[tuple[Place, int], dict[tuple[int, int], Count]] = field(default_factory=lambda: defaultdict(dict))
    """(place, attempt) -> (node, rank) -> how far it is."""

    written: dict[Place, dict[str, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))
    """Place -> unit -> (attempt that wrote it, rows)."""

    loading: dict[tuple[Place, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_taken: int = 0


class RunView:
    """The fold: told each status and each line, asked for rows."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self._told = _Told()

    def take_status(self, status: Status) -> None:
        """A new round counts from nothing."""
        if status.round != self.status.round:
            self._told = _Told()
        self.status = status

    def take_line(self, prefix: str, line: str) -> None:
        """A line of a pod: an event of ours, or anything else, which is passed over."""
        match, event = PREFIX.match(prefix), _parse(line)
        if match is None or event is None:
            return
        place = (match["stage"], int(match["group"] or 0))
        attempt, node = int(match["attempt"] or 0), int(match["node"] or 0)
        match event["event"]:
            case "progress" if (count := _count(event)) is not None:
                if _has_room(self._told.counts, (place, attempt), MAX_PLACES):
                    ranks, rank = self._told.counts[place, attempt], (node, _number(event.get("rank")))
                    if _has_room(ranks, rank, MAX_RANKS):
                        ranks[rank] = count
            case "shard" if _has_room(self._told.written, place, MAX_PLACES):
                # The audit's shard of a unit of pairs comes out of the passes that made the unit's own: one unit, counted once.
                form = "" if event.get("kind") in ("targets", "sums") else event.get("extractor", "")
                units, unit = self._told.written[place], f"{form}/{event.get('unit')}"[:200]
                if _has_room(units, unit, MAX_UNITS):
                    units.setdefault(unit, (attempt, _number(event.get("rows"))))
            case "loading" if _has_room(self._told.loading, (place, attempt), MAX_PLACES):
                self._told.loading[place, attempt] = f"loading {event.get('model')} on {event.get('device')}"
            case "ignored" if {"uri", "reason"} <= event.keys():
                note = f"{place[0]}: {_one_line(note_of(event) or '')}"
                if note not in self._told.notes:
                    self.add_note(note)

    def add_note(self, note: str) -> None:
        """A line of its own, beside the rows."""
        if len(self._told.notes) < MAX_PLACES:
            self._told.notes.append(_one_line(note))

    def take_notes(self) -> list[str]:
        """What is worth a line of its own, and was not taken before."""
        new = self._told.notes[self._told.num_taken :]
        self._told.num_taken += len(new)
        return new

    def headline(self) -> str:
        """'Extracting; groups 1/2; shards 3/8; 1 restart; extract 1: Unschedulable: …'"""
        it = self.status
        parts = [
            it.phase,
            *([f"groups {it.groups}"] if it.groups else []),
            *([f"shards {it.shards}"] if it.shards else []),
        ]
        parts += [f"{it.restarts} restart{'s' * (it.restarts > 1)}"] if it.restarts else []
        return _one_line("; ".join([*parts, *([it.message] if it.message else [])]))

    def rows(self) -> list[Row]:
        """plan, extract (a row for all groups where there are several, then one each), reduce."""
        known = {(one.stage, one.group): one for one in self.status.stages}
        groups = sorted(group for stage, group in known if stage == "extract")
        plan, reduce = (known.get((stage, 0)) for stage in ("plan", "reduce"))
        rows = [self._row(plan or StageStatus(stage="plan"), alone=True)]
        if self.status.missing_units == 0:
            rows.append(Row("extract", "", 0, 0, 0, "the store holds every unit"))
        elif len(groups) > 1:
            rows += [self._sum(groups), *(self._row(known["extract", group], alone=False) for group in groups)]
        else:
            rows.append(self._row(known.get(("extract", 0)) or StageStatus(stage="extract"), alone=True))
        return [*rows, self._row(reduce or StageStatus(stage="reduce"), alone=True)]

    def _row(self, entry: StageStatus, *, alone: bool) -> Row:
        count = self._count((entry.stage, entry.group), entry.attempt)
        name = entry.stage if alone else f"  group {entry.group}"
        if entry.state == "Succeeded":
            return Row(name, entry.state, entry.attempt, 1, 1, self._outcome(entry))
        if entry.state == "Running":
            words = self._told.loading.get(((entry.stage, entry.group), entry.attempt), "starting")
            if count.total:
                words = count.words(entry.stage) if alone else count.share_words()
            return Row(name, entry.state, entry.attempt, count.done, count.total, _one_line(words))
        return Row(name, entry.state, entry.attempt, 0, 0, _one_line(entry.message))

    def _sum(self, groups: Sequence[int]) -> Row:
        """All groups: what each did in all its attempts, of the whole."""
        present = {one.group: one.attempt for one in self.status.stages if one.stage == "extract"}
        count = Count()
        for group in groups:
            count = count.plus(self._count(("extract", group), present[group], whole=True))
        kept = sum(self._kept(("extract", group), present[group]) for group in groups)
        shown = Count(count.done, max(0, count.total - kept), count.tokens, count.seconds)
        words = shown.words("extract") if count.total else ""
        return Row("extract", "", 0, shown.done, shown.total, words)

    def _count(self, place: Place, attempt: int, *, whole: bool = False) -> Count:
        count = Count()
        for one in self._told.counts[place, attempt].values():
            count = count.plus(one)
        kept = 0 if whole else self._kept(place, attempt)
        return Count(count.done, max(0, count.total - kept), count.tokens, count.seconds)

    def _kept(self, place: Place, attempt: int) -> int:
        """Rows that earlier attempts wrote."""
        return sum(rows for earlier, rows in self._told.written[place].values() if earlier < attempt)

    def _outcome(self, entry: StageStatus) -> str:
        it = self.status
        if entry.stage == "plan":
            numbers = {"units": it.units, "missing": it.missing_units, "examples": it.examples, "pairs": it.pairs}
            counted = {name: value or 0 for name, value in numbers.items()}
            return outcome_words({"verb": "plan", "badRows": it.bad_rows or 0, **counted})
        if entry.stage == "reduce":
            return f"{it.selected:,} examples selected" if it.selected is not None else "done"
        return f"{entry.units or 0:,} units"


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """Lines for what is new: a state that was entered, another attempt, another reason to wait."""
    old = {row.place: row for row in before}
    lines = []
    for row in after:
        was = old.get(row.place)
        is_new = was is None or (was.state, was.attempt) != (row.state, row.attempt)
        says_why = row.state != "Running" and row.words and (was is None or was.words != row.words)
        if row.state and (says_why or (is_new and row.state != "Waiting")):
            lines.append(line_of(row))
    return lines


def line_of(row: Row) -> str:
    """'extract: Running, attempt 2; 24/48 examples, 3.1/s, 812 tokens/s, 0:07 left'."""
    place = row.place.replace("  ", "extract, ")
    attempt = f", attempt {row.attempt + 1}" if row.attempt else ""
    words = f"; {row.words}" if row.words else ""
    return f"{place}: {row.state or 'all groups'}{attempt}{words}"


def _parse(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _count(event: dict[str, Any]) -> Count | None:
    """None where it is no progress that we can add up: anybody may write to a pod's log."""
    done, total, tokens, seconds = (event.get(name, 0) for name in ("done", "total", "tokens", "seconds"))
    if not all(isinstance(value, int) and 0 <= value < LARGEST for value in (done, total, tokens)):
        return None
    if not isinstance(seconds, int | float) or not 0 <= seconds < LARGEST:
        return None
    return Count(done, total, tokens, float(seconds))


def _has_room(table: Mapping[Any, Any], key: Any, most: int) -> bool:
    return key in table or len(table) < most


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
