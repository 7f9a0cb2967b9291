"""Tensors and arrays: what they are, how the manifest calls that, and how saved bytes get into them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from holdfast.errors import UnsupportedValueError
from holdfast.format.dtypes import DTYPES
from holdfast.format.records import Piece, TensorRecord
from holdfast.format.tree import unsupported
from holdfast.storage.boxes import BoxSink, FlatSink, RegionSink, box_of, overlap, span
from holdfast.storage.reading import Sink

_TORCH_DTYPES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)
}
_DTYPES_BY_NAME = {name: dtype for dtype, name in _TORCH_DTYPES.items()}
_NUMPY_DTYPES: dict[np.dtype[Any], str] = {np.dtype(d.numpy): d.name for d in DTYPES.values() if d.numpy is not None}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


# ----------------------------------------------------------------------------------------------------- what they are


def check_tensor(tensor: torch.Tensor, path: str) -> str:
    """Refuse tensors whose values cannot be written exactly, with the way out; returns the name of the dtype.

    Nearly all tensors are plain ones, and there may be many: three looks tell one.
    """
    name = _TORCH_DTYPES.get(tensor.dtype)
    if name is None or type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta:
        _refuse_strange(tensor, path)
        assert name is not None
    return name


def _refuse_strange(tensor: torch.Tensor, path: str) -> None:
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
    return _DTYPES_BY_NAME[name]


def memory_format(tensor: torch.Tensor) -> str:
    """How ``tensor`` lies in memory, as the manifest calls it."""
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return "channels_last"
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return "channels_last_3d"
    return "contiguous"


def tensor_address(tensor: torch.Tensor) -> int:
    """Where a tensor's values begin; 0 when it has none. Another tensor may take the address when this one is gone."""
    return tensor.data_ptr()


def tensor_version(value: torch.Tensor | np.ndarray[Any, Any]) -> int:
    """How often it was written in place, as far as torch counts; 0 where it does not (inference mode, arrays).

    Writes through ``.data``, through numpy and by fused optimizers are not counted: this can show that something was
    written, never that nothing was.
    """
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def array_address(array: np.ndarray[Any, Any]) -> int:
    """The same for arrays."""
    return array.ctypes.data if array.size else 0


def tensor_identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two tensors with elements share exactly if they are one: while both are alive.

    An address alone would not do: views of another shape or type may begin at the same place.
    """
    storage = tensor.untyped_storage()._cdata
    flags = (tensor.is_conj(), tensor.is_neg())
    return ("torch", storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, flags)


def array_identity(array: np.ndarray[Any, Any]) -> tuple[object, ...]:
    """The same for arrays."""
    return ("numpy", array.ctypes.data, array.shape, array.strides, array.dtype.str)


def new_tensor(record: TensorRecord, device: torch.device | str) -> torch.Tensor:
    """An uninitialized tensor as ``record`` describes it."""
    return torch.empty(
        record.shape,
        dtype=torch_dtype(record.dtype),
        device=device,
        memory_format=_MEMORY_FORMATS[record.memory_format],
    )


# -------------------------------------------------------------------------------------------------- bytes in memory


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies in the CPU's memory just as its bytes do in a file."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def tensor_sink(
    tensor: torch.Tensor, record: TensorRecord, piece: Piece, offset: tuple[int, ...] = ()
) -> tuple[int, int, Sink] | None:
    """Which bytes of ``piece`` belong to ``tensor``, and what takes them there, converting where the dtypes differ.

    Args:
        tensor: the destination: all of the saved tensor, or a box of it.
        record: of the saved tensor.
        piece: where some of it lies.
        offset: where ``tensor`` begins in the saved one; empty for its origin.

    Returns:
        Where they begin, from the beginning of the piece, and how many they are; None where there are none.
    """
    if not offset and not piece.offset and tensor.shape == piece.shape:
        count = math.prod(piece.shape)
        nbytes = count * DTYPES[record.dtype].itemsize
        return (0, nbytes, _box_sink(tensor, record.dtype, piece.shape, (), count)) if count else None
    origin = (0,) * len(record.shape)
    begins, at = piece.offset or origin, offset or origin
    common = overlap(begins, piece.shape, at, tuple(tensor.shape))
    if common is None:
        return None
    low, size = common
    box = tensor.detach()
    if tuple(tensor.shape) != size:
        box = box_of(box, tuple(here - start for here, start in zip(low, at, strict=True)), size)
    within = tuple(here - start for here, start in zip(low, begins, strict=True))
    first, last = span(piece.shape, within, size)
    itemsize = DTYPES[record.dtype].itemsize
    return first * itemsize, (last - first) * itemsize, _box_sink(box, record.dtype, piece.shape, within, last - first)


def _box_sink(box: torch.Tensor, dtype: str, shape: tuple[int, ...], within: tuple[int, ...], count: int) -> Sink:
    """What takes so many elements of ``shape``, from the first of the region at ``within`` to its last, to ``box``."""
    saved_dtype, itemsize = torch_dtype(dtype), DTYPES[dtype].itemsize
    whole = count == box.numel()
    if whole and box.dtype == saved_dtype and is_flat(box):
        return FlatSink(box, box.data_ptr())
    box = box.detach()

    def values(data: memoryview, size: tuple[int, ...]) -> torch.Tensor:
        return torch.frombuffer(data, dtype=saved_dtype).view(size)

    def copy(view: torch.Tensor, source: torch.Tensor) -> None:
        with torch.inference_mode(box.is_inference()):  # a mode of the thread: this may be another than the caller's
            view.copy_(source)

    if whole:
        return BoxSink(box, itemsize, lambda view, data: copy(view, values(data, tuple(view.shape))))
    return RegionSink(box, itemsize, shape, within, values, copy)
