"""The first rows of each source, as a run reads them, and counts over all rows that were read. Writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from prism_job.data import examples
from prism_job.data.bad_row import UNUSABLE, reason_of
from prism_job.data.data_files import Source
from prism_job.data.examples import BadRow, Content, Layout, UnclearLayout
from prism_job.data.readers import Row, Unreadable
from prism_job.errors import RequestError
from prism_job.inspect.view import Part, Role, View
from prism_job.plan.sources import list_sources
from prism_job.progress import event
from prism_job.storage.model_files import fetch_config_and_tokenizer

if TYPE_CHECKING:
    from prism_job.extract.tokenise import Encoded

MAX_SOURCES = 8
"""Files whose rows are shown; the others of a folder are counted."""

MAX_LINES = 3
"""Lines named for each reason, and files where only one may be given."""


def inspect(view: View, num_rows: int = 3, line: int | None = None, *, read_all: bool = False) -> dict[str, Any]:
    """What the first rows of each source are, as plain values.

    Args:
        num_rows: rows shown of each source.
        line: the line or position at which to begin; the sources must be one file.
        read_all: read every row, to count layouts, tokens and unusable rows.

    Raises RequestError, DataError: a source cannot be read, no such row, no such model, a template that does not work.
    """
    listed: list[tuple[Part, Source]] = []
    ignored: dict[str, str] = {}
    for part in view.parts:
        found, others = list_sources(part.uris)
        listed += [(part, source) for source in found]
        ignored |= others
    if line is not None and len(listed) > 1:
        names = ", ".join(source.uri for _, source in listed[:MAX_LINES]) + (" …" if len(listed) > MAX_LINES else "")
        what = f"--line needs one file, and this names {len(listed)}: {names}"
        raise RequestError(what, where="--line", fix="give the file itself, or leave --line out")
    tokens = _Tokens(view) if view.model else None  # last: it takes seconds
    sources = []
    for index, (part, source) in enumerate(listed):
        if index < MAX_SOURCES or read_all:
            shown = num_rows if index < MAX_SOURCES else 0
            sources.append(_source_facts(view, part, source, shown, line or 1, tokens, read_all=read_all))
    return {
        "model": view.model and view.model.uri,
        "max_length": view.extraction.max_length,
        "loss_on": view.extraction.loss_on,
        "sources": sources,
        "sources_left_out": len(listed) - len(sources),
        "ignored": ignored,
    }


@dataclass
class _Counts:
    """Over the rows that were read."""

    layouts: Counter[Layout] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)  # the first of each reason
    tokens: Counter[str] = field(default_factory=Counter)
    num_read: int = 0
    num_cut: int = 0  # rows
    num_pairs: int = 0

    def add(self, line: int, row: _Inspected) -> None:
        self.num_read += 1
        if row.reason is not None:
            self.reasons[row.reason] += 1
            self.num_pairs += row.is_pair
            if self.reasons[row.reason] <= MAX_LINES:
                self.lines.setdefault(row.reason, []).append(line)
            return
        assert row.layout
        self.layouts[row.layout] += 1
        self.num_cut += any(text.num_cut for text in row.texts.values())
        for text in row.texts.values():
            self.tokens.update(tokens=len(text.ids), tokens_with_loss=text.num_supervised, tokens_cut=text.num_cut)


@dataclass
class _Inspected:
    """One row. `reason`: why a run cannot use it. `stops_run`: such a row ends the run, whatever maxBadFraction allows."""

    layout: Layout | None = None
    content: Content | None = None
    texts: dict[str, Encoded] = field(default_factory=dict)
    reason: str | None = None
    stops_run: bool = False
    is_pair: bool = False  # a candidate with chosen and rejected, which no layout of candidates has


class _Tokens:
    """The tokens of the model of a view."""

    def __init__(self, view: View) -> None:
        assert view.model is not None
        event("step", text=f"loading the tokenizer of {view.model.uri}")
        path = fetch_config_and_tokenizer(view.model.uri, view.model.revision)  # no weights
        # Imports torch, which takes seconds: only where there is a model.
        from prism_job.extract import tokenise
        from prism_job.extract.load.model import load_tokenizer
        from prism_job.inspect.decoding import text_facts

        self.tokenizer, self.tokenise, self.text_facts = load_tokenizer(view.model, path), tokenise, text_facts
        self.settings = (self.tokenizer, view.extraction.max_length, view.extraction.loss_on)

    def encode(self, content: Content, role: Role) -> dict[str, Encoded]:
        """The sides of a target, or the `text` of a candidate. Raises BadRow."""
        if role == "targets":
            return self.tokenise.encode_target(content, *self.settings)
        return {"text": self.tokenise.encode_candidate(content, *self.settings)}


def _source_facts(
    view: View, part: Part, source: Source, num_rows: int, first: int, tokens: _Tokens | None, *, read_all: bool
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    counts, loss_on = _Counts(), view.extraction.loss_on
    for line, row in islice(_rows_from(source, first), None if read_all else num_rows):
        inspected = _inspect_row(view, part, row, tokens)
        counts.add(line, inspected)
        if len(rows) < num_rows:
            rows.append(_row_facts(line, inspected, loss_on, tokens))
    if first > 1 and not rows:
        fix = "name a smaller number; lines count from 1, as do the rows of .json and .parquet files"
        raise RequestError("the file has no such line", where=f"{source.uri} line {first}", fix=fix)
    return {
        "uri": source.uri,
        "role": part.role,
        "set": part.name,
        "rows_read": counts.num_read,
        "is_whole": read_all and first == 1,
        "layouts": [
            {"layout": layout.name, "rows": number, "loss": layout.loss_text(loss_on)}
            for layout, number in counts.layouts.items()
        ],
        "rows_unusable": sum(counts.reasons.values()),
        "reasons": [
            {"reason": reason, "rows": number, "lines": counts.lines[reason]}
            for reason, number in counts.reasons.most_common()
        ],
        "rows_of_pairs": counts.num_pairs,
        "rows_cut": counts.num_cut if tokens else None,
        **{name: counts.tokens[name] if tokens else None for name in ("tokens", "tokens_with_loss", "tokens_cut")},
        "rows": rows,
    }


def _rows_from(source: Source, first: int) -> Iterator[tuple[int, Row | Unreadable]]:
    return ((line, row) for line, row in source.read() if line >= first)


def _inspect_row(view: View, part: Part, row: Row | Unreadable, tokens: _Tokens | None) -> _Inspected:
    inspected = _Inspected()
    try:
        if isinstance(row, Unreadable):
            raise BadRow(row.reason)
        if part.role == "targets":
            content, layout = examples.read_target(row, view.needs_rejected, part.columns)
        else:
            content, layout = examples.read_candidate(row, part.columns)
        examples.example_id(content)  # raises for what JSON cannot hold
        inspected.content, inspected.layout = content, layout
        inspected.texts = tokens.encode(content, part.role) if tokens else {}
    except UNUSABLE as error:
        inspected.reason = reason_of(error)
        inspected.is_pair = part.role == "candidates" and isinstance(row, dict) and {"chosen", "rejected"} <= row.keys()
        inspected.stops_run = part.role == "targets" or isinstance(error, UnclearLayout)
    return inspected


def _row_facts(line: int, row: _Inspected, loss_on: str, tokens: _Tokens | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "line": line,
        "layout": row.layout and row.layout.name,
        "loss": row.layout and row.layout.loss_text(loss_on),
        "reason": row.reason,
        "stops_run": row.stops_run,
        "content": row.content,
    }
    if tokens:
        facts["texts"] = {name: tokens.text_facts(encoded, tokens.tokenizer) for name, encoded in row.texts.items()}
    return facts
