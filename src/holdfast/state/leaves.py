"""The tensors of a saved tree: as references while structures are compared, then filled from the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from holdfast.checkpoint import Checkpoint
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import TensorRecord, is_shape
from holdfast.format.tree import plain_numpy_dtype
from holdfast.state.cuda import pinned_buffer, synchronize
from holdfast.state.tensors import new_tensor, tensor_sink, torch_dtype
from holdfast.storage import memory
from holdfast.storage.boxes import array_sink, box_of
from holdfast.storage.reading import Read


class SavedTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor in a checkpoint, not yet read; ``key`` is its ``entry/name``, the same for tied ones."""

    key: str
    record: TensorRecord

    @property
    def form(self) -> str:
        """Dtype and shape, in words."""
        return f"{self.record.dtype} {list(self.record.shape)}"


@dataclass(frozen=True, slots=True)
class SavedArray:
    """A numpy array in a checkpoint, not yet read."""

    key: str
    record: TensorRecord
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def fits(self, live: object) -> bool:
        """Whether ``live`` is an array that can be filled in place."""
        return (
            isinstance(live, np.ndarray)
            and live.dtype == self.dtype
            and live.shape == self.shape
            and live.flags.writeable
        )

    def new(self) -> np.ndarray[Any, Any]:
        """An array to fill."""
        return np.empty(self.shape, self.dtype)


class SavedLeaves:
    """Makes references of the tensors of one entry while its tree is decoded.

    Args:
        checkpoint: what is loaded.
        entry: the entry.
        device: where tensors go that a codec asks for before anything else is read.
    """

    def __init__(self, checkpoint: Checkpoint, entry: str, device: torch.device | str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._manifest = checkpoint.manifest
        self._entry = entry
        self._device = device

    def for_codec(self) -> CodecLeaves:
        """Leaves whose tensors are real ones."""
        return CodecLeaves(self._checkpoint, self._entry, self._device)

    def fill(self) -> None:
        """References are filled by whoever decoded them."""

    def decode(self, tag: str, body: Any) -> Any:
        """A reference to a tensor or array, or one of torch's own values."""
        if tag == "$tensor":
            return SavedTensor(*self._record(body))
        if tag == "$ndarray":
            return self._array(body)
        if tag == "$dtype":
            dtype = getattr(torch, body, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"torch has no dtype {body!r}")
            return dtype
        if tag == "$size":
            size = torch.Size(body)
            if not all(-(2**63) <= dimension < 2**63 for dimension in size):
                raise ValueError("a dimension of more than 64 bits")
            return size
        if tag == "$device":
            return torch.device(body)
        raise KeyError(tag)

    def _record(self, name: Any) -> tuple[str, TensorRecord]:
        if not isinstance(name, str):
            raise ValueError(f"expected the name of a tensor, found {str(name)[:80]!r}")
        canonical = self._manifest.aliases.get(self._entry, {}).get(name, name)
        record = self._manifest.tensors[self._entry].get(canonical)
        if record is None:
            raise ValueError(f"the tree refers to {name}, which the manifest does not list")
        return f"{self._entry}/{canonical}", record

    def _array(self, body: Any) -> SavedArray:
        if isinstance(body, str):
            key, record = self._record(body)
            numpy_name = DTYPES[record.dtype].numpy
            if numpy_name is None:
                raise ValueError(f"numpy has no {record.dtype}")
            return SavedArray(key, record, np.dtype(numpy_name), record.shape)
        name, dtype_text, shape = body
        key, record = self._record(name)
        dtype = plain_numpy_dtype(dtype_text)
        saved = SavedArray(key, record, dtype, tuple(shape))
        if not is_shape(saved.shape) or math.prod(saved.shape) * dtype.itemsize != record.nbytes:
            raise ValueError(f"{name}: {record.nbytes} bytes are no array of shape {shape} of {dtype}")
        return saved


class CodecLeaves(SavedLeaves):
    """Makes new tensors for the value that a codec is about to be given: its function may compute with them."""

    def __init__(self, checkpoint: Checkpoint, entry: str, device: torch.device | str) -> None:
        super().__init__(checkpoint, entry, device)
        self._made: dict[str, Any] = {}
        self._copies: list[tuple[SavedTensor | SavedArray, Any]] = []

    def decode(self, tag: str, body: Any) -> Any:
        """A new tensor or array, to be filled, or one of torch's own values."""
        saved = super().decode(tag, body)
        if not isinstance(saved, (SavedTensor, SavedArray)):
            return saved
        if saved.key not in self._made:
            made = new_tensor(saved.record, self._device) if isinstance(saved, SavedTensor) else saved.new()
            self._made[saved.key] = made
            self._copies.append((saved, made))
        return self._made[saved.key]

    def fill(self) -> None:
        """Read them."""
        fill(self._checkpoint, self._copies)


def fill(
    checkpoint: Checkpoint, copies: Sequence[tuple[SavedTensor | SavedArray, Any]], *, whole: bool = False
) -> None:
    """Read each saved tensor or array into its destination; destinations may lie on any device.

    Args:
        checkpoint: where from.
        copies: what, and where to.
        whole: verify also the chunks that hold none of it.
    """
    wanted: dict[str, list[Read]] = {}
    for saved, target in copies:
        record = saved.record
        itemsize = DTYPES[record.dtype].itemsize
        for piece in record.pieces:
            nbytes = math.prod(piece.shape) * itemsize
            if nbytes:
                if isinstance(saved, SavedTensor):
                    sink = tensor_sink(target, record, piece)
                elif len(record.pieces) == 1:
                    sink = array_sink(target)  # its shape may be another than that of its bytes
                else:
                    sink = array_sink(box_of(target, piece.offset, piece.shape))
                wanted.setdefault(piece.file, []).append(Read(piece.begin, nbytes, sink))
    on_cuda = synchronize(target for _, target in copies)
    checkpoint.read_files(wanted, whole=whole, allocate=pinned_buffer if on_cuda else memory.allocate)


def map_leaves(checkpoint: Checkpoint, leaves: Iterable[SavedTensor | SavedArray]) -> dict[str, Any]:
    """By key, saved tensors and arrays as views of the files, not read and not verified.

    Those without elements, and those in several pieces, are left out.
    """
    mappable = [leaf for leaf in leaves if len(leaf.record.pieces) == 1 and leaf.record.nbytes]
    maps = checkpoint.map_files(list({leaf.record.pieces[0].file for leaf in mappable}))
    made: dict[str, Any] = {}
    for leaf in mappable:
        piece = leaf.record.pieces[0]
        data = maps[piece.file][piece.begin : piece.begin + leaf.record.nbytes]
        if isinstance(leaf, SavedArray):
            made[leaf.key] = np.frombuffer(data, leaf.dtype).reshape(leaf.shape)
        else:
            made[leaf.key] = torch.frombuffer(data, dtype=torch_dtype(leaf.record.dtype)).view(leaf.record.shape)
    return made
