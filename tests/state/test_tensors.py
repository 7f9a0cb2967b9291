"""Saved bytes into live tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.dtypes import DTYPES
from holdfast.format.records import Piece, TensorRecord
from holdfast.state.tensors import tensor_sink
from holdfast.storage import memory

pytestmark = pytest.mark.filterwarnings(
    "ignore:ComplexHalf support is experimental", "ignore:Casting complex values to real"
)
SHAPE = (2, 3, 4, 2)


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in logical order."""
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def some_values(dtype: torch.dtype, shape: Sequence[int] = SHAPE) -> torch.Tensor:
    """Values that most dtypes can hold."""
    count = torch.arange(math.prod(shape))
    if dtype is torch.bool:
        return (count % 2 == 1).reshape(shape)
    if DTYPES[str(dtype).removeprefix("torch.")].itemsize == 1:
        return (count % 8 + 1).to(torch.uint8).view(dtype).reshape(shape)  # from some of these nothing is converted
    return (count % 8 + 1).to(dtype).reshape(shape)


def deliver(target: torch.Tensor, saved: torch.Tensor, piece: Piece, cuts: Sequence[int] = (5, 24)) -> None:
    """Restore ``saved`` into ``target``, the later pieces first."""
    name = str(saved.dtype).removeprefix("torch.")
    data = memoryview(bytearray(raw(saved)))
    found = tensor_sink(target, TensorRecord(name, tuple(target.shape), (piece,)), piece)
    if found is None:
        assert not data
        return
    begin, nbytes, sink = found
    assert (begin, nbytes) == (0, len(data))
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in reversed(list(itertools.pairwise(borders))):
        sink(begin, memory.address_of(data) + begin, end - begin)


def whole(tensor: torch.Tensor) -> Piece:
    """A piece that is all of it."""
    return Piece("f", "n", 4096, tuple(tensor.shape))


LAYOUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "contiguous": lambda dtype: torch.zeros(SHAPE, dtype=dtype),
    "channels last": lambda dtype: torch.zeros(SHAPE, dtype=dtype).contiguous(memory_format=torch.channels_last),
    "transposed": lambda dtype: torch.zeros(SHAPE[::-1], dtype=dtype).permute(3, 2, 1, 0),
    "every other": lambda dtype: torch.zeros(4, 6, 8, 4, dtype=dtype)[::2, ::2, ::2, ::2],
    "a parameter's": lambda dtype: torch.nn.Parameter(
        torch.zeros(SHAPE, dtype=dtype), requires_grad=dtype.is_floating_point or dtype.is_complex
    ),
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_in_every_layout(layout: str, name: str) -> None:
    """A tensor that lies in memory in its own way gets the saved bits; those that surround it are left."""
    dtype = getattr(torch, name)
    target = LAYOUTS[layout](dtype)
    saved = some_values(dtype)
    deliver(target, saved, whole(saved))
    assert raw(target) == raw(saved)
    if layout == "every other":
        assert target._base is not None
        assert sum(byte != 0 for byte in raw(target._base)) == sum(byte != 0 for byte in raw(saved))


@pytest.mark.parametrize("saved_name", ["bool", "int8", "int64", "float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["int32", "float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_converted(layout: str, name: str, saved_name: str) -> None:
    """As torch converts them, also where elements are torn."""
    saved = some_values(getattr(torch, saved_name))
    target = LAYOUTS[layout](getattr(torch, name))
    deliver(target, saved, whole(saved))
    assert raw(target) == raw(saved.to(target.dtype))


@pytest.mark.parametrize("lazy", ["conj", "neg"])
def test_lazily_changed_tensors(lazy: str) -> None:
    """What the tensor shows is what was saved, although its memory holds the conjugate or negative."""
    base = torch.zeros(3, 4, dtype=torch.complex64)
    target = base.conj() if lazy == "conj" else torch._neg_view(base)
    saved = some_values(torch.complex64, (3, 4)) + 2j
    deliver(target, saved, whole(saved))
    assert target.tolist() == saved.tolist()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_small_shapes(shape: tuple[int, ...], name: str) -> None:
    """No dimension, one element, or none: with and without a conversion."""
    target = torch.zeros(shape, dtype=getattr(torch, name))
    saved = some_values(torch.float32, shape)
    deliver(target, saved, whole(saved))
    assert target.tolist() == saved.tolist()


@given(
    corners=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=3),
    same=st.booleans(),
    cuts=st.lists(st.integers(0, 900), max_size=8),
)
def test_a_piece_goes_to_its_box(corners: list[tuple[int, int]], same: bool, cuts: list[int]) -> None:
    """Wherever in the tensor it lies; the rest is left as it was."""
    boxes = [slice(min(pair), max(pair)) for pair in corners]
    expected = torch.full((5,) * len(boxes), -1.0, dtype=torch.float32 if same else torch.float64)
    shape = tuple(box.stop - box.start for box in boxes)
    saved = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    target = expected.clone()
    expected[tuple(boxes)] = saved.to(expected.dtype)
    deliver(target, saved, Piece("f", "n", 4096, shape, tuple(box.start for box in boxes)), cuts)
    assert target.tolist() == expected.tolist()


def test_a_tensor_that_needs_gradients_is_filled_in_place() -> None:
    """It stays the leaf that its optimizer knows."""
    target = torch.zeros(3, requires_grad=True)
    deliver(target, torch.arange(3.0), whole(target))
    assert (target.tolist(), target.is_leaf, target.grad_fn) == ([0, 1, 2], True, None)
