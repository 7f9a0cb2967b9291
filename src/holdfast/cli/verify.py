"""``holdfast verify``: every byte, read and compared with its checksum."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli import output

if TYPE_CHECKING:
    from holdfast.checkpoint import Checkpoint
    from holdfast.errors import Damage
    from holdfast.run import Broken


def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run for all of its.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every byte and compare it with its checksum. Exit code 1 when anything is damaged."""
    with output.clear_errors():
        entries = _entries(path)
        start_s = time.monotonic()
        found = _verify(entries, quiet=as_json)
        seconds = time.monotonic() - start_s
        nbytes = sum(getattr(entry, "nbytes", 0) for entry in entries)
        if as_json:
            output.print_json({"path": str(path), "bytes": nbytes, "seconds": seconds, "checkpoints": found})
        else:
            _print(found, nbytes, seconds)
        if any(item["damage"] for item in found):
            raise typer.Exit(output.FOUND)


def _entries(path: Path) -> list[Checkpoint | Broken]:
    """One checkpoint, broken or not, or all of a run."""
    from holdfast.checkpoint import open as open_checkpoint
    from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
    from holdfast.format.names import CheckpointName
    from holdfast.run import Broken, Run

    try:
        return [open_checkpoint(path)]
    except CorruptCheckpointError as error:
        return [Broken(CheckpointName.parse(path.name) or CheckpointName(0), str(path), error)]
    except CheckpointNotFoundError:
        entries = Run(path).entries() if path.is_dir() else []
        if entries:
            return entries
        if path.is_dir():
            raise UsageError(f"{path} holds no checkpoints.", path=path) from None
        raise


def _verify(entries: list[Checkpoint | Broken], *, quiet: bool) -> list[dict[str, Any]]:
    from holdfast.errors import CorruptCheckpointError
    from holdfast.run import Broken

    results = []
    total = sum(getattr(entry, "nbytes", 0) for entry in entries)
    with _progress(total, quiet) as advance:
        for entry in entries:
            damage: list[dict[str, Any]] = []
            if isinstance(entry, Broken):
                parts = getattr(entry.error, "damage", ())
                damage = [_as_json(item) for item in parts] or [{"what": str(entry.error)}]
            else:
                try:
                    entry.verify(advance)
                except CorruptCheckpointError as error:
                    damage = [_as_json(item) for item in error.damage]
            results.append({"path": entry.path, "damage": damage})
    return results


def _as_json(damage: Damage) -> dict[str, Any]:
    return {"file": damage.file, "chunk": damage.chunk, "what": damage.what, "tensors": list(damage.tensors)}


@contextmanager
def _progress(total_bytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with bytes per second, on standard error and only where somebody can see it move."""
    if quiet:
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("verify", total=total_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)


def _print(found: list[dict[str, Any]], nbytes: int, seconds: float) -> None:
    from rich.markup import escape

    console = output.console()
    for item in found:
        if not item["damage"]:
            console.print(f"[green]intact[/green]   {escape(output.plain(item['path']))}")
            continue
        console.print(f"[red]damaged[/red]  {escape(output.plain(item['path']))}")
        for damage in item["damage"][: output.MOST_LINES]:
            chunk = "" if damage.get("chunk") is None else f", chunk {damage['chunk']}"
            tensors = ", ".join(damage.get("tensors", ()))
            place = f"{damage['file']}{chunk}: " if "file" in damage else ""
            shown = f"{place}{damage['what']}" + (f" (tensors: {tensors})" if tensors else "")
            console.print(escape(f"    {output.plain(shown)}"))
        if len(item["damage"]) > output.MOST_LINES:
            console.print(f"    and {len(item['damage']) - output.MOST_LINES} more, which --json lists")
    speed = f", {output.size(nbytes / seconds)}/s" if seconds > 0 and nbytes else ""
    console.print(f"{len(found)} checked, {output.size(nbytes)} read in {seconds:.1f} s{speed}")
