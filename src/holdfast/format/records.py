"""The records of a manifest: what each tensor is, where its bytes lie, and what each file must be.

Records of tensors and pieces stay out of the garbage collector (``gc=False``): they hold nothing that could refer back,
and there are many.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.format.dtypes import DTYPES
from holdfast.format.strict_json import cut, shown

CHUNK_BYTES = 2 * 2**20
MAX_DIMENSIONS = 64
MAX_CORNERS = 2**19
"""Of all pieces of tensors that are cut, together: two for each dimension that is cut, multiplied."""
HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)
"""What ids look like, and checksums."""
_MAX_BYTES = 2**63 - 1
_MAX_ELEMENTS = _MAX_BYTES // 16  # of the widest type
_MAX_CHUNK_BYTES = 64 * 2**20
_MEMORY_FORMATS = {"contiguous": None, "channels_last": 4, "channels_last_3d": 5}  # and the dimensions each needs
_Spans = dict[str, list[tuple[int, int]]]  # by file, where the bytes of tensors begin and end


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A box of a tensor, stored in one file.

    Attributes:
        file: the data file's name.
        name: the tensor's name in that file.
        begin: where its bytes begin, from the start of the file.
        shape: the box's shape; empty for a scalar, equal to the tensor's unless sharded.
        offset: where the box starts in the whole tensor, per dimension; empty for the origin.
    """

    file: str
    name: str
    begin: int
    shape: tuple[int, ...]
    offset: tuple[int, ...] = ()


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One tensor or array: what it is and of which pieces it is made.

    Attributes:
        dtype: PyTorch's name of the element type.
        shape: the global shape.
        pieces: where its bytes lie, one piece unless sharded; empty where it is cut into cells.
        memory_format: how the saved tensor lay in memory; its bytes in the file are always in logical order.
        device: where the saved tensor lived, such as ``cpu`` or ``cuda:1``.
        cell: of a tensor that is cut evenly, the shape of a cell; the last one along a dimension may be shorter. Where
            a cell begins in its file, the file's own header says.
        layout: which of the manifest's ``layouts`` names the file of each cell, in row-major order of the cells.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    memory_format: str = "contiguous"
    device: str = "cpu"
    cell: tuple[int, ...] = ()
    layout: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data file: its size, and the xxh3_128 of each chunk of ``chunk_bytes`` (the last may be shorter)."""

    bytes: int
    chunk_bytes: int
    xxh3_128: tuple[str, ...]


def check_file(name: str, file: FileRecord) -> None:
    """Refuse a record of a file that cannot be; ValueError says why."""
    if not 0 <= file.bytes <= _MAX_BYTES:
        raise ValueError(f"{name}: {file.bytes} bytes is out of range")
    if not 4096 <= file.chunk_bytes <= _MAX_CHUNK_BYTES:
        raise ValueError(f"{name}: chunks of {file.chunk_bytes} bytes, expected 4096 to {_MAX_CHUNK_BYTES}")
    chunks = -(-file.bytes // file.chunk_bytes)
    if len(file.xxh3_128) != chunks:
        raise ValueError(f"{name}: expected {chunks} checksums, found {len(file.xxh3_128)}")
    # All of them at once: a terabyte has half a million.
    digits = "".join(file.xxh3_128)
    lengths = set(map(len, file.xxh3_128))
    if not lengths <= {32} or not digits.isascii() or digits.encode().translate(None, b"0123456789abcdef"):
        raise ValueError(f"{name}: a checksum is not 32 hex digits")


def check_tensors(tensors: Mapping[str, Mapping[str, TensorRecord]], files: Mapping[str, FileRecord]) -> None:
    """Refuse tensors, by entry and name, that cannot be, or whose pieces do not lie in ``files`` as pieces do.

    Those that are cut into cells are for :func:`holdfast.format.cells.check_cells` to look at further.
    """
    spans: _Spans = {name: [] for name in files}
    sound: set[object] = set()  # most tensors of a model are as others are
    corners = 0
    for entry, records in tensors.items():
        for name, record in records.items():
            kind = (record.dtype, record.shape, record.memory_format)
            problem = None if kind in sound else _tensor_problem(record)
            if problem is None:
                sound.add(kind)
                if not (record.layout or record.cell):
                    problem = _places_problem(record, files, spans)
            if problem is None and len(record.pieces) > 1:
                corners += _corners(record)
                problem = pieces_problem(record) if corners <= MAX_CORNERS else "is cut in too many dimensions"
            if problem is not None:
                raise ValueError(f"{entry}/{cut(name)}: {problem}")
    for file, found in spans.items():
        found.sort()
        for (_, end), (begin, _) in itertools.pairwise(found):
            if begin < end:
                raise ValueError(f"{file}: two tensors have the bytes {begin} to {end}")


def _tensor_problem(record: TensorRecord) -> str | None:
    """What is wrong with a tensor itself, wherever it lies."""
    shape = record.shape
    if record.dtype not in DTYPES:
        return f"unknown dtype {shown(record.dtype)}"
    if not is_shape(shape):
        return f"impossible shape {shown(shape)}"
    if record.memory_format not in _MEMORY_FORMATS:
        return f"unknown memory format {shown(record.memory_format)}"
    if _MEMORY_FORMATS[record.memory_format] not in (None, len(shape)):
        return f"{record.memory_format} of shape {shape}"
    return None


def _places_problem(record: TensorRecord, files: Mapping[str, FileRecord], spans: _Spans) -> str | None:
    """Why the pieces do not lie in their tensor and files; notes where they lie.

    Says so in words only where something is: a run of a thousand checkpoints has half a million tensors to be listed.
    """
    shape, itemsize = record.shape, DTYPES[record.dtype].itemsize
    if not record.pieces:
        return "has no pieces"
    whole = len(record.pieces) == 1
    for piece in record.pieces:
        if piece.file not in files:
            return f"lies in {shown(piece.file)}, which the manifest does not list"
        if not (whole and piece.shape == shape and not piece.offset):
            problem = _piece_problem(record, piece)
            if problem is not None:
                return problem
        end = piece.begin + math.prod(piece.shape) * itemsize
        if piece.begin < 0 or end > files[piece.file].bytes:
            return f"lies outside {piece.file}"
        if end > piece.begin:
            spans[piece.file].append((piece.begin, end))
    if whole and record.pieces[0].shape != shape:
        return f"its pieces cover {math.prod(record.pieces[0].shape)} elements of {shape}"
    return None


def _piece_problem(record: TensorRecord, piece: Piece) -> str | None:
    """Why a piece is no box of its tensor."""
    offset = piece.offset or (0,) * len(record.shape)
    within = (
        is_shape(piece.shape)
        and len(piece.shape) == len(offset) == len(record.shape)
        and all(
            start >= 0 and start + size <= whole
            for start, size, whole in zip(offset, piece.shape, record.shape, strict=True)
        )
    )
    return None if within else f"a piece of shape {shown(piece.shape)} at {shown(offset)} is not within {record.shape}"


def pieces_problem(record: TensorRecord) -> str | None:
    """Why the pieces, each a box within it, do not make up the whole, each element once."""
    covered = sum(math.prod(piece.shape) for piece in record.pieces)
    if covered != math.prod(record.shape):
        return f"its pieces cover {covered} elements of {record.shape}"
    # Of the right volume and without an overlap, they leave no hole either.
    return None if _tile(record) else "its pieces overlap"


def _cut_dimensions(record: TensorRecord) -> list[int]:
    """The dimensions that some piece does not span from end to end."""
    return [
        dimension
        for dimension, whole in enumerate(record.shape)
        if any(piece.shape[dimension] != whole for piece in record.pieces)
    ]


def _corners(record: TensorRecord) -> int:
    """How many corners its pieces have, in the dimensions that are cut: what it takes to compare them."""
    return len(record.pieces) << len(_cut_dimensions(record))


def _tile(record: TensorRecord) -> bool:
    """Whether the pieces cover the whole, each element once.

    A box is the sum of what begins at each of its corners, with the sign of the corner: -1 for each dimension in which
    it lies at the end. So boxes add up to the whole exactly if their corners, with signs, add up to those of the whole.
    """
    axes = _cut_dimensions(record)
    left: dict[tuple[int, ...], int] = {}
    origin = (0,) * len(record.shape)
    boxes = [(piece.offset or origin, piece.shape, 1) for piece in record.pieces if 0 not in piece.shape]
    if 0 not in record.shape:
        boxes.append((origin, record.shape, -1))
    for offset, shape, sign in boxes:
        ends = [((offset[axis], 1), (offset[axis] + shape[axis], -1)) for axis in axes]
        for corner in itertools.product(*ends):
            place = tuple(at for at, _ in corner)
            left[place] = left.get(place, 0) + sign * math.prod(factor for _, factor in corner)
    return not any(left.values())


def is_shape(shape: tuple[Any, ...]) -> bool:
    """Whether arrays of ``shape`` can be: numpy and torch compute strides as if no size were zero."""
    if len(shape) > MAX_DIMENSIONS:
        return False
    elements = 1
    for size in shape:
        if type(size) is not int or size < 0:
            return False
        elements *= size or 1
    return elements <= _MAX_ELEMENTS
