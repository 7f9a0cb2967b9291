"""The tensors of a saved tree: as references while structures are compared, then filled from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint import Checkpoint
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Manifest, TensorRecord
from holdfast.format.tree import plain_numpy_dtype
from holdfast.state.tensors import array_sink, tensor_sink


@dataclass(frozen=True, slots=True)
class SavedTensor:
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
    """Makes references of the tensors of one entry while its tree is decoded."""

    def __init__(self, manifest: Manifest, entry: str) -> None:
        self._manifest = manifest
        self._entry = entry

    def encode(self, value: Any, path: str) -> dict[str, Any] | None:
        """Never called: loading only decodes."""
        return None

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
            return torch.Size(body)
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
        if int(np.prod(saved.shape, dtype=np.int64)) * dtype.itemsize != record.nbytes:
            raise ValueError(f"{name}: {record.nbytes} bytes are no array of shape {shape} of {dtype}")
        return saved


def fill(checkpoint: Checkpoint, copies: Iterable[tuple[SavedTensor | SavedArray, Any]]) -> None:
    """Read each saved tensor or array into its destination; destinations may lie on any device."""
    wanted = []
    for saved, target in copies:
        for piece in saved.record.pieces:
            if isinstance(saved, SavedArray):
                wanted.append((saved.key, piece, array_sink(target)))
            elif saved.record.nbytes:
                wanted.append((saved.key, piece, tensor_sink(target, saved.record, piece)))
    checkpoint.read_pieces(wanted)
