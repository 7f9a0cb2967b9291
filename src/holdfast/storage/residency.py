"""How much of a file the kernel has in its page cache."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

from holdfast.storage.durable import Descriptor


def cached_share(file: Descriptor, nbytes: int) -> float:
    """The share of a file's pages that are in the page cache; 1 where the system does not tell.

    Looking changes nothing: no page is read. Linux tells only those who may write the file or own it, and says "all"
    to others, which is the answer that costs least when it is wrong.
    """
    function = getattr(_libc, "mincore", None)
    if function is None or nbytes == 0:
        return 1.0
    try:
        mapping = mmap.mmap(file.fd, nbytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return 1.0
    pages = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
    view = np.frombuffer(mapping, np.uint8)
    address, room = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
    failed = function(address, ctypes.c_size_t(nbytes), room) != 0
    del view
    mapping.close()
    return 1.0 if failed else float((pages & 1).mean())


_libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
