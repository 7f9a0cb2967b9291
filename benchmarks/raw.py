"""What the machine itself can do in the same minute: the disk without a file format, and the memory."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 8 * 2**20

Transfer = Callable[[Path, int], float | None]
"""Seconds to move so many bytes to or from a file; None where the file system refuses."""


def direct_write(path: Path, nbytes: int) -> float | None:
    """Seconds to write past the page cache into a preallocated file, and to sync it; None where that is refused."""
    return _timed_file(path, nbytes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, _write)


def buffered_write(path: Path, nbytes: int) -> float | None:
    """The same with ordinary writes."""
    return _timed_file(path, nbytes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _write)


def direct_read(path: Path, nbytes: int) -> float | None:
    """Seconds to read a file past the page cache."""
    return _timed_file(path, nbytes, os.O_RDONLY | os.O_DIRECT, _read)


def memory_copy(nbytes: int, threads: int) -> float:
    """Seconds for one copy within memory that is there already."""
    sources = [np.ones(nbytes // threads, np.uint8) for _ in range(threads)]
    targets = [np.ones(nbytes // threads, np.uint8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.01] * threads))  # all threads are there before the clock starts
        start = time.perf_counter()
        list(pool.map(np.copyto, targets, sources))  # releases the GIL
        return time.perf_counter() - start


def _timed_file(path: Path, nbytes: int, flags: int, work: Callable[[int, int, mmap.mmap], None]) -> float | None:
    buffer = mmap.mmap(-1, BLOCK)  # aligned to pages, as O_DIRECT wants it
    buffer.write(os.urandom(4096) * (BLOCK // 4096))  # and in memory before the clock starts
    try:
        start = time.perf_counter()
        descriptor = os.open(path, flags, 0o600)
        try:
            work(descriptor, -(-nbytes // BLOCK), buffer)
        finally:
            os.close(descriptor)
        return time.perf_counter() - start
    except OSError:
        return None


def _write(descriptor: int, blocks: int, buffer: mmap.mmap) -> None:
    os.posix_fallocate(descriptor, 0, blocks * BLOCK)
    for index in range(blocks):
        os.pwritev(descriptor, [buffer], index * BLOCK)
    os.fsync(descriptor)


def _read(descriptor: int, blocks: int, buffer: mmap.mmap) -> None:
    for index in range(blocks):
        os.preadv(descriptor, [buffer], index * BLOCK)
