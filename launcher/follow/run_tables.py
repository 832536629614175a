"""What `prism list` and `prism status` print for a person."""

from datetime import datetime

from launcher.follow.terminal_text import aligned, one_line
from launcher.resource.record import Record
from launcher.resource.status import Status
from prism_job.spec.used import used_text


def runs_table(records: list[Record], now: datetime) -> str:
    """One row per run, like `kubectl get`."""
    if not records:
        return "no runs"
    head = ["NAMESPACE", "NAME", "PHASE", "GROUPS", "SHARDS", "RESTARTS", "AGE", "MESSAGE"]
    rows = [
        [
            *(record.namespace, record.name, status.phase, status.groups, status.shards, str(status.restarts)),
            age_text(record.created, now),
            status.message[:60],
        ]
        for record in records
        for status in [record.status]
    ]
    return "\n".join(aligned([head, *rows]))


def run_table(record: Record, status: Status, now: datetime) -> str:
    """One run in full: its stages and groups, and why one waits or failed.

    Args:
        status: the record's, with what else is known of it.
    """
    lines = [
        f"run       {record.namespace}/{record.name}, {age_text(record.created, now)} old, round {status.round}, "
        f"driven by {status.driver or 'nothing yet'}",
        f"phase     {one_line(f'{status.phase}: {status.message}') if status.message else status.phase}",
    ]
    if status.units is not None:
        bad = f", {status.bad_rows:,} unusable rows" if status.bad_rows else ""
        lines.append(
            f"plan      {status.examples or 0:,} examples and {status.pairs or 0:,} pairs in {status.units:,} units, "
            f"of which the store lacked {status.missing_units:,}{bad}"
        )
    if status.manifest:
        lines.append(f"manifest  {one_line(status.manifest)}")
    if status.gpu_seconds:
        lines.append(f"used      {one_line(used_text(status.gpu_hours, status.gpu, status.price))} by ended attempts")
    if status.stages:
        head = ["STAGE", "STATE", "ATTEMPT", "RESTARTS", "PREEMPTIONS", "UNITS", "WHY"]
        rows = [
            [
                f"{stage.stage} {stage.group}" if stage.stage == "extract" else stage.stage,
                stage.state,
                *(str(stage.attempt), str(stage.restarts), str(stage.preemptions)),
                "" if stage.units is None else f"{stage.units:,}",
                stage.message,
            ]
            for stage in status.stages
        ]
        lines += ["", *aligned([head, *rows])]
    return "\n".join(lines)


def age_text(since: datetime, now: datetime) -> str:
    """'42s', '17m', '3h', '12d'."""
    seconds = max(0, int((now - since).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
