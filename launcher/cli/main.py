"""The command `prism`: which verbs there are, and where. Exit codes: exit_codes.py; options: options.py.

`prism --help` starts fast: a verb imports what it needs when it is called.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from launcher.cli import cluster_verbs, local_verbs, logs_verb, selection_verbs, setup_verbs
from launcher.cli.exit_codes import exit_on_error

# Plain help texts: rich would double the time that --help takes.
app = typer.Typer(
    name="prism",
    help="Select fine-tuning data by preference-aware influence functions.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
store = typer.Typer(help="Inspect and prune a gradient store.", rich_markup_mode=None, no_args_is_help=True)

# On this machine.
app.command("init")(exit_on_error(local_verbs.init))
app.command("run")(exit_on_error(local_verbs.run))
app.command("inspect")(exit_on_error(local_verbs.inspect))
app.command("estimate")(exit_on_error(local_verbs.estimate))
store.command("list")(exit_on_error(local_verbs.store_list))
store.command("du")(exit_on_error(local_verbs.store_du))
store.command("prune")(exit_on_error(local_verbs.store_prune))
app.add_typer(store, name="store")

# A finished selection.
app.command("evaluate")(exit_on_error(selection_verbs.evaluate))
app.command("export")(exit_on_error(selection_verbs.export))
app.command("diff")(exit_on_error(selection_verbs.diff))
app.command("explain")(exit_on_error(selection_verbs.explain))

# In a cluster.
app.command("submit")(exit_on_error(cluster_verbs.submit))
app.command("list")(exit_on_error(cluster_verbs.list_runs))
app.command("status")(exit_on_error(cluster_verbs.status))
app.command("watch")(exit_on_error(cluster_verbs.watch))
app.command("wait")(exit_on_error(cluster_verbs.wait))
app.command("logs")(exit_on_error(logs_verb.logs))
app.command("cancel")(exit_on_error(cluster_verbs.cancel))
app.command("retry")(exit_on_error(cluster_verbs.retry))

# Setting a cluster up.
app.command("doctor")(exit_on_error(setup_verbs.doctor))
app.command("render")(exit_on_error(setup_verbs.render))
app.command("schedule")(exit_on_error(setup_verbs.schedule))
app.command("crd")(exit_on_error(setup_verbs.crd))
app.command("operator")(exit_on_error(setup_verbs.operator))


def main(arguments: Sequence[str] | None = None, *, job: Sequence[str] | None = None) -> None:
    """Run the command and exit. `job`: another command than `python -m prism_job` to start the stages with."""
    app(args=arguments, obj=job, prog_name="prism")


def _print_version(requested: bool) -> None:
    if requested:
        from launcher.cli.version import version_line

        print(version_line())
        raise typer.Exit


@app.callback()
def _prism(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and the commit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
