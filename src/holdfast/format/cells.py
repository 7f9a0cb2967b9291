"""Cells: a tensor cut evenly, as processes hold it that divide it among themselves, each cell in a file of its own.

What the manifest says of them is as long for a thousand processes as for one: the shape of a cell, and a list of files
that many tensors share. So nothing here is done for each cell of each tensor, but for the cells that somebody asks for.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from holdfast.format.dtypes import DTYPES
from holdfast.format.names import is_tensor_file_name
from holdfast.format.records import FileRecord, TensorRecord
from holdfast.format.strict_json import cut, shown

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape."""
Tensors = Mapping[str, Mapping[str, TensorRecord]]
"""By entry and name."""
Layouts = Mapping[str, tuple[str, ...]]
_ENTRY_BYTES = 40
"""What the header of a file says of a cell takes more than that."""


class Cell(NamedTuple):
    """A cell of a tensor: which one it is, in row-major order, where it lies in the tensor, and its shape."""

    number: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def counts(record: TensorRecord) -> tuple[int, ...]:
    """How many cells a tensor has along each dimension."""
    return _counts(record.shape, record.cell)


def count(record: TensorRecord) -> int:
    """How many cells a tensor has."""
    return math.prod(_counts(record.shape, record.cell))


@functools.lru_cache(maxsize=1024)
def _counts(shape: tuple[int, ...], cell: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-whole // size) for whole, size in zip(shape, cell, strict=True))


def cell_at(record: TensorRecord, number: int) -> Cell:
    """One cell of a tensor: the last one along a dimension may be shorter."""
    return _cell_at(record.shape, record.cell, number)


@functools.lru_cache(maxsize=4096)
def _cell_at(shape: tuple[int, ...], cell: tuple[int, ...], number: int) -> Cell:
    offset: list[int] = []
    left = number
    for size, along in zip(reversed(cell), reversed(_counts(shape, cell)), strict=True):
        left, at = divmod(left, along)
        offset.insert(0, at * size)
    ends = zip(cell, shape, offset, strict=True)
    return Cell(number, tuple(offset), tuple(min(size, whole - at) for size, whole, at in ends))


def cells(record: TensorRecord, box: Box | None = None) -> Iterator[Cell]:
    """The cells of a tensor that meet a box of it, all of them by default, in order; others are not looked at."""
    numbers = counts(record)
    if box is None:
        spans = [range(number) for number in numbers]
    else:
        spans = [
            range(at // size, -(-(at + length) // size)) if length else range(0)
            for at, length, size in zip(*box, record.cell, strict=True)
        ]
    for place in itertools.product(*spans):
        number = 0
        for at, along in zip(place, numbers, strict=True):
            number = number * along + at
        yield cell_at(record, number)


# ---------------------------------------------------------------------------------------------------------- what may be


def check_cells(tensors: Tensors, layouts: Layouts, files: Mapping[str, FileRecord]) -> None:
    """Refuse layouts that cannot be, and tensors whose cells do not lie in one.

    What else a record says is checked already.

    A file holds cells of one entry, and one cell of a tensor at most: by its name it is found in the file. Together
    cells weigh no more than the files do.

    Raises:
        ValueError: what is wrong, and where.
    """
    capacities = {name: _capacity(name, layout, files) for name, layout in layouts.items()}
    owners: dict[str, str] = {}  # by layout, the entry whose it is
    left_bytes = sum(file.bytes for file in files.values())
    known: dict[object, tuple[str | None, int]] = {}  # most tensors of a model are as others are
    for entry, records in tensors.items():
        for name, record in records.items():
            if not (record.layout or record.cell):
                continue
            kind = (record.dtype, record.shape, record.cell, record.layout, record.pieces)
            if kind not in known:
                problem = _cells_problem(record, capacities)
                known[kind] = problem, 0 if problem else record.nbytes + _ENTRY_BYTES * count(record)
            problem, weight_bytes = known[kind]
            if problem is None and owners.setdefault(record.layout, entry) != entry:
                problem = f"its layout {shown(record.layout)} is one of {cut(owners[record.layout])}"
            left_bytes -= weight_bytes
            if problem is None and left_bytes < 0:
                problem = "the cells have more bytes than all files"
            if problem is not None:
                raise ValueError(f"{entry}/{cut(name)}: {problem}")
    homes: dict[str, str] = {}
    for name, layout in layouts.items():
        if name not in owners:
            raise ValueError(f"the layout {shown(name)} is that of no tensor")
        for file in layout:
            if homes.setdefault(file, owners[name]) != owners[name]:
                raise ValueError(f"{file} holds cells of both {cut(homes[file])} and {cut(owners[name])}")


def _capacity(name: str, layout: tuple[str, ...], files: Mapping[str, FileRecord]) -> list[int]:
    """How many bytes the first files of a layout have together, for each number of them."""
    for file in layout:
        if file not in files:
            raise ValueError(f"the layout {shown(name)} has {shown(file)}, which the manifest does not list")
        if not is_tensor_file_name(file):
            raise ValueError(f"the layout {shown(name)} has {file}, which holds no tensors")
    if len(set(layout)) != len(layout):
        raise ValueError(f"the layout {shown(name)} has a file twice")
    return list(itertools.accumulate(files[file].bytes for file in layout))


def _cells_problem(record: TensorRecord, capacities: Mapping[str, list[int]]) -> str | None:
    shape, cell = record.shape, record.cell
    if record.pieces:
        return "has both pieces and cells"
    if (
        not cell
        or len(cell) != len(shape)
        or not all(0 < size <= whole for size, whole in zip(cell, shape, strict=True))
    ):
        return f"cells of shape {shown(cell)} in {shown(shape)}, expected from 1 to its size in each dimension"
    capacity = capacities.get(record.layout)
    if capacity is None:
        return f"its layout {shown(record.layout)} is not one of the manifest"
    number = count(record)
    if number > len(capacity):
        return f"has {number} cells, its layout {shown(record.layout)} only {len(capacity)} files"
    if record.nbytes > capacity[number - 1]:
        return f"has {record.nbytes} bytes, the files of its cells only {capacity[number - 1]}"
    return None


# -------------------------------------------------------------------------------------------- whose cells a file has


class Member(NamedTuple):
    """A tensor of a layout; ``number`` counts all tensors, in the order of the manifest."""

    number: int
    entry: str
    name: str
    record: TensorRecord

    @property
    def key(self) -> str:
        """``entry/name``."""
        return f"{self.entry}/{self.name}"

    def stored(self, cell: int) -> tuple[str, tuple[int, ...]]:
        """As a header has to have one of its cells: element type and shape."""
        dtype = DTYPES[self.record.dtype]
        return dtype.code, dtype.stored_shape(cell_at(self.record, cell).shape)

    def nbytes(self, cell: int) -> int:
        """Bytes of one of its cells."""
        return math.prod(cell_at(self.record, cell).shape) * DTYPES[self.record.dtype].itemsize


class CellTable:
    """Whose cells lie in which file.

    Of the tensors of a layout, those with more cells come first: a file has cells of the first so many, and nobody
    looks at the others.
    """

    def __init__(self, tensors: Tensors, layouts: Layouts) -> None:
        members: dict[str, list[Member]] = {layout: [] for layout in layouts}
        every = ((entry, name, record) for entry, records in tensors.items() for name, record in records.items())
        for number, (entry, name, record) in enumerate(every if layouts else ()):
            if record.layout:
                members[record.layout].append(Member(number, entry, name, record))
        for found in members.values():
            found.sort(key=lambda member: -count(member.record))
        self._members = members
        self._falling = {layout: [-count(member.record) for member in found] for layout, found in members.items()}
        self._places: dict[str, list[tuple[str, int]]] = {}
        for layout, files in layouts.items():
            for cell, file in enumerate(files):
                self._places.setdefault(file, []).append((layout, cell))

    def __contains__(self, file: str) -> bool:
        """Whether a file may hold cells."""
        return file in self._places

    def places(self, file: str) -> list[tuple[str, int]]:
        """Of each layout that lists ``file``: which, and which cell of its tensors the file holds."""
        return self._places.get(file, [])

    def members(self, layout: str, cell: int = 0) -> Iterator[Member]:
        """The tensors of a layout that have a cell of this number."""
        last = bisect.bisect_left(self._falling[layout], -cell)
        return itertools.islice(self._members[layout], last)

    def held(self, file: str) -> Iterator[tuple[Member, int]]:
        """The tensors that have a cell in ``file``, and which."""
        for layout, cell in self.places(file):
            for member in self.members(layout, cell):
                yield member, cell

    @functools.cached_property
    def positions(self) -> Mapping[str, int]:
        """By ``entry/name``, where a tensor stands among those of its layout."""
        return {member.key: at for found in self._members.values() for at, member in enumerate(found)}
