"""A save under way in a directory of a POSIX file system: steps 3 to 5 of the order that :mod:`.local` keeps."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping

from holdfast.errors import CheckpointExistsError, storage_errors
from holdfast.format.names import MANIFEST, aside_name
from holdfast.format.records import FileRecord
from holdfast.storage import durable
from holdfast.storage.durable import Descriptor
from holdfast.storage.local_cleaning import discard, remove_rest
from holdfast.storage.store import FileImage
from holdfast.storage.writing import write_files


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
            discard(self._parent, aside)
            self._close()

    def abort(self) -> None:
        """Remove what was written, unless it is another's save. Never raises: another error is on its way."""
        if not self._committed and not self._joined:
            with contextlib.suppress(OSError):
                remove_rest(self._parent, self._name, self._directory)
        self._close()

    def _seal(self, manifest: bytes) -> None:
        if not self._sealed:
            durable.write_file(self._directory, MANIFEST, manifest)
            durable.sync_directory(self._directory)
            self._sealed = True

    def _make_name_durable(self, final: str) -> None:
        with storage_errors("cannot make durable, though it can be seen already,", final):
            durable.sync_directory(self._parent)

    def _close(self) -> None:
        self._directory.close()
        self._parent.close()
