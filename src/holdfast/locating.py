"""Where the cells of tensors lie in their files: the files' own headers say, and are read for it when somebody asks."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from holdfast.errors import CorruptCheckpointError, Damage
from holdfast.format import safetensors
from holdfast.format.cells import Box, Cell, CellTable, Member, cell_at, cells, count
from holdfast.format.manifest import Manifest
from holdfast.format.records import Piece, TensorRecord
from holdfast.inspection import MAX_NAMED, Span, disagreement
from holdfast.storage import memory
from holdfast.storage.boxes import FlatSink
from holdfast.storage.reading import Read

MAX_KEPT_BYTES = 32 * 2**20
"""What is remembered of headers: eight bytes a cell, of those files that were asked for last."""
_FILES_AT_ONCE = 64
_FIRST_BYTES = 128 * 2**10
"""As much is read at first of each: most headers are shorter."""
_LONG_HEADERS_BYTES = 2 * safetensors.MAX_HEADER_BYTES
_ELSEWHERE = -1

Reading = Callable[[Mapping[str, Sequence[Read]]], None]
"""Reads parts of files, verified."""


class Wanted(NamedTuple):
    """A tensor that somebody wants to read.

    Attributes:
        key: ``entry/name``; of tied tensors that which is stored.
        record: what the manifest says of it.
        box: offset and shape of the part that is wanted; None for all of it.
    """

    key: str
    record: TensorRecord
    box: Box | None = None


class Locator:
    """Knows where the cells of a checkpoint lie, and remembers some of it. Several threads may ask.

    Args:
        manifest: of the checkpoint.
        path: of the checkpoint, for errors.
    """

    def __init__(self, manifest: Manifest, path: str) -> None:
        self._manifest = manifest
        self._path = path
        self._table = CellTable(manifest.tensors, manifest.layouts)
        self._lock = threading.Lock()
        # By file and layout, where each cell begins; the order is that of the table.
        self._kept: OrderedDict[str, dict[str, array[int]]] = OrderedDict()
        self._kept_bytes = 0

    def locate(self, wanted: Sequence[Wanted], read: Reading) -> list[list[Piece]]:
        """Where the bytes of each tensor lie. Blocks where headers have to be read; each is read once for all tensors.

        Args:
            wanted: which tensors.
            read: reads the headers.

        Raises:
            CorruptCheckpointError: a header is not what was written, or another than the manifest expects.
        """
        found: list[list[Piece]] = [list(item.record.pieces) for item in wanted]
        # File by file: nothing is made for cells of which a header may not know.
        whole, boxed = self._sorted_out(wanted)
        needed = [
            file
            for layout, some in whole.items()
            for file in self._manifest.layouts[layout][: count(wanted[some[0]].record)]
        ]
        for file, begins in self._begins(list(dict.fromkeys([*needed, *boxed])), read):
            for layout, number in self._table.places(file):
                for at in whole.get(layout, ()):
                    if number >= count(wanted[at].record):
                        break
                    found[at].append(self._piece(file, wanted[at], cell_at(wanted[at].record, number), begins))
            for at, cell in boxed.pop(file, ()):
                found[at].append(self._piece(file, wanted[at], cell, begins))
        for item, pieces in zip(wanted, found, strict=True):
            if item.record.layout:
                pieces.sort(key=lambda piece: piece.offset)
        return found

    def _sorted_out(self, wanted: Sequence[Wanted]) -> tuple[dict[str, list[int]], dict[str, list[tuple[int, Cell]]]]:
        """By layout, which are wanted as a whole, those with more cells first; by file, the cells of the others."""
        whole: dict[str, list[int]] = {}
        boxed: dict[str, list[tuple[int, Cell]]] = {}
        for at, item in enumerate(wanted):
            if item.record.layout and item.box is None:
                whole.setdefault(item.record.layout, []).append(at)
            elif item.record.layout:
                files = self._manifest.layouts[item.record.layout]
                for cell in cells(item.record, item.box):
                    boxed.setdefault(files[cell.number], []).append((at, cell))
        for some in whole.values():
            some.sort(key=lambda at: -count(wanted[at].record))
        return whole, boxed

    def _piece(self, file: str, wanted: Wanted, cell: Cell, begins: Mapping[str, array[int]]) -> Piece:
        begin = begins[wanted.record.layout][self._table.positions[wanted.key]]
        if begin == _ELSEWHERE:
            raise self._corrupt(disagreement(file, wanted.key))
        return Piece(file, wanted.key.partition("/")[2], begin, cell.shape, cell.offset)

    def spans(self, file: str, read: Reading) -> list[Span] | None:
        """Where the cells of a file lie; None where its header cannot tell."""
        try:
            ((_, begins),) = self._begins([file], read)
        except CorruptCheckpointError:
            return None
        return [
            (begin, begin + member.nbytes(cell), member.number)
            for layout, cell in self._table.places(file)
            for member, begin in zip(self._table.members(layout, cell), begins[layout], strict=True)
            if begin != _ELSEWHERE
        ]

    def held(self, file: str, read: Reading) -> Iterator[tuple[Member, Piece]]:
        """The cells in a file, with the tensors that they are of; none where it has none. Blocks, raises likewise."""
        if file not in self._table:
            return
        ((_, begins),) = self._begins([file], read)
        for layout, number in self._table.places(file):
            for member, begin in zip(self._table.members(layout, number), begins[layout], strict=True):
                if begin == _ELSEWHERE:
                    raise self._corrupt(disagreement(file, member.key))
                cell = cell_at(member.record, number)
                yield member, Piece(file, member.name, begin, cell.shape, cell.offset)

    def _begins(self, files: Sequence[str], read: Reading) -> Iterator[tuple[str, dict[str, array[int]]]]:
        """Of each file, by layout, where its cells begin."""
        for first in range(0, len(files), _FILES_AT_ONCE):
            some = files[first : first + _FILES_AT_ONCE]
            with self._lock:
                known = {file: self._kept[file] for file in some if file in self._kept}
                for file in known:
                    self._kept.move_to_end(file)
            yield from known.items()
            for file, header in self._headers([file for file in some if file not in known], read):
                begins = self._parsed(file, header)
                self._keep(file, begins)
                yield file, begins

    def _keep(self, file: str, begins: dict[str, array[int]]) -> None:
        with self._lock:
            self._kept_bytes += _nbytes(begins) - _nbytes(self._kept.pop(file, {}))
            self._kept[file] = begins
            while self._kept_bytes > MAX_KEPT_BYTES:
                _, dropped = self._kept.popitem(last=False)
                self._kept_bytes -= _nbytes(dropped)

    def _headers(self, files: Sequence[str], read: Reading) -> Iterator[tuple[str, memoryview]]:
        """The headers of files, several of which are read side by side; a long one takes a second look."""
        if not files:
            return
        sizes = {file: self._manifest.files[file].bytes for file in files}
        # Nothing behind the first chunk, which may be damaged without a harm to the header.
        ends = {file: min(sizes[file], self._manifest.files[file].chunk_bytes, _FIRST_BYTES) for file in files}
        first = _filled({file: (0, end) for file, end in ends.items()}, read)
        long: dict[str, int] = {}
        for file, begun in first.items():
            try:
                nbytes = safetensors.header_length(begun, sizes[file])
            except ValueError as error:
                raise self._unreadable(file, error) from error
            if nbytes <= len(begun):
                yield file, begun[:nbytes]
            else:
                long[file] = nbytes
        while long:
            group: dict[str, tuple[int, int]] = {}
            left_bytes = _LONG_HEADERS_BYTES
            for file, nbytes in list(long.items()):
                if group and nbytes > left_bytes:
                    break
                group[file] = 0, long.pop(file)
                left_bytes -= nbytes
            yield from _filled(group, read).items()

    def _parsed(self, file: str, header: memoryview) -> dict[str, array[int]]:
        try:
            layout = safetensors.parse(header, self._manifest.files[file].bytes)
        except ValueError as error:
            raise self._unreadable(file, error) from error
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        begins: dict[str, array[int]] = {}
        for name, cell in self._table.places(file):
            begins[name] = array("q")
            for member in self._table.members(name, cell):
                tensor = tensors.get(member.name)
                fits = tensor is not None and (tensor.code, tensor.shape) == member.stored(cell)
                begins[name].append(tensor.begin if tensor is not None and fits else _ELSEWHERE)
        return begins

    def _unreadable(self, file: str, error: ValueError) -> CorruptCheckpointError:
        some = itertools.islice((member.key for member, _ in self._table.held(file)), MAX_NAMED)
        return self._corrupt(Damage(file, f"its safetensors header: {error}", tensors=tuple(some)))

    def _corrupt(self, damage: Damage) -> CorruptCheckpointError:
        return CorruptCheckpointError.at(self._path, [damage], self._manifest.step)


def _nbytes(begins: Mapping[str, array[int]]) -> int:
    return sum(len(found) * found.itemsize + 1000 for found in begins.values())


def _filled(parts: Mapping[str, tuple[int, int]], read: Reading) -> dict[str, memoryview]:
    """Parts of files, from where to where."""
    rooms = {file: memoryview(bytearray(end - begin)) for file, (begin, end) in parts.items()}
    read(
        {
            file: [Read(begin, end - begin, FlatSink(rooms[file], memory.address_of(rooms[file])))]
            for file, (begin, end) in parts.items()
            if begin < end
        }
    )
    return rooms
