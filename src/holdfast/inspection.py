"""What is wrong with a checkpoint on disk: found by looking at it, said in words."""

from __future__ import annotations

import math
from collections.abc import Iterable

from holdfast.errors import Damage
from holdfast.format import manifest as manifests
from holdfast.format import safetensors
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Annotations, Head, Manifest, Piece
from holdfast.format.names import ANNOTATIONS, is_auxiliary
from holdfast.storage.reading import Damaged
from holdfast.storage.store import StoredCheckpoint, StoredFile


def read_annotations(stored: StoredCheckpoint) -> Annotations:
    """The annotations of a checkpoint; ValueError says what is wrong with them."""
    try:
        return manifests.decode_annotations(stored.read_whole(ANNOTATIONS, manifests.MAX_ANNOTATIONS_BYTES))
    except FileNotFoundError:
        return Annotations()


def annotations_damage(stored: StoredCheckpoint) -> list[Damage]:
    """What is wrong with the annotations."""
    try:
        read_annotations(stored)
    except ValueError as error:
        return [Damage(ANNOTATIONS, str(error))]
    return []


def structure_damage(stored: StoredCheckpoint, manifest: Manifest | Head) -> list[Damage]:
    """Files that are missing, of another size, or not part of the checkpoint."""
    damage = []
    present = set(stored.names())
    for name in manifest.files:
        damage += unreadable(stored, manifest, name)
    strangers = sorted(name for name in present - set(manifest.files) if not is_auxiliary(name))
    return damage + [Damage(name, "is not part of the checkpoint") for name in strangers]


def unreadable(stored: StoredCheckpoint, manifest: Manifest | Head, name: str) -> list[Damage]:
    """Why a data file cannot be what was written, as far as a look at its size tells."""
    try:
        file = stored.open_file(name)
    except FileNotFoundError:
        return [Damage(name, "is missing", tensors=_tensors_in(manifest, name))]
    except ValueError as error:
        return [Damage(name, str(error), tensors=_tensors_in(manifest, name))]
    nbytes = file.nbytes
    file.close()
    expected = manifest.files[name].bytes
    if nbytes == expected:
        return []
    return [Damage(name, f"has {nbytes} bytes, expected {expected}", tensors=_tensors_in(manifest, name))]


def damaged_chunks(manifest: Manifest, damaged: Iterable[Damaged]) -> list[Damage]:
    """What to say of chunks whose bytes are not those that were written: where they are, and whose bytes they hold."""
    found = []
    for file, index in damaged:
        record = manifest.files[file]
        begin = index * record.chunk_bytes
        end = min(begin + record.chunk_bytes, record.bytes)
        tensors = _tensors_in(manifest, file, begin, end)
        found.append(Damage(file, f"bytes {begin} to {end} differ from what was written", chunk=index, tensors=tensors))
    return found


def header_damage(stored: StoredCheckpoint, name: str, manifest: Manifest) -> list[Damage]:
    """Where the safetensors header of a data file, whose bytes are intact, tells another story than the manifest."""
    file = stored.open_file(name)
    try:
        layout = _layout_of(file)
    except ValueError as error:
        return [Damage(name, f"its safetensors header: {error}")]
    finally:
        file.close()
    described = {tensor.name: (tensor.code, tensor.shape, tensor.begin) for tensor in layout.tensors}
    for entry, records in manifest.tensors.items():
        for tensor, record in records.items():
            for piece in record.pieces:
                expected = (DTYPES[record.dtype].code, DTYPES[record.dtype].stored_shape(piece.shape), piece.begin)
                if piece.file == name and described.get(piece.name) != expected:
                    return [Damage(name, "its header and the manifest disagree", tensors=(f"{entry}/{tensor}",))]
    return []


def _layout_of(file: StoredFile) -> safetensors.Layout:
    first = memoryview(bytearray(8))
    file.read_into(0, first)
    prefix = memoryview(bytearray(safetensors.header_length(bytes(first), file.nbytes)))
    file.read_into(0, prefix)
    return safetensors.parse(bytes(prefix), file.nbytes)


def _tensors_in(manifest: Manifest | Head, file: str, begin: int = 0, end: int | None = None) -> tuple[str, ...]:
    """The tensors with bytes in a part of a file, as ``entry/name``."""
    if isinstance(manifest, Head):
        return ()
    return tuple(
        f"{entry}/{name}"
        for entry, records in manifest.tensors.items()
        for name, record in records.items()
        if any(
            piece.file == file and (end is None or _overlaps(piece, DTYPES[record.dtype].itemsize, begin, end))
            for piece in record.pieces
        )
    )


def _overlaps(piece: Piece, itemsize: int, begin: int, end: int) -> bool:
    return piece.begin < end and piece.begin + math.prod(piece.shape) * itemsize > begin
