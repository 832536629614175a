"""The command `prism`: verbs, options, exit codes. No logic; every verb imports what it needs when it is called.

Data on stdout, words on stderr. Exit codes: 0 done, 1 launcher error, 2 usage, 3 preflight, 100 run failed,
130 and 143 stopped by Ctrl-C and SIGTERM (DESIGN, section 8).
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer

LAUNCHER_ERROR = 1
PREFLIGHT = 3
RUN_FAILED = 100

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


class Output(enum.StrEnum):
    """How data are written on stdout."""

    table = "table"
    json = "json"
    yaml = "yaml"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Form of what is printed on stdout.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Let the job's own stderr through.")]
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
    file: Annotated[
        typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="selection.yaml; - reads stdin.")
    ],
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Run the document on this machine: plan, extract, reduce. Prints where the manifest is."""
    with _exit_codes(output):
        from launcher import display, local

        text = _read(file)
        with display.open_display(plain=verbose) as shown:
            facts = local.run_stages(text, file.name, shown, job=context.obj or local.JOB, verbose=verbose)
    _print(facts, output, table=facts["manifest"])


@app.command()
def evaluate(
    context: typer.Context,
    manifest: ManifestArgument,
    label: Annotated[
        str, typer.Option(metavar="COLUMN", help="Column of the candidates that says good or bad.")
    ] = "label",
    positive: Annotated[
        str | None, typer.Option(metavar="VALUE", help="Its value that means good; else 1, true and yes do.")
    ] = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Compare a selection's ranking with a label, beside the plain loss. Intervals are 95 %."""
    chosen = ["--label", label] + (["--positive", positive] if positive is not None else [])
    metrics = _ask("evaluate", [manifest, *chosen], context, output, verbose)
    from launcher.display import metrics_table

    _print(metrics, output, table=metrics_table(metrics))


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
    _print(facts, output, table=facts["report"])
    if open_it:
        from launcher.display import open_in_browser

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
    _print(facts, output, table=facts["written"])


@app.command()
def estimate(
    context: typer.Context,
    file: Annotated[
        typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="selection.yaml; - reads stdin.")
    ],
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
    with _exit_codes(output):
        from launcher import local

        with local.checked_copy(_read(file), file.name) as document:
            options = ["--gpu", gpu, "--utilisation", str(utilisation), "--sample", str(sample)]
            facts = _ask("estimate", ["--spec", document, *options], context, output, verbose)
    from launcher.tables import estimate_table

    _print(facts, output, table=estimate_table(facts))


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
    from launcher.tables import store_table

    _print(facts, output, table=store_table(facts))


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
    from launcher.tables import bytes_table

    _print(facts, output, table=bytes_table(facts))


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
    from launcher.tables import prune_table

    _print(facts, output, table=prune_table(facts))


def _keeps(keep: list[str] | None) -> list[str]:
    return [word for uri in keep or () for word in ("--keep", uri)]


def _ask(verb: str, arguments: list[str], context: typer.Context, output: Output, verbose: bool) -> dict[str, Any]:
    """Run a verb of the job that has no bars; its facts without the envelope."""
    with _exit_codes(output):
        from launcher import display, local

        job = context.obj or local.JOB
        local.refuse_missing_packages(job)
        with local.Signals() as signals:
            words = local.run_verb(verb, arguments, display.Silent(), signals, job=job, verbose=verbose)
    return {key: value for key, value in words.items() if key not in ("event", "time", "verb")}


def _read(file: typer.FileText) -> str:
    from prism_job.errors import SpecError

    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise SpecError(f"the document is not UTF-8 text: {error}", where=file.name, fix="save it as UTF-8") from error


@contextlib.contextmanager
def _exit_codes(output: Output) -> Iterator[None]:
    """Errors become three readable lines and an exit code; this is the only place."""
    from launcher.display import printable
    from launcher.local import NotInstalledError, StageError, StopError
    from prism_job.errors import SpecError

    try:
        yield
    except SpecError as error:
        _fail(PREFLIGHT, output, error.what, error.where, error.fix, stage="preflight")
    except NotInstalledError as error:
        _fail(LAUNCHER_ERROR, output, str(error), sys.executable, "pip install 'prism-selection[job]'")
    except StageError as error:
        for line in error.tail:
            print(printable(line), file=sys.stderr)
        _fail(RUN_FAILED, output, error.what, error.where, error.fix, stage=error.stage, stage_exit=error.exit_code)
    except StopError as error:
        kept = "; finished units are kept; run the same command again to go on" if error.is_stage else ""
        print(f"stopped{kept}", file=sys.stderr)
        sys.exit(128 + error.number)


def _fail(
    code: int, output: Output, what: str, where: str, fix: str, stage: str | None = None, stage_exit: int | None = None
) -> NoReturn:
    from launcher.display import printable

    print(printable(f"error: {what}\n  where: {where}\n  to do: {fix}"), file=sys.stderr)
    if output is not Output.table:
        failure = {"error": what, "where": where, "fix": fix, "stage": stage, "stageExitCode": stage_exit}
        _print(failure, output, table="")
    sys.exit(code)


def _print(facts: dict[str, Any], output: Output, *, table: str) -> None:
    if output is Output.json:
        try:
            print(json.dumps(facts, ensure_ascii=False))
        except UnicodeEncodeError:  # half of a surrogate pair, from a column's name say: written out
            print(json.dumps(facts))
    elif output is Output.yaml:
        import yaml

        print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), end="")
    else:
        print(table)


if __name__ == "__main__":
    main()
