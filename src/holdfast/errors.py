"""Everything that Holdfast raises, in one tree.

    HoldfastError
    ├── UsageError               (ValueError)          an argument cannot mean anything
    ├── CheckpointNotFoundError  (FileNotFoundError)   nothing intact is there
    ├── CheckpointExistsError    (FileExistsError)     something is there already
    ├── CorruptCheckpointError   (ValueError)          bytes differ from what was written
    ├── FormatVersionError       (ValueError)          written by a newer Holdfast
    ├── UnsupportedValueError    (TypeError)           a value that cannot be written exactly
    ├── StateMismatchError       (ValueError)          live objects and checkpoint differ in structure
    ├── MissingMetricError       (LookupError)         a policy needs a metric that was not given
    ├── AuditError               (RuntimeError)        a training failed while it was audited
    ├── RunBusyError             (OSError)             another process writes this run
    ├── RanksDifferError         (ValueError)          the processes of a training do not agree on what they save
    └── StorageError             (OSError)             the file system refused
        ├── DiskFullError        (StorageError)        no space, no quota, no inodes, or a size limit
        └── RankError            (StorageError)        a process of the training could not do its part
            └── RankTimeoutError (TimeoutError)        a process of the training did not answer

Each class is also the natural builtin, so code that knows nothing of Holdfast can catch it. Each error carries
``path``, ``step`` and ``key`` (None where they mean nothing).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AuditError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "Damage",
    "DiskFullError",
    "FormatVersionError",
    "HoldfastError",
    "MissingMetricError",
    "RankError",
    "RankTimeoutError",
    "RanksDifferError",
    "RunBusyError",
    "SaveTimeoutError",
    "StateMismatchError",
    "StorageError",
    "StrayWriteError",
    "UnsupportedValueError",
    "UsageError",
]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class HoldfastError(Exception):
    """Base of every error that Holdfast raises on purpose.

    Args:
        message: what was expected, what was found, where, and what to do.
        path: the file or directory concerned.
        step: the step of the checkpoint concerned.
        key: the place within the state or manifest, such as ``scheduler.lr_lambdas[0]``.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        step: int | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else os.fspath(path)
        self.step = step
        self.key = key

    def __str__(self) -> str:
        return self.message


class UsageError(HoldfastError, ValueError):
    """An argument that cannot mean anything."""


class CheckpointNotFoundError(HoldfastError, FileNotFoundError):
    """No checkpoint where one was asked for."""


class CheckpointExistsError(HoldfastError, FileExistsError):
    """A checkpoint was to be made where something is already; what is there was left as it is."""


class FormatVersionError(HoldfastError, ValueError):
    """The checkpoint was written in a version of the format that this Holdfast does not know."""


class UnsupportedValueError(HoldfastError, TypeError):
    """A value that cannot be written exactly; ``key`` is the path to it."""


class MissingMetricError(HoldfastError, LookupError):
    """A policy ranks checkpoints by a metric that was not reported."""


class AuditError(HoldfastError, RuntimeError):
    """A training, or saving or restoring it, failed while it was audited; the message holds the traceback."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a checkpoint on disk.

    Attributes:
        file: the name of the file within the checkpoint.
        what: what is wrong with it, in words.
        chunk: the index of the chunk whose checksum differs; None when it is not about one chunk.
        tensors: the tensors with bytes in the damaged place, as ``entry/name``.
    """

    file: str
    what: str
    chunk: int | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = self.file if self.chunk is None else f"{self.file}, chunk {self.chunk}"
        shown = ", ".join(self.tensors[:5]) + (f" and {len(self.tensors) - 5} more" if len(self.tensors) > 5 else "")
        return f"{where}: {self.what}" + (f" (tensors: {shown})" if self.tensors else "")


class CorruptCheckpointError(HoldfastError, ValueError):
    """The bytes on disk are not those that were written; ``damage`` lists what was found."""

    def __init__(self, message: str, *, damage: Sequence[Damage] = (), **where: Any) -> None:
        super().__init__(message, **where)
        self.damage = tuple(damage)

    @classmethod
    def at(
        cls, path: str | os.PathLike[str], damage: Sequence[Damage], step: int | None = None
    ) -> CorruptCheckpointError:
        """The error for ``damage`` found in the checkpoint at ``path``."""
        found = "\n".join(f"  {item}" for item in damage)
        return cls(
            f"{os.fspath(path)} is damaged:\n{found}\n"
            "Restore these files from a copy, or resume from another checkpoint of the run.",
            damage=damage,
            path=path,
            step=step,
        )


class StateMismatchError(HoldfastError, ValueError):
    """Live objects and checkpoint differ in structure; nothing was touched. ``report`` says where."""

    def __init__(self, message: str, *, report: Any = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.report = report


class SaveTimeoutError(HoldfastError, TimeoutError):
    """A save in the background did not end in the time it was given."""


class StrayWriteError(HoldfastError, RuntimeError):
    """A tensor was written while a save copied it; that save was given up, and nothing of it is left."""

    @classmethod
    def to(cls, names: Sequence[str]) -> StrayWriteError:
        """The error for tensors called ``names``."""
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return cls(
            f"{shown}: written while an overlapping save copied it, by something else than an optimizer of the state. "
            "The save was given up. Until the next optimizer step nothing may write the weights; where something has "
            "to, use overlap=False.",
            key=names[0],
        )


class RunBusyError(HoldfastError, OSError):
    """Another process holds the run for writing."""


class StorageError(HoldfastError, OSError):
    """The file system refused; ``errno`` says why. What was durable before is still there."""


class DiskFullError(StorageError):
    """No space, quota, inodes or file size left for a new checkpoint."""


class RankError(StorageError):
    """A process of the training could not do its part: every process raises this, and it says which and why.

    Nothing was committed; what was durable before is still there.

    Attributes:
        ranks: those that could not.
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = (), **where: Any) -> None:
        super().__init__(message, **where)
        self.ranks = tuple(ranks)


class RankTimeoutError(RankError, TimeoutError):
    """A process of the training did not answer in the time that it was given."""


class RanksDifferError(HoldfastError, ValueError):
    """The processes of a training do not agree on what they save, or on where they are; nothing was saved.

    Attributes:
        ranks: those that differ from the first.
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = (), **where: Any) -> None:
        super().__init__(message, **where)
        self.ranks = tuple(ranks)


@contextmanager
def storage_errors(doing: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """The one place where an ``OSError`` of the file system becomes a ``StorageError``."""
    try:
        yield
    except HoldfastError:
        raise
    except OSError as error:
        full = error.errno in _FULL
        advice = " Free some space (or keep fewer checkpoints) and save again." if full else ""
        kind = DiskFullError if full else StorageError
        mapped = kind(f"{doing} {os.fspath(path)}: {error.strerror or error}.{advice}", path=path)
        mapped.errno = error.errno
        try:
            raise mapped from error
        finally:
            del mapped  # its traceback holds this frame: together they would keep open what the frames below it opened
