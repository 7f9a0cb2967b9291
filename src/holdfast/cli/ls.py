"""``holdfast ls``: the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli import output

if TYPE_CHECKING:
    from rich.text import Text

    from holdfast.checkpoint import Checkpoint
    from holdfast.run import Broken


def command(
    run: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)],
    best: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC:MODE", help="Mark the best by a metric, such as val_loss:min. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the checkpoints of a run, oldest first: step, epoch, metrics, size, age, reason. Broken ones are red."""
    with output.clear_errors():
        from holdfast.checkpoint import Checkpoint
        from holdfast.run import Run

        entries = Run(existing_run(run)).entries()
        intact = [entry for entry in entries if isinstance(entry, Checkpoint)]
        marks = _marks(intact, [output.metric_and_mode(text) for text in best or []])
        if as_json:
            output.print_json({"run": str(run), "checkpoints": [_as_json(entry, marks) for entry in entries]})
        elif not entries:
            typer.echo(f"{run} holds no checkpoints.")
        else:
            _print_table(entries, marks)


def existing_run(path: Path) -> str:
    """``path`` if it may be a run; an error that says what it is otherwise."""
    from holdfast.errors import CheckpointNotFoundError, UsageError
    from holdfast.format.names import MANIFEST

    if not path.exists():
        raise CheckpointNotFoundError(f"{path} does not exist; expected the directory of a run.", path=path)
    if (path / MANIFEST).exists():
        raise UsageError(f"{path} is one checkpoint, not a run; try: holdfast show {path}", path=path)
    return str(path)


def _marks(intact: list[Checkpoint], best: list[tuple[str, str]]) -> dict[str, list[str]]:
    from holdfast.run import ranked_by

    marks: dict[str, list[str]] = {checkpoint.name: [] for checkpoint in intact}
    if intact:
        marks[intact[-1].name].append("newest")
    for metric, mode in best:
        for checkpoint in ranked_by(metric, mode, intact)[:1]:
            marks[checkpoint.name].append(f"best {metric}")
    for checkpoint in intact:
        if checkpoint.pinned:
            marks[checkpoint.name].append("pinned")
    return marks


def _as_json(entry: Checkpoint | Broken, marks: dict[str, list[str]]) -> dict[str, Any]:
    from holdfast.run import Broken

    if isinstance(entry, Broken):
        return {"name": str(entry.name), "path": entry.path, "step": entry.name.step, "broken": str(entry.error)}
    return {**output.summary(entry), "marks": marks[entry.name], "broken": None}


def _print_table(entries: list[Checkpoint | Broken], marks: dict[str, list[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("step", "right"), ("epoch", "right"), ("metrics", "left"), ("size", "right")):
        table.add_column(title, justify=justify, no_wrap=title != "metrics")  # type: ignore[arg-type]  # a literal
    for title in ("age", "reason", ""):
        table.add_column(title, no_wrap=title == "age")
    table.columns[-1].style = "green"
    for entry in entries:
        cells, style = _row(entry, marks)
        table.add_row(*cells, style=style)
    output.console().print(table)


def _row(entry: Checkpoint | Broken, marks: dict[str, list[str]]) -> tuple[list[Text], str | None]:
    """The cells of one line, and its style. Text, not markup: it is quicker, and a reason may hold brackets."""
    from rich.text import Text

    from holdfast.run import Broken

    if isinstance(entry, Broken):
        first = str(entry.error).splitlines()
        what = first[1].strip() if len(first) > 1 else first[0]
        cells = [_step(entry.name.step, entry.name.generation), "", what, "", "", "", "broken"]
    else:
        cells = [
            _step(entry.step, entry.generation),
            str(entry.epoch),
            output.metrics(entry.metrics),
            output.size(entry.nbytes),
            output.age(entry.created_at),
            entry.reason,
            ", ".join(marks[entry.name]),
        ]
    return [Text(output.plain(cell)) for cell in cells], "red" if isinstance(entry, Broken) else None


def _step(step: int, generation: int) -> str:
    return str(step) if generation == 1 else f"{step}.g{generation}"
