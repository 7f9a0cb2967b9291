"""What the commands share: how things are printed, and how errors end a command."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from holdfast.checkpoint import Checkpoint
    from holdfast.format.tree import Opaque

FOUND = 1
USED_WRONGLY = 2
_WIDE = 200
LONGEST_TEXT = 500
MOST_LINES = 100
_LONGEST_INT_BITS = 4096
_INDENTED_BYTES = 2**19
# Control characters, and halves of characters: what a name on the disk has in place of bytes that are no text.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


@contextmanager
def clear_errors() -> Iterator[None]:
    """An error of Holdfast as one message on standard error, without a traceback, and exit code 2."""
    try:
        yield
    except HoldfastError as error:
        lines = str(error).splitlines()
        more = [f"  and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
        typer.echo("\n".join(["holdfast: " + plain(lines[0]), *map(plain, lines[1:MOST_LINES]), *more]), err=True)
        raise typer.Exit(USED_WRONGLY) from error


def console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut off in a file or pipe."""
    from rich.console import Console  # a tenth of a second that --help and --json do without

    plain = Console(highlight=False, soft_wrap=False)
    return plain if plain.is_terminal else Console(highlight=False, width=_WIDE)


def print_json(value: object) -> None:
    """One JSON object on standard output; what JSON has no number for becomes text.

    Indented, but where it is so long that nobody reads it: at a depth of a hundred, indenting makes a hundred of it.
    """
    import msgspec

    data = msgspec.json.encode(_valid(value))
    if len(data) <= _INDENTED_BYTES:
        data = msgspec.json.format(data, indent=2)
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


@dataclass(frozen=True, slots=True)
class AsItIs:
    """A value that came from JSON, and can be JSON again without a look at each of its parts."""

    value: object


def _valid(value: object) -> object:
    kind = type(value)
    if isinstance(value, AsItIs):
        return value.value
    if kind is str:
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()  # type: ignore[attr-defined]
    if kind is bool or value is None:
        return value
    if kind is int:  # Python has no decimals for large ones
        return value if value.bit_length() <= _LONGEST_INT_BITS else hex(value)  # type: ignore[attr-defined, arg-type]
    if kind is float:
        return value if math.isfinite(value) else str(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {_key(key): _valid(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, os.PathLike)):
        return plain(str(value))
    return plain_repr(value)


def _key(key: object) -> str:
    return str(_valid(key)) if isinstance(key, str) else plain_repr(key)


def plain(text: str) -> str:
    """``text`` as it may be printed: not endless, and nothing in it that a terminal obeys or cannot show."""
    cut = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), cut)


class _Repr(reprlib.Repr):
    """Shows what a checkpoint holds, whatever that is: parts of what is large, and integers of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 6
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdeque = self.maxdict = 30
        self.maxstring = self.maxother = self.maxlong = LONGEST_TEXT

    def repr1(self, x: Any, level: int) -> str:
        """See ``reprlib``."""
        if isinstance(x, int) and x.bit_length() > _LONGEST_INT_BITS:
            return f"an integer of {x.bit_length()} bits"
        if isinstance(x, (str, bytes, bytearray)) and len(x) > LONGEST_TEXT:
            return super().repr1(x[:LONGEST_TEXT], level)
        return super().repr1(x, level)

    def repr_Opaque(self, x: Opaque, level: int) -> str:  # noqa: N802 - after the type, as ``reprlib`` wants it
        """As itself, its body shortened."""
        return f"{x.tag.removeprefix('$')}({self.repr1(x.body, level - 1) if level > 0 else '...'})"


_repr = _Repr()


def plain_repr(value: object) -> str:
    """A value of a checkpoint as text that may be printed."""
    return plain(_repr.repr(value))


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
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else plain_repr(value)


def metrics(values: Mapping[str, Any]) -> str:
    """All metrics on one line."""
    return "  ".join(f"{name}={number(value)}" for name, value in itertools.islice(values.items(), MOST_LINES))


def one_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``; of a run, its newest."""
    from holdfast.checkpoint import open as open_checkpoint
    from holdfast.errors import CheckpointNotFoundError
    from holdfast.run import Run

    try:
        return open_checkpoint(path)
    except CheckpointNotFoundError:
        newest = Run(path).latest() if path.is_dir() else None
        if newest is None:
            raise
        return newest


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
