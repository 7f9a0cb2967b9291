"""The command line: ``holdfast ls``, ``show``, ``verify``, ``export``, ``prune`` and ``audit``.

Exit codes: 0 done, 1 found what it looks for (damage, a difference), 2 used wrongly. No command needs torch (``audit``
starts processes that do), and ``--help`` needs nothing but typer: each command imports what it uses when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast._version import __version__
from holdfast.cli import audit, export, ls, prune, show, verify

app = typer.Typer(
    name="holdfast",
    help="Look at the checkpoints of a training run, verify them, and remove those that are not needed; "
    "prove that a training resumes exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("ls")(ls.command)
app.command("show")(show.command)
app.command("verify")(verify.command)
app.command("export")(export.command)
app.command("prune")(prune.command)
app.command("audit")(audit.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
