"""One committed checkpoint, read without torch."""

from __future__ import annotations

import datetime
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast import exporting
from holdfast.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    Damage,
    FormatVersionError,
    HoldfastError,
    UnsupportedValueError,
    storage_errors,
)
from holdfast.format import envelope, tree
from holdfast.format import manifest as manifests
from holdfast.format.cells import Box, count
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Annotations, Head, Manifest
from holdfast.format.names import (
    ANNOTATIONS,
    CONFIG_ENTRY,
    LOOP_ENTRY,
    MANIFEST,
    CheckpointName,
)
from holdfast.format.records import FileRecord, Piece, TensorRecord
from holdfast.format.strict_json import shown
from holdfast.inspection import (
    Contents,
    annotations_damage,
    content_damage,
    damaged_chunks,
    open_data_file,
    read_annotations,
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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of one tensor.

    Attributes:
        dtype: PyTorch's name of the element type, such as ``bfloat16``.
        shape: the global shape.
        nbytes: bytes of the whole tensor.
        alias_of: the tensor it is tied to, as ``entry/name``; None when it is stored itself.
        parts: in how many parts it is stored: one unless several processes held some of it each.
        files: in how many files these lie.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    alias_of: str | None = None
    parts: int = 1
    files: int = 1


class Checkpoint:
    """A committed checkpoint, read-only. Made by :func:`open` and :class:`Run`; needs no torch.

    It holds no file open between calls, and may be used from several threads. What it says is what its manifest said
    when it was opened; reading fails with ``CheckpointNotFoundError`` when the checkpoint has been removed since.
    """

    def __init__(self, store: Store, name: str, head: Head, annotations: Annotations, data: bytes) -> None:
        self._store = store
        self._head = head
        self._data = data  # the manifest's bytes, whose long parts are decoded when somebody asks for them
        self._annotations = annotations
        self.name = name

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, step={self.step}, epoch={self.epoch})"

    # ------------------------------------------------------------------------------------------------ what it says

    @property
    def path(self) -> str:
        """The directory of the checkpoint."""
        return os.path.join(self._store.path, self.name)

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._head.step

    @property
    def epoch(self) -> int:
        """The epoch in which training continues from here."""
        return self._head.epoch

    @property
    def generation(self) -> int:
        """1, or higher when its run had a checkpoint of the same step before."""
        parsed = CheckpointName.parse(self.name)
        return 1 if parsed is None else parsed.generation

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured of this state, at the save or later."""
        decoded = tree.decode({**self._head.metrics, **self._annotations.metrics}, tree.OpaqueLeaves())
        return dict(decoded)

    @property
    def created_at(self) -> datetime.datetime:
        """When it was saved, in UTC."""
        return datetime.datetime.fromisoformat(self._head.created_at)

    @property
    def reason(self) -> str:
        """Why it was saved, in words."""
        return self._head.reason

    @property
    def checkpoint_id(self) -> str:
        """Its own id, 32 hex digits."""
        return self._head.checkpoint_id

    @property
    def run_id(self) -> str:
        """The id of the run that it belongs to."""
        return self._head.run_id

    @property
    def parent(self) -> str | None:
        """The id of the checkpoint from which the process that saved it had resumed; None when it started anew."""
        return self._head.parent

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and world size at the save."""
        return dict(self._head.environment)

    @property
    def pinned(self) -> bool:
        """Whether it is kept whatever the retention policy says."""
        return self._annotations.pinned

    @property
    def tags(self) -> tuple[str, ...]:
        """Labels given to it."""
        return self._annotations.tags

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """By name, the size and the checksums of each of its data files."""
        return self._head.files

    @property
    def nbytes(self) -> int:
        """Bytes of its data files."""
        return sum(record.bytes for record in self._head.files.values())

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The whole manifest; CorruptCheckpointError when it is not what a manifest has to be."""
        with self._decoding():
            return manifests.decode(self._data, os.path.join(self.path, MANIFEST), self._head)

    @property
    def annotations(self) -> Annotations:
        """What was learned after the save."""
        return self._annotations

    def annotations_now(self, stored: StoredCheckpoint) -> Annotations:
        """The same of what is there by now, which may have changed since this was opened."""
        return _annotations_of(stored, self._head)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by ``entry/name``, tied ones included."""
        found = {}
        for entry, records in self.manifest.tensors.items():
            for name, record in records.items():
                found[f"{entry}/{name}"] = self._info(record)
            for alias, name in self.manifest.aliases.get(entry, {}).items():
                found[f"{entry}/{alias}"] = self._info(records[name], f"{entry}/{name}")
        return found

    def _info(self, record: TensorRecord, alias_of: str | None = None) -> TensorInfo:
        parts = files = 1
        if record.layout:
            parts = files = count(record)
        elif len(record.pieces) > 1:
            parts, files = len(record.pieces), len({piece.file for piece in record.pieces})
        return TensorInfo(record.dtype, record.shape, record.nbytes, alias_of, parts, files)

    def state_tree(self) -> dict[str, Any]:
        """The saved state with everything but torch's own values decoded; tensors stand as ``Opaque`` leaves."""
        with self._decoding():
            return {
                entry: tree.decode(node, _ListedLeaves(self.manifest, entry))
                for entry, node in self.manifest.state.items()
                if not entry.startswith("_")
            }

    @property
    def config(self) -> Any:
        """What the user recorded as ``config=``; None when that was nothing."""
        return self._own_entry(CONFIG_ENTRY)

    @property
    def loop(self) -> dict[str, Any]:
        """Where in its epoch the training was: ``steps_in_epoch``, ``accumulated``, and where the run comes from."""
        loop = self._own_entry(LOOP_ENTRY)
        return loop if isinstance(loop, dict) else {}

    def _own_entry(self, entry: str) -> Any:
        with self._decoding():
            return tree.decode(self.manifest.state.get(entry), _ListedLeaves(self.manifest, entry))

    # ---------------------------------------------------------------------------------------------------- its bytes

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
        with _reading(self.path, self.step):
            stored = self._store.open(self.name)
            try:
                stored.lock()
                if not _holds_manifest(stored, self._data):
                    _decode_head(_read_manifest(stored), self.path)  # raises where the manifest was damaged meanwhile
                    raise CheckpointNotFoundError(
                        f"{self.path} is another checkpoint now than when it was opened; open it again.", path=self.path
                    )
                yield stored
            finally:
                stored.close()

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except HoldfastError:  # a time zone that is not known here is no damage
            raise
        except ValueError as error:
            raise CorruptCheckpointError.at(self.path, [Damage(MANIFEST, str(error))], self.step) from error


class _ListedLeaves(tree.OpaqueLeaves):
    """Leaves for looking at an entry; a tensor among them is one that the manifest lists."""

    def __init__(self, manifest: Manifest, entry: str) -> None:
        self._known = (manifest.tensors.get(entry, {}), manifest.aliases.get(entry, {}))

    def decode(self, tag: str, body: Any) -> Any:
        """An :class:`Opaque` leaf."""
        if tag in tree.IN_FILES:
            name = body[0] if tag == "$ndarray" and isinstance(body, list) and body else body
            if not isinstance(name, str) or not any(name in names for names in self._known):
                raise ValueError(f"the tree refers to {shown(name)}, which the manifest does not list")
        return super().decode(tag, body)


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


def _annotations_of(stored: StoredCheckpoint, head: Head) -> Annotations:
    """The annotations; none where there are none, and none, with a warning, where they are broken: no state is lost."""
    try:
        return read_annotations(stored, head)
    except ValueError as error:
        damage = Damage(ANNOTATIONS, str(error))
        warnings.warn(f"{stored.path}: {damage}; its later metrics, pin and tags are not known.", stacklevel=2)
        return Annotations()


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
    with _reading(path):
        stored = store.open(name)
        try:
            data = _read_manifest(stored)
            head = _decode_head(data, path)
            _check_step(name, head, path)
            checkpoint = Checkpoint(store, name, head, _annotations_of(stored, head), data)
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


@contextmanager
def _reading(path: str, step: int | None = None) -> Iterator[None]:
    """The file system's errors while reading the checkpoint at ``path``, in the words of checkpoints."""
    with storage_errors("cannot read", path):
        try:
            yield
        except CheckpointNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointNotFoundError(_why_not_found(path), path=path, step=step) from error


def _why_not_found(path: str) -> str:
    if os.path.isfile(path):
        return f"{path} is a file; a checkpoint is a directory with a {MANIFEST}."
    if os.path.islink(path):
        return f"{path} is a symbolic link; within a run, a checkpoint is a directory."
    if not os.path.isdir(path):
        return f"{path} does not exist; expected the directory of a checkpoint."
    inside = sorted(filter(None, map(CheckpointName.parse, os.listdir(path))))
    if inside:
        return f"{path} is a run of {len(inside)} checkpoints, not one; open one of them, such as {inside[-1]}."
    return f"{path} has no {MANIFEST}: it is not a checkpoint."


def _holds_manifest(stored: StoredCheckpoint, data: bytes) -> bool:
    try:
        return stored.is_whole(MANIFEST, data)
    except ValueError:  # reading it says what is wrong
        return False


def _read_manifest(stored: StoredCheckpoint) -> bytes:
    try:
        return stored.read_whole(MANIFEST, manifests.MAX_MANIFEST_BYTES, envelope.BEGIN)
    except ValueError as error:
        raise CorruptCheckpointError.at(stored.path, [Damage(MANIFEST, str(error))]) from error


def _decode_head(data: bytes, path: str) -> Head:
    try:
        return manifests.decode_head(data, os.path.join(path, MANIFEST))
    except FormatVersionError:
        raise
    except ValueError as error:
        raise CorruptCheckpointError.at(path, [Damage(MANIFEST, str(error))]) from error


def _check_step(name: str, head: Head, path: str) -> None:
    """Refuse the checkpoint of one step under the name of another: a run orders its checkpoints by their names.

    Generations are not compared: a manifest does not know its own, and a checkpoint under another is still of its step.
    """
    named = CheckpointName.parse(name)
    if named is not None and named.step != head.step:
        what = f"is that of step {head.step}, in a directory named for step {named.step}"
        raise CorruptCheckpointError(
            f"{path} is damaged: {MANIFEST} {what}. If the directory was copied or renamed, name it "
            f"{CheckpointName(head.step)} (or with .g2, .g3 where that is taken); if the manifest is from another "
            "checkpoint, restore it from a copy.",
            damage=[Damage(MANIFEST, what)],
            path=path,
            step=head.step,
        )


__all__ = ["Checkpoint", "TensorInfo", "TensorRecord", "open", "open_checkpoint"]
