"""Captured tensors as the image of a data file: what its bytes are, part by part, without ever making all of them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from holdfast.format.safetensors import Layout
from holdfast.state.capture import CapturedTensor
from holdfast.state.cuda import synchronize
from holdfast.state.tensors import is_flat
from holdfast.storage import memory
from holdfast.storage.boxes import elements
from holdfast.storage.chunks import digest_of
from holdfast.storage.workers import cores, in_parallel

_FEW = 16  # parts; to look at more of them one by one takes longer than to gather them


class Segment(Protocol):
    """The bytes of a tensor that does not lie in the CPU's memory as it does in the file."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""

    def gather(self, offset: int, address: int, nbytes: int) -> None:
        """Put ``nbytes`` of them, from ``offset``, to where ``address`` says. Called from several threads.

        They are whole elements: see :func:`_gather`.
        """


class StateImage:
    """The image of a data file over live tensors: it holds what they hold when they are read.

    Args:
        layout: where everything lies.
        tensors: by name, tensors of the layout. Where some are left out, reading leaves their bytes untouched.
        header: whether the header is part of it, or left out likewise.
    """

    def __init__(self, layout: Layout, tensors: Mapping[str, CapturedTensor], *, header: bool = True) -> None:
        self.nbytes = layout.nbytes
        prefix = np.frombuffer(layout.prefix, np.uint8)
        self._owners = [prefix, *(tensor.value for tensor in tensors.values())]
        begins, ends = ([0], [len(prefix)]) if header else ([], [])
        # Where the bytes lie. A number is an address: of most tensors nothing else has to be known.
        sources: list[int | Segment] = [prefix.ctypes.data] if header else []
        for item in layout.tensors:
            captured = tensors.get(item.name)
            if captured is not None and item.nbytes:
                begins.append(item.begin)
                ends.append(item.begin + item.nbytes)
                sources.append(captured.address if captured.flat else _source(captured.value))
        self._begins, self._ends, self._sources = begins, ends, sources

    @property
    def held_bytes(self) -> int:
        """How many bytes the tensors and the header have that are not left out."""
        return sum(self._ends) - sum(self._begins)

    def begins(self, part_bytes: int) -> list[int]:
        """Where the parts of so many bytes begin that hold some of them."""
        found: set[int] = set()
        for begin, end in zip(self._begins, self._ends, strict=True):
            found.update(range(begin // part_bytes, (end - 1) // part_bytes + 1))
        return [index * part_bytes for index in sorted(found)]

    def settle(self) -> None:
        """Wait until devices have done what was queued on them, before threads read from there."""
        synchronize(self._owners)

    def digests(self, chunk_bytes: int) -> tuple[str, ...]:
        """The checksum of each chunk that the file would have. Blocks; reads the tensors once."""
        self.settle()
        begins = range(0, self.nbytes, chunk_bytes)
        found = [""] * len(begins)

        def worker() -> Callable[[int], None]:
            buffer = memoryview(bytearray(min(chunk_bytes, self.nbytes)))

            def work(begin: int) -> None:
                room = buffer[: min(chunk_bytes, self.nbytes - begin)]
                found[begin // chunk_bytes] = digest_of(self._look(begin, room))

            return work

        in_parallel(begins, worker, cores())
        return tuple(found)

    def _look(self, begin: int, room: memoryview) -> Iterator[memoryview]:
        """The bytes from ``begin``, as many as ``room`` has: where they lie, or gathered where that is quicker."""
        end = begin + len(room)
        parts = slice(bisect.bisect_right(self._ends, begin), bisect.bisect_left(self._begins, end))
        sources = self._sources[parts]
        addresses = [source for source in sources if isinstance(source, int)]
        if len(addresses) < len(sources) or len(sources) > _FEW:
            yield self.read(begin, room)
            return
        for start, stop, address in zip(self._begins[parts], self._ends[parts], addresses, strict=True):
            low = max(start, begin)
            yield memory.view_at(address + low - start, min(stop, end) - low)

    def read(self, begin: int, room: memoryview) -> memoryview:
        """Gather the bytes from ``begin`` in ``room``."""
        end = begin + len(room)
        address = memory.address_of(room) - begin
        first = bisect.bisect_right(self._ends, begin)
        last = bisect.bisect_left(self._begins, end)
        for start, stop, source in zip(
            self._begins[first:last], self._ends[first:last], self._sources[first:last], strict=True
        ):
            low = max(start, begin)
            nbytes = min(stop, end) - low
            if isinstance(source, int):
                memory.copy(address + low, source + low - start, nbytes)
            else:
                _gather(source, low - start, address + low, nbytes)
        return room


def _source(value: torch.Tensor | np.ndarray[Any, Any]) -> int | Segment:
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data) if value.flags.c_contiguous else _Array(value)
    return value.data_ptr() if is_flat(value) else _Tensor(value)


def _gather(source: Segment, offset: int, address: int, nbytes: int) -> None:
    """Gather any bytes of ``source``: what begins or ends within an element, by way of all of its elements."""
    before, after = offset % source.itemsize, -(offset + nbytes) % source.itemsize
    if not before and not after:
        source.gather(offset, address, nbytes)
        return
    room = memoryview(bytearray(before + nbytes + after))
    whole = memory.address_of(room)
    source.gather(offset - before, whole, len(room))
    memory.copy(address, whole + before, nbytes)


class _Tensor:
    """A tensor on another device, or one that lies in another order in memory, or is conjugated or negated lazily."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def itemsize(self) -> int:
        return self._tensor.element_size()

    def gather(self, offset: int, address: int, nbytes: int) -> None:
        size = self.itemsize
        room = torch.frombuffer(memory.view_at(address, nbytes), dtype=self._tensor.dtype)
        for view in elements(self._tensor, offset // size, (offset + nbytes) // size):
            count = view.numel()
            room[:count].view(view.shape).copy_(view)
            room = room[count:]


class _Array:
    """An array that lies in another order in memory."""

    __slots__ = ("_array",)

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    @property
    def itemsize(self) -> int:
        return self._array.itemsize

    def gather(self, offset: int, address: int, nbytes: int) -> None:
        size = self.itemsize
        room = np.frombuffer(memory.view_at(address, nbytes), self._array.dtype)
        for view in elements(self._array, offset // size, (offset + nbytes) // size):
            np.copyto(room[: view.size].reshape(view.shape), view)
            room = room[view.size :]
