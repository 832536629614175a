"""The command `prism`: which verbs there are, and where. Exit codes: exit_codes.py; options: options.py.

`prism --help` starts fast: a verb imports what it needs when it is called.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launcher.cli import cluster_verbs, local_verbs, logs_verb, selection_verbs, setup_verbs
from launcher.cli.exit_codes import exit_on_error

LOCAL, SELECTION, RUNS, SETUP = "On this machine", "A finished selection", "Runs on a cluster", "Setting a cluster up"


class _Sections(TyperGroup):
    """Lists the verbs under the names of their panels, as rich would."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, Any]]] = {name: [] for name in (LOCAL, SELECTION, RUNS, SETUP)}
        for name, command in self.commands.items():
            sections[str(command.rich_help_panel)].append((name, command))  # type: ignore[attr-defined]
        width = max(map(len, self.commands))
        for title, verbs in sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(width), command.get_short_help_str(formatter.width - 6 - width))
                        for name, command in verbs
                    ]
                )


# Plain help texts: rich would double the time that --help takes.
app = typer.Typer(
    name="prism",
    cls=_Sections,
    help="Select fine-tuning data by preference-aware influence functions.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
store = typer.Typer(help="Inspect and prune a gradient store.", rich_markup_mode=None, no_args_is_help=True)

app.command("init", rich_help_panel=LOCAL)(exit_on_error(local_verbs.init))
app.command("run", rich_help_panel=LOCAL)(exit_on_error(local_verbs.run))
app.command("inspect", rich_help_panel=LOCAL)(exit_on_error(local_verbs.inspect))
app.command("estimate", rich_help_panel=LOCAL)(exit_on_error(local_verbs.estimate))
store.command("list")(exit_on_error(local_verbs.store_list))
store.command("du")(exit_on_error(local_verbs.store_du))
store.command("prune")(exit_on_error(local_verbs.store_prune))
app.add_typer(store, name="store", rich_help_panel=LOCAL)

app.command("evaluate", rich_help_panel=SELECTION)(exit_on_error(selection_verbs.evaluate))
app.command("export", rich_help_panel=SELECTION)(exit_on_error(selection_verbs.export))
app.command("diff", rich_help_panel=SELECTION)(exit_on_error(selection_verbs.diff))
app.command("explain", rich_help_panel=SELECTION)(exit_on_error(selection_verbs.explain))

app.command("submit", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.submit))
app.command("list", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.list_runs))
app.command("status", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.status))
app.command("watch", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.watch))
app.command("wait", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.wait))
app.command("logs", rich_help_panel=RUNS)(exit_on_error(logs_verb.logs))
app.command("cancel", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.cancel))
app.command("retry", rich_help_panel=RUNS)(exit_on_error(cluster_verbs.retry))

app.command("doctor", rich_help_panel=SETUP)(exit_on_error(setup_verbs.doctor))
app.command("render", rich_help_panel=SETUP)(exit_on_error(setup_verbs.render))
app.command("schedule", rich_help_panel=SETUP)(exit_on_error(setup_verbs.schedule))
app.command("crd", rich_help_panel=SETUP)(exit_on_error(setup_verbs.crd))
app.command("operator", rich_help_panel=SETUP)(exit_on_error(setup_verbs.operator))


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
