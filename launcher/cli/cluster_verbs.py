"""The verbs for runs in a cluster: submit, list, status, watch, wait, cancel, retry."""

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from launcher.cli.exit_codes import LAUNCHER_ERROR, NOT_FINISHED, OF_PHASE, RUN_FAILED, fail
from launcher.cli.options import (
    ContextOption,
    FileArgument,
    LogActionsOption,
    NameArgument,
    NamespaceOption,
    Output,
    OutputOption,
    TimeoutOption,
    WaitOption,
    read_text,
)
from launcher.cli.printing import print_facts, print_note
from launcher.cli.waiting import (
    connect,
    connect_to_runs,
    drive_and_exit,
    end_of_cancelled,
    exit_at_end,
    open_run,
    or_not_found,
    print_warnings,
    require_wait,
    until_interrupted,
)

CANCEL_TIMEOUT_SECONDS = 60


def submit(
    file: FileArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    output: OutputOption = Output.table,
    verbose: LogActionsOption = False,
) -> None:
    """Submit a run to a cluster. Submitting it again attaches to the run, or runs it again if it has ended."""
    from launcher import submit as remote

    require_wait(timeout, wait=wait)
    document = remote.read_document(read_text(file), file.name, namespace)
    cluster = connect(context, waits=wait, timeout=timeout)
    namespace, name = document.namespace or cluster.namespace, document.run.metadata.name
    if not wait and remote.record_kind(cluster) == "ConfigMap":
        fix = "add --wait so that this process does the operator's work, or install the operator: kubectl apply -k k8s/"
        fail(LAUNCHER_ERROR, output, "no operator starts its Jobs: SelectionRun is not installed", namespace, fix)
    submitted = remote.submit(cluster, document, namespace)
    print_warnings(cluster)
    print_note(f"{submitted.action}: {namespace}/{name}")
    if wait:
        drive_and_exit(cluster, submitted.record, timeout, output, verbose)
    print_note(f"follow it with: prism watch {name} -n {namespace}")
    print_facts({**remote.outcome(submitted.record), "action": submitted.action}, output, table=name)


def status(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Show the status of a run. Lists its stages and groups, and why one is waiting or failed."""
    from launcher import submit as remote
    from launcher.follow.kueue_reasons import kueue_reasons, with_kueue_reasons
    from launcher.follow.run_tables import run_table

    cluster, record = open_run(name, namespace, context)
    shown = with_kueue_reasons(record.status, record.name, kueue_reasons(cluster, record))
    facts = {**remote.outcome(record), "status": shown.to_document()}
    print_facts(facts, output, table=run_table(record, shown, datetime.now(UTC)))


def list_runs(
    namespace: NamespaceOption = "",
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="List the runs of all namespaces.")
    ] = False,
    context: ContextOption = None,
    output: OutputOption = Output.table,
) -> None:
    """List the runs in a namespace."""
    from launcher import submit as remote
    from launcher.follow.run_tables import runs_table

    cluster = connect_to_runs(context)
    records = remote.list_records(cluster, None if all_namespaces else namespace or cluster.namespace)
    facts = {"runs": [remote.outcome(record) for record in records]}
    print_facts(facts, output, table=runs_table(records, datetime.now(UTC)))


def wait(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    timeout: TimeoutOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Wait until a run ends. Exit code: 0 complete, 100 failed, 101 timed out, 102 deleted, 103 cancelled."""
    cluster, record = open_run(name, namespace, context, waits=True, timeout=timeout)
    exit_at_end(cluster, record, timeout, output)


def watch(name: NameArgument, namespace: NamespaceOption = "", context: ContextOption = None) -> None:
    """Show a run's progress until it ends. Ctrl-C stops watching; the run continues."""
    from launcher.follow.watch import watch_run

    cluster, record = open_run(name, namespace, context, waits=True)
    ended = or_not_found(until_interrupted(lambda: watch_run(cluster, record), record), record)
    sys.exit(OF_PHASE.get(ended.status.phase, RUN_FAILED))


def cancel(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Cancel a run. Finished shards are kept; `prism retry` continues from them."""
    from launcher import submit as remote

    cluster, record = open_run(name, namespace, context, waits=True)
    record = remote.cancel(cluster, record)
    ended = end_of_cancelled(cluster, record, CANCEL_TIMEOUT_SECONDS)
    ended = or_not_found(ended, record, output)
    if not ended.status.is_terminal:
        hint = f"prism status {name} -n {record.namespace}"
        fail(
            NOT_FINISHED,
            output,
            "cancellation requested; the run has not ended yet",
            f"{record.namespace}/{name}",
            hint,
        )
    print_facts(remote.outcome(ended), output, table=f"{name}: {ended.status.phase}")


def retry(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    output: OutputOption = Output.table,
    verbose: LogActionsOption = False,
) -> None:
    """Start a finished run again, on the current data. Extracts only what the store lacks."""
    from launcher import submit as remote

    require_wait(timeout, wait=wait)
    cluster, record = open_run(name, namespace, context, waits=wait, timeout=timeout)
    if not record.status.is_terminal:
        to_run = f"{name} -n {record.namespace}"
        fix = f"wait for its end with `prism wait {to_run}`, or cancel it with `prism cancel {to_run}`"
        fail(LAUNCHER_ERROR, output, f"the run has not ended: {record.status.phase}", name, fix)
    if not wait and record.is_config_map:
        fix = "add --wait so that this process does the operator's work"
        fail(LAUNCHER_ERROR, output, "no operator would start the run's Jobs", name, fix)
    record = remote.run_again(cluster, record)
    print_warnings(cluster)
    if wait:
        drive_and_exit(cluster, record, timeout, output, verbose)
    print_facts(remote.outcome(record), output, table=f"{name}: round {record.round}")
