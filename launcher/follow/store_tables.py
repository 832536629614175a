"""What `prism store list`, `du` and `prune` print for a person."""

from typing import Any

from launcher.follow.terminal_text import aligned

PARTS = ("candidates", "targets", "factors", "sums", "nll", "staged")


def store_table(facts: dict[str, Any]) -> str:
    """One row per extractor: what it holds, and how many kept selections need it ('?' without --keep)."""
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
    lines = aligned([head, *rows], right=True)
    if any(it["needed_by"] is None for it in facts["extractors"]):
        lines.append("needed by: name spec.output of the runs with --keep, and their selections are counted")
    return "\n".join(lines)


def bytes_table(facts: dict[str, Any]) -> str:
    """One row per extractor, then staged rows, objects that are not PRISM's, and the total."""
    lines = _byte_rows(facts["extractors"])
    if facts["other_objects"]:
        lines.append(f"{facts['other_objects']:,} other objects, {facts['other_bytes']:,} bytes")
    needed = "" if facts["needed_bytes"] is None else f"; kept selections need {facts['needed_bytes']:,}"
    return "\n".join([*lines, f"{facts['bytes']:,} bytes in total{needed}"])


def prune_table(facts: dict[str, Any]) -> str:
    """What was or would be removed, by extractor, and what was kept and why."""
    lines = _byte_rows(facts["extractors"]) if facts["objects"] else []
    lines += [f"kept: the plan of a run that is not published yet, {uri}" for uri in facts["kept_unfinished"]]
    if facts["too_young_objects"]:
        lines.append(
            f"kept: {facts['too_young_objects']:,} objects, {facts['too_young_bytes']:,} bytes, "
            f"younger than {facts['older_than_hours']:g} hours"
        )
    lines.append(f"kept: {facts['kept_objects']:,} objects that {facts['kept_selections']:,} selection(s) need")
    done = "removed" if facts["removed"] else "would remove (nothing is removed without --yes)"
    return "\n".join([*lines, f"{done}: {facts['objects']:,} objects, {facts['bytes']:,} bytes"])


def _byte_rows(extractors: list[dict[str, Any]]) -> list[str]:
    head, names = ["extractor", "objects", "bytes", *PARTS], ["objects", "bytes", *(f"{part}_bytes" for part in PARTS)]
    rows = [[it["extractor"], *(f"{it[name]:,}" for name in names)] for it in extractors]
    return aligned([head, *rows], right=True)
