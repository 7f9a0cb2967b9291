"""Tensors and arrays to bytes in logical order, and back, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from holdfast.errors import UnsupportedValueError
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Piece, TensorRecord
from holdfast.format.tree import unsupported
from holdfast.storage.scatter import Sink

BLOCK_BYTES = 8 * 2**20

_TORCH_DTYPES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)
}
_NUMPY_DTYPES: dict[np.dtype[Any], str] = {np.dtype(d.numpy): d.name for d in DTYPES.values() if d.numpy is not None}
_MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


# ----------------------------------------------------------------------------------------------------- what they are


def check_tensor(tensor: torch.Tensor, path: str) -> None:
    """Refuse tensors whose values cannot be written exactly, with the way out."""
    if is_lazy(tensor):
        raise unsupported(tensor, path, "Run one forward pass first, so that the lazy module gets its shapes.")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise unsupported(tensor, path, "Save the plain tensor that it stands for (such as tensor.full_tensor()).")
    if tensor.is_meta:
        raise _refused(
            tensor, path, "a meta tensor has no values", "Materialize the module first: to_empty(device=...)."
        )
    if tensor.is_quantized:
        raise _refused(tensor, path, "quantized", "Save tensor.int_repr() with its scale and zero point.")
    if tensor.layout is not torch.strided:
        raise _refused(
            tensor, path, f"layout {tensor.layout}", "Save its parts (indices() and values()) or to_dense()."
        )
    if tensor.dtype not in _TORCH_DTYPES:
        raise _refused(tensor, path, f"dtype {tensor.dtype}", f"Known are {', '.join(DTYPES)}.")


def _refused(tensor: torch.Tensor, path: str, what: str, way_out: str) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{path}: a tensor of shape {tuple(tensor.shape)} cannot be saved: {what}. {way_out}", key=path
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Holdfast's name for a torch dtype."""
    return _TORCH_DTYPES[dtype]


def numpy_dtype_name(dtype: np.dtype[Any]) -> str | None:
    """Holdfast's name for a numpy dtype; None when it has none (text, times, foreign byte order)."""
    return _NUMPY_DTYPES.get(dtype) if dtype.isnative else None


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that Holdfast calls ``name``."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def memory_format(tensor: torch.Tensor) -> str:
    """How ``tensor`` lies in memory, as the manifest calls it."""
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return "channels_last"
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return "channels_last_3d"
    return "contiguous"


def tensor_identity(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What two tensors share exactly if they are one: while both are alive, so the caller keeps them alive.

    An address alone would not do: it is reused, and tensors without elements have none.
    """
    if tensor.numel() == 0:
        return None
    storage = tensor.untyped_storage()._cdata
    flags = (tensor.is_conj(), tensor.is_neg())
    return ("torch", storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, flags)


def array_identity(array: np.ndarray[Any, Any]) -> tuple[object, ...] | None:
    """The same for arrays."""
    if array.size == 0:
        return None
    address = array.__array_interface__["data"][0]
    return ("numpy", address, array.shape, array.strides, array.dtype.str)


def new_tensor(record: TensorRecord, device: torch.device | str) -> torch.Tensor:
    """An uninitialized tensor as ``record`` describes it."""
    return torch.empty(
        record.shape,
        dtype=torch_dtype(record.dtype),
        device=device,
        memory_format=_MEMORY_FORMATS[record.memory_format],
    )


# -------------------------------------------------------------------------------------------------------- to bytes


def tensor_blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in logical order; without a copy where it lies so in the CPU's memory.

    A block is valid until the next one is asked for.
    """
    tensor = tensor.detach()
    if _is_flat(tensor):
        yield _flat_bytes(tensor)
        return
    # One buffer for all blocks: each is written before the next is asked for, and a new one each time would leave the
    # allocator with several times as much.
    buffer = torch.empty(0, dtype=tensor.dtype)
    for block in split(tensor, tensor.element_size()):
        if buffer.numel() < block.numel():
            buffer = torch.empty(block.numel(), dtype=tensor.dtype)
        target = buffer[: block.numel()].view(block.shape)
        target.copy_(block)
        yield _flat_bytes(target)


def array_blocks(array: np.ndarray[Any, Any]) -> Iterator[memoryview]:
    """The bytes of ``array`` in logical order."""
    for block in [array] if array.flags.c_contiguous else split(array, array.itemsize):
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def split(value: Any, itemsize: int) -> Iterator[Any]:
    """Views of a tensor or array, in logical order, of at most ``BLOCK_BYTES`` each."""
    shape = value.shape
    count = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 0 or count * itemsize <= BLOCK_BYTES:
        yield value
        return
    row_bytes = count // shape[0] * itemsize
    rows = BLOCK_BYTES // row_bytes
    if rows == 0:
        for index in range(shape[0]):
            yield from split(value[index], itemsize)
    else:
        for index in range(0, shape[0], rows):
            yield value[index : index + rows]


def _is_flat(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _flat_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------------- from bytes


def tensor_sink(tensor: torch.Tensor, record: TensorRecord, piece: Piece) -> Sink:
    """What takes the bytes of ``piece`` into its box of ``tensor``, converting where the dtypes differ."""
    box = tensor.detach()
    for dimension, start in enumerate(piece.offset):
        box = box.narrow(dimension, start, piece.shape[dimension])
    saved_dtype = torch_dtype(record.dtype)
    if _is_flat(box) and box.dtype == saved_dtype:
        return flat_sink(_flat_bytes(box))
    blocks = split(box, DTYPES[record.dtype].itemsize)

    def fill(block: torch.Tensor, data: bytearray) -> None:
        source = torch.frombuffer(data, dtype=torch.uint8).view(saved_dtype).reshape(block.shape)
        block.copy_(source)

    return _staged(blocks, DTYPES[record.dtype].itemsize, fill)


def array_sink(array: np.ndarray[Any, Any]) -> Sink:
    """What takes the bytes of a whole array, in logical order."""
    if array.flags.c_contiguous:
        return flat_sink(array.reshape(-1).view(np.uint8).data)

    def fill(block: np.ndarray[Any, Any], data: bytearray) -> None:
        block[...] = np.frombuffer(data, array.dtype).reshape(block.shape)

    return _staged(split(array, array.itemsize), array.itemsize, fill)


def flat_sink(view: memoryview) -> Sink:
    """What takes bytes straight to where they belong."""
    target = np.frombuffer(view, np.uint8) if len(view) else np.empty(0, np.uint8)

    def write(offset: int, data: memoryview) -> None:
        target[offset : offset + len(data)] = data

    return write


def _staged(blocks: Iterator[Any], itemsize: int, fill: Callable[[Any, bytearray], None]) -> Sink:
    """What collects bytes until a block of the destination is complete, and then fills it."""
    staged = bytearray()
    block = next(blocks)

    def write(offset: int, data: memoryview) -> None:
        nonlocal block, staged
        while len(data):
            wanted = int(np.prod(block.shape, dtype=np.int64)) * itemsize
            taken = min(wanted - len(staged), len(data))
            staged += data[:taken]
            data = data[taken:]
            if len(staged) == wanted:
                fill(block, staged)
                staged = bytearray()
                block = next(blocks, None)

    return write
