"""What every verb shares: the form of its answer, exit codes, errors in three lines. Not: any verb.

Data on stdout, words on stderr (DESIGN, section 8).
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NoReturn

import typer

LAUNCHER_ERROR = 1
PREFLIGHT = 3
RUN_FAILED = 100
NOT_FINISHED = 101
NOT_FOUND = 102
CANCELLED = 103


class Output(enum.StrEnum):
    """How data are written on stdout."""

    table = "table"
    json = "json"
    yaml = "yaml"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Form of what is printed on stdout.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Let the job's own stderr through.")]
FileArgument = Annotated[
    typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="selection.yaml; - reads stdin.")
]


def read_text(file: typer.FileText) -> str:
    from prism_job.errors import SpecError

    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise SpecError(f"the document is not UTF-8 text: {error}", where=file.name, fix="save it as UTF-8") from error


@contextlib.contextmanager
def exit_codes(output: Output) -> Iterator[None]:
    """Errors become three readable lines and an exit code; this is the only place."""
    from launcher.follow.display import printable
    from launcher.kube.errors import ClusterError, NotFound
    from launcher.local.stages import NotInstalledError, StageError, StopError
    from prism_job.errors import SpecError

    try:
        yield
    except SpecError as error:
        fail(PREFLIGHT, output, error.what, error.where, error.fix, stage="preflight")
    except NotFound as error:
        fail(NOT_FOUND, output, error.what, error.where, error.fix)
    except ClusterError as error:
        fail(LAUNCHER_ERROR, output, error.what, error.where, error.fix)
    except NotInstalledError as error:
        fail(LAUNCHER_ERROR, output, str(error), sys.executable, "pip install 'prism-selection[job]'")
    except StageError as error:
        for line in error.tail:
            print(printable(line), file=sys.stderr)
        fail(RUN_FAILED, output, error.what, error.where, error.fix, stage=error.stage, stage_exit=error.exit_code)
    except StopError as error:
        kept = "; finished units are kept; run the same command again to go on" if error.is_stage else ""
        print(f"stopped{kept}", file=sys.stderr)
        sys.exit(128 + error.number)


def fail(
    code: int, output: Output, what: str, where: str, fix: str, stage: str | None = None, stage_exit: int | None = None
) -> NoReturn:
    from launcher.follow.display import printable

    print(printable(f"error: {what}\n  where: {where}\n  hint: {fix}"), file=sys.stderr)
    if output is not Output.table:
        failure = {"error": what, "where": where, "fix": fix, "stage": stage, "stageExitCode": stage_exit}
        print_facts(failure, output, table="")
    sys.exit(code)


def print_facts(facts: dict[str, Any], output: Output, *, table: str) -> None:
    if output is Output.json:
        try:
            print(json.dumps(facts, ensure_ascii=False))
        except UnicodeEncodeError:  # half of a surrogate pair, from a column's name say: written out
            print(json.dumps(facts))
    elif output is Output.yaml:
        import yaml

        print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), end="")
    else:
        from launcher.follow.display import printable

        print(printable(table))


def yaml_documents(objects: Iterable[dict[str, Any]]) -> str:
    """Objects one after the other, as `kubectl apply -f -` reads them; a text of several lines stays one."""
    import yaml

    class Readable(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Readable.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=Readable, sort_keys=False, allow_unicode=True)
