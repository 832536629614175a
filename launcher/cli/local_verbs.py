"""The verbs of a run on this machine: look at its data, predict its cost, run it, and look after its store."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.job import print_verb, report_of, run_verb, words_of
from launcher.cli.options import (
    FileArgument,
    KeepOption,
    LossOn,
    Output,
    OutputOption,
    StoreArgument,
    VerboseOption,
    read_text,
)
from launcher.cli.printing import print_facts, print_note
from launcher.follow.estimate_table import estimate_table
from launcher.follow.inspect_text import inspect_text
from launcher.follow.store_tables import bytes_table, prune_table, store_table


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
    from prism_job.spec.document import parse_spec

    text = read_text(file)
    with open_display(plain=verbose) as display:
        facts = stages.run_stages(text, file.name, display, job=context.obj or stages.JOB, verbose=verbose)
    print_facts(facts, output, table=facts["manifest"])
    report = report_of(facts["manifest"])
    print_note(f"report: {report}")
    if not parse_spec(text, file.name).spec.scoring.is_forward_only:
        print_note(
            f"both ends of the ranking, and the pairs behind them: prism explain {shlex.quote(facts['manifest'])}"
        )
    if open_report:
        _open_in_browser(report)


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
        options = words_of({"--gpu": gpu, "--utilisation": utilisation, "--sample": sample})
        print_verb(context, "estimate", ["--spec", document, *options], output, verbose, estimate_table)


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

    given = words_of(
        {
            "--model": model,
            "--columns": columns,
            "--loss-on": loss_on,
            "--max-length": max_length,
            "--targets": targets,
        }
    )
    shown = words_of({"--rows": rows or (1 if line else 3), "--line": line, "--all": read_all})
    if any(source.endswith((".yaml", ".yml")) for source in sources):
        if len(sources) > 1 or given:
            raise typer.BadParameter("a selection.yaml stands alone: the document has its sources, model and settings")
        with stages.checked_copy(_read_document(sources[0]), sources[0]) as document:
            facts = run_verb(context, "inspect", ["--spec", document, *shown], verbose)
    else:  # after --: a file's name may begin with a dash
        facts = run_verb(context, "inspect", [*given, *shown, "--", *sources], verbose)
    print_facts(facts, output, table=inspect_text(facts) if output is Output.table else "", has_marks=True)


def init(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The document to write.")] = Path("selection.yaml"),
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Hub id, folder, s3:// URI or .gguf of the model to tune.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Candidates: files, folders, s3:// or hf://. Repeatable.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Pairs. A file that is not there yet: how to write it is shown."),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Write a commented selection.yaml from three answers, after a look at the data. Asks for what is not given."""
    from launcher.local.new_document import are_small, name_of, new_document, unusable_rows_advice
    from prism_job.spec.data import HOW_TO_WRITE_PAIRS
    from prism_job.spec.document import parse_spec

    if file.exists() or not file.parent.is_dir():
        what = "is there already" if file.exists() else "has no folder"
        raise typer.BadParameter(f"{file} {what}: name another FILE")
    missing = {"--model": not model, "--data": not data, "--targets": not targets}
    if any(missing.values()) and not sys.stdin.isatty():
        options = ", ".join(option for option, is_missing in missing.items() if is_missing)
        raise typer.BadParameter(f"give {options}: there is no terminal to ask in")
    model = model or _ask("Model (hub id, folder or .gguf)")
    data = data or shlex.split(_ask("Candidates (files, folders, s3:// or hf://)"))
    targets = targets or _ask("Pairs (a file that you will write is fine)")
    text = new_document(name_of(data[0]), model, data, [targets], has_gpu=shutil.which("nvidia-smi") is not None)
    max_bad_fraction = parse_spec(text, str(file)).spec.candidates.max_bad_fraction
    has_pairs = "://" in targets or Path(targets).exists()
    following = [f"prism estimate {shlex.quote(str(file))} && prism run {shlex.quote(str(file))}"]
    for role, sources in (("candidates", data), ("targets", [targets] if has_pairs else [])):
        if sources:
            files = {"--targets": role == "targets", "--rows": 1, "--all": are_small(sources)}
            words = words_of({"--model": model, **files})
            facts = run_verb(context, "inspect", [*words, "--", *sources], verbose)
            print_note(inspect_text(facts) + "\n")
            advice = unusable_rows_advice(facts, role, max_bad_fraction, str(file))
            following[:0] = [advice] if advice else []
    with file.open("x", encoding="utf-8") as document:
        document.write(text)
    if not has_pairs:
        print_note(f"Pairs are to come: {HOW_TO_WRITE_PAIRS}\n")
        following.insert(0, f"write {targets}")
    print_note(f"next: {'; then '.join(following)}")
    print(file)


def _ask(question: str) -> str:
    return str(typer.prompt(question, err=True))


def _read_document(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return read_text(file)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error


def store_list(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """List units and rows by extractor digest, and how many kept selections need them."""
    print_verb(context, "store", ["list", store, *_keep_options(keep)], output, verbose, store_table)


def store_du(
    context: typer.Context,
    store: StoreArgument,
    keep: KeepOption = None,
    output: OutputOption = Output.table,
    verbose: VerboseOption = False,
) -> None:
    """Show disk use by extractor digest and part."""
    print_verb(context, "store", ["du", store, *_keep_options(keep)], output, verbose, bytes_table)


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
    options = words_of({"--older-than": older_than, "--yes": yes})
    print_verb(context, "store", ["prune", store, *_keep_options(keep), *options], output, verbose, prune_table)


def _keep_options(keep: list[str] | None) -> list[str]:
    return [word for uri in keep or () for word in ("--keep", uri)]


def _open_in_browser(address: str) -> None:
    if "://" in address:
        print_note("not opened: the report is not on this disk")
        return
    import webbrowser

    webbrowser.open(Path(address).resolve().as_uri())
