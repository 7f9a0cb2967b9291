"""The tensors of a saved tree: as references while structures are compared, then filled from the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from holdfast.checkpoint import Checkpoint
from holdfast.format.dtypes import DTYPES
from holdfast.format.records import TensorRecord, is_shape
from holdfast.format.strict_json import cut, shown
from holdfast.format.tree import plain_numpy_dtype
from holdfast.locating import Wanted
from holdfast.state.cuda import pinned_buffer, synchronize
from holdfast.state.sharding import empty_beside, local_box, local_of
from holdfast.state.tensors import new_tensor, tensor_sink, torch_dtype
from holdfast.storage import memory
from holdfast.storage.boxes import array_sink, box_of
from holdfast.storage.memory import enough_memory
from holdfast.storage.reading import Read


class SavedTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor in a checkpoint, not yet read; ``key`` is its ``entry/name``, the same for tied ones."""

    key: str
    record: TensorRecord

    @property
    def form(self) -> str:
        """Dtype and shape, in words."""
        return f"{self.record.dtype} {list(self.record.shape)}"

    def new(self, device: torch.device | str) -> torch.Tensor:
        """A tensor to fill."""
        with enough_memory(self.key, self.record.nbytes):
            return new_tensor(self.record, device)

    def new_beside(self, like: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """One to fill that is cut over ranks as ``like`` is."""
        with enough_memory(self.key, local_of(like).numel() * DTYPES[self.record.dtype].itemsize):
            return empty_beside(like, self.record.shape, torch_dtype(self.record.dtype), device)


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
        with enough_memory(self.key, self.record.nbytes):
            return np.empty(self.shape, self.dtype)


class SavedLeaves:
    """Makes references of the tensors of one entry while its tree is decoded.

    Args:
        checkpoint: what is loaded.
        entry: the entry.
        device: where tensors go that a codec asks for before anything else is read.
        prefix: what the names of its tensors begin with in the entry, and not in the tree.
    """

    def __init__(
        self, checkpoint: Checkpoint, entry: str, device: torch.device | str = "cpu", *, prefix: str = ""
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._manifest = checkpoint.manifest
        self._entry = entry
        self._device = device
        self._codec_leaves: CodecLeaves | None = None

    def for_codec(self) -> CodecLeaves:
        """Leaves whose tensors are real ones; of each tensor there is one, however many codecs ask for it."""
        if self._codec_leaves is None:
            self._codec_leaves = CodecLeaves(self._checkpoint, self._entry, self._device, prefix=self._prefix)
        return self._codec_leaves

    def fill(self) -> None:
        """References are filled by whoever decoded them."""

    def decode(self, tag: str, body: Any) -> Any:
        """A reference to a tensor or array, or one of torch's own values."""
        if tag == "$tensor":
            return SavedTensor(*self._record(body))
        if tag == "$ndarray":
            return self._array(body)
        if tag == "$dtype":
            # Not getattr: torch imports some of its modules when they are asked for.
            dtype = vars(torch).get(body)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"torch has no dtype {shown(body)}")
            return dtype
        if tag == "$size":
            if not isinstance(body, list) or not all(type(size) is int and -(2**63) <= size < 2**63 for size in body):
                raise ValueError(f"expected a list of integers of 64 bits, found {shown(body)}")
            return torch.Size(body)
        if tag == "$device":
            if not isinstance(body, str):
                raise ValueError(f"expected the name of a device, found {shown(body)}")
            return torch.device(body)
        raise KeyError(tag)

    def _record(self, name: Any) -> tuple[str, TensorRecord]:
        if not isinstance(name, str):
            raise ValueError(f"expected the name of a tensor, found {shown(name)}")
        full = self._prefix + name
        canonical = self._manifest.aliases.get(self._entry, {}).get(full, full)
        record = self._manifest.tensors[self._entry].get(canonical)
        if record is None:
            raise ValueError(f"the tree refers to {cut(name)}, which the manifest does not list")
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
            raise ValueError(f"{cut(name)}: {record.nbytes} bytes are no array of shape {shown(shape)} of {dtype}")
        if len(record.pieces) != 1:
            raise ValueError(f"{cut(name)}: an array of {dtype} is stored in one piece, not cut into several")
        return saved


class CodecLeaves(SavedLeaves):
    """Makes new tensors for the value that a codec is about to be given: its function may compute with them."""

    def __init__(self, checkpoint: Checkpoint, entry: str, device: torch.device | str, *, prefix: str = "") -> None:
        super().__init__(checkpoint, entry, device, prefix=prefix)
        self._made: dict[str, Any] = {}
        self._copies: list[tuple[SavedTensor | SavedArray, Any]] = []

    def decode(self, tag: str, body: Any) -> Any:
        """A new tensor or array, to be filled, or one of torch's own values."""
        saved = super().decode(tag, body)
        if not isinstance(saved, (SavedTensor, SavedArray)):
            return saved
        if saved.key not in self._made:
            made = saved.new(self._device) if isinstance(saved, SavedTensor) else saved.new()
            self._made[saved.key] = made
            self._copies.append((saved, made))
        return self._made[saved.key]

    def for_codec(self) -> CodecLeaves:
        """A codec within the value of a codec."""
        return self

    def fill(self) -> None:
        """Read those that were not read yet."""
        copies, self._copies = self._copies, []
        fill(self._checkpoint, copies)


Copy = tuple[SavedTensor | SavedArray, Any]
"""Something saved, and the tensor or array that it goes to."""


class Fill(Protocol):
    """Reads what is saved into where it goes: :func:`fill`, or what several processes do together."""

    def __call__(self, checkpoint: Checkpoint, copies: Sequence[Copy], *, whole: bool) -> None:
        """See :func:`fill`."""


def fill(checkpoint: Checkpoint, copies: Sequence[Copy], *, whole: bool = False) -> None:
    """Read each saved tensor or array into its destination; destinations may lie on any device.

    Args:
        checkpoint: where from.
        copies: what, and where to.
        whole: verify also the chunks that hold none of it.
    """
    boxes = [local_box(target) if isinstance(saved, SavedTensor) else (target, ()) for saved, target in copies]
    located = checkpoint.locate(
        [
            Wanted(saved.key, saved.record, None if local is target else (offset, tuple(local.shape)))
            for (saved, target), (local, offset) in zip(copies, boxes, strict=True)
        ]
    )
    wanted: dict[str, list[Read]] = {}
    for (saved, target), (local, offset), pieces in zip(copies, boxes, located, strict=True):
        record = saved.record
        if isinstance(saved, SavedTensor):
            for piece in pieces:
                found = tensor_sink(local, record, piece, offset)
                if found is not None:
                    begin, nbytes, sink = found
                    wanted.setdefault(piece.file, []).append(Read(piece.begin + begin, nbytes, sink))
            continue
        itemsize = DTYPES[record.dtype].itemsize
        for piece in pieces:
            # The shape of an array in one piece may be another than that of its bytes.
            box = target if len(pieces) == 1 else box_of(target, piece.offset, piece.shape)
            nbytes = math.prod(piece.shape) * itemsize
            if nbytes:
                wanted.setdefault(piece.file, []).append(Read(piece.begin, nbytes, array_sink(box)))
    on_cuda = synchronize(target for _, target in copies)
    checkpoint.read_files(wanted, whole=whole, allocate=pinned_buffer if on_cuda else memory.allocate)


def _is_mappable(record: TensorRecord) -> bool:
    """Whether its bytes can be looked at where they lie: no file of ours has one in between elements."""
    return len(record.pieces) == 1 and record.nbytes > 0 and record.pieces[0].begin % DTYPES[record.dtype].itemsize == 0


def map_leaves(checkpoint: Checkpoint, leaves: Iterable[SavedTensor | SavedArray]) -> dict[str, Any]:
    """By key, saved tensors and arrays as views of the files, not read and not verified.

    Those without elements, those in several pieces, and those that are not aligned to their elements are left out.
    """
    mappable = [leaf for leaf in leaves if _is_mappable(leaf.record)]
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
