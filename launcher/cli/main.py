"""The command `prism`: verbs, options, exit codes. No logic; every verb imports what it needs when it is called.

The verbs that talk to a cluster are in cluster_cli.py. Exit codes: 0 done, 1 launcher error, 2 usage, 3 preflight,
100 run failed, 101 not finished, 102 not found, 103 cancelled, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from launcher.cli.cluster_verbs import add_verbs
from launcher.cli.output import FileArgument, Output, OutputOption, VerboseOption, exit_codes, print_facts, read_text

# Plain help texts: rich would double the time that --help takes.
app = typer.Typer(
    name="prism",
    help="Select fine-tuning data by preference-aware influence functions.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
store_app = typer.Typer(
    help="Look at a gradient store, and remove what no kept selection needs.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(store_app, name="store")
add_verbs(app)


ManifestArgument = Annotated[str, typer.Argument(metavar="MANIFEST", help="Path or s3:// address of manifest.json.")]

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Path or s3:// address: spec.store.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="OUTPUT", help="Keep what manifests below this spec.output need; repeatable."),
]


def main(arguments: Sequence[str] | None = None, *, job: Sequence[str] | None = None) -> None:
    """Run the command and exit. `job`: another command than `python -m prism_job` to start the stages with."""
    app(args=arguments, obj=job, prog_name="prism")


def _print_version(asked: bool) -> None:
    if asked:
        from prism_job import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _prism(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    file: FileArgument,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Run the document on this machine: plan, extract, reduce. Prints where the manifest is."""
    with exit_codes(output):
        from launcher.follow import display
        from launcher.local import stages

        text = read_text(file)
        with display.open_display(plain=verbose) as shown:
            facts = stages.run_stages(text, file.name, shown, job=context.obj or stages.JOB, verbose=verbose)
    print_facts(facts, output, table=facts["manifest"])


@app.command()
def evaluate(
    context: typer.Context,
    manifest: ManifestArgument,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Column of the candidates that says good or bad; else spec.evaluation's, or 'label'."
        ),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(metavar="VALUE", help="Its value that means good; else 1, true and yes do.")
    ] = None,
    target_label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the targets that says which pairs are right.")
    ] = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Compare a selection's ranking with a label, beside the plain loss; and π with the targets'. Intervals are 95 %."""
    options = {"--label": label, "--positive": positive, "--target-label": target_label}
    chosen = [word for name, value in options.items() if value is not None for word in (name, value)]
    metrics = _ask("evaluate", [manifest, *chosen], context, output, verbose)
    from launcher.follow.metrics_table import metrics_table

    print_facts(metrics, output, table=metrics_table(metrics))


@app.command()
def report(
    context: typer.Context,
    manifest: ManifestArgument,
    open_it: Annotated[
        bool, typer.Option("--open", help="Also open it in the browser, if it is on this disk.")
    ] = False,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Print where a selection's report.html is."""
    facts = _ask("report", [manifest], context, output, verbose)
    print_facts(facts, output, table=facts["report"])
    if open_it:
        from launcher.follow.display import open_in_browser

        open_in_browser(facts["report"])


@app.command()
def export(
    context: typer.Context,
    manifest: ManifestArgument,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="Path or s3:// address ending in .jsonl, .jsonl.gz, .jsonl.zst or .parquet."
        ),
    ],
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Write the selected examples, with all their columns, to a file. Prints where it is."""
    facts = _ask("export", [manifest, destination], context, output, verbose)
    print_facts(facts, output, table=facts["written"])


@app.command()
def estimate(
    context: typer.Context,
    file: FileArgument,
    gpu: Annotated[str, typer.Option(metavar="TYPE", help="A100-80GB, H100, H200, L4 or L40S.")] = "H100",
    utilisation: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the card's published peak that is reached.")
    ] = 0.35,
    sample: Annotated[
        int, typer.Option(metavar="N", help="Tokenise one row in N and scale; 1 counts all of them.")
    ] = 1,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Say what a run will cost, from the document, the model's config and the data. Needs no weights."""
    with exit_codes(output):
        from launcher.local import stages

        with stages.checked_copy(read_text(file), file.name) as document:
            options = ["--gpu", gpu, "--utilisation", str(utilisation), "--sample", str(sample)]
            facts = _ask("estimate", ["--spec", document, *options], context, output, verbose)
    from launcher.follow.tables import estimate_table

    print_facts(facts, output, table=estimate_table(facts))


@store_app.command("list")
def store_list(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Units and rows by extractor digest, and how many kept selections need them."""
    facts = _ask("store", ["list", store, *_keeps(keep)], context, output, verbose)
    from launcher.follow.tables import store_table

    print_facts(facts, output, table=store_table(facts))


@store_app.command("du")
def store_du(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Bytes by extractor digest and part."""
    facts = _ask("store", ["du", store, *_keeps(keep)], context, output, verbose)
    from launcher.follow.tables import bytes_table

    print_facts(facts, output, table=bytes_table(facts))


@store_app.command("prune")
def store_prune(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    older_than: Annotated[
        float, typer.Option(metavar="HOURS", help="Younger objects are never removed: a run may be going on.")
    ] = 24.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove. Without it, only say what would be removed.")] = False,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Remove what no kept selection needs. A dry run unless --yes is given."""
    options = ["--older-than", str(older_than), *(["--yes"] if yes else [])]
    facts = _ask("store", ["prune", store, *_keeps(keep), *options], context, output, verbose)
    from launcher.follow.tables import prune_table

    print_facts(facts, output, table=prune_table(facts))


def _keeps(keep: list[str] | None) -> list[str]:
    return [word for uri in keep or () for word in ("--keep", uri)]


def _ask(verb: str, arguments: list[str], context: typer.Context, output: Output, verbose: bool) -> dict[str, Any]:
    """Run a verb of the job that has no bars; its facts without the envelope."""
    with exit_codes(output):
        from launcher.follow import display
        from launcher.local import stages

        job = context.obj or stages.JOB
        stages.refuse_missing_packages(job)
        with stages.Signals() as signals:
            words = stages.run_verb(verb, arguments, display.Silent(), signals, job=job, verbose=verbose)
    return {key: value for key, value in words.items() if key not in ("event", "time", "verb")}


if __name__ == "__main__":
    main()
