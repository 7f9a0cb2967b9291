"""Bytes in logical order into arrays that lie in memory in any order."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.storage import memory
from holdfast.storage.boxes import (
    BoxSink,
    FlatSink,
    array_region_sink,
    array_sink,
    box_of,
    elements,
    overlap,
    runs,
    span,
)
from holdfast.storage.reading import Sink

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def deliver(sink: Sink, data: bytes, cuts: Sequence[int], seed: int) -> None:
    """Give ``data`` to a sink in the pieces between ``cuts``, in some order, aligned to nothing."""
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = list(itertools.pairwise(borders))
    order = random.Random(seed)
    order.shuffle(pieces)
    for begin, end in pieces:
        skip = order.randrange(16)
        buffer = memoryview(bytearray(skip + end - begin))
        buffer[skip:] = data[begin:end]
        sink(begin, memory.address_of(buffer) + skip, end - begin)


# ------------------------------------------------------------------------------------------------------------ elements


@given(shape=SHAPES, ends=st.tuples(st.integers(0, 300), st.integers(0, 300)))
@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_elements_in_logical_order(make: Callable[[Any], Any], shape: tuple[int, ...], ends: tuple[int, int]) -> None:
    """The views together hold the elements asked for, in order, for every shape and every part of it."""
    count = math.prod(shape)
    value = make(np.arange(count).reshape(shape))
    start, stop = sorted(end % (count + 1) for end in ends)
    found = [int(item) for view in elements(value, start, stop) for item in view.reshape(-1)]
    assert found == list(range(start, stop))


@given(shape=SHAPES, ends=st.tuples(st.integers(0, 300), st.integers(0, 300)))
@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_elements_are_views(make: Callable[[Any], Any], shape: tuple[int, ...], ends: tuple[int, int]) -> None:
    """What is written into them is in the array, and nowhere else."""
    count = math.prod(shape)
    value = make(np.zeros(shape, np.int64))
    start, stop = sorted(end % (count + 1) for end in ends)
    for view in elements(value, start, stop):
        view[...] = 1
    assert np.asarray(value).reshape(-1).tolist() == [int(start <= at < stop) for at in range(count)]


# --------------------------------------------------------------------------------------------------------------- sinks


def layouts(shape: tuple[int, ...], order: Sequence[int], dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of one shape that lie in memory in different ways, all zeros."""
    permuted = tuple(order[: len(shape)]) if sorted(order[: len(shape)]) == list(range(len(shape))) else None
    axes = permuted or tuple(reversed(range(len(shape))))
    stored = tuple(shape[axis] for axis in axes)
    doubled = tuple(2 * size for size in shape)
    return {
        "contiguous": np.zeros(shape, dtype),
        "permuted": np.zeros(stored, dtype).transpose(tuple(np.argsort(axes))),
        "every other": np.zeros(doubled, dtype)[(..., *(slice(None, None, 2) for _ in shape))],
        "backwards": np.zeros(shape, dtype)[(..., *(slice(None, None, -1) for _ in shape))],
        "a box": np.zeros(doubled, dtype)[(..., *(slice(size // 2, size // 2 + size) for size in shape))],
    }


@given(
    shape=SHAPES,
    order=st.permutations(range(4)),
    dtype=st.sampled_from(["u1", "i2", "f4", "f8", "c16", "?"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
    seed=st.integers(0, 100),
)
def test_arrays_in_any_order(shape: tuple[int, ...], order: list[int], dtype: str, cuts: list[int], seed: int) -> None:
    """In whatever pieces the bytes come, torn at any byte, the array gets them; whatever surrounds it does not."""
    expected = np.random.default_rng(seed).integers(1, 2 if dtype == "?" else 100, shape).astype(dtype)
    arrays = layouts(shape, order, dtype)
    for array in arrays.values():
        deliver(array_sink(array), expected.tobytes(), cuts, seed)
    assert {name: array.tobytes() for name, array in arrays.items()} == dict.fromkeys(arrays, expected.tobytes())
    around = arrays["a box"].base
    assert around is None or np.count_nonzero(around) == np.count_nonzero(arrays["a box"])


@given(
    shape=SHAPES,
    order=st.permutations(range(4)),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
    seed=st.integers(0, 100),
)
def test_tensors_in_any_order(shape: tuple[int, ...], order: list[int], cuts: list[int], seed: int) -> None:
    """The same for torch's tensors, with a conversion on the way."""
    expected = np.random.default_rng(seed).integers(1, 100, shape, np.int32)
    axes = [axis for axis in order if axis < len(shape)]
    stored = torch.zeros([shape[axis] for axis in axes])
    box = stored.permute([axes.index(axis) for axis in range(len(shape))])

    def fill(view: torch.Tensor, data: memoryview) -> None:
        view.copy_(torch.frombuffer(data, dtype=torch.int32).view(view.shape))

    deliver(BoxSink(box, 4, fill), expected.tobytes(), cuts, seed)
    assert (box.dtype, box.tolist()) == (torch.float32, expected.astype(np.float32).tolist())


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_what_fills_a_view_gets_aligned_bytes(itemsize: int) -> None:
    """Wherever they were read to: some processors and libraries do not take anything else."""
    box = np.zeros((3, 4), f"V{itemsize}").T
    addresses: list[int] = []

    def fill(view: np.ndarray[Any, Any], data: memoryview) -> None:
        addresses.append(memory.address_of(data) % itemsize)

    deliver(BoxSink(box, itemsize, fill), bytes(12 * itemsize), range(0, 200, 7), seed=1)
    assert set(addresses) == {0}


def test_an_element_in_single_bytes() -> None:
    """An element is filled once, when its last byte has come, in whatever order they come."""
    box = np.zeros((1, 2), np.uint64).T
    filled: list[bytes] = []
    sink = BoxSink(box, 8, lambda view, data: filled.append(bytes(data)))
    buffer = memoryview(bytearray(range(16)))
    for place in [15, 3, 8, 0, 9, 1, 2, 7, 5, 14, 6, 10, 4, 11, 13, 12]:
        sink(place, memory.address_of(buffer) + place, 1)
    assert filled == [bytes(range(8)), bytes(range(8, 16))]


def test_a_flat_sink_writes_only_its_bytes() -> None:
    """At an offset, and not a byte further."""
    target = bytearray(b"........")
    source = memoryview(bytearray(b"abc"))
    FlatSink(target, memory.address_of(memoryview(target)))(2, memory.address_of(source), 3)
    assert target == b"..abc..."


def test_a_sink_keeps_what_it_fills() -> None:
    """The array may have no other owner until it is filled."""
    sink = array_sink(np.zeros(2, np.uint8))
    owners = [value for value in map(sink.__getattribute__, type(sink).__slots__) if isinstance(value, np.ndarray)]
    assert [owner.shape for owner in owners] == [(2,)]


# --------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_a_box_is_a_view(make: Callable[[Any], Any]) -> None:
    """Of the place it was asked for."""
    value = make(np.zeros((3, 4)))
    box_of(value, (1, 2), (2, 1))[...] = 1
    assert value.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
@pytest.mark.parametrize("offset", [(), (0, 0)])
def test_the_whole_is_a_box(make: Callable[[Any], Any], offset: tuple[int, ...]) -> None:
    """Without an offset, or with one of zeros."""
    value = make(np.zeros((2, 2)))
    box_of(value, offset, (2, 2))[...] = 1
    assert value.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_a_box_without_dimensions_is_a_view(make: Callable[[Any], Any]) -> None:
    """Not a scalar of its own."""
    value = make(np.zeros(()))
    box_of(value, (), ())[...] = 1
    assert value.tolist() == 1


# ------------------------------------------------------------------------------------------------------------- regions

Box = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def boxes(draw: st.DrawFn, number: int = 1) -> tuple[tuple[int, ...], list[Box]]:
    """A shape without zeros, and some boxes of it that have elements."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    found = []
    for _ in range(number):
        offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
        found.append((offset, tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, offset, strict=True))))
    return shape, found


def mask(shape: tuple[int, ...], box: Box) -> np.ndarray[Any, Any]:
    """Which elements of an array of ``shape`` a box has."""
    found = np.zeros(shape, bool)
    box_of(found, *box)[...] = True
    return found


@given(boxes(number=2))
def test_what_two_boxes_have_in_common(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """The elements of both, and None where there are none."""
    shape, (one, other) = case
    both = mask(shape, one) & mask(shape, other)
    common = overlap(*one, *other)
    assert np.array_equal(mask(shape, common) if common else np.zeros(shape, bool), both)
    assert common == overlap(*other, *one)


@pytest.mark.parametrize("one", [((0,), (0,)), ((2,), (0,)), ((4,), (2,))])
def test_boxes_that_touch_have_nothing_in_common(one: Box) -> None:
    """Nor does one without elements."""
    assert overlap(*one, (1,), (3,)) is None


@given(boxes())
def test_how_far_a_box_reaches(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """From its first element to behind its last, in logical order."""
    shape, (box,) = case
    found = np.flatnonzero(mask(shape, box))
    assert span(shape, *box) == (found[0], found[-1] + 1)


@given(shape=SHAPES, ends=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_runs_in_logical_order(shape: tuple[int, ...], ends: tuple[int, int]) -> None:
    """One after the other the boxes are the elements asked for, for every shape and every part of it."""
    count = math.prod(shape)
    values = np.arange(count).reshape(shape)
    start, stop = sorted(end % (count + 1) for end in ends)
    found = [int(item) for box in runs(shape, start, stop) for item in box_of(values, *box).reshape(-1)]
    assert found == list(range(start, stop))


def test_runs_are_few() -> None:
    """Whole rows are one box: no more than two for each dimension, and one between."""
    assert len(list(runs((100, 100, 100), 12_345, 876_543))) == 5


@given(
    case=boxes(),
    order=st.permutations(range(4)),
    dtype=st.sampled_from(["u1", "i2", "f4", "c16"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
    seed=st.integers(0, 100),
)
def test_regions_into_arrays_in_any_order(
    case: tuple[tuple[int, ...], list[Box]], order: list[int], dtype: str, cuts: list[int], seed: int
) -> None:
    """Of the bytes from a region's first element to its last, torn anywhere, the array gets those of the region."""
    shape, (box,) = case
    whole = np.random.default_rng(seed).integers(1, 100, shape).astype(dtype)
    first, last = span(shape, *box)
    data = whole.reshape(-1)[first:last].tobytes()
    expected = box_of(whole, *box).tobytes()
    arrays = layouts(box[1], order, dtype)
    for array in arrays.values():
        deliver(array_region_sink(array, shape, box[0]), data, cuts, seed)
    assert {name: array.tobytes() for name, array in arrays.items()} == dict.fromkeys(arrays, expected)
    around = arrays["a box"].base
    assert around is None or np.count_nonzero(around) == np.count_nonzero(arrays["a box"])


@pytest.mark.parametrize("itemsize", [2, 4, 8, 16])
def test_a_region_takes_an_element_in_single_bytes(itemsize: int) -> None:
    """As a box does: one way of putting torn elements together serves both."""
    whole = np.arange(12 * itemsize, dtype=np.uint8).view(f"V{itemsize}").reshape(3, 4)
    target = np.zeros((2, 2), f"V{itemsize}")
    first, last = span((3, 4), (1, 1), (2, 2))
    data = whole.reshape(-1)[first:last].tobytes()
    deliver(array_region_sink(target, (3, 4), (1, 1)), data, range(len(data)), seed=2)
    assert target.tobytes() == whole[1:, 1:3].tobytes()
