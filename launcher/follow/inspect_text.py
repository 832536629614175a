"""What `prism inspect` prints for a person: contents, and texts whose tokens with loss are marked. Does not read data."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from launcher.follow.terminal_text import marked, one_line, printable, without_marks

Facts = dict[str, Any]

MAX_CHARACTERS = 400
"""Of a stretch of text with or without loss, shown at each of its ends."""

MAX_LISTED = 5
"""Reasons of each source, and ignored files, that are listed."""


MAX_LINES = 3
"""Lines named for each reason over several files."""


def inspect_text(facts: Facts) -> str:
    """Source by source: what it is, its rows, and what cannot be used."""
    parts = [line for source in facts["sources"] for line in (*_source_lines(source, facts), "")]
    ignored = list(facts["ignored"].items())
    parts += [f"ignored {_plain(uri)}: {_plain(reason)}" for uri, reason in ignored[:MAX_LISTED]]
    parts += [f"ignored {len(ignored) - MAX_LISTED:,} more files"] if len(ignored) > MAX_LISTED else []
    if facts["sources_left_out"]:
        parts.append(f"{facts['sources_left_out']:,} more files: name one to see its rows; --all reads all of them")
    parts += _total_lines(facts)
    if facts["model"] is None:
        parts.append("without --model no text is rendered: give one to see which tokens carry loss")
    return "\n".join(parts).rstrip("\n")


def _total_lines(facts: Facts) -> Iterator[str]:
    """Over all files that are read in the same way, where all their rows were read."""
    parts = {(source["role"], source["set"]): source for source in facts["sources"]}
    for role, name in parts:
        sources = [source for source in facts["sources"] if (source["role"], source["set"]) == (role, name)]
        if len(sources) > 1 and all(source["is_whole"] for source in sources):
            yield f"{len(sources):,} files of {role}" + (f" of the set {name}" if name else "") + " together:"
            yield from _summary_lines(_total_of(sources), facts)


def _total_of(sources: Sequence[Facts]) -> Facts:
    """Several sources as one. A line of it names its file."""
    layouts, reasons, lines = Counter[tuple[str, str]](), Counter[str](), defaultdict[str, list[str]](list)
    for source in sources:
        layouts.update({(each["layout"], each["loss"]): each["rows"] for each in source["layouts"]})
        for each in source["reasons"]:
            reasons[each["reason"]] += each["rows"]
            lines[each["reason"]] += [f"{line} of {_plain(source['uri'])}" for line in each["lines"]]
    sums = ("rows_read", "rows_unusable", "rows_of_pairs", "rows_cut", "tokens", "tokens_with_loss", "tokens_cut")
    return {
        **{name: sum(source[name] or 0 for source in sources) for name in sums},
        "is_whole": True,
        "layouts": [{"layout": layout, "loss": loss, "rows": rows} for (layout, loss), rows in layouts.items()],
        "reasons": [
            {"reason": reason, "rows": rows, "lines": lines[reason][:MAX_LINES]}
            for reason, rows in reasons.most_common()
        ],
        "rows": [],
    }


def _source_lines(source: Facts, facts: Facts) -> Iterator[str]:
    kind = source["role"] + (f" of the set {source['set']}" if source["set"] else "")
    yield f"{_plain(source['uri'])}: {kind}"
    for row in source["rows"]:
        yield from _row_lines(row, facts)
    if not source["rows_read"]:
        yield "  no rows"
        return
    yield from _summary_lines(source, facts)


def _summary_lines(source: Facts, facts: Facts) -> Iterator[str]:
    read = f"all {_rows(source['rows_read'])}" if source["is_whole"] else f"{_rows(source['rows_read'])} read"
    layouts = [
        f"{each['rows']:,} as {_plain(each['layout'])}, loss on {_plain(each['loss'])}" for each in source["layouts"]
    ]
    unusable = [f"{source['rows_unusable']:,} unusable"]
    yield f"  {read}: " + "; ".join(layouts + (unusable if source["rows_unusable"] or not layouts else []))
    if source["rows_of_pairs"]:
        yield "  rows with chosen and rejected are targets: --targets reads them"
    if source["tokens"]:
        limit = f"maxLength {facts['max_length']:,}"
        cut = f"{_rows(source['rows_cut'])} cut at {limit}, by {source['tokens_cut']:,} tokens together"
        yield f"  {source['tokens']:,} tokens, {source['tokens_with_loss']:,} carry loss; " + (
            cut if source["rows_cut"] else f"no row is longer than {limit}"
        )
    for reason in source["reasons"][:MAX_LISTED] if source["rows_read"] > len(source["rows"]) else []:
        lines = ", ".join(map(str, reason["lines"])) + (", …" if reason["rows"] > len(reason["lines"]) else "")
        yield f"  unusable: {reason['rows']:,} × {_plain(reason['reason'])} (line {lines})"
    if len(source["reasons"]) > MAX_LISTED:
        yield f"  and {len(source['reasons']) - MAX_LISTED:,} more reasons"


def _rows(number: int) -> str:
    return f"{number:,} row" + ("" if number == 1 else "s")


def _row_lines(row: Facts, facts: Facts) -> Iterator[str]:
    heading = [] if row["layout"] is None else [f"{_plain(row['layout'])}, loss on {_plain(row['loss'])}"]
    if row["reason"] is not None:
        verdict = "this row stops the run" if row["stops_run"] else "unusable"
        heading.append(f"{verdict}: {_plain(row['reason'])}")
    texts = row.get("texts") or {}
    if "text" in texts:
        heading.append(_tokens_of(texts["text"], facts))
    yield f"  line {row['line']}: {'; '.join(heading)}"
    if "text" in texts:
        yield from _block(_marked_text(texts["text"]))
    elif texts:
        yield from _pair_lines(texts, facts)
    else:
        yield from _content_lines(row["content"] or {})


def _pair_lines(texts: Facts, facts: Facts) -> Iterator[str]:
    """What both sides begin with once, then each side from where they differ."""
    sides = list(texts.values())
    shared = _num_shared([side["ids"] for side in sides]) if len(sides) > 1 else 0
    if shared:
        yield f"    both begin with the same {shared:,} tokens:"
        yield from _block(_marked_text(sides[0], stop=shared))
    for name, side in texts.items():
        yield f"    {name}: {_tokens_of(side, facts)}" + (f"; from token {shared + 1} on:" if shared else "")
        yield from _block(_marked_text(side, start=shared))


def _num_shared(ids: Sequence[Sequence[int]]) -> int:
    return next(
        (index for index, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), min(map(len, ids))
    )


def _tokens_of(text: Facts, facts: Facts) -> str:
    cut = f"; {text['tokens_cut']:,} more cut at maxLength {facts['max_length']:,}" if text["tokens_cut"] else ""
    return f"{text['tokens']:,} tokens, {text['tokens_with_loss']:,} carry loss{cut}"


def _marked_text(text: Facts, start: int = 0, stop: int | None = None) -> str:
    """The tokens from `start` to `stop`, those with loss between marks."""
    spans = list(zip(text["offsets"], text["loss"], strict=True))[start:stop]
    shown = ""
    for has_loss, stretch in groupby(spans, key=lambda span: span[1]):
        spans_of = [offset for offset, _ in stretch]
        piece = _shortened(text["text"][spans_of[0][0] : spans_of[-1][1]])
        shown += marked(piece) if has_loss else piece
    return shown


def _content_lines(content: Facts) -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
            for message in value:
                others = {key: other for key, other in message.items() if key not in ("role", "content")}
                text = message.get("content") or ""
                yield from _block(
                    _shortened(text if isinstance(text, str) else _as_json(text)), f"{name} {message['role']}"
                )
                if others:
                    yield from _block(_shortened(_as_json(others)), f"{name} {message['role']}")
        else:
            yield from _block(_shortened(value if isinstance(value, str) else _as_json(value)), name)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text of data on one line, without marks."""
    return without_marks(one_line(text))


def _shortened(text: str) -> str:
    """Text of data, without marks; of a long one both ends."""
    if len(text) <= 2 * MAX_CHARACTERS + 40:
        return without_marks(printable(text))
    left_out = f" … {len(text) - 2 * MAX_CHARACTERS:,} characters … "
    return without_marks(printable(text[:MAX_CHARACTERS]) + left_out + printable(text[-MAX_CHARACTERS:]))


def _block(text: str, label: str = "") -> Iterator[str]:
    """The lines of a text, indented; no line of it can look like a line of ours."""
    head = f"{_plain(label)}: " if label else ""
    for line in f"{head}{text}".removesuffix("\n").split("\n"):
        yield f"    │ {line}"
