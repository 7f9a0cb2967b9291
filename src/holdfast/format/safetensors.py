"""The layout of a data file: standard safetensors, with the tensors' bytes starting at a multiple of 4096.

Source: https://github.com/huggingface/safetensors#format. Eight bytes give the length of a JSON header (little-endian);
the header gives each tensor's type, shape and place; the bytes follow in that order without holes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from holdfast.errors import UsageError
from holdfast.format import strict_json
from holdfast.format.dtypes import CODE_ITEMSIZE
from holdfast.format.strict_json import cut, shown

ALIGNMENT = 4096
MAX_HEADER_BYTES = 16 * 2**20  # a hundred thousand tensors; the safetensors library takes 100 MB
MAX_HEADER_COST_BYTES = 96 * 2**20
"""What a header may take in memory, by the estimate of :func:`holdfast.format.strict_json.cost_bytes`."""
LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a data file, as its header describes it; ``begin`` counts from the start of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a data file: ``prefix`` (length and header, padded), then ``tensors`` in order."""

    prefix: bytes
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return len(self.prefix) + sum(tensor.nbytes for tensor in self.tensors)


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def plan(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
    """Lay out ``tensors`` (name, safetensors code, stored shape) in a file.

    Wider elements come first, as the safetensors library sorts them, so that each tensor is aligned to its own
    elements; among equals the given order is kept.
    """
    ordered = sorted(tensors, key=lambda tensor: -CODE_ITEMSIZE[tensor[1]])
    sizes = [math.prod(shape) * CODE_ITEMSIZE[code] for _, code, shape in ordered]
    header: dict[str, object] = {_METADATA: dict(metadata)}
    begin = 0
    for (name, code, shape), nbytes in zip(ordered, sizes, strict=True):
        if name == _METADATA or name in header:
            raise UsageError(f"tensor name {name!r} is reserved or used twice in one file.", key=name)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, begin + nbytes)}
        begin += nbytes
    text = msgspec.json.encode(header)
    length = -(-(LENGTH_BYTES + len(text)) // ALIGNMENT) * ALIGNMENT - LENGTH_BYTES
    if length > MAX_HEADER_BYTES or strict_json.cost_bytes(text) > MAX_HEADER_COST_BYTES:
        raise UsageError(f"the names and shapes of {len(ordered)} tensors do not fit one safetensors header.")
    prefix = length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
    placed = []
    begin = len(prefix)
    for (name, code, shape), nbytes in zip(ordered, sizes, strict=True):
        placed.append(StoredTensor(name, code, shape, begin, nbytes))
        begin += nbytes
    return Layout(prefix, tuple(placed), dict(metadata))


def header_length(first_bytes: bytes | bytearray | memoryview, file_bytes: int) -> int:
    """How many bytes length and header take, read from the first eight; ValueError when that cannot be."""
    if len(first_bytes) < LENGTH_BYTES:
        raise ValueError(f"expected at least {LENGTH_BYTES} bytes, found {len(first_bytes)}")
    length = int.from_bytes(first_bytes[:LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ValueError(f"the header claims {length} bytes in a file of {file_bytes}")
    return LENGTH_BYTES + length


def parse(prefix: bytes | memoryview, file_bytes: int) -> Layout:
    """The layout that ``prefix`` (length and header) describes, strictly; ValueError says what is wrong with it."""
    if header_length(prefix, file_bytes) != len(prefix):
        raise ValueError(f"the header's length does not match the {len(prefix)} bytes given")
    text = bytes(prefix[LENGTH_BYTES:]).rstrip(b" ")
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with '{'")
    cost_bytes = strict_json.cost_bytes(text)
    if cost_bytes > MAX_HEADER_COST_BYTES:
        raise ValueError(f"can take {cost_bytes} bytes of memory, more than the {MAX_HEADER_COST_BYTES} that it may")
    raw = strict_json.decode(text, dict[str, msgspec.Raw])
    metadata_raw = raw.pop(_METADATA, None)
    metadata = {} if metadata_raw is None else strict_json.decode(bytes(metadata_raw), dict[str, str])
    begin = len(prefix)
    # All at once: of a thousand files each may have fifty thousand.
    headers = strict_json.decode(b"[" + b",".join(raw.values()) + b"]", list[_Header])
    tensors = [_stored(name, header, begin) for name, header in zip(raw, headers, strict=True)]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.begin + tensor.nbytes))
    for tensor in tensors:
        if tensor.begin != begin:
            raise ValueError(
                f"{cut(tensor.name)}: starts at byte {tensor.begin}, expected {begin}: a hole or an overlap"
            )
        begin += tensor.nbytes
    if begin != file_bytes:
        raise ValueError(f"the tensors end at byte {begin}, the file at {file_bytes}")
    return Layout(bytes(prefix), tuple(tensors), metadata)


def _stored(name: str, header: _Header, origin: int) -> StoredTensor:
    if header.dtype not in CODE_ITEMSIZE:
        raise ValueError(f"{cut(name)}: unknown dtype {shown(header.dtype)}")
    if any(size < 0 for size in header.shape):
        raise ValueError(f"{cut(name)}: negative size in shape {shown(header.shape)}")
    begin, end = header.data_offsets
    nbytes = math.prod(header.shape) * CODE_ITEMSIZE[header.dtype]
    if begin < 0 or end - begin != nbytes:
        raise ValueError(
            f"{cut(name)}: offsets {begin} to {end} do not hold shape {shown(header.shape)} of {header.dtype}"
        )
    return StoredTensor(name, header.dtype, header.shape, origin + begin, nbytes)
