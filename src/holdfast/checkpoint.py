"""One committed checkpoint, read without torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from holdfast import exporting, opening
from holdfast.description import Description, TensorInfo
from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, Damage, UnsupportedValueError
from holdfast.format.cells import Box
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Annotations, Head
from holdfast.format.names import MANIFEST
from holdfast.format.records import Piece, TensorRecord
from holdfast.inspection import (
    Contents,
    annotations_damage,
    content_damage,
    damaged_chunks,
    open_data_file,
    structure_damage,
    unreadable,
)
from holdfast.locating import Locator, Wanted
from holdfast.storage import memory
from holdfast.storage.boxes import array_sink, box_of
from holdfast.storage.local import LocalStore
from holdfast.storage.reading import FileReads, Read, read_files
from holdfast.storage.store import Store, StoredCheckpoint

Progress = Callable[[int], None]


class Checkpoint(Description):
    """A committed checkpoint, read-only. Made by :func:`open` and :class:`Run`; needs no torch.

    It holds no file open between calls, and may be used from several threads. What it says is what its manifest said
    when it was opened; reading fails with ``CheckpointNotFoundError`` when the checkpoint has been removed since.
    """

    def __init__(self, store: Store, name: str, head: Head, annotations: Annotations, data: bytes) -> None:
        super().__init__(os.path.join(store.path, name), head, annotations, data)
        self._store = store

    def annotations_now(self, stored: StoredCheckpoint) -> Annotations:
        """``annotations``, of what is there by now, which may have changed since this was opened."""
        return opening.annotations_of(stored, self._head)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor as a new numpy array, its chunks verified. Blocks.

        Args:
            name: ``entry/name``, as in ``tensors``.

        Raises:
            KeyError: there is no such tensor.
            UnsupportedValueError: numpy has no such element type (bfloat16, float8); use ``holdfast.load``.
            CorruptCheckpointError: the bytes are not those that were written.
        """
        entry, _, tensor = name.partition("/")
        try:
            record = self.manifest.record(entry, tensor)
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}; its names are in .tensors") from None
        numpy_name = DTYPES[record.dtype].numpy
        if numpy_name is None:
            raise UnsupportedValueError(
                f"{name}: numpy has no {record.dtype}; "
                f"holdfast.load({self.path!r}, only={name!r}) gives a torch tensor.",
                key=name,
            )
        with memory.enough_memory(name, record.nbytes):
            array = np.empty(record.shape, numpy_name)
        wanted: dict[str, list[Read]] = {}
        stored = self.manifest.aliases.get(entry, {}).get(tensor, tensor)
        for piece in self.pieces(f"{entry}/{stored}", record):
            box = box_of(array, piece.offset, piece.shape)
            wanted.setdefault(piece.file, []).append(Read(piece.begin, box.nbytes, array_sink(box)))
        self.read_files(wanted)
        return array

    def export(self, entry: str, path: str | os.PathLike[str]) -> None:
        """Write the tensors of an entry into one standard safetensors file, whatever parts they lie in. Blocks.

        Their names are those of ``tensors``, without the entry; tied ones stand in the metadata, as
        ``safetensors.torch.save_model`` writes them. Takes the memory of a few chunks, however large the entry is.

        Args:
            entry: such as ``model``.
            path: the new file, which is there when it is whole and durable. Nothing is overwritten.

        Raises:
            UsageError: there is no such entry, it has no tensors, or ``path`` lies in the checkpoint.
            CheckpointExistsError: something is at ``path``.
            CorruptCheckpointError: the bytes are not those that were written; no file is left.
            DiskFullError: there is no space for the file; none is left.
        """
        target = exporting.target_of(path, self.path)
        exporting.export_entry(self.manifest, entry, target, self._locator, self._read_headers, self.read_files)

    def pieces(self, key: str, record: TensorRecord, box: Box | None = None) -> Sequence[Piece]:
        """Where the bytes of a tensor lie. Blocks where headers of files have to be read for it; they are remembered.

        Args:
            key: ``entry/name`` of the tensor; of tied ones that which is stored.
            record: what the manifest says of it.
            box: offset and shape of the part that is wanted; all of it by default.

        Raises:
            CorruptCheckpointError: a file is not what was written.
        """
        return self.locate([Wanted(key, record, box)])[0]

    def locate(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[Piece]]:
        """The same of many tensors, for each of them. Each header is read once for all, as long as there is room."""
        if not any(item.record.layout for item in wanted):
            return [item.record.pieces for item in wanted]
        return self._locator.locate(wanted, self._read_headers)

    @functools.cached_property
    def _locator(self) -> Locator:
        return Locator(self.manifest, self.path)

    def _read_headers(self, wanted: Mapping[str, Sequence[Read]]) -> None:
        # Damage in headers is not looked up in headers.
        self._read(list(wanted), wanted, Contents(self.manifest))

    def read_files(
        self,
        wanted: Mapping[str, Sequence[Read]],
        *,
        whole: bool = False,
        allocate: Callable[[int], memoryview] = memory.allocate,
    ) -> None:
        """Read parts of files, each chunk verified before any of its bytes reach a sink. Blocks.

        Args:
            wanted: by file, where to read and what takes the bytes.
            whole: verify every other chunk of every file too.
            allocate: makes the buffers that the bytes pass through.

        Raises:
            CorruptCheckpointError: names file, chunk and tensors. Sinks may have got what was read before it.
            CheckpointNotFoundError: the checkpoint was removed since it was opened.
        """
        contents = Contents(self.manifest, lambda file: self._locator.spans(file, self._read_headers))
        names = list(self.manifest.files) if whole else list(wanted)
        self._read(names, wanted, contents, whole=whole, allocate=allocate)

    def _read(
        self,
        names: Sequence[str],
        wanted: Mapping[str, Sequence[Read]],
        contents: Contents,
        *,
        whole: bool = False,
        allocate: Callable[[int], memoryview] = memory.allocate,
    ) -> None:
        if not names:
            return
        with self._opened() as stored:
            damage = unreadable(stored, self.manifest, names)
            if not damage:
                jobs = [
                    FileReads(
                        name,
                        functools.partial(open_data_file, stored, self.manifest, name),
                        self.manifest.files[name],
                        wanted.get(name, ()),
                        whole,
                    )
                    for name in names
                ]
                damage = damaged_chunks(self.manifest, read_files(jobs, allocate=allocate), contents)
        if damage:
            raise CorruptCheckpointError.at(self.path, damage, self.step)

    def map_files(self, names: Collection[str]) -> dict[str, memoryview]:
        """Whole files as memory, nothing of which is verified; writing to it changes a private copy of a page.

        Raises:
            CorruptCheckpointError: a file is missing or of another size.
            CheckpointNotFoundError: the checkpoint was removed since it was opened.
        """
        with self._opened() as stored:
            damage = unreadable(stored, self.manifest, names)
            maps = {}
            for name in () if damage else names:
                try:
                    maps[name] = stored.map_file(name, self.manifest.files[name].bytes)
                except (FileNotFoundError, ValueError) as error:  # since the first look
                    damage.append(Damage(name, str(error)))
            if damage:
                raise CorruptCheckpointError.at(self.path, damage, self.step)
            return maps

    def verify(self, progress: Progress | None = None) -> None:
        """Read every byte and compare it with its checksum. Blocks.

        Args:
            progress: called with the number of bytes checked since its last call.

        Raises:
            CorruptCheckpointError: lists all damage, not only the first; of damaged chunks up to 10,000.
            CheckpointNotFoundError: the checkpoint was removed since it was opened.
        """
        with self._opened() as stored:
            damage = structure_damage(stored, self.manifest) + annotations_damage(stored, self.manifest)
            missing = {item.file for item in damage}
            readable = [name for name in self.manifest.files if name not in missing]
            damage += content_damage(stored, self.manifest, readable, progress)
        if damage:
            raise CorruptCheckpointError.at(self.path, damage, self.step)

    @contextmanager
    def _opened(self) -> Iterator[StoredCheckpoint]:
        """The checkpoint's files, locked against removal, and still those that the manifest speaks of."""
        with opening.reading(self.path, self.step):
            stored = self._store.open(self.name)
            try:
                stored.lock()
                if not opening.holds_manifest(stored, self._data):
                    opening.read_head(stored)  # raises where the manifest was damaged meanwhile
                    raise CheckpointNotFoundError(
                        f"{self.path} is another checkpoint now than when it was opened; open it again.", path=self.path
                    )
                yield stored
            finally:
                stored.close()


def reopen_checkpoint(store: Store, name: str, manifest: bytes) -> Checkpoint:
    """The checkpoint that was just committed as ``name``: its files all there, and its manifest the one written.

    Raises:
        CorruptCheckpointError: it is not.
    """
    checkpoint = open_checkpoint(store, name, whole=False)
    if checkpoint._data != manifest:
        raise CorruptCheckpointError.at(
            checkpoint.path, [Damage(MANIFEST, "is not what was just written")], checkpoint.step
        )
    return checkpoint


def open_checkpoint(store: Store, name: str, *, whole: bool = True) -> Checkpoint:
    """The checkpoint called ``name``: its manifest validated, its files all there and of the right sizes.

    Args:
        store: where it is.
        name: what it is called.
        whole: validate also the records of its tensors. Otherwise that is done when they are asked for, which lets a
            run of a thousand checkpoints be listed at once; the manifest's checksum is compared in any case.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: what is there is not whole.
        FormatVersionError: a newer Holdfast wrote it.
    """
    path = os.path.join(store.path, name)
    with opening.reading(path):
        stored = store.open(name)
        try:
            head, data = opening.read_head(stored)
            checkpoint = Checkpoint(store, name, head, opening.annotations_of(stored, head), data)
            if whole or structure_damage(stored, head):
                damage = structure_damage(stored, checkpoint.manifest)  # names the tensors too
                if damage and not stored.is_current():
                    raise CheckpointNotFoundError(f"{path} was removed while it was looked at.", path=path)
                if damage:
                    raise CorruptCheckpointError.at(path, damage, head.step)
            return checkpoint
        finally:
            stored.close()


def open(path: str | os.PathLike[str]) -> Checkpoint:  # noqa: A001 - the public name, used as holdfast.open
    """Open a checkpoint for reading. Needs no torch; reads the manifest and checks the sizes of the files.

    Args:
        path: the directory of one checkpoint, or a symbolic link to it.

    Raises:
        CheckpointNotFoundError: there is none; when ``path`` is a run, the message names its newest.
        CorruptCheckpointError: what is there is not whole.
        FormatVersionError: a newer Holdfast wrote it.
    """
    absolute = os.path.realpath(os.fspath(path))
    store = LocalStore(os.path.dirname(absolute))
    return open_checkpoint(store, os.path.basename(absolute))


__all__ = ["Checkpoint", "TensorInfo", "TensorRecord", "open", "open_checkpoint"]
