"""Memory that the kernel's direct I/O takes: aligned to pages, in huge pages where there are some, and there already.

Reading past the page cache into memory that has never been touched is two to three times slower: each page is made by
a fault in the middle of the transfer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator

from holdfast.errors import StorageError

HUGE_PAGE_BYTES = 2 * 2**20
_BRIEF_BYTES = 32 * 2**10
# Linux 4.14 and 5.14; Python has no names for them.
_WIPE_ON_FORK = 18
_POPULATE_WRITE = 23


def allocate(nbytes: int) -> memoryview:
    """``nbytes`` of zeroed memory, aligned and present. It goes back to the system with its last view.

    Raises:
        MemoryError: the process may not have that much. That it may does not mean that the system has it: see
            :func:`available_bytes`.
    """
    if nbytes == 0:
        return memoryview(bytearray())
    try:
        # Private: of shared memory there are no huge pages unless the administrator said so.
        rounded = nbytes + (HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else 0)
        mapping = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{nbytes} bytes: {error}") from error
    start = -address_of(mapping) % HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else 0
    # A forked child has no use for it, and after a fork every page that the parent writes would be copied. But the
    # place stays taken there, which MADV_DONTFORK would free: a child that drops its mapping object unmaps the place,
    # whatever has come to lie in it.
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), _WIPE_ON_FORK if sys.platform == "linux" else None):
        if advice is not None:
            with contextlib.suppress(OSError):
                mapping.madvise(advice)
    view = memoryview(mapping)[start : start + nbytes]
    _populate(mapping, start, nbytes, view)
    return view


@contextlib.contextmanager
def enough_memory(name: str, nbytes: int) -> Iterator[None]:
    """Where something is made for the bytes of a tensor: that there is no room for it is an error of ours."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):  # as torch says it
            raise
        found = StorageError(f"{name}: there is no memory for its {nbytes} bytes. Load parts of it, with only=.")
        found.errno = errno.ENOMEM
        raise found from error


def available_bytes() -> int:
    """How much memory can be had before the system swaps or kills; without a limit where nobody tells."""
    limits = [2**63]
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo", encoding="ascii") as table:
        limits += [int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        with open("/proc/self/cgroup", encoding="ascii") as groups:
            path = next(line.split(":", 2)[2].strip() for line in groups if line.startswith("0::"))
        group = os.path.join("/sys/fs/cgroup", path.lstrip("/"))
        with open(os.path.join(group, "memory.max"), encoding="ascii") as file:
            most = int(file.read())  # "max" is no number, and no limit
        with open(os.path.join(group, "memory.current"), encoding="ascii") as file:
            limits.append(most - int(file.read()))
    return min(limits)


def _populate(mapping: mmap.mmap, start: int, nbytes: int, view: memoryview) -> None:
    try:
        mapping.madvise(_POPULATE_WRITE, start, nbytes)
    except MemoryError:
        raise
    except (OSError, ValueError):  # an older kernel, or another system
        for page in range(0, nbytes, mmap.PAGESIZE):
            view[page] = 0


def address_of(view: memoryview | mmap.mmap) -> int:
    """Where the bytes of a writable buffer lie; valid as long as somebody holds the buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def view_at(address: int, nbytes: int) -> memoryview:
    """The bytes at an address; the caller keeps what they belong to."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def copy(target: int, source: int, nbytes: int) -> None:
    """Copy between addresses; only for long copies is Python's lock let go of, which costs more than a short one."""
    (_copy_briefly if nbytes < _BRIEF_BYTES else ctypes.memmove)(target, source, nbytes)


_memmove_address = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
assert _memmove_address is not None
_copy_briefly = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_memmove_address)
