"""Events of the stages: read from a line, and as short English text. Does not know where the text is shown."""

import json
from typing import Any

ETA_SHARE, ETA_ROWS = 0.25, 200
"""The time left is shown from this share of the work on, or from this many rows: the first rows are pairs and take longer."""

EXTRACTED_FOR = {
    "candidates": "candidates",
    "pairs": "pairs",
    "preferenceModel": "pairs for the preference model",
    "audit": "of the audit's sample",
}
"""Keys of the event `missing`, in the order in which they are named."""


def parse_event(line: str) -> dict[str, Any] | None:
    """The event of a JSON line; None for any other output."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def progress_text(event: dict[str, Any]) -> str:
    """'24/48 examples, 3.1/s, 812 tokens/s, 0:07 left' from a progress event; rates and the time once they are known."""
    noun = "files" if event["stage"] == "plan" else "examples"
    done, total, seconds = event["done"], event["total"], event["seconds"]
    parts = [f"{done:,}/{total:,} {noun}"]
    if seconds > 0 and done:
        parts.append(f"{_rate(done / seconds)}/s")
        if event.get("tokens"):
            parts.append(f"{_rate(event['tokens'] / seconds)} tokens/s")
        if min(ETA_SHARE * total, ETA_ROWS) <= done < total:
            parts.append(f"{_clock(seconds * (total - done) / done)} left")
    return ", ".join(parts)


def outcome_text(outcome: dict[str, Any]) -> str:
    """The outcome of a stage (its termination message) in a few words."""
    match outcome.get("verb"):
        case "plan":
            bad = f"; {outcome['badRows']:,} unusable rows" if outcome["badRows"] else ""
            return (
                f"{outcome['examples']:,} examples, {outcome['pairs']:,} pairs; "
                f"{outcome['missing']:,} of {outcome['units']:,} units to extract{bad}"
            )
        case "extract":
            share = audit_share(outcome)
            audit = f"; {share:.0%} of the time for the audit's sample" if share else ""
            cut = f"; {outcome['cut']:,} rows cut at maxLength" if outcome.get("cut") else ""
            done = f"{outcome['units']:,} units, {outcome['examples']:,} examples, {outcome['tokens']:,} tokens"
            return f"{done}{cut}{audit}"
        case "reduce" if outcome.get("unchanged"):
            return "this selection was published before"
        case "reduce":
            return f"{outcome['selected']:,} of {outcome['candidates'] - outcome['badRows']:,} usable examples selected"
    return "done"


def audit_share(outcome: dict[str, Any]) -> float:
    """The audit's share of the time of extraction's passes, 0 to 1."""
    seconds = outcome.get("seconds", 0.0)
    return round(outcome.get("auditSeconds", 0.0) / seconds, 4) if seconds else 0.0


def note_text(event: dict[str, Any]) -> str | None:
    """A line for an event that deserves one of its own, else None."""
    match event["event"]:
        case "ignored":
            return f"ignored {event['uri']}: {event['reason']}"
        case "layout" if event["layout"] == "unusable rows":
            return f"{event['uri']}: {event['rows']:,} rows, none usable"
        case "layout":
            return f"{event['uri']}: {event['rows']:,} rows as {event['layout']}; loss on {event['loss']}"
        case "missing":
            return _missing_text(event)
        case "step":
            return str(event["text"])
        case "loading":
            return f"loading {event['model']} on {event['device']}"
        case "quantised":
            largest = f"; the largest that is not: {event['largest_others'][0]}" if event["largest_others"] else ""
            return f"{event['share']:.1%} of the weights are quantised, {event['bytes'] / 1e9:.3g} GB{largest}"
        case "adapter":
            return f"not captured of the adapter: {', '.join(event['not_captured'][:8])} ({event['note']})"
        case "layers":
            return _layers_text(event)
    return None


def _missing_text(event: dict[str, Any]) -> str:
    rows = {key: event[key] for key in EXTRACTED_FOR if key in event}
    num_rows = sum(rows.values())
    hint = " (audit.examples: 0 leaves it out)" if rows.get("audit", 0) > num_rows / 2 else ""
    return f"{num_rows:,} to extract: {', '.join(f'{rows[key]:,} {EXTRACTED_FOR[key]}' for key in rows)}{hint}"


def _layers_text(event: dict[str, Any]) -> str:
    shares = f"{event['coverage']:.1%} of those asked for, {event['share_of_model']:.1%} of the model's matrices"
    unseen = f"; not captured: {', '.join(event['unseen'])}" if event["unseen"] else ""
    left_out = f"; no text passes through {', '.join(event['left_out'])}" if event["left_out"] else ""
    return f"gradients of {event['captured']:,} weights, {shares}{unseen}{left_out}"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
