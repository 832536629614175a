"""What `prism watch` knows of a run: its status and its pods' events, folded into rows. Pure; draws nothing.

Each rank counts its own work out of the total of all ranks of all groups: the counts of ranks and groups are summed, their
totals are equal. What an earlier attempt wrote is skipped by the next one, so it is subtracted from the next one's total.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from launcher.follow.event_text import note_text, outcome_text, parse_event, progress_text
from launcher.follow.terminal_text import one_line
from launcher.resource.status import StageStatus, Status

StageGroup = tuple[str, int]
"""(stage, group)."""

PREFIX = re.compile(r"(?P<stage>[a-z]+)(-(?P<group>\d+))?(\.(?P<attempt>\d+))?(/(?P<node>\d+))?$")
"""As `merged_logs.prefix_of` writes it."""

MAX_UNITS, MAX_RANKS, MAX_ENTRIES = 100_000, 4096, 4096
"""Sizes of the tables below: whatever a pod writes, this process does not grow without bound."""

MAX_COUNT = 10**12
"""A larger count, or more seconds, is not credible and is ignored."""


@dataclass(frozen=True)
class Row:
    """A line of the view: a stage, a group of the extract stage, or all its groups together.

    Attributes:
        label: the stage, or an indented group.
        state: as in the status; empty for the sum over groups.
        done, total: of the bar; total 0: nothing counted yet.
        text: what it does, why it waits, or how it ended; safe for a terminal.
    """

    label: str
    state: str
    attempt: int
    done: int
    total: int
    text: str


@dataclass(frozen=True)
class Progress:
    """Progress of the ranks of one attempt."""

    done: int = 0
    total: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Self) -> Self:
        """Of two that work at the same time towards the same total."""
        total, seconds = max(self.total, other.total), max(self.seconds, other.seconds)
        return replace(
            self, done=self.done + other.done, total=total, tokens=self.tokens + other.tokens, seconds=seconds
        )

    def minus_total(self, num_done_before: int) -> Self:
        return replace(self, total=max(0, self.total - num_done_before))

    def group_text(self) -> str:
        """Of one group among several: its share of the total is not known."""
        if not self.seconds or not self.done:
            return f"{self.done:,} examples"
        return f"{self.done:,} examples, {self.done / self.seconds:,.3g}/s, {self.tokens / self.seconds:,.0f} tokens/s"


@dataclass
class _PodReports:
    """What the pods of one round reported."""

    progress: dict[tuple[StageGroup, int], dict[tuple[int, int], Progress]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """(stage and group, attempt) -> (node, rank) -> progress."""

    written: dict[StageGroup, dict[str, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))
    """Stage and group -> unit -> (attempt that wrote it, rows)."""

    loading: dict[tuple[StageGroup, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_notes_taken: int = 0


class RunView:
    """Takes every status and every log line of a run; gives rows."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self._reports = _PodReports()

    def take_status(self, status: Status) -> None:
        """A new round starts from zero."""
        if status.round != self.status.round:
            self._reports = _PodReports()
        self.status = status

    def take_line(self, prefix: str, line: str) -> None:
        """A line of a pod: an event of a stage; anything else is ignored."""
        match, event, reports = PREFIX.match(prefix), parse_event(line), self._reports
        if match is None or event is None:
            return
        stage_group = (match["stage"], int(match["group"] or 0))
        attempt, node = int(match["attempt"] or 0), int(match["node"] or 0)
        match event["event"]:
            case "progress" if (progress := _progress(event)) is not None:
                if _has_room(reports.progress, (stage_group, attempt), MAX_ENTRIES):
                    ranks, rank = reports.progress[stage_group, attempt], (node, _integer(event.get("rank")))
                    if _has_room(ranks, rank, MAX_RANKS):
                        ranks[rank] = progress
            case "shard" if _has_room(reports.written, stage_group, MAX_ENTRIES):
                # The audit's shard of a unit of pairs comes from the same passes as the unit's own: count it once.
                extractor = "" if event.get("kind") in ("targets", "sums") else event.get("extractor", "")
                units, unit = reports.written[stage_group], f"{extractor}/{event.get('unit')}"[:200]
                if _has_room(units, unit, MAX_UNITS):
                    units.setdefault(unit, (attempt, _integer(event.get("rows"))))
            case "loading" if _has_room(reports.loading, (stage_group, attempt), MAX_ENTRIES):
                reports.loading[stage_group, attempt] = f"loading {event.get('model')} on {event.get('device')}"
            case "ignored" if {"uri", "reason"} <= event.keys():
                note = f"{stage_group[0]}: {one_line(note_text(event) or '')}"
                if note not in reports.notes:
                    self.add_note(note)

    def add_note(self, note: str) -> None:
        """A line of its own, beside the rows."""
        if len(self._reports.notes) < MAX_ENTRIES:
            self._reports.notes.append(one_line(note))

    def take_notes(self) -> list[str]:
        """The notes that were not taken before."""
        new = self._reports.notes[self._reports.num_notes_taken :]
        self._reports.num_notes_taken += len(new)
        return new

    def headline(self) -> str:
        """'Extracting; groups 1/2; shards 3/8; 1 restart; extract 1: Unschedulable: …'"""
        status = self.status
        parts = [status.phase]
        parts += [f"groups {status.groups}"] if status.groups else []
        parts += [f"shards {status.shards}"] if status.shards else []
        parts += [f"{status.restarts} restart{'s' * (status.restarts > 1)}"] if status.restarts else []
        parts += [status.message] if status.message else []
        return one_line("; ".join(parts))

    def rows(self) -> list[Row]:
        """plan, extract (a row for all groups if there are several, then one each), reduce."""
        known = {(stage.stage, stage.group): stage for stage in self.status.stages}
        groups = sorted(group for stage, group in known if stage == "extract")
        plan, reduce = (known.get((stage, 0)) for stage in ("plan", "reduce"))
        rows = [self._row(plan or StageStatus(stage="plan"), is_only_group=True)]
        if self.status.missing_units == 0:
            rows.append(Row("extract", "", 0, 0, 0, "the store holds every unit"))
        elif len(groups) > 1:
            stages = [known["extract", group] for group in groups]
            rows += [self._sum_row(stages), *(self._row(stage, is_only_group=False) for stage in stages)]
        else:
            rows.append(self._row(known.get(("extract", 0)) or StageStatus(stage="extract"), is_only_group=True))
        return [*rows, self._row(reduce or StageStatus(stage="reduce"), is_only_group=True)]

    def _row(self, stage: StageStatus, *, is_only_group: bool) -> Row:
        stage_group, state, attempt = (stage.stage, stage.group), stage.state, stage.attempt
        label = stage.stage if is_only_group else f"  group {stage.group}"
        if state == "Succeeded":
            return Row(label, state, attempt, 1, 1, self._outcome(stage))
        if state != "Running":
            return Row(label, state, attempt, 0, 0, one_line(stage.message))
        progress = self._progress(stage).minus_total(self._num_rows_before(stage))
        text = self._reports.loading.get((stage_group, attempt), "starting")
        if progress.total:
            text = _progress_text(progress, stage.stage) if is_only_group else progress.group_text()
        return Row(label, state, attempt, progress.done, progress.total, one_line(text))

    def _sum_row(self, stages: Sequence[StageStatus]) -> Row:
        """All groups together."""
        progress = Progress()
        for stage in stages:
            progress = progress.plus(self._progress(stage))
        is_counted = progress.total > 0
        progress = progress.minus_total(sum(self._num_rows_before(stage) for stage in stages))
        text = _progress_text(progress, "extract") if is_counted else ""
        return Row("extract", "", 0, progress.done, progress.total, text)

    def _progress(self, stage: StageStatus) -> Progress:
        """Of all ranks of the current attempt; its total includes what earlier attempts wrote."""
        progress = Progress()
        for of_rank in self._reports.progress[(stage.stage, stage.group), stage.attempt].values():
            progress = progress.plus(of_rank)
        return progress

    def _num_rows_before(self, stage: StageStatus) -> int:
        """Rows that earlier attempts wrote."""
        written = self._reports.written[stage.stage, stage.group].values()
        return sum(num_rows for attempt, num_rows in written if attempt < stage.attempt)

    def _outcome(self, stage: StageStatus) -> str:
        status = self.status
        if stage.stage == "plan":
            counts = {"units": status.units, "missing": status.missing_units, "badRows": status.bad_rows}
            counts |= {"examples": status.examples, "pairs": status.pairs}
            return outcome_text({"verb": "plan", **{name: count or 0 for name, count in counts.items()}})
        if stage.stage == "reduce":
            return f"{status.selected:,} examples selected" if status.selected is not None else "done"
        return f"{stage.units or 0:,} units"


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """Lines for what is new: a state, an attempt, a reason to wait."""
    old = {row.label: row for row in before}
    lines = []
    for row in after:
        was = old.get(row.label)
        is_new = was is None or (was.state, was.attempt) != (row.state, row.attempt)
        has_new_reason = row.state != "Running" and row.text and (was is None or was.text != row.text)
        if row.state and (has_new_reason or (is_new and row.state != "Waiting")):
            lines.append(line_of(row))
    return lines


def line_of(row: Row) -> str:
    """'extract: Running, attempt 2; 24/48 examples, 3.1/s, 812 tokens/s, 0:07 left'."""
    label = row.label.replace("  ", "extract, ")
    attempt = f", attempt {row.attempt + 1}" if row.attempt else ""
    text = f"; {row.text}" if row.text else ""
    return f"{label}: {row.state or 'all groups'}{attempt}{text}"


def _progress_text(progress: Progress, stage: str) -> str:
    return progress_text({"stage": stage, **vars(progress)})


def _progress(event: dict[str, Any]) -> Progress | None:
    """None if its values cannot be added up: anything may write to a pod's log."""
    done, total, tokens, seconds = (event.get(name, 0) for name in ("done", "total", "tokens", "seconds"))
    if not all(isinstance(value, int) and 0 <= value < MAX_COUNT for value in (done, total, tokens)):
        return None
    if not isinstance(seconds, int | float) or not 0 <= seconds < MAX_COUNT:
        return None
    return Progress(done, total, tokens, float(seconds))


def _has_room(table: Mapping[Any, Any], key: Any, max_entries: int) -> bool:
    return key in table or len(table) < max_entries


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0
