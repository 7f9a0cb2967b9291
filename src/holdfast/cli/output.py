"""What the commands share: how things are printed, and how errors end a command."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.checkpoint import Checkpoint

FOUND = 1
USED_WRONGLY = 2
_WIDE = 200
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


@contextmanager
def clear_errors() -> Iterator[None]:
    """An error of Holdfast as one message on standard error, without a traceback, and exit code 2."""
    try:
        yield
    except HoldfastError as error:
        typer.echo(f"holdfast: {error}", err=True)
        raise typer.Exit(USED_WRONGLY) from error


def console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut off in a file or pipe."""
    from rich.console import Console  # a tenth of a second that --help and --json do without

    plain = Console(highlight=False, soft_wrap=False)
    return plain if plain.is_terminal else Console(highlight=False, width=_WIDE)


def print_json(value: object) -> None:
    """One JSON object on standard output; what JSON has no number for becomes text."""
    typer.echo(json.dumps(_valid(value), indent=2, default=str))


def _valid(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _valid(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(item) for item in value]
    return value


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them, by powers of 1,000."""
    unit = 0
    while nbytes >= 999.5 and unit < len(_UNITS) - 1:
        nbytes /= 1000
        unit += 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 or nbytes >= 99.5 else f"{nbytes:.1f} {_UNITS[unit]}"


def age(then: datetime.datetime) -> str:
    """How long ago ``then`` was, in its largest unit."""
    seconds = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def number(value: object) -> str:
    """A metric, short."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def metrics(values: Mapping[str, Any]) -> str:
    """All metrics on one line."""
    return "  ".join(f"{name}={number(value)}" for name, value in values.items())


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What every command says of a checkpoint in JSON."""
    return {
        "name": checkpoint.name,
        "path": checkpoint.path,
        "step": checkpoint.step,
        "generation": checkpoint.generation,
        "epoch": checkpoint.epoch,
        "metrics": checkpoint.metrics,
        "bytes": checkpoint.nbytes,
        "created_at": checkpoint.created_at.isoformat(),
        "reason": checkpoint.reason,
        "pinned": checkpoint.pinned,
        "tags": list(checkpoint.tags),
        "checkpoint_id": checkpoint.checkpoint_id,
        "run_id": checkpoint.run_id,
        "parent": checkpoint.parent,
    }


def metric_and_mode(text: str) -> tuple[str, str]:
    """``val_loss:min`` as its two parts."""
    metric, _, mode = text.rpartition(":")
    if not metric or mode not in ("min", "max"):
        raise typer.BadParameter(f"expected METRIC:min or METRIC:max, found {text!r}")
    return metric, mode
