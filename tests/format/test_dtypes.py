"""Element types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.format.dtypes import CODE_ITEMSIZE, DTYPES, DType


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_sizes_are_torchs(dtype: DType) -> None:
    """Each name is a torch dtype of the size that the table says."""
    assert getattr(torch, dtype.name).itemsize == dtype.itemsize


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.numpy], ids=lambda dtype: dtype.name)
def test_numpy_types_are_the_same(dtype: DType) -> None:
    """Where numpy has the type, it is the one that torch gives for it."""
    tensor = torch.zeros(1, dtype=getattr(torch, dtype.name))
    assert tensor.numpy().dtype == np.dtype(dtype.numpy)


def test_every_plain_torch_dtype_is_known() -> None:
    """All of torch's element types can be saved, but quantized ones and bits."""
    known = {getattr(torch, name) for name in DTYPES}
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    left_out = {str(dtype).removeprefix("torch.") for dtype in every - known}
    odd = {name for name in left_out if not name.startswith(("q", "bits", "int", "uint"))}
    assert odd == set()


def test_parts_add_up() -> None:
    """A type stored as several elements takes as many bytes as those."""
    assert {d.name: d.itemsize for d in DTYPES.values()} == {
        d.name: CODE_ITEMSIZE[d.code] * d.parts for d in DTYPES.values()
    }


def test_stored_shape() -> None:
    """complex128 is stored as pairs; the rest as it is."""
    assert DTYPES["complex128"].stored_shape((2, 3)) == (2, 3, 2)
    assert DTYPES["float32"].stored_shape((2, 3)) == (2, 3)
