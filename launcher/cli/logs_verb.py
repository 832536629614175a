"""The verb logs: of pods that exist from the API server, of others from the bucket, with the rights that the user has there."""

import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launcher.cli.exit_codes import LAUNCHER_ERROR, NOT_FOUND, fail
from launcher.cli.job import run_verb
from launcher.cli.options import ContextOption, NameArgument, NamespaceOption, Output, Stage
from launcher.cli.printing import print_note
from launcher.cli.waiting import open_run, until_interrupted

if TYPE_CHECKING:
    from launcher.follow.kept_log import KeptLog
    from launcher.local.process import StageError
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
    tail: Annotated[int | None, typer.Option(metavar="LINES", help="Only the last lines of each pod.")] = None,
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
    from launcher.follow.kept_log import gone_pods
    from launcher.follow.merged_logs import list_pods, log_lines, prefix_of
    from launcher.local.process import NotInstalledError, StageError

    with tempfile.TemporaryDirectory(prefix="prism-logs-") as folder:
        if kept is not None:
            try:
                _print_kept(context, kept, name, folder, stage, group, tail)
            except StageError as error:
                _fail(error)
            return
        cluster, record = open_run(name, namespace, kube_context, waits=follow)
        there = {prefix_of(pod) for pod in list_pods(cluster, record.namespace, name, stage=stage, group=group)}
        gone = gone_pods(record, there, stage, group)
        found: list[KeptLog] = []
        problem: StageError | NotInstalledError | None = None
        try:
            found = _kept_logs(context, record, gone, folder, tail)
        except (StageError, NotInstalledError) as error:
            problem = error  # the other pods' logs come first
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
            kept=found,
        )
        until_interrupted(lambda: _print(lines), record)
        if isinstance(problem, StageError):
            _fail(problem)
        if problem is not None:
            raise problem


def _kept_logs(
    context: typer.Context, record: "Record", pods: list[str], folder: str, tail: int | None
) -> list["KeptLog"]:
    """Copies of the kept logs of these pods. Raises StageError, NotInstalledError."""
    from launcher.follow.kept_log import KeptLog

    if not pods:
        return []
    output, round_key = str(record.spec.get("output")), f"{record.uid}/{record.status.round}"
    print_note(f"gone: {_named(pods)}; their logs come from {output.rstrip('/')}/{record.name}/logs/{round_key}/")
    wanted = [word for pod in pods for word in ("--pod", pod)]
    facts = run_verb(context, "logs", [output, record.name, folder, "--round", round_key, *wanted], False)
    found = [log for each in facts["logs"] if (log := KeptLog.of(each, record.status.round, tail))]
    if missing := sorted({*pods} - {log.prefix for log in found}):
        print_note(f"no log is kept of {_named(missing)}")
    return found


def _print_kept(
    context: typer.Context, output: str, name: str, folder: str, stage: str | None, group: int | None, tail: int | None
) -> None:
    from launcher.follow.kept_log import KeptLog

    facts = run_verb(context, "logs", [output, name, folder], False)
    found = [log for each in facts["logs"] if (log := KeptLog.of(each, 0, tail))]
    found = [log for log in found if stage in (None, log.stage) and group in (None, log.group)]
    if not found:
        fix = "check the address, which is spec.output of the run, and the name"
        fail(NOT_FOUND, Output.table, f"no logs of a run named {name} are kept", facts["kept"], fix)
    print_note(f"from {facts['kept']}")
    _print((log.prefix, line) for log in sorted(found, key=lambda log: log.order) for line in log.lines())


def _fail(error: "StageError") -> NoReturn:
    """Not with the exit code of a failed run."""
    fail(LAUNCHER_ERROR, Output.table, f"kept logs cannot be read: {error.what}", error.where, error.fix)


def _print(lines: Iterable[tuple[str, str]]) -> None:
    from launcher.follow.terminal_text import printable

    for prefix, line in lines:
        print(f"{prefix} {printable(line)}", flush=True)


def _named(pods: list[str]) -> str:
    others = len(pods) - NUM_NAMED
    return ", ".join(pods[:NUM_NAMED]) + (f" and {others} more" if others > 0 else "")
