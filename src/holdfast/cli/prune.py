"""``holdfast prune``: remove what no policy keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli import output
from holdfast.cli.ls import existing_run

if TYPE_CHECKING:
    from holdfast.run import PruneReport, Retention


def command(
    run: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)],
    keep_last: Annotated[int | None, typer.Option(metavar="N", help="Keep the N newest.")] = None,
    keep_best: Annotated[
        list[str] | None, typer.Option(metavar="METRIC:MODE", help="Keep the best by a metric. May be repeated.")
    ] = None,
    keep_every_steps: Annotated[int | None, typer.Option(metavar="N", help="Keep multiples of N steps.")] = None,
    keep_every_epochs: Annotated[int | None, typer.Option(metavar="N", help="Keep multiples of N epochs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove the checkpoints that none of the --keep options keeps. The newest and pinned ones always stay."""
    with output.clear_errors():
        from holdfast.run import Run

        policy = _policy(keep_last, keep_best or [], keep_every_steps, keep_every_epochs)
        report = Run(existing_run(run)).prune(policy, dry_run=dry_run)
        if as_json:
            output.print_json(
                {
                    "run": str(run),
                    "dry_run": report.dry_run,
                    "removed": [output.summary(checkpoint) for checkpoint in report.removed],
                    "kept": report.kept,
                    "busy": list(report.busy),
                    "broken": [str(item.name) for item in report.broken],
                }
            )
        else:
            _print(report)


def _policy(last: int | None, best: list[str], steps: int | None, epochs: int | None) -> Retention:
    from holdfast.policies import AnyKeep, KeepBest, KeepEvery, KeepLast

    policies: list[Retention] = []
    if last is not None:
        policies.append(KeepLast(last))
    policies += [KeepBest(*output.metric_and_mode(text)) for text in best]
    if steps is not None:
        policies.append(KeepEvery(steps=steps))
    if epochs is not None:
        policies.append(KeepEvery(epochs=epochs))
    if not policies:
        raise typer.BadParameter("say what to keep, such as --keep-last 3 or --keep-best val_loss:min")
    return AnyKeep(tuple(policies))


def _print(report: PruneReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    goes = "would go" if report.dry_run else "removed"
    rows = {checkpoint.name: (f"[red]{goes}[/red]", "no policy keeps it") for checkpoint in report.removed}
    rows |= {name: ("[green]stays[/green]", why) for name, why in report.kept.items()}
    rows |= dict.fromkeys(report.busy, ("[yellow]stays[/yellow]", "somebody is reading it"))
    rows |= {str(item.name): ("[yellow]stays[/yellow]", "broken, and left as it is") for item in report.broken}
    for name in sorted(rows):
        verdict, why = rows[name]
        table.add_row(escape(name), verdict, escape(why))
    console = output.console()
    console.print(table)
    freed = output.size(sum(checkpoint.nbytes for checkpoint in report.removed))
    console.print(f"{len(report.removed)} {goes} ({freed}), {len(rows) - len(report.removed)} stay")
