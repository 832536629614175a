"""The verb logs: of pods that exist from the API server, of others from the bucket, with the rights that the user has there."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.exit_codes import LAUNCHER_ERROR, NOT_FOUND, fail
from launcher.cli.job import stream_verb, words_of
from launcher.cli.options import ContextOption, NameArgument, NamespaceOption, Output, Stage
from launcher.cli.printing import print_note
from launcher.cli.waiting import open_run, until_interrupted

if TYPE_CHECKING:
    from launcher.resource.record import Record

NUM_NAMED = 4
"""Pods that a note names; of the others it states the number."""


def logs(
    context: typer.Context,
    name: NameArgument,
    namespace: NamespaceOption = "",
    kube_context: ContextOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stream new lines until the run ends.")] = False,
    stage: Annotated[Stage | None, typer.Option(help="Only this stage.")] = None,
    group: Annotated[int | None, typer.Option(metavar="N", help="Only this group.")] = None,
    tail: Annotated[int | None, typer.Option(metavar="LINES", min=0, help="Only the last lines of each pod.")] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Start each line with its time. Logs from the bucket have none.")
    ] = False,
    kept: Annotated[
        str | None,
        typer.Option(
            metavar="OUTPUT",
            help="Read only the bucket, below this spec.output: for a run that no cluster has any more.",
        ),
    ] = None,
) -> None:
    """Print the logs of a run's pods; those of pods that are gone from the bucket. Lines start with stage, group, attempt."""
    from launcher import submit as remote
    from launcher.follow.logs.gone_pods import gone_pods
    from launcher.follow.logs.merged_logs import list_pods, log_lines, prefix_of

    wanted = words_of({"--stage": stage, "--group": group, "--tail": tail})
    if kept is not None:
        _print_kept(context, kept, name, wanted)
        return
    cluster, record = open_run(name, namespace, kube_context, waits=follow)
    there = {prefix_of(pod) for pod in list_pods(cluster, record.namespace, name, stage=stage, group=group)}
    gone = _GoneLogs(context, record, gone_pods(record, there, stage, group), wanted)
    lines = log_lines(
        cluster,
        record.namespace,
        name,
        stage=stage,
        group=group,
        follow=follow,
        tail=tail,
        timestamps=timestamps,
        is_over=lambda: remote.is_over(cluster.without_retries(), record),
        on_outage=print_note,
        gone=gone,
    )
    num_printed = until_interrupted(lambda: _print(lines), record)
    if gone.state != "read":
        if gone.state == "unread":
            print_note("kept logs were not read: the bucket does not answer")
        if not num_printed:
            sys.exit(LAUNCHER_ERROR)


@dataclass
class _GoneLogs:
    """Lines of the kept logs of pods that are gone. Where they cannot be read, a note says so: the other pods' lines count."""

    context: typer.Context
    record: "Record"
    pods: list[str]
    wanted: list[str]
    state: str = field(default="unread", init=False)
    """unread, read, failed."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        from launcher.local.process import NotInstalledError, StageError

        missing = set(self.pods)
        if missing:
            output, name, status = str(self.record.spec.get("output")), self.record.name, self.record.status
            round_key = f"{self.record.uid}/{status.round}"
            print_note(f"gone: {_named(self.pods)}; their logs come from {output.rstrip('/')}/{name}/logs/{round_key}/")
            pods = [word for pod in self.pods for word in ("--pod", pod)]
            words = [output, name, "--round", round_key, *pods, *self.wanted]
            try:
                for log in stream_verb(self.context, "logs", words):
                    missing.discard(log["pod"])
                    yield from ((log["pod"], line) for line in log["lines"])
            except (StageError, NotInstalledError) as error:
                where = f" ({error.where}); {error.fix}" if isinstance(error, StageError) else f" ({sys.executable})"
                print_note(f"kept logs cannot be read: {error}{where}")
                self.state = "failed"
                return
        if missing:
            print_note(f"no log is kept of {_named(sorted(missing))}")
        self.state = "read"


def _print_kept(context: typer.Context, output: str, name: str, wanted: list[str]) -> None:
    from launcher.local.process import StageError

    place = f"{output.rstrip('/')}/{name}/logs/"
    found = ""
    try:
        for log in stream_verb(context, "logs", [output, name, *wanted]):
            if not found:
                found = log["round"]
                print_note(f"from {place}{found}/")
            _print((log["pod"], line) for line in log["lines"])
    except StageError as error:  # not with the exit code of a failed run
        fail(LAUNCHER_ERROR, Output.table, f"kept logs cannot be read: {error.what}", error.where, error.fix)
    if not found:
        fix = "check the address, which is spec.output of the run, and the name"
        fail(NOT_FOUND, Output.table, f"no logs of a run named {name} are kept", place, fix)


def _print(lines: Iterable[tuple[str, str]]) -> int:
    """Returns their number."""
    from launcher.follow.terminal_text import printable

    num_lines = 0
    for prefix, line in lines:
        print(f"{prefix} {printable(line)}", flush=True)
        num_lines += 1
    return num_lines


def _named(pods: list[str]) -> str:
    others = len(pods) - NUM_NAMED
    return ", ".join(pods[:NUM_NAMED]) + (f" and {others} more" if others > 0 else "")
