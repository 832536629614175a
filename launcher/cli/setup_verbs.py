"""The verbs that prepare a cluster, and what PRISM puts into it: doctor, render, schedule, crd, operator."""

import os
import sys
from typing import Annotated

import typer

from launcher.cli.exit_codes import PREFLIGHT_FAILED
from launcher.cli.options import ContextOption, DryRun, FileArgument, NamespaceOption, Output, OutputOption, read_text
from launcher.cli.printing import print_facts, print_note, yaml_documents
from launcher.cli.waiting import connect, print_warnings


def doctor(
    file: Annotated[
        typer.FileText | None,
        typer.Argument(metavar="FILE", encoding="utf-8", help="selection.yaml: also check what this run needs."),
    ] = None,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Test the buckets from a Job with the pods' own credentials.")
    ] = True,
    output: OutputOption = Output.table,
) -> None:
    """Check that a cluster is ready for runs. Exits with 3 if a check finds an error."""
    from launcher import submit as remote
    from launcher.doctor.cluster_checks import examine
    from launcher.doctor.findings import findings_table

    document = remote.read_document(read_text(file), file.name, namespace) if file else None
    cluster = connect(context)
    run, namespace = (document.run, document.namespace) if document else (None, namespace)
    probe = probe and run is not None
    if probe:
        print_note("testing the buckets from a Job; this may pull its image first (--no-probe skips it)")
    findings = examine(cluster, namespace or cluster.namespace, run, probe=probe)
    print_facts({"findings": [vars(finding) for finding in findings]}, output, table=findings_table(findings))
    if any(finding.level == "error" for finding in findings):
        sys.exit(PREFLIGHT_FAILED)


def render(
    file: FileArgument,
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    dry_run: Annotated[
        DryRun, typer.Option(help="server: validate every object on the API server; creates nothing.")
    ] = DryRun.client,
    output: OutputOption = Output.yaml,
) -> None:
    """Print the Kubernetes objects of a run's first attempts. Needs no cluster unless --dry-run=server."""
    from launcher import submit as remote
    from launcher.render.run_objects import run_objects

    document = remote.read_document(read_text(file), file.name, namespace)
    cluster = connect(context) if dry_run is DryRun.server else None
    objects = run_objects(document.run, document.namespace or (cluster.namespace if cluster else "default"))
    if cluster:
        for manifest in objects:
            cluster.apply(manifest, dry_run=True)
        print_warnings(cluster)
        print_note(f"the API server accepts all {len(objects)} objects")
    if output is Output.json:
        print_facts({"apiVersion": "v1", "kind": "List", "items": objects}, output, table="")
    else:
        print(yaml_documents(objects), end="")


def schedule(
    file: FileArgument,
    cron: Annotated[str, typer.Option(metavar="EXPRESSION", help="Cron schedule: '0 3 * * *' or @daily.")],
    image: Annotated[str, typer.Option(metavar="IMAGE", help="Launcher image, preferably pinned by digest.")],
    namespace: NamespaceOption = "",
    context: ContextOption = None,
    time_zone: Annotated[
        str | None, typer.Option(metavar="ZONE", help="Time zone, e.g. Europe/Berlin. Default: the cluster's.")
    ] = None,
    service_account: Annotated[
        str, typer.Option(metavar="NAME", help="Service account with the role prism-driver (k8s/rbac.yaml).")
    ] = "prism-driver",
    apply: Annotated[bool, typer.Option("--apply", help="Apply it to the cluster instead of printing it.")] = False,
) -> None:
    """Print or apply a CronJob that submits a run. Its pod runs `prism submit --wait`."""
    from launcher import submit as remote
    from launcher.render.cron_job import cron_job

    document = remote.read_document(read_text(file), file.name, namespace)
    cluster = connect(context) if apply else None
    objects = cron_job(
        document.run,
        document.text,
        document.namespace or (cluster.namespace if cluster else "default"),
        cron,
        image=image,
        service_account=service_account,
        time_zone=time_zone,
    )
    if cluster is None:
        print(yaml_documents(objects), end="")
        return
    for manifest in objects:  # a schedule that the API server refuses must not leave a new document to the old CronJob
        cluster.apply(manifest, dry_run=True)
    for manifest in objects:
        cluster.apply(manifest)
        print(f"{manifest['kind'].lower()}/{manifest['metadata']['name']}")
    print_warnings(cluster)


def crd() -> None:
    """Print the CustomResourceDefinition of SelectionRun."""
    from launcher.resource.crd import to_yaml

    print(to_yaml(), end="")


def operator(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", metavar="NAME", help="Only this namespace. Default: all.")
    ] = "",
    context: ContextOption = None,
    port: Annotated[int, typer.Option(help="Port of /healthz, /readyz and /metrics.")] = 8080,
    webhook_url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="PRISM_WEBHOOK_URL",
            help="POST the end of each run there, signed with PRISM_WEBHOOK_SECRET if that is set.",
        ),
    ] = "",
) -> None:
    """Run the operator: reconcile every SelectionRun until SIGTERM. With several replicas, one works at a time."""
    from launcher.kube.cluster import Cluster
    from launcher.operator.process import run_operator
    from launcher.operator.webhook import Webhook

    try:
        webhook = Webhook(webhook_url, os.environ.get("PRISM_WEBHOOK_SECRET", "")) if webhook_url else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--webhook-url") from error
    cluster = Cluster(context)
    own_namespace = os.environ.get("POD_NAMESPACE") or cluster.namespace
    sys.exit(run_operator(cluster, namespace or None, port, own_namespace, webhook))
