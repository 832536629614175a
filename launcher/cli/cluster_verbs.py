"""The verbs of `prism` that talk to a cluster. No logic; every verb imports what it needs when it is called."""

from __future__ import annotations

import contextlib
import datetime
import enum
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from launcher.cli.output import (
    CANCELLED,
    LAUNCHER_ERROR,
    NOT_FINISHED,
    NOT_FOUND,
    RUN_FAILED,
    FileArgument,
    Output,
    OutputOption,
    exit_codes,
    fail,
    print_facts,
    read_text,
    yaml_documents,
)

if TYPE_CHECKING:
    from launcher.kube.cluster import Cluster
    from launcher.resource.record import Record

T = TypeVar("T")

TRIES, WAITING_TRIES = 6, 20
"""Of a request that meets a transient error: about seven seconds, and a minute where a verb waits anyway."""

NamespaceOption = Annotated[
    str,
    typer.Option("--namespace", "-n", metavar="NAME", help="Namespace; else the document's, else the kubeconfig's."),
]
ContextOption = Annotated[
    str | None, typer.Option("--context", metavar="NAME", help="Context of the kubeconfig; else its current one.")
]


def _check_name(name: str) -> str:
    from launcher.resource.names import is_dns_label

    if not is_dns_label(name):
        raise typer.BadParameter(f"'{name}' is no name: it has lower-case letters, digits and '-'")
    return name


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the run: metadata.name.", callback=_check_name)
]
TimeoutOption = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop waiting after so long, with exit code 101.", min=0)
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Stay until the run ends; where no operator is, carry it on meanwhile.")
]

DriverVerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say what is done in the cluster, a JSON line each, on stderr.")
]


class Stage(enum.StrEnum):
    """Whose logs."""

    plan = "plan"
    extract = "extract"
    reduce = "reduce"


class DryRun(enum.StrEnum):
    """Who checks what is rendered."""

    client = "client"
    server = "server"


def add_verbs(app: typer.Typer) -> None:
    """Put the verbs below into the command."""
    for verb in (submit, render, status, watch, wait, logs, cancel, retry, schedule, doctor, crd, operator):
        app.command()(verb)
    app.command("list")(list_runs)


def submit(
    file: FileArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    output: OutputOption = Output.table,
    verbose: DriverVerboseOption = False,
) -> None:
    """Put the run into a cluster. A second submit of the same document attaches, or runs an ended one again."""
    with exit_codes(output):
        from launcher import submit as remote

        cluster = _cluster(context, waits=wait, timeout=timeout)
        document = remote.read_document(read_text(file), file.name, namespace)
        place, name = document.namespace or cluster.namespace, document.run.metadata.name
        if not wait and remote.record_kind(cluster) == "ConfigMap":
            fix = "add --wait, and this process carries it on; or install the operator: kubectl apply -k k8s/"
            fail(LAUNCHER_ERROR, output, "nobody would carry the run on: no SelectionRun kind here", place, fix)
        submitted = remote.submit(cluster, document, place)
        for warning in cluster.warnings:
            _say(f"warning: {warning}")
        _say(f"{submitted.action}: {place}/{name}")
        if timeout is not None and not wait:
            _say("warning: --timeout says how long to --wait, and does nothing without it")
        if wait:
            _wait_and_exit(cluster, submitted.record, timeout, output, verbose)
        _say(f"follow it with: prism watch {name} -n {place}")
        print_facts({**remote.outcome(submitted.record), "action": submitted.action}, output, table=name)


def render(
    file: FileArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    dry_run: Annotated[
        DryRun, typer.Option(help="server: have the API server check every object; makes nothing.")
    ] = DryRun.client,
    output: OutputOption = Output.yaml,
) -> None:
    """Print every object of the run's first attempts. Needs no cluster, unless --dry-run=server."""
    with exit_codes(output):
        from launcher import submit as remote
        from launcher.render.run_objects import run_objects

        document = remote.read_document(read_text(file), file.name, namespace)
        objects = run_objects(document.run, document.namespace or "default")
        if dry_run is DryRun.server:
            cluster = _cluster(context)
            objects = run_objects(document.run, document.namespace or cluster.namespace)
            for one in objects:
                cluster.apply(one, dry_run=True)
            for warning in cluster.warnings:
                _say(f"warning: {warning}")
            _say(f"{len(objects)} objects: the API server takes them")
        if output is Output.json:
            print_facts({"apiVersion": "v1", "kind": "List", "items": objects}, output, table="")
        else:
            print(yaml_documents(objects), end="")


def status(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Show a run: its stages and groups, and why one waits or failed."""
    with exit_codes(output):
        from launcher import submit as remote
        from launcher.follow.tables import run_table

        cluster = _cluster(context)
        record = remote.get_record(cluster, namespace or cluster.namespace, name)
        facts = {**remote.outcome(record), "status": record.status.to_document()}
        print_facts(facts, output, table=run_table(record, _now()))


def list_runs(
    namespace: NamespaceOption = "",
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    context: ContextOption = None,
    output: OutputOption = Output.table,
) -> None:
    """List the runs of a namespace."""
    with exit_codes(output):
        from launcher import submit as remote
        from launcher.follow.tables import runs_table

        cluster = _cluster(context)
        records = remote.list_records(cluster, None if everywhere else namespace or cluster.namespace)
        print_facts({"runs": [remote.outcome(one) for one in records]}, output, table=runs_table(records, _now()))


def wait(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    timeout: TimeoutOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Wait for a run's end. Exit code 0 complete, 100 failed, 101 timed out, 102 gone, 103 cancelled."""
    with exit_codes(output):
        from launcher import submit as remote

        cluster = _cluster(context, waits=True, timeout=timeout)
        record = remote.get_record(cluster, namespace or cluster.namespace, name)
        _exit_as_it_ended(cluster, record, timeout, output)


def watch(name: NameArgument, namespace: NamespaceOption = "", context: ContextOption = None) -> None:
    """Show a run's stages with bars until it ends. Ctrl-C leaves; the run goes on."""
    with exit_codes(Output.table):
        from launcher import submit as remote
        from launcher.follow.watch import watch_run

        cluster = _cluster(context, waits=True)
        record = remote.get_record(cluster, namespace or cluster.namespace, name)
        ended = _detaching(lambda: watch_run(cluster, record), record)
        if ended is None:
            fail(NOT_FOUND, Output.table, "the run was deleted", f"{record.namespace}/{name}", "submit it again")
        sys.exit(_exit_code(ended))


def logs(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    stage: Annotated[Stage | None, typer.Option(help="Of this stage alone.")] = None,
    group: Annotated[int | None, typer.Option(metavar="N", help="Of this group alone.")] = None,
    tail: Annotated[int | None, typer.Option(metavar="LINES", help="Of each pod, so many lines from its end.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Begin each line with its time.")] = False,
) -> None:
    """Print what the pods of a run say, of all stages, groups and attempts, each line with its pod before it."""
    with exit_codes(Output.table):
        from launcher import submit as remote
        from launcher.follow.display import printable
        from launcher.follow.logs import log_lines

        cluster = _cluster(context, waits=follow)
        record = remote.get_record(cluster, namespace or cluster.namespace, name)
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
            on_outage=_say,
        )

        def show() -> None:
            for prefix, line in lines:
                print(f"{prefix} {printable(line)}", flush=True)

        _detaching(show, record)


def cancel(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    output: OutputOption = Output.table,
) -> None:
    """End a run. Its finished shards are kept: `prism retry` goes on from there."""
    with exit_codes(output):
        from launcher import submit as remote

        cluster = _cluster(context, waits=True)
        record = remote.cancel(cluster, remote.get_record(cluster, namespace or cluster.namespace, name))
        ended = _ended(cluster, record, timeout_seconds=60)
        if ended is None:
            where = f"{record.namespace}/{name}"
            fail(NOT_FOUND, output, "its record was removed before it was seen to end", where, "see: prism list")
        if not ended.status.is_terminal:
            fail(NOT_FINISHED, output, "asked for; nobody has ended it yet", name, f"see: prism status {name}")
        print_facts(remote.outcome(ended), output, table=f"{name}: {ended.status.phase}")


def retry(
    name: NameArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    output: OutputOption = Output.table,
    verbose: DriverVerboseOption = False,
) -> None:
    """Run an ended run again: the same document, the data as they are now; only what its store lacks is extracted."""
    with exit_codes(output):
        from launcher import submit as remote

        cluster = _cluster(context, waits=wait, timeout=timeout)
        record = remote.get_record(cluster, namespace or cluster.namespace, name)
        if not record.status.is_terminal:
            fix = f"`prism cancel {name}` ends it; `prism wait {name}` waits for its end"
            fail(LAUNCHER_ERROR, output, f"it has not ended: {record.status.phase}", name, fix)
        if not wait and record.is_config_map:
            fail(LAUNCHER_ERROR, output, "nobody would carry the run on", name, "add --wait, and this process does")
        record = remote.run_again(cluster, record)
        if wait:
            _wait_and_exit(cluster, record, timeout, output, verbose)
        print_facts(remote.outcome(record), output, table=f"{name}: round {record.round}")


def schedule(
    file: FileArgument,
    cron: Annotated[str, typer.Option(metavar="EXPRESSION", help="When: '0 3 * * *', or @daily.")],
    image: Annotated[str, typer.Option(metavar="IMAGE", help="The launcher's image; best pinned by digest.")],
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    time_zone: Annotated[
        str | None, typer.Option(metavar="ZONE", help="Europe/Berlin, say; else the cluster's.")
    ] = None,
    service_account: Annotated[
        str, typer.Option(metavar="NAME", help="With the driver's rights (k8s/rbac.yaml).")
    ] = "prism-driver",
    apply: Annotated[bool, typer.Option("--apply", help="Put it into the cluster; else it is only printed.")] = False,
) -> None:
    """Write a plain CronJob whose pod runs `prism submit --wait` on this document."""
    with exit_codes(Output.table):
        from launcher import submit as remote
        from launcher.render.cron_job import cron_job

        document = remote.read_document(read_text(file), file.name, namespace)
        cluster = _cluster(context) if apply else None
        place = document.namespace or (cluster.namespace if cluster else "default")
        objects = cron_job(
            document.run,
            document.text,
            place,
            cron,
            image=image,
            service_account=service_account,
            time_zone=time_zone,
        )
        if cluster is None:
            print(yaml_documents(objects), end="")
            return
        for one in objects:
            cluster.apply(one)
            print(f"{one['kind'].lower()}/{one['metadata']['name']}")


def doctor(
    file: Annotated[
        typer.FileText | None,
        typer.Argument(metavar="FILE", encoding="utf-8", help="selection.yaml: check what this run needs too."),
    ] = None,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Let a Job try the buckets with the pods' own credentials.")
    ] = True,
    output: OutputOption = Output.table,
) -> None:
    """Check what stands in a run's way: rights, queue, GPUs, policies, image, buckets. Exit code 3 where something does."""
    with exit_codes(output):
        from launcher import submit as remote
        from launcher.doctor.cluster_checks import examine, findings_table

        cluster = _cluster(context)
        document = remote.read_document(read_text(file), file.name, namespace) if file else None
        run, place = (document.run, document.namespace) if document else (None, namespace)
        if probe and run is not None:
            _say(
                "trying the buckets from within the cluster; its image may have to come first (--no-probe leaves it out)"
            )
        findings = examine(cluster, place or cluster.namespace, run, probe=probe and run is not None)
        facts = {"findings": [vars(one) for one in findings]}
        print_facts(facts, output, table=findings_table(findings))
        if any(one.level == "error" for one in findings):
            from launcher.cli.output import PREFLIGHT

            sys.exit(PREFLIGHT)


def crd() -> None:
    """Print the CustomResourceDefinition of SelectionRun."""
    from launcher.resource.crd import to_yaml

    print(to_yaml(), end="")


def operator(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", metavar="NAME", help="Look after this namespace alone; else all.")
    ] = "",
    context: ContextOption = None,
    port: Annotated[int, typer.Option(help="Of /healthz, /readyz and /metrics.")] = 8080,
) -> None:
    """Reconcile every SelectionRun of the cluster until SIGTERM. Of several replicas one leads, the others stand by."""
    with exit_codes(Output.table):
        from launcher.kube.cluster import Cluster
        from launcher.operator.process import run_operator

        cluster = Cluster(context)
        own = os.environ.get("POD_NAMESPACE") or cluster.namespace
        sys.exit(run_operator(cluster, namespace or None, port, own))


def _cluster(context: str | None, *, waits: bool = False, timeout: float | None = None) -> Cluster:
    """A client of the API server.

    Args:
        waits: whether the verb waits for something anyway, and so outlasts a longer outage.
        timeout: seconds after which it would stop waiting.
    """
    import signal

    from launcher.kube.cluster import Cluster

    if waits and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # In a pod we are process 1, which SIGTERM does not end by itself.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    tries = WAITING_TRIES if waits else TRIES
    return Cluster(context, tries=tries, on_outage=_say, timeout_seconds=timeout if waits else None)


def _wait_and_exit(cluster: Cluster, record: Record, timeout: float | None, output: Output, verbose: bool) -> None:
    """Carry the run on, unless an operator does or we may not; exit as it ended."""
    from launcher import submit as remote
    from launcher.doctor.cluster_checks import SPARE, missing_rights
    from launcher.operator.controller import say_lines

    missing = [
        f"{', '.join(verbs)} {resource}"
        for resource, verbs in missing_rights(cluster, record.namespace, not record.is_config_map)
        if resource not in SPARE
    ]
    if missing and record.is_config_map:
        fix = "bind the role prism-driver (k8s/rbac.yaml); `prism doctor` shows all that is missing"
        fail(LAUNCHER_ERROR, output, f"you may not {'; '.join(missing)}", f"namespace {record.namespace}", fix)
    if missing:
        _say(f"you may not {'; '.join(missing)}: waiting for an operator to carry the run on")
        _exit_as_it_ended(cluster, record, timeout, output)
    with remote.driven_here(cluster, record, say_lines if verbose else _say_trouble()):
        _exit_as_it_ended(cluster, record, timeout, output)


def _say_trouble() -> Callable[..., None]:
    """Of what the loop says, what keeps it from going on: said once, at the third time, since a conflict or two is nothing.

    An API server that does not answer is not said here: whoever waits for the record says so.
    """
    times: Counter[str] = Counter()

    def say(*, event: str = "", error: str = "", transient: bool = False, **_: object) -> None:
        if event in ("watch", "retry") and error.strip() and not transient:
            line = f"{event}: {error.strip().splitlines()[-1]}"
            times[line] += 1
            if times[line] == 3:
                _say(line)

    return say


def _exit_as_it_ended(cluster: Cluster, record: Record, timeout: float | None, output: Output) -> None:
    from launcher import submit as remote

    said: list[str] = []

    def show(found: Record) -> None:
        line = f"{found.status.phase}{f': {found.status.message}' if found.status.message else ''}"
        is_of_this_round = found.status.round >= found.round
        if is_of_this_round and said[-1:] != [line]:
            said.append(line)
            _say(" ".join(line.split()))

    def stay() -> Record | None:
        return remote.wait_until(
            cluster, record, remote.has_ended, timeout_seconds=timeout, on_change=show, on_outage=_say
        )

    try:
        ended = _detaching(stay, record)
    except TimeoutError:
        fail(NOT_FINISHED, output, f"not finished within {timeout:g} s", record.name, f"prism wait {record.name}")
    if ended is None:
        fail(NOT_FOUND, output, "the run was deleted", f"{record.namespace}/{record.name}", "submit it again")
    facts = remote.outcome(ended)
    print_facts(facts, output, table=facts["manifest"] or f"{record.name}: {facts['phase']}")
    sys.exit(_exit_code(ended))


def _exit_code(ended: Record) -> int:
    return {"Complete": 0, "Cancelled": CANCELLED}.get(ended.status.phase, RUN_FAILED)


def _ended(cluster: Cluster, record: Record, timeout_seconds: float) -> Record | None:
    """The record at its end; a record without an operator is carried there by us."""
    from launcher import submit as remote

    with contextlib.ExitStack() as stack:
        if record.is_config_map or record.status.driver == "client":
            stack.enter_context(remote.driven_here(cluster, record))
        try:
            return remote.wait_until(cluster, record, remote.has_ended, timeout_seconds=timeout_seconds, on_outage=_say)
        except TimeoutError:
            return record


def _detaching(act: Callable[[], T], record: Record) -> T:
    """Ctrl-C and SIGTERM leave, and say how to come back."""
    import signal

    def leave(number: int, _: object) -> None:
        raise _Left(number)

    # In a pod we are process 1, which SIGTERM does not end by itself.
    before = signal.signal(signal.SIGTERM, leave)
    try:
        return act()
    except (KeyboardInterrupt, _Left) as left:
        back = f"prism wait {record.name} -n {record.namespace}"
        if record.is_config_map:
            back = "submit the document again, with --wait (nobody carries the run on meanwhile)"
        _say(f"left; what runs goes on. Come back: {back}")
        sys.exit(128 + left.number if isinstance(left, _Left) else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Left(BaseException):
    """A signal asked us to leave."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


def _say(line: str) -> None:
    from launcher.follow.display import printable

    print(printable(line), file=sys.stderr, flush=True)


def _now() -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
