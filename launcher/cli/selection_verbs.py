"""The verbs that take a finished selection by its manifest: how good it is, why, what changed, and its rows for training."""

from typing import Annotated

import typer

from launcher.cli.exit_codes import GATE_FAILED
from launcher.cli.job import Facts, print_verb, report_of, run_verb, words_of
from launcher.cli.options import DiffOutput, ExportFormat, ManifestArgument, Output, OutputOption, VerboseOption
from launcher.cli.printing import print_facts, print_note
from launcher.follow.metrics_table import metrics_table


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
    given = words_of({"--label": label, "--positive": positive, "--target-label": target_label})
    print_verb(context, "evaluate", [manifest, *given], output, verbose, metrics_table)
    print_note(f"report: {report_of(manifest)}")


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
    given = words_of(
        {
            "--format": to_format,
            "--weight-column": weight_column,
            "--score-column": score_column,
            "--card": card,
            "--no-card": card is False,
            "--public": public,
        }
    )
    print_verb(context, "export", [manifest, destination, *given], output, verbose, _exported)


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

    facts = run_verb(context, "diff", [old, new], verbose)
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
    examples: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXAMPLE]...", help="Candidates: FILE:LINE, an example id, or the beginning of one."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also the N highest scores. Default: 3 without EXAMPLE.")
    ] = None,
    bottom: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also the N lowest scores. Default: 3 without EXAMPLE.")
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

    if pair is not None and examples:
        raise typer.BadParameter("give examples or --pair, not both")
    default = 0 if examples or (top, bottom) != (None, None) else 3
    top, bottom = (default if count is None else count for count in (top, bottom))
    given = words_of({"--top": top, "--bottom": bottom, "--pairs": pairs, "--pair": pair})
    print_verb(context, "explain", [manifest, *(examples or ()), *given], output, verbose, explain_text)
