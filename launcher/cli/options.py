"""Arguments and options that several verbs share, each declared once."""

import enum
from typing import Annotated, TextIO

import typer


class Output(enum.StrEnum):
    """How data are written on stdout."""

    table = "table"
    json = "json"
    yaml = "yaml"


class ExportFormat(enum.StrEnum):
    """Formats of training data, by the trainer that reads them."""

    trl = "trl"
    sharegpt = "sharegpt"
    alpaca = "alpaca"


class DiffOutput(enum.StrEnum):
    """How `prism diff` writes: markdown is a comment of a pull request."""

    table = "table"
    json = "json"
    yaml = "yaml"
    markdown = "markdown"


class Stage(enum.StrEnum):
    """Values of --stage."""

    plan = "plan"
    extract = "extract"
    reduce = "reduce"


class LossOn(enum.StrEnum):
    """Values of --loss-on: spec.extraction.lossOn."""

    assistant = "assistant"
    last = "last"


class DryRun(enum.StrEnum):
    """Values of --dry-run: who checks the rendered objects."""

    client = "client"
    server = "server"


def _check_name(name: str) -> str:
    from launcher.resource.names import is_dns_label

    if not is_dns_label(name):
        raise typer.BadParameter(f"'{name}' is not a valid name: use lower-case letters, digits and '-'")
    return name


FileArgument = Annotated[
    typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="selection.yaml; - reads stdin.")
]
ManifestArgument = Annotated[str, typer.Argument(metavar="MANIFEST", help="Path or s3:// URI of manifest.json.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Path or s3:// URI of the store: spec.store.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the run: metadata.name.", callback=_check_name)
]

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Output format.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show the stages' own stderr.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="OUTPUT", help="Keep what the manifests under this output need. Repeatable."),
]

NamespaceOption = Annotated[
    str,
    typer.Option("--namespace", "-n", metavar="NAME", help="Namespace. Default: the document's or the kubeconfig's."),
]
ContextOption = Annotated[
    str | None, typer.Option("--context", metavar="NAME", help="Kubeconfig context. Default: the current context.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Wait until the run ends. Without an operator, reconcile the run until then.")
]
TimeoutOption = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop waiting after this time; exit code 101.", min=0)
]
LogActionsOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log cluster actions as JSON lines on stderr.")]


def read_text(file: TextIO) -> str:
    """Raises SpecError if the document is not UTF-8."""
    from prism_job.errors import SpecError
    from prism_job.spec.document import refuse_data

    try:
        return file.read()
    except UnicodeDecodeError as error:
        refuse_data("", file.name)  # such as parquet
        raise SpecError(f"the document is not UTF-8 text: {error}", where=file.name, fix="save it as UTF-8") from error
