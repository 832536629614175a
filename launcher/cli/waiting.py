"""Waiting for a run to end: what a person sees meanwhile, how Ctrl-C leaves, and the exit code at the end.

Does not decide anything about the run: submit.py drives and watches its record.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

import typer

from launcher.cli.exit_codes import LAUNCHER_ERROR, NOT_FINISHED, NOT_FOUND, OF_PHASE, RUN_FAILED, fail
from launcher.cli.options import Output
from launcher.cli.printing import print_facts, print_note

if TYPE_CHECKING:
    from launcher.kube.cluster import Cluster
    from launcher.resource.record import Record

T = TypeVar("T")

NUM_TRIES, NUM_TRIES_WHILE_WAITING = 6, 20
"""Attempts per request on transient errors: about seven seconds, and a minute for a verb that waits anyway."""

REPEATS_BEFORE_REPORT = 3
"""A driver's error is reported when it occurs this often: one or two conflicts are normal."""


def connect(context: str | None, *, waits: bool = False, timeout: float | None = None) -> Cluster:
    """A client of the API server.

    Args:
        waits: the verb waits for something anyway, so the client rides out a longer outage.
        timeout: seconds after which the verb stops waiting.
    """
    from launcher.kube.cluster import Cluster

    if waits and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # In a pod we are process 1, which SIGTERM does not end by default.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    tries = NUM_TRIES_WHILE_WAITING if waits else NUM_TRIES
    return Cluster(context, tries=tries, on_outage=print_note, timeout_seconds=timeout if waits else None)


def connect_to_runs(context: str | None, *, waits: bool = False, timeout: float | None = None) -> Cluster:
    """As `connect`, for a verb about runs that exist. Where there is no cluster, the error says where others are found."""
    from launcher.kube.errors import NoCluster

    try:
        return connect(context, waits=waits, timeout=timeout)
    except NoCluster as error:
        fix = (
            f"{error.fix}; what `prism run` ran has no record on a cluster: its manifests lie under spec.output, in a folder "
            "named after the run"
        )
        raise NoCluster(error.what, where=error.where, fix=fix) from error


def open_run(
    name: str, namespace: str, context: str | None, *, waits: bool = False, timeout: float | None = None
) -> tuple[Cluster, Record]:
    """As `connect_to_runs`, and the record of an existing run. Raises NotFound."""
    from launcher import submit as remote

    cluster = connect_to_runs(context, waits=waits, timeout=timeout)
    return cluster, remote.get_record(cluster, namespace or cluster.namespace, name)


def drive_and_exit(cluster: Cluster, record: Record, timeout: float | None, output: Output, verbose: bool) -> NoReturn:
    """Drive the run, unless an operator does or we lack the rights; exit with its outcome."""
    from launcher import submit as remote
    from launcher.doctor.rights import OPTIONAL, missing_rights
    from launcher.operator.events import print_json_line

    missing = [
        f"{', '.join(verbs)} {resource}"
        for resource, verbs in missing_rights(cluster, record.namespace, not record.is_config_map)
        if resource not in OPTIONAL
    ]
    if missing and record.is_config_map:
        fix = "bind the role prism-driver (k8s/rbac.yaml); `prism doctor` lists all missing rights"
        fail(LAUNCHER_ERROR, output, f"you may not {'; '.join(missing)}", f"namespace {record.namespace}", fix)
    if missing:
        print_note(f"you may not {'; '.join(missing)}: waiting for an operator to drive the run")
        exit_at_end(cluster, record, timeout, output)
    with remote.driven_here(cluster, record, print_json_line if verbose else _report_repeated_errors()):
        exit_at_end(cluster, record, timeout, output)


def exit_at_end(cluster: Cluster, record: Record, timeout: float | None, output: Output) -> NoReturn:
    """Print each change of the run's state until it ends; exit with its outcome."""
    from launcher import submit as remote

    last_line = ""

    def show(current: Record) -> None:
        nonlocal last_line
        status = current.status
        line = " ".join(f"{status.phase}{f': {status.message}' if status.message else ''}".split())
        is_this_round = status.round >= current.round
        if is_this_round and line != last_line:
            last_line = line
            print_note(line)

    def wait() -> Record | None:
        return remote.wait_until(
            cluster, record, remote.has_ended, timeout_seconds=timeout, on_change=show, on_outage=print_note
        )

    try:
        ended = until_interrupted(wait, record)
    except TimeoutError:
        where, hint = f"{record.namespace}/{record.name}", f"prism wait {record.name} -n {record.namespace}"
        fail(NOT_FINISHED, output, f"not finished within {timeout:g} s", where, hint)
    ended = or_not_found(ended, record, output)
    facts = remote.outcome(ended)
    print_facts(facts, output, table=facts["manifest"] or f"{record.name}: {facts['phase']}")
    sys.exit(OF_PHASE.get(ended.status.phase, RUN_FAILED))


def require_wait(timeout: float | None, *, wait: bool) -> None:
    if timeout is not None and not wait:
        raise typer.BadParameter("--timeout needs --wait")


def print_warnings(cluster: Cluster) -> None:
    """What the API server warned of, each once."""
    for warning in cluster.warnings:
        print_note(f"warning: {warning}")


def or_not_found(ended: Record | None, record: Record, output: Output = Output.table) -> Record:
    """The record of the ended run; exits where the run was deleted instead."""
    if ended is None:
        fail(NOT_FOUND, output, "the run was deleted", f"{record.namespace}/{record.name}", "see: prism list")
    return ended


def end_of_cancelled(cluster: Cluster, record: Record, timeout_seconds: float) -> Record | None:
    """The record once the run has ended, or after the timeout. Drives a run that has no operator to its end."""
    from launcher import submit as remote

    with contextlib.ExitStack() as stack:
        if record.is_config_map or record.status.driver == "client":
            stack.enter_context(remote.driven_here(cluster, record))
        try:
            return remote.wait_until(
                cluster, record, remote.has_ended, timeout_seconds=timeout_seconds, on_outage=print_note
            )
        except TimeoutError:
            return record


def until_interrupted(act: Callable[[], T], record: Record) -> T:
    """What `act` returns. Ctrl-C and SIGTERM exit at once, with a hint how to return to the run."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    # In a pod we are process 1, which SIGTERM does not end by default.
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        return act()
    except KeyboardInterrupt as interrupted:
        if record.is_config_map:
            print_note("stopped waiting; nothing drives the run now. Continue: submit the document again with --wait")
        else:
            print_note(f"stopped waiting; the run continues. Return: prism wait {record.name} -n {record.namespace}")
        sys.exit(128 + (interrupted.args[0] if interrupted.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report_repeated_errors() -> Callable[..., None]:
    """A listener for the driver's log events that prints a persistent error once.

    A server that does not answer is not reported here: waiting for the record reports it.
    """
    num_seen: Counter[str] = Counter()

    def report(*, event: str = "", error: str = "", transient: bool = False, **_: object) -> None:
        if event in ("watch", "retry") and error.strip() and not transient:
            line = f"{event}: {error.strip().splitlines()[-1]}"
            num_seen[line] += 1
            if num_seen[line] == REPEATS_BEFORE_REPORT:
                print_note(line)

    return report
