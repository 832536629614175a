"""One call of `python -m prism_job <verb>` on this machine: its options as words, its facts, and how they are printed."""

from collections.abc import Callable, Iterator
from typing import Any

import typer

from launcher.cli.options import Output
from launcher.cli.printing import print_facts

Facts = dict[str, Any]


def words_of(options: dict[str, str | float | bool | None]) -> list[str]:
    """The options that are given, as words of a command. None and False: not given. True: a flag."""
    words: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [name] if value is True else [name, str(value)]
    return words


def run_verb(context: typer.Context, verb: str, arguments: list[str], verbose: bool) -> Facts:
    """Run one verb of the job. Returns its facts."""
    from launcher.local import stages

    return stages.run_verb(verb, arguments, job=context.obj or stages.JOB, verbose=verbose)


def stream_verb(context: typer.Context, verb: str, arguments: list[str]) -> Iterator[Facts]:
    """The events of one verb of the job, as it writes them."""
    from launcher.local import stages

    return stages.stream_verb(verb, arguments, job=context.obj or stages.JOB)


def print_verb(
    context: typer.Context,
    verb: str,
    arguments: list[str],
    output: Output,
    verbose: bool,
    table_of: Callable[[Facts], str],
) -> None:
    """Run one verb of the job and print its facts."""
    facts = run_verb(context, verb, arguments, verbose)
    print_facts(facts, output, table=table_of(facts) if output is Output.table else "")


def report_of(manifest: str) -> str:
    """The report that was published beside a manifest."""
    folder, separator, _ = manifest.rpartition("/")
    return f"{folder}{separator}report.html"
