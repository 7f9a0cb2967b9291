"""Direct I/O: past the page cache. Whether a file system takes it, and with what alignment, only it can tell."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys

from holdfast.storage.durable import Descriptor

PAGE_BYTES = 4096
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES, _MASK_AT, _MEMORY_AT, _OFFSET_AT = 256, 0, 152, 156  # struct statx of linux/stat.h


def enable(file: Descriptor) -> int:
    """Send the writes of an open file past the page cache.

    Returns:
        Of what number of bytes offsets, lengths and addresses have to be multiples; 0 where the file system does not
        take it, and nothing was changed.
    """
    flag = getattr(os, "O_DIRECT", 0)
    alignment = _alignment(file)
    if not flag or not alignment:
        return 0
    try:
        fcntl.fcntl(file.fd, fcntl.F_SETFL, fcntl.fcntl(file.fd, fcntl.F_GETFL) | flag)
    except OSError:
        return 0
    return alignment


def disable(file: Descriptor) -> None:
    """Send them through the page cache again."""
    flags = fcntl.fcntl(file.fd, fcntl.F_GETFL)
    fcntl.fcntl(file.fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))


def _alignment(file: Descriptor) -> int:
    """What the kernel says (Linux 6.1); 4096 where it says nothing, which all disks take."""
    statx = getattr(_libc, "statx", None)
    if statx is None:
        return PAGE_BYTES
    buffer = (ctypes.c_char * _STATX_BYTES)()
    if statx(file.fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return PAGE_BYTES
    mask, in_memory, in_file = (_u32(buffer, at) for at in (_MASK_AT, _MEMORY_AT, _OFFSET_AT))
    if not mask & _STATX_DIOALIGN:
        return PAGE_BYTES
    # Our memory is aligned to pages, and parts of files to much more than any disk asks for.
    return max(PAGE_BYTES, in_file) if 0 < in_memory <= PAGE_BYTES and in_file else 0


def _u32(buffer: ctypes.Array[ctypes.c_char], at: int) -> int:
    return int.from_bytes(memoryview(buffer)[at : at + 4], sys.byteorder)


_libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
