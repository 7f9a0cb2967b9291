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


class BoxSink:
    """Takes bytes into an array or tensor that does not lie in memory as its bytes do in the file.

    Args:
        box: what is filled.
        itemsize: bytes of one saved element.
        fill: puts the bytes of some elements into a view of the box; the bytes are aligned to elements.
    """

    def __init__(self, box: Any, itemsize: int, fill: Callable[[Any, memoryview], None]) -> None:
        self._box = box
        self._itemsize = itemsize
        self._fill = fill
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
        for view in elements(self._box, first, first + len(data) // self._itemsize):
            nbytes = math.prod(view.shape) * self._itemsize
            self._fill(view, data[:nbytes])
            data = data[nbytes:]

    def _take_torn(self, offset: int, data: memoryview) -> None:
        """Part of an element whose rest is in another chunk. No file of ours has one: all elements are aligned."""
        index, within = divmod(offset, self._itemsize)
        with self._lock:
            element, missing = self._torn.setdefault(index, (bytearray(self._itemsize), [self._itemsize]))
            element[within : within + len(data)] = data
            missing[0] -= len(data)
            if missing[0]:
                return
            del self._torn[index]
        self._take_whole(index, memoryview(element))


def array_sink(array: np.ndarray[Any, Any]) -> Sink:
    """What takes the bytes of an array, in logical order."""
    if array.flags.c_contiguous:
        return FlatSink(array, array.ctypes.data)

    def fill(view: np.ndarray[Any, Any], data: memoryview) -> None:
        view[...] = np.frombuffer(data, array.dtype).reshape(view.shape)

    return BoxSink(array, array.itemsize, fill)


def box_of(value: Any, offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The view of ``value`` that begins at ``offset`` (empty for its origin) and has ``shape``."""
    offset = offset or (0,) * len(shape)
    # The ellipsis keeps it a view where there are no dimensions; without it numpy gives a copy, a scalar.
    return value[(..., *(slice(at, at + size) for at, size in zip(offset, shape, strict=True)))]
