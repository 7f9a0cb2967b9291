"""Memory for the images of one save, kept from save to save: made once, and there when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from holdfast.storage import memory

_SLOT_BYTES = 4096  # where a slot may begin: direct I/O takes it
_LEAVE_BYTES = 256 * 2**20  # what has to stay available to everybody else


class Pinning(Protocol):
    """Memory registered with a device's driver."""

    def release(self) -> None:
        """Take that back."""


class Arena:
    """Room for copies of what a save writes. One save at a time uses it."""

    def __init__(self) -> None:
        self.pinning: Pinning | None = None  # set by whoever copies to it from a device
        self._memory = memoryview(b"")

    @property
    def nbytes(self) -> int:
        """How much memory it holds."""
        return len(self._memory)

    @property
    def memory(self) -> memoryview:
        """All of it."""
        return self._memory

    def slots(self, sizes: Mapping[str, int]) -> dict[str, memoryview]:
        """A slot of each size, under its name. What the last ones held is gone.

        Raises:
            MemoryError: the system cannot give that much without swapping or killing.
        """
        needed = sum(_rounded(nbytes) for nbytes in sizes.values())
        if needed < len(self._memory) // 4:
            self.release()  # most of the state turned out not to need a copy
        self.reserve(needed)
        slots = {}
        begin = 0
        for name, nbytes in sizes.items():
            slots[name] = self._memory[begin : begin + nbytes]
            begin += _rounded(nbytes)
        return slots

    def reserve(self, nbytes: int) -> None:
        """Have at least so much memory, there and not only promised: making it takes longer than filling it.

        Raises:
            MemoryError: as :meth:`slots`.
        """
        if nbytes <= len(self._memory):
            return
        self.release()
        available = memory.available_bytes()
        if nbytes + _LEAVE_BYTES > available:
            raise MemoryError(f"{nbytes} bytes are needed, {available} are available")
        self._memory = memory.allocate(nbytes)

    def release(self) -> None:
        """Give the memory back, as soon as nobody looks at it any more."""
        if self.pinning is not None:
            self.pinning.release()
        self._memory = memoryview(b"")


class MemoryImage:
    """The image of a file that lies in memory already, at an address that direct I/O takes."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return len(self._data)

    def read(self, begin: int, room: memoryview) -> memoryview:
        """The bytes from ``begin``, where they lie."""
        return self.view(begin, len(room))

    def view(self, begin: int, nbytes: int) -> memoryview:
        """The same for those who have no room to offer."""
        return self._data[begin : begin + nbytes]


class BytesImage:
    """The image of a small file whose bytes are known."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def read(self, begin: int, room: memoryview) -> memoryview:
        """The bytes from ``begin``, copied to ``room``."""
        room[:] = self._data[begin : begin + len(room)]
        return room


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _SLOT_BYTES) * _SLOT_BYTES
