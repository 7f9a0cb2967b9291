"""The contract between checkpoints and the place they live in.

It speaks of checkpoints, files and commits, never of paths and renames, so that an object store can keep it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from holdfast.format.records import FileRecord


class StoredFile(Protocol):
    """One file of a committed checkpoint, open for reading."""

    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; returns how many bytes there were, fewer only at the end of the file."""

    def choose_way(self) -> int:
        """Decide, once, how most of this file is best read; returns how many bytes to ask for at a time.

        1 means as few as one likes. Otherwise offsets have to be multiples of 4096, and buffers begin at addresses
        that are, and have room for a multiple at the end of the file.
        """

    def close(self) -> None:
        """Let go of it."""


class StoredCheckpoint(Protocol):
    """A committed checkpoint, open for reading."""

    path: str

    def lock(self) -> None:
        """Keep others from removing it while it is open."""

    def is_current(self) -> bool:
        """Whether it still stands under its name: it is removed from there before any of its files goes."""

    def names(self, limit: int) -> list[str]:
        """The files it holds, listed or not; no more than ``limit`` of them."""

    def read_whole(self, name: str, limit_bytes: int, begin: bytes = b"") -> bytes:
        """A small file in one piece.

        ValueError when it is longer than ``limit_bytes``, does not begin with ``begin``, or is not a plain file.
        """

    def is_whole(self, name: str, data: bytes) -> bool:
        """Whether a file holds ``data`` and nothing else; ValueError when it is not a plain file."""

    def open_file(self, name: str) -> StoredFile:
        """A file to read from; FileNotFoundError, or ValueError when it is not a plain file."""

    def map_file(self, name: str, nbytes: int) -> memoryview:
        """A whole file as memory, with a private copy of each page that is written to; it outlasts ``close``.

        FileNotFoundError, or ValueError when it is not a plain file of ``nbytes``.
        """

    def close(self) -> None:
        """Let go of it."""


class FileImage(Protocol):
    """The bytes that a data file is to have, wherever they are now."""

    @property
    def nbytes(self) -> int:
        """How many they are."""

    def read(self, begin: int, room: memoryview) -> memoryview:
        """As many of them as ``room`` is long, from ``begin``: gathered in ``room``, or where they lie already.

        Where they lie already, they lie at a multiple of 4096 if ``begin`` is one. Called from several threads.
        """


class PendingCheckpoint(Protocol):
    """A save under way: invisible until committed."""

    @property
    def name(self) -> str:
        """What others call it who join it."""

    def link_file(self, name: str, checkpoint: str, file: str, nbytes: int) -> bool:
        """Take a file of a committed checkpoint as ``name``, without writing its bytes again.

        False where that cannot be: the checkpoint is gone, the file has not ``nbytes``, or there are no links here.
        """

    def write_files(self, images: Mapping[str, FileImage]) -> dict[str, FileRecord]:
        """Write the data files, durably, and return the record of each. Called once."""

    def leave(self) -> None:
        """Let go of a save that was joined, when everything that was written is durable."""

    def commit(self, name: str, manifest: bytes) -> None:
        """Make the checkpoint durable and visible as ``name``.

        Raises:
            CheckpointExistsError: the name is taken; another may be tried.
        """

    def replace(self, name: str, manifest: bytes) -> None:
        """Make the checkpoint durable and visible as ``name``, in the place of the one that has it now."""

    def abort(self) -> None:
        """Remove what was written. Does nothing after a commit."""


class Store(Protocol):
    """A place that holds checkpoints under names."""

    path: str

    def names(self) -> list[str]:
        """Every name there is, recognised or not; empty when the place does not exist."""

    def open(self, name: str) -> StoredCheckpoint:
        """A checkpoint to read from; FileNotFoundError when there is none."""

    def create(self, step: int) -> PendingCheckpoint:
        """Begin a save."""

    def join(self, name: str) -> PendingCheckpoint:
        """Write into the save that another process began as ``name``; CheckpointNotFoundError where there is none.

        Everything but writing and leaving is for the process that began it.
        """

    def log(self, line: bytes) -> None:
        """Append a line to what is known of past saves; losing it loses no checkpoint."""

    def log_lines(self) -> Iterator[bytes]:
        """The lines of that log, newest first, as far back as one looks; none where there is none.

        ValueError when what is there is not a plain file.
        """

    def annotate(self, name: str, change: Callable[[StoredCheckpoint], bytes]) -> None:
        """Replace the annotations of a checkpoint atomically.

        Args:
            name: of the checkpoint.
            change: returns the new ones. From its call on nobody else annotates or removes the checkpoint.

        Raises:
            CheckpointNotFoundError: it is gone.
        """

    def remove(self, name: str, spare: Callable[[StoredCheckpoint], bool] | None = None) -> bool:
        """Remove a checkpoint; False when it was left: somebody is reading it, or it is to be spared.

        Args:
            name: of the checkpoint.
            spare: asked last, when nobody can read or annotate it any more.
        """

    def clean(self) -> list[str]:
        """Remove what dead writers left behind, as far as that is certain; returns the names removed."""

    def recover(self, name: str) -> bool:
        """Bring back a checkpoint whose replacement never came; True when there was one."""

    def hold(self) -> None:
        """Become the only writer until :meth:`release`; RunBusyError when another is."""

    def release(self) -> None:
        """Let other writers in."""
