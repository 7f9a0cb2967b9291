"""What is wrong with a checkpoint on disk: found by looking at it, said in words."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from holdfast.errors import CorruptCheckpointError, Damage
from holdfast.format import envelope, safetensors
from holdfast.format import manifest as manifests
from holdfast.format.cells import CellTable
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Annotations, Head, Manifest
from holdfast.format.names import ANNOTATIONS, is_auxiliary, is_tensor_file_name
from holdfast.format.strict_json import shown
from holdfast.storage import memory
from holdfast.storage.reading import Damaged, FileReads, Read, read_files
from holdfast.storage.store import StoredCheckpoint, StoredFile

MAX_STRANGERS = 1000
"""With more files than this that are not its own, a directory is not looked at further."""
MAX_NAMED = 100_000
"""After so many names of tensors that have cells in damaged files, nobody needs to know of more."""
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


Span = tuple[int, int, int]
"""Where some bytes of a tensor begin and end in a file, and the number of the tensor in the manifest."""


class Contents:
    """Which tensors lie where in the files of a checkpoint; of a head nothing is known.

    Args:
        manifest: of the checkpoint.
        cells: gives the spans of the cells in a file that has some, as its header tells them; None where that is not
            known, and any of them may lie anywhere in the file.
    """

    def __init__(
        self, manifest: Manifest | Head, cells: Callable[[str], list[Span] | None] = lambda file: None
    ) -> None:
        self._manifest = manifest
        self._cells = cells
        self._found: dict[str, tuple[list[Span], list[int], bool]] = {}
        self._left = MAX_NAMED

    def tensors(self, file: str, begin: int = 0, end: int | None = None) -> tuple[str, ...]:
        """The tensors with bytes in a part of a file, as ``entry/name``, in the order of the manifest.

        No more than :data:`MAX_NAMED` in all: each of a thousand files may have cells of the same tensors.
        """
        if isinstance(self._manifest, Head):
            return ()
        places, ends, known = self._places(file)
        if end is not None:  # they lie one behind the other: decoding made sure of it
            places = places[bisect.bisect_right(ends, begin) : bisect.bisect_left(places, (end,))]
            places = [place for place in places if place[0] < place[1]]  # an empty tensor has no bytes anywhere
        numbers = [number for _, _, number in places]
        if not known:
            numbers += [member.number for member, _ in itertools.islice(self.table.held(file), self._left)]
        named = tuple(self._names[number] for number in sorted(set(numbers)))[: self._left]
        self._left -= len(named)
        return named

    @functools.cached_property
    def table(self) -> CellTable:
        """Whose cells lie in which file."""
        if isinstance(self._manifest, Head):
            return CellTable({}, {})
        return CellTable(self._manifest.tensors, self._manifest.layouts)

    @functools.cached_property
    def _names(self) -> list[str]:
        if isinstance(self._manifest, Head):
            return []
        return [f"{entry}/{name}" for entry, records in self._manifest.tensors.items() for name in records]

    def _places(self, file: str) -> tuple[list[Span], list[int], bool]:
        """The spans in a file, in order of their beginnings; their ends alone; and whether these are all."""
        if file not in self._found:
            cells = self._cells(file) if file in self.table else []
            spans = sorted(self._pieces.get(file, []) + (cells or []))
            self._found[file] = spans, sorted(span[1] for span in spans), cells is not None
        return self._found[file]

    @functools.cached_property
    def _pieces(self) -> dict[str, list[Span]]:
        """By file, the span of each piece."""
        if isinstance(self._manifest, Head):
            return {}
        spans: dict[str, list[Span]] = {name: [] for name in self._manifest.files}
        records = (record for records in self._manifest.tensors.values() for record in records.values())
        for number, record in enumerate(records):
            itemsize = DTYPES[record.dtype].itemsize
            for piece in record.pieces:
                end = piece.begin + math.prod(piece.shape) * itemsize
                spans[piece.file].append((piece.begin, end, number))
        return spans


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


def damaged_chunks(manifest: Manifest, damaged: Iterable[Damaged], contents: Contents) -> list[Damage]:
    """What to say of chunks whose bytes are not those that were written: where they are, and whose bytes they hold."""
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
    spans: dict[str, list[Span] | None] = {}
    contents = Contents(manifest, spans.get)
    described = _described(manifest)
    every = (_Header(stored, manifest, name, described.get(name, []), contents.table) for name in names)
    damage: list[Damage] = []
    for headers in _groups(every):
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
        damaged = read_files(jobs, to_the_end=True, progress=progress)
        broken: dict[str, list[int]] = {}
        for file, index in damaged:
            broken.setdefault(file, []).append(index)
        for header in headers:
            spans[header.name] = header.look(broken.get(header.name, ()))
        damage += damaged_chunks(manifest, damaged, contents)
        damage += [item for header in headers if header.name not in broken for item in header.damage]
        spans.clear()
    return damage


_Piece = tuple[str, str, str, tuple[int, ...], int]
"""Of a piece in a file, ``entry/name``; and as a header has it: name, element type, shape, and where it begins."""


def _described(manifest: Manifest) -> dict[str, list[_Piece]]:
    """By file, each piece."""
    described: dict[str, list[_Piece]] = {}
    for entry, records in manifest.tensors.items():
        for tensor, record in records.items():
            dtype = DTYPES[record.dtype]
            for piece in record.pieces:
                described.setdefault(piece.file, []).append(
                    (f"{entry}/{tensor}", piece.name, dtype.code, dtype.stored_shape(piece.shape), piece.begin)
                )
    return described


class _Header:
    """The header of a data file, taken from the bytes that are read of it."""

    def __init__(
        self, stored: StoredCheckpoint, manifest: Manifest, name: str, pieces: Sequence[_Piece], table: CellTable
    ) -> None:
        self.name = name
        self.damage: list[Damage] = []
        self._record = manifest.files[name]
        self._pieces = pieces
        self._table = table
        self._data = bytearray()
        if not is_tensor_file_name(name):
            self.nbytes = 0
        elif name in table:
            self.nbytes = _claimed_bytes(stored, manifest, name)
        else:
            end = min((piece[4] for piece in pieces), default=self._record.bytes)
            self.nbytes = min(end, safetensors.MAX_HEADER_BYTES)

    def reads(self) -> list[Read]:
        """What to read for it."""
        self._data = bytearray(self.nbytes)
        return [Read(0, self.nbytes, self._take)]

    def _take(self, offset: int, address: int, nbytes: int) -> None:
        """See ``Sink``."""
        self._data[offset : offset + nbytes] = memory.view_at(address, nbytes)

    def look(self, broken: Iterable[int]) -> list[Span] | None:
        """Note in ``damage`` where it does not say of the tensors what the manifest says.

        Args:
            broken: the chunks of the file that were not read.

        Returns:
            Where the cells of the file lie; None where that is not known.
        """
        data, self._data = self._data, bytearray()
        if not is_tensor_file_name(self.name) or any(at * self._record.chunk_bytes < self.nbytes for at in broken):
            return None
        try:
            nbytes = safetensors.header_length(data, self._record.bytes)
            layout = safetensors.parse(memoryview(data)[:nbytes], self._record.bytes)
        except ValueError as error:
            self.damage = [Damage(self.name, f"its safetensors header: {error}")]
            return None
        found = {tensor.name: tensor for tensor in layout.tensors}
        for key, name, *expected in self._pieces:
            tensor = found.pop(name, None)  # each is that of one piece or cell
            if tensor is None or [tensor.code, tensor.shape, tensor.begin] != expected:
                self.damage = [disagreement(self.name, key)]
                return None
        spans = []
        for member, cell in self._table.held(self.name):
            tensor = found.pop(member.name, None)
            if tensor is None or (tensor.code, tensor.shape) != member.stored(cell):
                self.damage = [disagreement(self.name, member.key)]
                return None
            spans.append((tensor.begin, tensor.begin + tensor.nbytes, member.number))
        return spans


def disagreement(file: str, key: str) -> Damage:
    """What to say of a header that has a tensor not at all, or as another than it is."""
    return Damage(file, "its header and the manifest disagree", tensors=(key,))


def _claimed_bytes(stored: StoredCheckpoint, manifest: Manifest, name: str) -> int:
    """How long the header of a file says that it is; nothing relies on it before its checksum is compared."""
    with contextlib.closing(open_data_file(stored, manifest, name)) as file:
        first = memoryview(bytearray(min(safetensors.LENGTH_BYTES, file.nbytes)))
        try:
            file.read_into(0, first)
            return safetensors.header_length(first, file.nbytes)
        except (OSError, ValueError):  # reading it, or what it says, is damaged: that is found, and said, later
            return len(first)


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
