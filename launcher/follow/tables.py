"""What `estimate`, `store`, `list` and `status` print for people. Not: what the figures mean, or where they come from."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from launcher.follow.display import printable

if TYPE_CHECKING:
    from launcher.resource.record import Record

TERMS = ("weights", "gathered", "activations", "logits", "captured", "projections", "rows", "workspace", "buffers")
PARTS = ("candidates", "targets", "factors", "sums", "staged")


def estimate_table(facts: dict[str, Any]) -> str:
    """Model, data, cost and store a line each; then memory a rank, term by term; then the topology."""
    about = "" if facts["tokens_are_exact"] else f" (scaled: one row in {facts['sample']} was tokenised)"
    flops = facts["flops"]
    lines = [
        f"model     {printable(facts['model'])}, {facts['dtype']}: {facts['parameters']:,} parameters, "
        f"{facts['parameters_covered']:,} of them in {facts['layers_captured']} captured layers",
        f"data      {facts['num_examples']:,} examples and {facts['num_pairs']:,} pairs in {facts['units']:,} units, "
        f"{facts['bad_rows']:,} unusable rows",
        f"tokens    {facts['tokens']:,}{about}; {facts['tokens_padded']:,} with padding; "
        f"{facts['tokens_of_audit']:,} of them for the audit",
        f"work      {flops['total']:.3g} FLOPs: forward {flops['forward']:.3g}, backward {flops['backward']:.3g}, "
        f"projection {flops['projection']:.3g}, sketches {flops['sketches']:.3g}",
        f"store     {facts['store_bytes']:,} bytes, from an empty store: "
        + ", ".join(f"{name.replace('_', ' ')} {size_words(size)}" for name, size in facts["store"].items()),
        f"time      {facts['gpu_hours']:.3g} hours of one {facts['gpu']} at {facts['utilisation']:.0%} of its published peaks",
        "",
        *_columns(_memory_rows(facts["memory"])),
        "",
        _topology_words(facts),
    ]
    return "\n".join(lines)


def _memory_rows(memory: list[dict[str, Any]]) -> list[list[str]]:
    """One setting a column: terms downward, what lies outside the card last."""
    heads = [f"stage {it['stage']}{'' if it['offload'] == 'none' else ', ' + it['offload']}" for it in memory]
    rows = [["memory a rank", *heads], ["ranks", *(str(it["ranks"]) for it in memory)]]
    for term in (*TERMS, "device", "host", "nvme"):
        name = "in all on the card" if term == "device" else term
        rows.append([name, *(size_words(it[f"{term}_bytes"]) for it in memory)])
    return [*rows, ["fits", *("yes" if it["fits"] else "no" for it in memory)]]


def _topology_words(facts: dict[str, Any]) -> str:
    chosen = facts["topology"]
    if chosen is None:
        return (
            f"topology  none fits: the longest text alone needs more than a {facts['gpu']} holds; "
            "lower extraction.maxLength, or take a larger card"
        )
    world = f"{chosen['nodes']} node(s) × {chosen['gpus_per_node']} GPU(s), ZeRO stage {chosen['stage']}"
    offload = "" if chosen["offload"] == "none" else f", weights in {chosen['offload']} memory (slower than said here)"
    return (
        f"topology  {world}{offload}, tokensPerBatch {chosen['tokens_per_batch']:,}: "
        f"{size_words(chosen['device_bytes'])} a rank of {size_words(facts['gpu_memory_bytes'])}, "
        f"{chosen['groups']} group(s), {chosen['hours']:.3g} hours"
    )


def store_table(facts: dict[str, Any]) -> str:
    """An extractor a row: what it holds, and how many kept selections need it ('?' where none were named)."""
    head = ["extractor", "units", "rows", "target units", "pairs", "factor units", "bytes", "needed by"]
    names = ("units", "rows", "target_units", "pairs", "factor_units", "bytes")
    rows = [
        [
            it["extractor"],
            *(f"{it[name]:,}" for name in names),
            "?" if it["needed_by"] is None else str(it["needed_by"]),
        ]
        for it in facts["extractors"]
    ]
    return "\n".join(_columns([head, *rows]))


def bytes_table(facts: dict[str, Any]) -> str:
    """An extractor a row, staged rows last, then what is none of PRISM's, and the sum."""
    lines = _byte_rows(facts["extractors"])
    if facts["other_objects"]:
        lines.append(f"{facts['other_objects']:,} other objects, {facts['other_bytes']:,} bytes")
    needed = "" if facts["needed_bytes"] is None else f"; kept selections need {facts['needed_bytes']:,}"
    return "\n".join([*lines, f"{facts['bytes']:,} bytes in all{needed}"])


def prune_table(facts: dict[str, Any]) -> str:
    """What was or would be removed, by extractor, and what was kept and why."""
    lines = _byte_rows(facts["extractors"]) if facts["objects"] else []
    lines += [f"kept: the plan of a run not published yet, {uri}" for uri in facts["kept_unfinished"]]
    if facts["too_young_objects"]:
        lines.append(
            f"kept: {facts['too_young_objects']:,} objects, {facts['too_young_bytes']:,} bytes, "
            f"younger than {facts['older_than_hours']:g} hours"
        )
    lines.append(f"kept: {facts['kept_objects']:,} objects that {facts['kept_selections']:,} selection(s) need")
    done = "removed" if facts["removed"] else "would remove (nothing is removed without --yes)"
    return "\n".join([*lines, f"{done}: {facts['objects']:,} objects, {facts['bytes']:,} bytes"])


def _byte_rows(extractors: list[dict[str, Any]]) -> list[str]:
    head = ["extractor", "objects", "bytes", *PARTS]
    rows = [
        [it["extractor"], *(f"{it[name]:,}" for name in ("objects", "bytes", *(f"{part}_bytes" for part in PARTS)))]
        for it in extractors
    ]
    return _columns([head, *rows])


def _columns(rows: list[list[str]]) -> list[str]:
    """The first column left, the others right, each as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def runs_table(records: list[Record], now: datetime.datetime) -> str:
    """A run a row, as `kubectl get` shows them."""
    if not records:
        return "no runs"
    head = ["NAMESPACE", "NAME", "PHASE", "GROUPS", "SHARDS", "RESTARTS", "AGE", "MESSAGE"]
    rows = [
        [
            *(record.namespace, record.name, it.phase, it.groups, it.shards, str(it.restarts)),
            age_words(record.created, now),
            it.message[:60],
        ]
        for record in records
        for it in [record.status]
    ]
    return "\n".join(_left([head, *rows]))


def run_table(record: Record, now: datetime.datetime) -> str:
    """A run in full: what it is, each stage and group, and why one waits or failed."""
    status = record.status
    lines = [
        f"run       {record.namespace}/{record.name}, {age_words(record.created, now)} old, round {status.round}, "
        f"carried on by {status.driver or 'nobody yet'}",
        f"phase     {_one_line(f'{status.phase}: {status.message}') if status.message else status.phase}",
    ]
    if status.units is not None:
        bad = f", {status.bad_rows:,} unusable rows" if status.bad_rows else ""
        lines.append(
            f"plan      {status.examples or 0:,} examples and {status.pairs or 0:,} pairs in {status.units:,} units, "
            f"of which the store lacked {status.missing_units:,}{bad}"
        )
    if status.manifest:
        lines.append(f"manifest  {_one_line(status.manifest)}")
    if status.stages:
        head = ["STAGE", "STATE", "ATTEMPT", "RESTARTS", "PREEMPTIONS", "UNITS", "WHY"]
        rows = [
            [
                f"{it.stage} {it.group}" if it.stage == "extract" else it.stage,
                it.state,
                str(it.attempt),
                str(it.restarts),
                str(it.preemptions),
                "" if it.units is None else f"{it.units:,}",
                it.message,
            ]
            for it in status.stages
        ]
        lines += ["", *_left([head, *rows])]
    return "\n".join(lines)


def age_words(since: datetime.datetime, now: datetime.datetime) -> str:
    """'42s', '17m', '3h', '12d'."""
    seconds = max(0, int((now - since).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _left(rows: list[list[str]]) -> list[str]:
    """Every column left, each as wide as its longest cell; a cell is one line, whatever a pod put into it."""
    rows = [[_one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size_words(size_bytes: float) -> str:
    """'3.4 MB': decimal units, as cards and buckets are sold."""
    size, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:,.0f} {units[0]}"
