"""Checkpoints in a directory of a POSIX file system.

A checkpoint exists if and only if a valid manifest is readable under its name. It comes to be in this order, and no
step may be moved before another:

1. the directory it will stand in exists, durably;
2. ``.tmp-...`` is made in it, and locked for as long as its writer lives;
3. the data files are written and synced;
4. the manifest is written and synced, then the temporary directory;
5. the temporary directory is renamed to its final name, then the parent directory is synced.

Only then is the save acknowledged. It goes the other way round: locked against readers, renamed to ``.trash-...``,
synced, and only then unlinked.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator

from holdfast.errors import CheckpointNotFoundError, RunBusyError, storage_errors
from holdfast.format.names import (
    ANNOTATIONS,
    EVENTS,
    MANIFEST,
    TemporaryName,
    host_label,
    parse_aside,
    staged_annotations_name,
    trash_name,
)
from holdfast.storage import durable
from holdfast.storage.durable import Descriptor, Lock
from holdfast.storage.local_cleaning import clean, remove_rest
from holdfast.storage.local_pending import LocalPending
from holdfast.storage.local_reading import LocalCheckpoint, LocalFile

MAX_LOG_BYTES = 8 * 2**20
"""Of a longer log only the end is read: tens of thousands of saves."""


class LocalStore:
    """A directory that holds checkpoints.

    Args:
        path: the directory; it is made at the first save.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._held: Descriptor | None = None
        self._made = False

    def names(self) -> list[str]:
        """Every name there is; empty when the directory does not exist."""
        with storage_errors("cannot list", self.path):
            try:
                return os.listdir(self.path)
            except FileNotFoundError:
                return []

    def open(self, name: str) -> LocalCheckpoint:
        """A checkpoint to read from."""
        with self._parent() as parent:
            return LocalCheckpoint(os.path.join(self.path, name), durable.open_directory(name, parent))

    def create(self, step: int) -> LocalPending:
        """Begin a save."""
        with storage_errors("cannot save in", self.path):
            self._make()
            parent = self._parent()
            try:
                return self._locked_temporary(parent, step)
            except BaseException:
                parent.close()
                raise

    def join(self, name: str) -> LocalPending:
        """Write into the save under way that another process began as ``name``.

        It is for that process to commit it, or to abort it.
        """
        with storage_errors("cannot save in", self.path):
            try:
                parent = self._parent()
                try:
                    return LocalPending(self.path, parent, name, durable.open_directory(name, parent), joined=True)
                except BaseException:
                    parent.close()
                    raise
            except FileNotFoundError as error:  # the run's own directory may be missing too: made a moment ago
                raise CheckpointNotFoundError(
                    f"{self.path} has no save under way as {name}.", path=self.path
                ) from error

    def log(self, line: bytes) -> None:
        """Append a line to ``events.jsonl``."""
        with storage_errors("cannot write", os.path.join(self.path, EVENTS)), self._parent() as parent:
            durable.append_line(parent, EVENTS, line + b"\n")

    def log_lines(self) -> Iterator[bytes]:
        """The lines of ``events.jsonl``, newest first; the newest only when it is whole."""
        with storage_errors("cannot read", os.path.join(self.path, EVENTS)):
            try:
                with self._parent() as parent, LocalFile(durable.open_file(parent, EVENTS)) as file:
                    data = file.read_all(max(0, file.nbytes - MAX_LOG_BYTES))
                    cut = file.nbytes > MAX_LOG_BYTES
            except FileNotFoundError:
                return
        # One after the other, never all at once: eight million bytes can be as many lines.
        end = data.rfind(b"\n")
        while end > 0:
            begin = data.rfind(b"\n", 0, end)
            if begin >= 0 or not cut:
                yield data[begin + 1 : end]
            end = begin

    def annotate(self, name: str, change: Callable[[LocalCheckpoint], bytes]) -> None:
        """Replace the annotations of a checkpoint atomically.

        The lock on the directory keeps the checkpoint from being removed by somebody who does not know them yet, and
        the one on its manifest keeps two that annotate from undoing each other's changes.
        """
        path = os.path.join(self.path, name)
        with storage_errors("cannot annotate", path), self._parent() as parent:
            try:
                with durable.open_directory(name, parent) as directory:
                    durable.lock_shared(directory)
                    with durable.open_file(directory, MANIFEST) as manifest:
                        durable.lock_exclusive(manifest, wait=True)
                        staged = staged_annotations_name(secrets.token_hex(8))
                        durable.replace_file(directory, ANNOTATIONS, staged, change(LocalCheckpoint(path, directory)))
            except FileNotFoundError as error:
                raise CheckpointNotFoundError(f"{path} was removed meanwhile.", path=path) from error

    def remove(self, name: str, spare: Callable[[LocalCheckpoint], bool] | None = None) -> bool:
        """Remove a checkpoint; False when somebody is reading it, it is to be spared or gone, and nothing was done."""
        with storage_errors("cannot remove", os.path.join(self.path, name)), self._parent() as parent:
            try:
                directory = durable.open_directory(name, parent)
            except FileNotFoundError:
                return False
            with directory:
                if durable.lock_exclusive(directory) is Lock.BUSY:
                    return False
                if not durable.is_same_directory(directory, parent, name):
                    return False
                if spare is not None and spare(LocalCheckpoint(os.path.join(self.path, name), directory)):
                    return False
                trash = trash_name(name, secrets.token_hex(8))
                durable.move_aside(parent, name, trash)
                durable.sync_directory(parent)
                remove_rest(parent, trash, directory)
                return True

    def clean(self) -> list[str]:
        """Remove what dead writers left behind, as far as it is certain that they are dead."""
        names = self.names()
        if not names:
            return []
        with storage_errors("cannot clean", self.path), self._parent() as parent:
            return clean(parent, names)

    def recover(self, name: str) -> bool:
        """Bring back the checkpoint that stepped aside for a replacement which never came; True when one did."""
        for candidate in self.names():
            if parse_aside(candidate) == name:
                with (
                    storage_errors("cannot bring back", os.path.join(self.path, name)),
                    contextlib.suppress(FileNotFoundError, FileExistsError),  # another process was faster
                    self._parent() as parent,
                ):
                    durable.publish(parent, candidate, name)
                    return True  # durable or not: after a crash it is brought back again
        return False

    def hold(self) -> None:
        """Become the only writer of this directory."""
        with storage_errors("cannot open run", self.path):
            self._make()
            directory = self._parent()
            if durable.lock_exclusive(directory) is Lock.BUSY:
                pid = durable.lock_holder(directory)
                directory.close()
                who = "Another process" if pid is None else f"Process {pid}"
                raise RunBusyError(
                    f"{self.path}: {who} is writing this run. Wait for it to end, stop it, or use another directory.",
                    path=self.path,
                )
        self._held = directory

    def release(self) -> None:
        """Let other writers in."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _make(self) -> None:
        """Have the directory, durably; what is above it is looked at once."""
        if not self._made or not os.path.isdir(self.path):
            durable.make_directories(self.path)
            self._made = True

    def _parent(self) -> Descriptor:
        return durable.open_directory(self.path)

    def _locked_temporary(self, parent: Descriptor, step: int) -> LocalPending:
        host = host_label(socket.gethostname())
        while True:
            name = str(TemporaryName(step, host, os.getpid(), secrets.token_hex(8)))
            directory = durable.make_directory(parent, name)
            # Between making and locking, a cleaner may have taken it for abandoned; then it is not ours any more.
            if directory is None:
                continue
            pending = LocalPending(self.path, parent, name, directory)
            try:
                if durable.lock_exclusive(directory) is not Lock.BUSY and durable.is_same_directory(
                    directory, parent, name
                ):
                    return pending
            except BaseException:
                pending.abort()
                raise
            directory.close()
