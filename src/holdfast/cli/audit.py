"""``holdfast audit``: the proof that a training resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli import output

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.audit.comparison import Divergence
    from holdfast.audit.report import AuditReport, Cause


def command(
    training: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:FUNCTION",
            help="A function that builds a training and returns (state, step); or package.module:FUNCTION.",
            show_default=False,
        ),
    ],
    steps_before: Annotated[int, typer.Option(metavar="N", help="Steps before the save.")] = 3,
    steps_after: Annotated[int, typer.Option(metavar="N", help="Steps after the restore.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a training with and without an interruption, and compare every bit. Exit code 1 when something differs."""
    with output.clear_errors():
        from holdfast.audit import audit

        with _progress(quiet=as_json) as progress:
            report = audit(training, before=steps_before, after=steps_after, progress=progress)
        if as_json:
            output.print_json(report.as_dict())
        else:
            _print(report)
        if not report.exact:
            raise typer.Exit(output.FOUND)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is being done, on standard error and only where somebody looks."""
    from rich.console import Console

    stderr = Console(stderr=True)
    if quiet or not stderr.is_terminal:
        yield lambda doing: None
        return
    with stderr.status("starting") as status:
        yield status.update


def _print(report: AuditReport) -> None:
    from rich.table import Table
    from rich.text import Text

    console = output.console()
    console.print(Text(report.title, style="bold green" if report.exact else "bold red"))
    facts = Table.grid(padding=(0, 2))
    for word, text in report.facts():
        facts.add_row(Text(word, style="bold"), Text(text))
    console.print(facts)
    if report.divergence is not None:
        _print_divergence(console, report, report.divergence)
    for cause in report.causes:
        _print_cause(console, cause)


def _print_divergence(console: Console, report: AuditReport, divergence: Divergence) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = divergence.first
    table = Table(
        box=box.SIMPLE_HEAD, title="first difference", title_justify="left", title_style="bold", pad_edge=False
    )
    for title in ("when", "what", *report.sides()):
        table.add_column(title)
    table.add_row(*map(Text, (divergence.moment, first.name, str(first.expected), str(first.found))))
    console.print()
    console.print(table)
    if report.others():
        console.print(Text(f"differs as well: {report.others()}"))


def _print_cause(console: Console, cause: Cause) -> None:
    from rich.padding import Padding
    from rich.text import Text

    word, style = ("cause", "bold red") if cause.certain else ("possible cause", "bold yellow")
    console.print()
    console.print(Text.assemble((f"{word}: ", style), (cause.what, "bold")))
    for sentence in cause.evidence:
        console.print(Padding(Text(f"- {sentence}"), (0, 0, 0, 2), expand=False))
    if cause.advice:
        console.print(Padding(Text.assemble(("what to do: ", "green"), cause.advice), (0, 0, 0, 2), expand=False))
