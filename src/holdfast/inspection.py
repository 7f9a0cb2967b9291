"""What is wrong with a checkpoint on disk: found by looking at it, said in words."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Iterator

from holdfast.errors import CorruptCheckpointError, Damage
from holdfast.format import envelope, safetensors
from holdfast.format import manifest as manifests
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Annotations, Head, Manifest
from holdfast.format.names import ANNOTATIONS, is_auxiliary, is_tensor_file_name
from holdfast.format.strict_json import shown
from holdfast.storage import memory
from holdfast.storage.reading import Damaged, FileReads, Read, read_files
from holdfast.storage.store import StoredCheckpoint, StoredFile

MAX_STRANGERS = 1000
"""With more files than this that are not its own, a directory is not looked at further."""
_HEADERS_BYTES = 2 * safetensors.MAX_HEADER_BYTES
"""What is kept of headers at a time, until they are compared with the manifest."""


def read_annotations(stored: StoredCheckpoint, manifest: Manifest | Head) -> Annotations:
    """The annotations of a checkpoint; ValueError says what is wrong with them."""
    try:
        data = stored.read_whole(ANNOTATIONS, manifests.MAX_ANNOTATIONS_BYTES, envelope.BEGIN)
    except FileNotFoundError:
        return Annotations()
    annotations = manifests.decode_annotations(data)
    if annotations.checkpoint_id not in (None, manifest.checkpoint_id):
        raise ValueError(
            f"belongs to the checkpoint {shown(annotations.checkpoint_id)}, expected {manifest.checkpoint_id}"
        )
    return annotations


def annotations_damage(stored: StoredCheckpoint, manifest: Manifest | Head) -> list[Damage]:
    """What is wrong with the annotations."""
    try:
        read_annotations(stored, manifest)
    except ValueError as error:
        return [Damage(ANNOTATIONS, str(error))]
    return []


class Contents:
    """Which tensors lie where in the files of a checkpoint; of a head nothing is known."""

    def __init__(self, manifest: Manifest | Head) -> None:
        self._manifest = manifest

    def tensors(self, file: str, begin: int = 0, end: int | None = None) -> tuple[str, ...]:
        """The tensors with bytes in a part of a file, as ``entry/name``, in the order of the manifest."""
        places, ends = self._places.get(file, ([], []))
        if end is not None:  # they lie one behind the other: decoding made sure of it
            places = places[bisect.bisect_right(ends, begin) : bisect.bisect_left(places, (end,))]
            places = [place for place in places if place[0] < place[1]]  # an empty tensor has no bytes anywhere
        return tuple(dict.fromkeys(self._names[number] for _, _, number in sorted(places, key=lambda place: place[2])))

    @functools.cached_property
    def _names(self) -> list[str]:
        if isinstance(self._manifest, Head):
            return []
        return [f"{entry}/{name}" for entry, records in self._manifest.tensors.items() for name in records]

    @functools.cached_property
    def _places(self) -> dict[str, tuple[list[tuple[int, ...]], list[int]]]:
        """By file: begin, end and number of each piece, in order of their beginnings; and the ends alone."""
        if isinstance(self._manifest, Head):
            return {}
        places: dict[str, list[tuple[int, ...]]] = {name: [] for name in self._manifest.files}
        records = (record for records in self._manifest.tensors.values() for record in records.values())
        for number, record in enumerate(records):
            itemsize = DTYPES[record.dtype].itemsize
            for piece in record.pieces:
                end = piece.begin + math.prod(piece.shape) * itemsize
                places[piece.file].append((piece.begin, end, number))
        return {name: (sorted(found), sorted(place[1] for place in found)) for name, found in places.items()}


def structure_damage(stored: StoredCheckpoint, manifest: Manifest | Head) -> list[Damage]:
    """Files that are missing, of another size, or not part of the checkpoint."""
    most = len(manifest.files) + MAX_STRANGERS
    present = set(stored.names(most + 1))
    if len(present) > most:
        return [Damage(".", f"holds more than {most} files, expected {len(manifest.files)}")]
    damage = unreadable(stored, manifest, manifest.files, present)
    strangers = sorted(name for name in present - set(manifest.files) if not is_auxiliary(name))
    return damage + [Damage(name, "is not part of the checkpoint") for name in strangers]


def unreadable(
    stored: StoredCheckpoint, manifest: Manifest | Head, names: Iterable[str], present: set[str] | None = None
) -> list[Damage]:
    """Why data files cannot be what was written, as far as a look at their sizes tells.

    It lets all of them be named before anything is read. What is read is looked at once more, when it is open.

    Args:
        stored: the checkpoint.
        manifest: what it has to be.
        names: the files.
        present: all that are there, where that is known.
    """
    contents = Contents(manifest)
    damage = []
    for name in names:
        if present is not None and name not in present:
            damage.append(Damage(name, "is missing", tensors=contents.tensors(name)))
            continue
        try:
            open_data_file(stored, manifest, name, contents).close()
        except CorruptCheckpointError as error:
            damage += error.damage
    return damage


def open_data_file(
    stored: StoredCheckpoint, manifest: Manifest | Head, name: str, contents: Contents | None = None
) -> StoredFile:
    """A data file, open, and of the size that it has to have.

    Raises:
        CorruptCheckpointError: it is not.
    """
    expected = manifest.files[name].bytes
    try:
        file = stored.open_file(name)
    except FileNotFoundError:
        what = "is missing"
    except ValueError as error:
        what = str(error)
    else:
        if file.nbytes == expected:
            return file
        what = f"has {file.nbytes} bytes, expected {expected}"
        file.close()
    tensors = (contents or Contents(manifest)).tensors(name)
    raise CorruptCheckpointError.at(stored.path, [Damage(name, what, tensors=tensors)], manifest.step)


def damaged_chunks(manifest: Manifest, damaged: Iterable[Damaged]) -> list[Damage]:
    """What to say of chunks whose bytes are not those that were written: where they are, and whose bytes they hold."""
    contents = Contents(manifest)
    found = []
    for file, index in damaged:
        record = manifest.files[file]
        begin = index * record.chunk_bytes
        end = min(begin + record.chunk_bytes, record.bytes)
        tensors = contents.tensors(file, begin, end)
        found.append(Damage(file, f"bytes {begin} to {end} differ from what was written", chunk=index, tensors=tensors))
    return found


def content_damage(
    stored: StoredCheckpoint, manifest: Manifest, names: Iterable[str], progress: Callable[[int], None] | None
) -> list[Damage]:
    """Chunks of files that are not what was written, and headers that tell another story than the manifest. Blocks.

    A header is taken from the very bytes whose checksums were compared.
    """
    described = _described(manifest)
    damage: list[Damage] = []
    for headers in _groups([_Header(name, manifest, described.get(name, {})) for name in names]):
        jobs = [
            FileReads(
                header.name,
                functools.partial(open_data_file, stored, manifest, header.name),
                manifest.files[header.name],
                header.reads(),
                whole=True,
            )
            for header in headers
        ]
        found = damaged_chunks(manifest, read_files(jobs, to_the_end=True, progress=progress))
        broken = {item.file for item in found}
        damage += found
        for header in headers:
            if header.name not in broken:
                damage += header.damage()
    return damage


_Piece = tuple[str, str, tuple[int, ...], int]
"""Of a piece in a file, ``entry/name``; and as a header has it: element type, shape, and where it begins."""


def _described(manifest: Manifest) -> dict[str, dict[str, _Piece]]:
    """By file and by the name that it has there, each piece."""
    described: dict[str, dict[str, _Piece]] = {}
    for entry, records in manifest.tensors.items():
        for tensor, record in records.items():
            dtype = DTYPES[record.dtype]
            for piece in record.pieces:
                described.setdefault(piece.file, {})[piece.name] = (
                    f"{entry}/{tensor}",
                    dtype.code,
                    dtype.stored_shape(piece.shape),
                    piece.begin,
                )
    return described


class _Header:
    """The header of a data file, taken from the bytes that are read of it."""

    def __init__(self, name: str, manifest: Manifest, pieces: dict[str, _Piece]) -> None:
        self.name = name
        self._file_bytes = manifest.files[name].bytes
        self._pieces = pieces
        end = min((piece[3] for piece in pieces.values()), default=self._file_bytes)
        self.nbytes = min(end, safetensors.MAX_HEADER_BYTES) if is_tensor_file_name(name) else 0
        self._data = bytearray()

    def reads(self) -> list[Read]:
        """What to read for it."""
        self._data = bytearray(self.nbytes)
        return [Read(0, self.nbytes, self._take)]

    def _take(self, offset: int, address: int, nbytes: int) -> None:
        """See ``Sink``."""
        self._data[offset : offset + nbytes] = memory.view_at(address, nbytes)

    def damage(self) -> list[Damage]:
        """Where it does not say of the tensors what the manifest says."""
        data, self._data = self._data, bytearray()
        if not is_tensor_file_name(self.name):
            return []
        try:
            nbytes = safetensors.header_length(data, self._file_bytes)
            layout = safetensors.parse(memoryview(data)[:nbytes], self._file_bytes)
        except ValueError as error:
            return [Damage(self.name, f"its safetensors header: {error}")]
        found = {tensor.name: (tensor.code, tensor.shape, tensor.begin) for tensor in layout.tensors}
        for name, (tensor, *expected) in self._pieces.items():
            if found.get(name) != tuple(expected):
                return [Damage(self.name, "its header and the manifest disagree", tensors=(tensor,))]
        return []


def _groups(headers: Iterable[_Header]) -> Iterator[list[_Header]]:
    """As many together as there is room for their bytes; one always has its place."""
    group: list[_Header] = []
    nbytes = 0
    for header in headers:
        if group and nbytes + header.nbytes > _HEADERS_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(header)
        nbytes += header.nbytes
    if group:
        yield group
