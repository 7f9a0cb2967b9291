"""The manifest: what a checkpoint holds, where each byte of it lies, and what those bytes must be.

Records of tensors and pieces stay out of the garbage collector (``gc=False``): they hold nothing that could refer back,
and there are many.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from holdfast.errors import FormatVersionError, UsageError
from holdfast.format import envelope, strict_json, tree
from holdfast.format.dtypes import DTYPES
from holdfast.format.names import MAX_STEP, is_data_file_name, is_entry_name

FORMAT = "holdfast/1"
CHUNK_BYTES = 2 * 2**20
MAX_MANIFEST_BYTES = 2**30
MAX_ANNOTATIONS_BYTES = 2**24
MAX_DIMENSIONS = 64
_MAX_BYTES = 2**63 - 1
_MAX_ELEMENTS = _MAX_BYTES // 16  # of the widest type
_MAX_CHUNK_BYTES = 2**30
_MEMORY_FORMATS = {"contiguous": None, "channels_last": 4, "channels_last_3d": 5}  # and the dimensions each needs
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SUPPORTED_BY = {FORMAT: "0.1"}


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
        pieces: one unless sharded.
        memory_format: how the saved tensor lay in memory; its bytes in the file are always in logical order.
        device: where the saved tensor lived, such as ``cpu`` or ``cuda:1``.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    memory_format: str = "contiguous"
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data file: its size, and the xxh3_128 of each chunk of ``chunk_bytes`` (the last may be shorter)."""

    bytes: int
    chunk_bytes: int
    xxh3_128: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about a checkpoint but its tensors' bytes. Times are UTC, ISO 8601."""

    format: str
    checkpoint_id: str
    run_id: str
    parent: str | None
    step: int
    epoch: int
    created_at: str
    reason: str
    metrics: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, dict[str, TensorRecord]]
    aliases: dict[str, dict[str, str]]
    files: dict[str, FileRecord]
    environment: dict[str, Any]

    def record(self, entry: str, name: str) -> TensorRecord:
        """The record of tensor ``name`` of ``entry``, through its alias if it has one; KeyError when there is none."""
        canonical = self.aliases.get(entry, {}).get(name, name)
        return self.tensors[entry][canonical]

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return sum(record.bytes for record in self.files.values())


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest whose long parts are not looked into: enough to list a run and to decide what stays.

    The fields and their order are those of :class:`Manifest`.
    """

    format: str
    checkpoint_id: str
    run_id: str
    parent: str | None
    step: int
    epoch: int
    created_at: str
    reason: str
    metrics: dict[str, Any]
    state: msgspec.Raw
    tensors: msgspec.Raw
    aliases: msgspec.Raw
    files: dict[str, FileRecord]
    environment: dict[str, Any]


_Kind = TypeVar("_Kind", Manifest, Head)


class Annotations(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What was learned of a checkpoint after it was made. Losing it loses no state."""

    metrics: dict[str, Any] = {}
    pinned: bool = False
    tags: tuple[str, ...] = ()


def encode(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``.

    Raises:
        UsageError: they would be more than a reader takes.
    """
    data = envelope.seal("manifest", msgspec.json.encode(manifest))
    if len(data) > MAX_MANIFEST_BYTES:
        raise UsageError(
            f"the values beside the tensors take {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} that a manifest "
            "may have; put large lists, texts and bytes into arrays."
        )
    return data


def decode(data: bytes, path: str) -> Manifest:
    """The manifest in ``data``, checked as far as that goes without its files.

    Args:
        data: the bytes of ``manifest.json``.
        path: where they were found, for errors.

    Raises:
        ValueError: what is wrong with it.
        FormatVersionError: it was written in another version of the format.
    """
    manifest = _decoded(data, path, Manifest)
    _check(manifest)
    return manifest


def decode_head(data: bytes, path: str) -> Head:
    """The head of the manifest in ``data``, checked as :func:`decode` does but for what it leaves out."""
    head = _decoded(data, path, Head)
    _check_head(head)
    return head


def encode_annotations(annotations: Annotations) -> bytes:
    """The bytes of ``annotations.json``."""
    return envelope.seal("annotations", msgspec.json.encode(annotations))


def decode_annotations(data: bytes) -> Annotations:
    """The annotations in ``data``; ValueError says what is wrong."""
    annotations = strict_json.decode(envelope.unseal("annotations", data), Annotations)
    _check_metrics(annotations.metrics)
    return annotations


def _decoded(data: bytes, path: str, kind: type[_Kind]) -> _Kind:
    inner = envelope.unseal("manifest", data)
    try:
        decoded = strict_json.decode(inner, kind)
    except ValueError:
        _check_version(inner, path)  # another version may have other fields, and says so better
        raise
    if decoded.format != FORMAT:
        _check_version(inner, path)
    return decoded


class _Version(msgspec.Struct):
    format: str


def _check_version(inner: bytes, path: str) -> None:
    found = _version(inner)
    if found != FORMAT:
        raise FormatVersionError(
            f"{path} is in format {found!r}; this Holdfast reads {', '.join(_SUPPORTED_BY)}. "
            "A newer Holdfast wrote it: upgrade to read it (pip install --upgrade holdfast). It was left as it is.",
            path=path,
            key="format",
        )


def _version(inner: bytes) -> str:
    """The ``format`` field alone, whatever else the object holds."""
    try:
        return msgspec.json.decode(inner, type=_Version).format
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a manifest: {error}") from error


def _check(manifest: Manifest) -> None:
    """Refuse whatever the types alone do not."""
    _check_head(manifest)
    _require(set(manifest.state) == set(manifest.tensors), "state and tensors name different entries")
    for entry, tensors in manifest.tensors.items():
        _require(entry.startswith("_") or is_entry_name(entry), f"{entry!r} is not the name of an entry")
        for name, record in tensors.items():
            problem = _tensor_problem(record, manifest.files)
            if problem is not None:
                raise ValueError(f"{entry}/{name}: {problem}")
    for entry, aliases in manifest.aliases.items():
        known = manifest.tensors.get(entry, {})
        for alias, name in aliases.items():
            _require(name in known and alias not in known, f"{entry}/{alias} is an alias of no tensor")


def _check_head(manifest: Manifest | Head) -> None:
    _require(0 <= manifest.step <= MAX_STEP, f"step {manifest.step} is out of range")
    _require(0 <= manifest.epoch <= MAX_STEP, f"epoch {manifest.epoch} is out of range")
    for name, value in (
        ("checkpoint_id", manifest.checkpoint_id),
        ("run_id", manifest.run_id),
        ("parent", manifest.parent),
    ):
        _require(value is None or _ID.fullmatch(value) is not None, f"{name}: expected 32 hex digits, found {value!r}")
    _check_time(manifest.created_at)
    _check_metrics(manifest.metrics)
    for name, file in manifest.files.items():
        _require(is_data_file_name(name), f"{name!r} is not the name of a data file")
        _check_file(name, file)


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    _require(not any(name.startswith("$") for name in metrics), f"metrics: {sorted(metrics)} are not names")
    tree.decode(dict(metrics), tree.OpaqueLeaves())


def _check_time(text: str) -> None:
    try:
        zone = datetime.datetime.fromisoformat(text).utcoffset()
    except ValueError as error:
        raise ValueError(f"created_at: {error}") from error
    _require(zone == datetime.timedelta(), f"created_at: expected a time in UTC, found {text!r}")


def _check_file(name: str, file: FileRecord) -> None:
    _require(0 <= file.bytes <= _MAX_BYTES, f"{name}: {file.bytes} bytes is out of range")
    _require(4096 <= file.chunk_bytes <= _MAX_CHUNK_BYTES, f"{name}: chunks of {file.chunk_bytes} bytes")
    chunks = -(-file.bytes // file.chunk_bytes)
    _require(len(file.xxh3_128) == chunks, f"{name}: expected {chunks} checksums, found {len(file.xxh3_128)}")
    _require(all(map(_ID.fullmatch, file.xxh3_128)), f"{name}: a checksum is not 32 hex digits")


def _tensor_problem(record: TensorRecord, files: Mapping[str, FileRecord]) -> str | None:
    """What is wrong with a tensor's record.

    Says so in words only where something is: a run of a thousand checkpoints has half a million tensors to be listed.
    """
    shape = record.shape
    dtype = DTYPES.get(record.dtype)
    if dtype is None:
        return f"unknown dtype {record.dtype!r}"
    if not is_shape(shape):
        return f"impossible shape {shape}"
    if record.memory_format not in _MEMORY_FORMATS:
        return f"unknown memory format {record.memory_format!r}"
    if _MEMORY_FORMATS[record.memory_format] not in (None, len(shape)):
        return f"{record.memory_format} of shape {shape}"
    if not record.pieces:
        return "has no pieces"
    for piece in record.pieces:
        if piece.file not in files:
            return f"lies in {piece.file!r}, which the manifest does not list"
        end = piece.begin + math.prod(piece.shape) * dtype.itemsize
        if piece.begin < 0 or end > files[piece.file].bytes:
            return f"lies outside {piece.file}"
    first = record.pieces[0]
    if len(record.pieces) == 1 and first.shape == shape and not first.offset:
        return None
    return _pieces_problem(record)


def _pieces_problem(record: TensorRecord) -> str | None:
    """Why the pieces do not make up the whole, each element once."""
    for piece in record.pieces:
        offset = piece.offset or (0,) * len(record.shape)
        within = (
            is_shape(piece.shape)
            and len(piece.shape) == len(offset) == len(record.shape)
            and all(
                start >= 0 and start + size <= whole
                for start, size, whole in zip(offset, piece.shape, record.shape, strict=True)
            )
        )
        if not within:
            return f"a piece of shape {piece.shape} at {offset} is not within {record.shape}"
    covered = sum(math.prod(piece.shape) for piece in record.pieces)
    if covered != math.prod(record.shape):
        return f"its pieces cover {covered} elements of {record.shape}"
    # Of the right volume and without an overlap, they leave no hole either.
    return "its pieces overlap" if _overlap(record.pieces) else None


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether any two boxes share an element."""
    boxes = sorted((piece.offset or (0,) * len(piece.shape), piece.shape) for piece in pieces if math.prod(piece.shape))
    for index, (offset, shape) in enumerate(boxes):
        for other, size in boxes[index + 1 :]:
            if other and other[0] >= offset[0] + shape[0]:
                break  # sorted by where they start: no later one reaches back to this one
            if all(a < b + n and b < a + m for a, m, b, n in zip(offset, shape, other, size, strict=True)):
                return True
    return False


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


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
