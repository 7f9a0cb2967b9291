"""An entry of a checkpoint as one standard safetensors file, in whatever parts and files it lies.

Each chunk of the checkpoint is read once, verified, and its bytes go straight to their places in the new file: what it
takes of memory is a few chunks, and the places of the parts of a few files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence

from holdfast.errors import UsageError
from holdfast.format import safetensors
from holdfast.format.cells import count
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Manifest
from holdfast.format.records import Piece, TensorRecord
from holdfast.format.safetensors import StoredTensor
from holdfast.locating import Locator, Reading
from holdfast.storage.reading import Read
from holdfast.storage.scattering import BoxWriter, ScatteredFile

_FILES_AT_ONCE = 16
_PARTS_AT_ONCE = 50_000


def export_entry(
    manifest: Manifest, entry: str, path: str, locator: Locator, read_headers: Reading, read: Reading
) -> None:
    """Write the tensors of ``entry`` into one file. Blocks.

    Args:
        manifest: of the checkpoint.
        entry: which.
        path: the new file.
        locator: knows where cells lie.
        read_headers: what it reads with.
        read: reads the tensors.

    Raises:
        UsageError: there is no such entry, or it has no tensors.
        CheckpointExistsError: something is at ``path``.
        CorruptCheckpointError: the bytes are not those that were written; nothing is left at ``path``.
        StorageError: the file system refused; nothing is left either.
    """
    records = manifest.tensors.get(entry, {})
    if not records:
        some = ", ".join(name for name, found in manifest.tensors.items() if found and not name.startswith("_"))
        raise UsageError(f"{entry!r} is no entry with tensors; those are: {some or 'none'}.", key=entry)
    layout = safetensors.plan(
        [
            (name, DTYPES[record.dtype].code, DTYPES[record.dtype].stored_shape(record.shape))
            for name, record in records.items()
        ],
        _metadata(manifest, entry),
    )
    places = {tensor.name: tensor for tensor in layout.tensors}
    with ScatteredFile(path, layout.nbytes) as file:
        file.write(0, memoryview(layout.prefix))
        for wanted in _groups(_reads(manifest, entry, places, file, locator, read_headers)):
            read(wanted)
        file.publish()


def _metadata(manifest: Manifest, entry: str) -> dict[str, str]:
    """As the files of a checkpoint have it: tied names as ``safetensors.torch.load_model`` wants them."""
    own = {"holdfast_checkpoint_id": manifest.checkpoint_id, "format": "pt"}
    return own | {alias: name for alias, name in manifest.aliases.get(entry, {}).items() if alias not in own}


def _reads(
    manifest: Manifest,
    entry: str,
    places: Mapping[str, StoredTensor],
    file: ScatteredFile,
    locator: Locator,
    read_headers: Reading,
) -> Iterator[tuple[str, list[Read]]]:
    """Of one file of the checkpoint after the other, what of it goes where."""
    whole: dict[str, list[tuple[str, TensorRecord, Piece]]] = {}
    most: dict[str, int] = {}  # of the tensors of each layout, how many cells
    for name, record in manifest.tensors[entry].items():
        for piece in record.pieces:
            whole.setdefault(piece.file, []).append((name, record, piece))
        if record.layout:
            most[record.layout] = max(most.get(record.layout, 0), count(record))
    for layout, number in most.items():
        for source in manifest.layouts[layout][:number]:
            whole.setdefault(source, [])
    for source, held in sorted(whole.items()):
        cells = ((member, piece) for member, piece in locator.held(source, read_headers) if member.entry == entry)
        held += [(member.name, member.record, piece) for member, piece in cells]
        reads = []
        for name, record, piece in held:
            itemsize = DTYPES[record.dtype].itemsize
            sink = BoxWriter(file, places[name].begin, itemsize, record.shape, piece.offset, piece.shape)
            nbytes = math.prod(piece.shape) * itemsize
            if nbytes:
                reads.append(Read(piece.begin, nbytes, sink))
        yield source, reads


def _groups(reads: Iterator[tuple[str, list[Read]]]) -> Iterator[Mapping[str, Sequence[Read]]]:
    """Some files at a time: small ones are read side by side."""
    group: dict[str, list[Read]] = {}
    parts = 0
    for source, wanted in reads:
        group[source] = wanted
        parts += len(wanted)
        if len(group) == _FILES_AT_ONCE or parts >= _PARTS_AT_ONCE:
            yield group
            group, parts = {}, 0
    if group:
        yield group


def target_of(path: str | os.PathLike[str], checkpoint: str) -> str:
    """The path of a new file, absolute; UsageError where it would lie in the checkpoint, which holds its own files."""
    absolute = os.path.abspath(os.fspath(path))
    if os.path.realpath(os.path.dirname(absolute)) == os.path.realpath(checkpoint):
        raise UsageError(
            f"{absolute} would lie in the checkpoint, whose files are its own; export elsewhere.", key="path"
        )
    return absolute
