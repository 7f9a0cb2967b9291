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
from collections.abc import Callable, Iterator, Mapping

from holdfast.errors import CheckpointExistsError, CheckpointNotFoundError, RunBusyError, storage_errors
from holdfast.format.names import (
    ANNOTATIONS,
    EVENTS,
    MANIFEST,
    CheckpointName,
    TemporaryName,
    aside_name,
    host_label,
    is_auxiliary,
    is_data_file_name,
    is_probe,
    is_staged_annotations,
    is_trash,
    parse_aside,
    probe_name,
    staged_annotations_name,
    trash_name,
)
from holdfast.format.records import FileRecord
from holdfast.storage import durable
from holdfast.storage.durable import Descriptor, Lock
from holdfast.storage.local_reading import LocalCheckpoint, LocalFile
from holdfast.storage.store import FileImage
from holdfast.storage.writing import write_files

# A writer on another host is given up for dead only after this long without a sign of life, by the file system's own
# clock, and only when its lock is free as well: some network file systems keep locks to one host.
FOREIGN_IDLE_S = 3600.0

MAX_LOG_BYTES = 8 * 2**20
"""Of a longer log only the end is read: tens of thousands of saves."""


class LocalPending:
    """A save under way, in a directory of its own that no reader takes for a checkpoint."""

    def __init__(
        self, store_path: str, parent: Descriptor, name: str, directory: Descriptor, *, joined: bool = False
    ) -> None:
        self._store_path = store_path
        self._parent = parent
        self._name = name
        self._directory = directory
        self._joined = joined
        self._committed = False
        self._sealed = False

    def link_file(self, name: str, checkpoint: str, file: str, nbytes: int) -> bool:
        """Take a file of a committed checkpoint as ``name``; False where that cannot be."""
        with storage_errors("cannot link", os.path.join(self._store_path, checkpoint, file)):
            try:
                source = durable.open_directory(checkpoint, self._parent)
            except FileNotFoundError:
                return False
            with source:
                return durable.link_file(source, file, self._directory, name, nbytes)

    @property
    def name(self) -> str:
        """What others call it who join it."""
        return self._name

    def write_files(self, images: Mapping[str, FileImage]) -> dict[str, FileRecord]:
        """Write the data files, durably, and return their records."""
        return write_files(self._directory, images, os.path.join(self._store_path, self._name))

    def leave(self) -> None:
        """Let go of a save that was joined: the names of its files are durable, as far as this process can tell."""
        with storage_errors("cannot write", os.path.join(self._store_path, self._name)):
            durable.sync_directory(self._directory)
            self._close()

    def commit(self, name: str, manifest: bytes) -> None:
        """Make the checkpoint durable and visible as ``name``."""
        final = os.path.join(self._store_path, name)
        with storage_errors("cannot commit", final):
            self._seal(manifest)
            try:
                durable.publish(self._parent, self._name, name)
            except FileExistsError as error:
                raise CheckpointExistsError(f"{final} exists already; it was left as it is.", path=final) from error
            # From here on it is visible and whole, whether or not its name is durable: nothing may unlink its files.
            self._committed = True
            self._make_name_durable(final)
            self._close()

    def replace(self, name: str, manifest: bytes) -> None:
        """Make the checkpoint durable and visible as ``name``, in the place of the one that has it now.

        A crash leaves the old one or the new one, whole. Where two names cannot be swapped in one step, the old one
        waits as ``.aside-...-<name>`` until the new one is durable, and :meth:`LocalStore.recover` brings it back.
        """
        final = os.path.join(self._store_path, name)
        with storage_errors("cannot replace", final):
            self._seal(manifest)
            aside = aside_name(name, secrets.token_hex(8))
            if durable.exchange(self._parent, self._name, name):
                self._committed = True
                durable.move_aside(self._parent, self._name, aside)
            else:
                durable.move_aside(self._parent, name, aside)
                try:
                    durable.publish(self._parent, self._name, name)
                except OSError:
                    durable.publish(self._parent, aside, name)
                    raise
                self._committed = True
            self._make_name_durable(final)
            _discard(self._parent, aside)
            self._close()

    def abort(self) -> None:
        """Remove what was written, unless it is another's save. Never raises: another error is on its way."""
        if not self._committed and not self._joined:
            with contextlib.suppress(OSError):
                _remove_rest(self._parent, self._name, self._directory)
        self._close()

    def _seal(self, manifest: bytes) -> None:
        if not self._sealed:
            durable.write_file(self._directory, MANIFEST, manifest)
            durable.sync_directory(self._directory)
            self._sealed = True

    def _make_name_durable(self, final: str) -> None:
        with storage_errors("a power cut may undo what can be seen already: cannot make durable the name of", final):
            durable.sync_directory(self._parent)

    def _close(self) -> None:
        self._directory.close()
        self._parent.close()


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
                _remove_rest(parent, trash, directory)
                return True

    def clean(self) -> list[str]:
        """Remove what dead writers left behind, as far as it is certain that they are dead."""
        removed = []
        names = self.names()
        if not names:
            return []
        with storage_errors("cannot clean", self.path), self._parent() as parent:
            durable.unlink_files(parent, filter(is_probe, names))
            for name in names:
                unfinished = is_trash(name) or parse_aside(name) or TemporaryName.parse(name)
                if not unfinished and CheckpointName.parse(name) is None:
                    continue
                with (
                    contextlib.suppress(FileNotFoundError, NotADirectoryError),
                    durable.open_directory(name, parent) as directory,
                ):
                    if not unfinished:
                        _remove_staged(directory)
                    elif self._is_abandoned(name, directory, parent) and _remove_rest(parent, name, directory):
                        removed.append(name)
        return removed

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

    def _is_abandoned(self, name: str, directory: Descriptor, parent: Descriptor) -> bool:
        lock = durable.lock_exclusive(directory)
        if lock is Lock.BUSY or not durable.is_same_directory(directory, parent, name):
            return False
        if is_trash(name):
            return True  # its removal was decided, and no reader holds it
        successor = parse_aside(name)
        if successor is not None:
            return durable.exists(parent, successor)
        temporary = TemporaryName.parse(name)
        assert temporary is not None
        if temporary.host == host_label(socket.gethostname()):
            return lock is Lock.HELD or not _is_alive(temporary.pid)
        return lock is Lock.HELD and _idle_s(directory, parent) > FOREIGN_IDLE_S


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _idle_s(directory: Descriptor, parent: Descriptor) -> float:
    """Seconds since anything changed in ``directory``, by the clock of its file system, not by this host's."""
    newest = os.fstat(directory.fd).st_mtime
    for name in os.listdir(directory.fd):
        newest = max(newest, os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_mtime)
    probe = probe_name(secrets.token_hex(8))
    try:
        with durable.create_file(parent, probe) as file:
            return os.fstat(file.fd).st_mtime - newest
    finally:
        durable.unlink_files(parent, [probe])


def _discard(parent: Descriptor, name: str) -> None:
    """Remove a checkpoint that has been renamed out of sight, unless it is being read; then ``clean`` will."""
    with contextlib.suppress(FileNotFoundError), durable.open_directory(name, parent) as directory:
        if durable.lock_exclusive(directory) is not Lock.BUSY:
            _remove_rest(parent, name, directory)


def _remove_staged(directory: Descriptor) -> None:
    """Unlink annotations that were about to replace others when their writer died."""
    for name in filter(is_staged_annotations, os.listdir(directory.fd)):
        with contextlib.suppress(FileNotFoundError, ValueError), durable.open_file(directory, name) as file:
            if durable.lock_exclusive(file) is Lock.HELD:
                durable.unlink_files(directory, [name])


def _remove_rest(parent: Descriptor, name: str, directory: Descriptor) -> bool:
    """Unlink the files of a removed or abandoned checkpoint; the manifest first, so that no half of it looks whole.

    What is not a checkpoint's is left, and with it the directory.
    """
    found = os.listdir(directory.fd)
    ours = [file for file in found if file != MANIFEST and (is_auxiliary(file) or is_data_file_name(file))]
    durable.unlink_files(directory, [MANIFEST, *ours])
    return durable.remove_directory(parent, name)
