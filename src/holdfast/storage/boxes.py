"""Bytes of a file, which stand in logical order, into arrays, which may lie in memory in any order.

They come piece by piece, in any order, from several threads. What is said of arrays here holds for torch's tensors too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from holdfast.storage import memory
from holdfast.storage.reading import Sink


def elements(value: Any, start: int, stop: int) -> Iterator[Any]:
    """Views of an array or tensor which together are its elements ``start`` to ``stop``, counted in logical order."""
    if start >= stop:
        return
    count = math.prod(value.shape)
    if stop - start == count:
        yield value
        return
    row = count // value.shape[0]
    first, last = -(-start // row), stop // row  # the rows between are whole
    if first > last:
        yield from elements(value[last], start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from elements(value[first - 1], start - (first - 1) * row, row)
    if first < last:
        yield value[first:last]
    if last * row < stop:
        yield from elements(value[last], 0, stop - last * row)


class FlatSink:
    """Takes bytes straight to where they belong, in memory that ``owner`` keeps."""

    __slots__ = ("_address", "_owner")

    def __init__(self, owner: object, address: int) -> None:
        self._owner = owner
        self._address = address

    def __call__(self, offset: int, address: int, nbytes: int) -> None:
        """See ``Sink``."""
        memory.copy(self._address + offset, address, nbytes)


class _ElementSink:
    """Takes bytes element by element, whole and aligned, in whatever pieces they come."""

    def __init__(self, itemsize: int) -> None:
        self._itemsize = itemsize
        self._lock = threading.Lock()
        self._torn: dict[int, tuple[bytearray, list[int]]] = {}

    def __call__(self, offset: int, address: int, nbytes: int) -> None:
        """See ``Sink``."""
        head = min(-offset % self._itemsize, nbytes)
        tail = (offset + nbytes) % self._itemsize if head < nbytes else 0
        if head:
            self._take_torn(offset, memory.view_at(address, head))
        if tail:
            self._take_torn(offset + nbytes - tail, memory.view_at(address + nbytes - tail, tail))
        self._take_whole((offset + head) // self._itemsize, memory.view_at(address + head, nbytes - head - tail))

    def _take_whole(self, first: int, data: memoryview) -> None:
        if len(data) and memory.address_of(data) % self._itemsize:
            data = memoryview(bytearray(data))
        self._take(first, data)

    def _take(self, first: int, data: memoryview) -> None:
        """Take some elements, of which the first is ``first``."""
        raise NotImplementedError

    def _take_torn(self, offset: int, data: memoryview) -> None:
        """Part of an element whose rest is in another chunk: of complex128, which is stored as pairs of eight bytes."""
        index, within = divmod(offset, self._itemsize)
        with self._lock:
            element, missing = self._torn.setdefault(index, (bytearray(self._itemsize), [self._itemsize]))
            element[within : within + len(data)] = data
            missing[0] -= len(data)
            if missing[0]:
                return
            del self._torn[index]
        self._take_whole(index, memoryview(element))


class BoxSink(_ElementSink):
    """Takes bytes into an array or tensor that does not lie in memory as its bytes do in the file.

    Args:
        box: what is filled.
        itemsize: bytes of one saved element.
        fill: puts the bytes of some elements into a view of the box; the bytes are aligned to elements.
    """

    def __init__(self, box: Any, itemsize: int, fill: Callable[[Any, memoryview], None]) -> None:
        super().__init__(itemsize)
        self._box = box
        self._fill = fill

    def _take(self, first: int, data: memoryview) -> None:
        for view in elements(self._box, first, first + len(data) // self._itemsize):
            nbytes = math.prod(view.shape) * self._itemsize
            self._fill(view, data[:nbytes])
            data = data[nbytes:]


def array_region_sink(array: np.ndarray[Any, Any], shape: tuple[int, ...], offset: tuple[int, ...]) -> Sink:
    """What takes the bytes of a box of ``shape``, from which the region at ``offset`` goes to ``array``."""
    return RegionSink(
        array,
        array.itemsize,
        shape,
        offset,
        lambda data, size: np.frombuffer(data, array.dtype).reshape(size),
        np.copyto,
    )


def array_sink(array: np.ndarray[Any, Any]) -> Sink:
    """What takes the bytes of an array, in logical order."""
    if array.flags.c_contiguous:
        return FlatSink(array, array.ctypes.data)

    def fill(view: np.ndarray[Any, Any], data: memoryview) -> None:
        view[...] = np.frombuffer(data, array.dtype).reshape(view.shape)

    return BoxSink(array, array.itemsize, fill)


def overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], other_offset: tuple[int, ...], other_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offset and shape of what two boxes have in common; None where that is nothing."""
    low = tuple(map(max, offset, other_offset))
    high = tuple(
        min(at + size, other_at + other_size)
        for at, size, other_at, other_size in zip(offset, shape, other_offset, other_shape, strict=True)
    )
    if any(begin >= end for begin, end in zip(low, high, strict=True)):
        return None
    return low, tuple(end - begin for begin, end in zip(low, high, strict=True))


def span(shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int]:
    """From which element to which the box at ``offset`` reaches, where elements of ``shape`` stand in logical order."""
    first = last = 0
    for whole, at, count in zip(shape, offset, size, strict=True):
        first = first * whole + at
        last = last * whole + at + count - 1
    return first, last + 1


def runs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and shape of boxes which one after the other are the elements ``start`` to ``stop`` of ``shape``."""
    if start >= stop:
        return
    if not shape or stop - start == math.prod(shape):
        yield (0,) * len(shape), shape
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows between are whole

    def within(index: int, begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for at, size in runs(shape[1:], begin, end):
            yield (index, *at), (1, *size)

    if first > last:
        yield from within(last, start - last * row, stop - last * row)
        return
    yield from within(first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from within(last, 0, stop - last * row)


class RegionSink(_ElementSink):
    """Takes the bytes of a box of which only a region is wanted: those from its first element to its last.

    Args:
        target: what is filled: it has the shape of the region.
        itemsize: bytes of one saved element.
        shape: of the whole box.
        offset: of the region in it.
        values: makes an array of some shape of the bytes of its elements.
        copy: puts such an array, or a part of it, into a view of the target.
    """

    def __init__(
        self,
        target: Any,
        itemsize: int,
        shape: tuple[int, ...],
        offset: tuple[int, ...],
        values: Callable[[memoryview, tuple[int, ...]], Any],
        copy: Callable[[Any, Any], None],
    ) -> None:
        super().__init__(itemsize)
        self._target = target
        self._shape = shape
        self._offset = offset
        self._size = tuple(target.shape)
        self._first, _ = span(shape, offset, self._size)
        self._values = values
        self._copy = copy

    def _take(self, first: int, data: memoryview) -> None:
        first += self._first
        for at, shape in runs(self._shape, first, first + len(data) // self._itemsize):
            nbytes = math.prod(shape) * self._itemsize
            wanted = overlap(at, shape, self._offset, self._size)
            if wanted is not None:
                low, size = wanted
                source = box_of(self._values(data[:nbytes], shape), _from(low, at), size)
                self._copy(box_of(self._target, _from(low, self._offset), size), source)
            data = data[nbytes:]


def _from(place: tuple[int, ...], origin: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(at - begin for at, begin in zip(place, origin, strict=True))


def box_of(value: Any, offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The view of ``value`` that begins at ``offset`` (empty for its origin) and has ``shape``."""
    offset = offset or (0,) * len(shape)
    # The ellipsis keeps it a view where there are no dimensions; without it numpy gives a copy, a scalar.
    return value[(..., *(slice(at, at + size) for at, size in zip(offset, shape, strict=True)))]
