"""The verbs that run the job on this machine: the stages, and one call each of `python -m prism_job <verb>`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.exit_codes import GATE_FAILED
from launcher.cli.options import (
    DiffOutput,
    ExportFormat,
    FileArgument,
    KeepOption,
    LossOn,
    ManifestArgument,
    Output,
    OutputOption,
    StoreArgument,
    VerboseOption,
    read_text,
)
from launcher.cli.printing import print_facts, print_note
from launcher.follow.estimate_table import estimate_table
from launcher.follow.inspect_text import inspect_text
from launcher.follow.metrics_table import metrics_table
from launcher.follow.store_tables import bytes_table, prune_table, store_table

Facts = dict[str, Any]


def run(
    context: typer.Context,
    file: FileArgument,
    open_report: Annotated[
        bool, typer.Option("--open", help="Open report.html in the browser, if it is on this disk.")
    ] = False,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Run a selection on this machine: plan, extract, reduce. Prints the location of manifest.json."""
    from launcher.follow.bars import open_display
    from launcher.local import stages

    text = read_text(file)
    with open_display(plain=verbose) as display:
        facts = stages.run_stages(text, file.name, display, job=context.obj or stages.JOB, verbose=verbose)
    print_facts(facts, output, table=facts["manifest"])
    report = _report_of(facts["manifest"])
    print_note(f"report: {report}")
    if open_report:
        _open_in_browser(report)


def evaluate(
    context: typer.Context,
    manifest: ManifestArgument,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Candidates' column of labels. Default: spec.evaluation.label or 'label'."),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(metavar="VALUE", help="The label's value that means good. Default: 1, true or yes.")
    ] = None,
    target_label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Targets' column that labels pairs as correct.")
    ] = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Compare a selection's ranking with labels. Also ranks by the plain loss; intervals are 95 %."""
    options = {"--label": label, "--positive": positive, "--target-label": target_label}
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    _run_verb(context, "evaluate", [manifest, *given], output, verbose, metrics_table)
    print_note(f"report: {_report_of(manifest)}")


def export(
    context: typer.Context,
    manifest: ManifestArgument,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST",
            help="Path or s3:// URI ending in .jsonl, .jsonl.gz, .jsonl.zst or .parquet, or hf://datasets/ORG/NAME[/PATH].",
        ),
    ],
    to_format: Annotated[
        ExportFormat | None,
        typer.Option(
            "--format", help="Write the training content alone, in this format. Default: the candidates' own rows."
        ),
    ] = None,
    weight_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add a training weight: 1 for the best of n rows to 1/n for the last."),
    ] = None,
    score_column: Annotated[str | None, typer.Option(metavar="NAME", help="Add the score.")] = None,
    card: Annotated[
        bool | None,
        typer.Option(
            "--card/--no-card",
            show_default=False,
            help="README.md and croissant.json beside it. Default: on the hub only.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a data set that is created on the hub public. Default: private.")
    ] = False,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Write the selected examples to a file or push them to the Hugging Face hub. Prints their location."""
    options = {"--format": to_format, "--weight-column": weight_column, "--score-column": score_column}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    given += [] if card is None else ["--card" if card else "--no-card"]
    given += ["--public"] if public else []
    _run_verb(context, "export", [manifest, destination, *given], output, verbose, _exported)


def _exported(facts: Facts) -> str:
    for note in facts.get("notes", ()):
        print_note(f"note: {note}")
    if facts.get("unchanged"):
        print_note("nothing was committed: the data set holds all of it already")
    return str(facts["written"])


def diff(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Path or s3:// URI of the manifest.json before.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Path or s3:// URI of the manifest.json now.")],
    max_churn: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Exit with code 104 if churn is above it: (added + removed) / (selected before + selected now).",
        ),
    ] = None,
    output: Annotated[DiffOutput, typer.Option("--output", "-o", help="Output format.")] = DiffOutput.table,
    verbose: VerboseOption = False,
) -> None:
    """Compare two selections: examples added, removed and kept, and which inputs changed."""
    from launcher.follow.selections.diff_text import diff_markdown, diff_table
    from launcher.local import stages

    facts = stages.run_verb("diff", [old, new], job=context.obj or stages.JOB, verbose=verbose)
    exceeds = max_churn is not None and facts["churn"] > max_churn
    if max_churn is not None:
        facts |= {"max_churn": max_churn, "gate": "failed" if exceeds else "passed"}
    texts = {DiffOutput.table: diff_table, DiffOutput.markdown: diff_markdown}
    if output in texts:
        print_facts(facts, Output.table, table=texts[output](facts))
    else:
        print_facts(facts, Output(output), table="")
    if exceeds:
        print_note(f"error: churn {facts['churn']:.4f} is above --max-churn {max_churn:g}")
        raise typer.Exit(GATE_FAILED)


def explain(
    context: typer.Context,
    manifest: ManifestArgument,
    example_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[EXAMPLE_ID]...", help="Ids of candidates, from scores.parquet.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also the N highest scores. Default: 3 without ids.")
    ] = None,
    bottom: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also the N lowest scores. Default: 3 without ids.")
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pairs listed for each example, the largest first; 0: all.")
    ] = 3,
    pair: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Instead, the examples that target pair N raises and lowers most. Pairs count from 1, as in the report.",
        ),
    ] = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Show which target pairs an example's score comes from. Contributions add up to the score."""
    from launcher.follow.selections.explain_text import explain_text

    if pair is not None and example_ids:
        raise typer.BadParameter("give example ids or --pair, not both")
    default = 0 if example_ids or (top, bottom) != (None, None) else 3
    ends = [str(default if count is None else count) for count in (top, bottom)]
    options = ["--top", ends[0], "--bottom", ends[1], "--pairs", str(pairs)]
    options += [] if pair is None else ["--pair", str(pair)]
    _run_verb(context, "explain", [manifest, *(example_ids or ()), *options], output, verbose, explain_text)


def estimate(
    context: typer.Context,
    file: FileArgument,
    gpu: Annotated[str, typer.Option(metavar="TYPE", help="A100-80GB, H100, H200, L4 or L40S.")] = "H100",
    utilisation: Annotated[
        float, typer.Option(metavar="SHARE", help="Expected speed as a share of the GPU's published peak.")
    ] = 0.35,
    sample: Annotated[int, typer.Option(metavar="N", help="Tokenise one row in N and scale up; 1: all rows.")] = 1,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Estimate tokens, GPU memory and GPU hours of a run. Reads the document, the model's config and the data."""
    from launcher.local import stages

    with stages.checked_copy(read_text(file), file.name) as document:
        options = ["--gpu", gpu, "--utilisation", str(utilisation), "--sample", str(sample)]
        _run_verb(context, "estimate", ["--spec", document, *options], output, verbose, estimate_table)


def inspect(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="selection.yaml; or data files, folders, s3:// or hf:// URIs."),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id, folder, s3:// URI or .gguf: shows the tokens with loss."),
    ] = None,
    targets: Annotated[bool, typer.Option("--targets", help="Read the rows as targets: chosen and rejected.")] = False,
    columns: Annotated[
        str | None,
        typer.Option(metavar="YAML", help="As in the document: 'prompt: question, completion: answer'."),
    ] = None,
    loss_on: Annotated[LossOn | None, typer.Option(help="Turns that carry loss. Default: assistant.")] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="TOKENS", min=2, help="Longer texts are cut. Default: 2048.")
    ] = None,
    rows: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows shown of each file. Default: 3.")] = None,
    line: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Show this line, and with --rows those after it.")
    ] = None,
    read_all: Annotated[bool, typer.Option("--all", help="Read all rows: count layouts and unusable rows.")] = False,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Show the first rows as a run reads them: layout, rendered text, which tokens carry loss, what is unusable and why."""
    from launcher.local import stages

    of_files = {"--model": model, "--columns": columns, "--loss-on": loss_on, "--max-length": max_length}
    given = [word for name, value in of_files.items() if value is not None for word in (name, str(value))]
    given += ["--targets"] if targets else []
    shown = ["--rows", str(rows or (1 if line else 3)), *(["--line", str(line)] if line else [])]
    shown += ["--all"] if read_all else []
    if any(source.endswith((".yaml", ".yml")) for source in sources):
        if len(sources) > 1 or given:
            raise typer.BadParameter("a selection.yaml stands alone: the document has its sources, model and settings")
        with stages.checked_copy(_read_document(sources[0]), sources[0]) as document:
            facts = _run(context, "inspect", ["--spec", document, *shown], verbose)
    else:  # after --: a file's name may begin with a dash
        facts = _run(context, "inspect", [*given, *shown, "--", *sources], verbose)
    print_facts(facts, output, table=inspect_text(facts) if output is Output.table else "", has_marks=True)


def _read_document(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error


def store_list(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """List units and rows by extractor digest, and how many kept selections need them."""
    _run_verb(context, "store", ["list", store, *_keep_options(keep)], output, verbose, store_table)


def store_du(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Show disk use by extractor digest and part."""
    _run_verb(context, "store", ["du", store, *_keep_options(keep)], output, verbose, bytes_table)


def store_prune(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    older_than: Annotated[
        float, typer.Option(metavar="HOURS", help="Never remove younger objects: a run may still be writing.")
    ] = 24.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove. Without it, only list what would be removed.")] = False,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Delete shards and staged rows that the selections under --keep do not need. A dry run unless --yes is given."""
    options = ["--older-than", str(older_than), *(["--yes"] if yes else [])]
    _run_verb(context, "store", ["prune", store, *_keep_options(keep), *options], output, verbose, prune_table)


def _run_verb(
    context: typer.Context,
    verb: str,
    arguments: list[str],
    output: Output,
    verbose: bool,
    table_of: Callable[[Facts], str],
) -> None:
    """Run one verb of the job and print its facts."""
    facts = _run(context, verb, arguments, verbose)
    print_facts(facts, output, table=table_of(facts) if output is Output.table else "")


def _run(context: typer.Context, verb: str, arguments: list[str], verbose: bool) -> Facts:
    from launcher.local import stages

    return stages.run_verb(verb, arguments, job=context.obj or stages.JOB, verbose=verbose)


def _keep_options(keep: list[str] | None) -> list[str]:
    return [word for uri in keep or () for word in ("--keep", uri)]


def _report_of(manifest: str) -> str:
    """The report that was published beside a manifest."""
    folder, separator, _ = manifest.rpartition("/")
    return f"{folder}{separator}report.html"


def _open_in_browser(address: str) -> None:
    if "://" in address:
        print_note("not opened: the report is not on this disk")
        return
    import webbrowser

    webbrowser.open(Path(address).resolve().as_uri())
