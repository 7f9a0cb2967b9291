"""``holdfast export``: an entry as one standard safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli import output


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its newest.", show_default=False)],
    entry: Annotated[str, typer.Argument(help="Whose tensors, such as model.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT.safetensors", help="The new file; nothing is overwritten.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the tensors of an entry into one safetensors file, from however many files they lie in, verified."""
    with output.clear_errors():
        found = output.one_checkpoint(checkpoint)
        found.export(entry, out)
        nbytes = out.stat().st_size
        records = found.manifest.tensors[entry]
        if as_json:
            output.print_json(
                {
                    "checkpoint": found.path,
                    "step": found.step,
                    "entry": entry,
                    "path": str(out),
                    "bytes": nbytes,
                    "tensors": len(records),
                }
            )
        else:
            typer.echo(output.plain(f"{out}: {len(records)} tensors of {found.name}, {output.size(nbytes)}"))
