"""What a peer left on the disk: its files, making them durable, removing them, and the page cache over them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.raw import BLOCK

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def files(path: Path) -> Iterator[Path]:
    """The files of what a peer saved."""
    yield from [path] if path.is_file() else (found for found in path.rglob("*") if found.is_file())


def size(path: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in files(path))


def sync(path: Path) -> None:
    """Make a saved file or directory durable, with the names above it."""
    folders = [path, *(found for found in path.rglob("*") if found.is_dir())] if path.is_dir() else []
    for target in [*files(path), *folders, path.parent]:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove what a peer saved."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def warm_cache(path: Path) -> None:
    """Make the next reads come from the page cache."""
    for file in files(path):
        with file.open("rb", buffering=0) as opened:
            while opened.read(BLOCK):
                pass


def forget_cache(path: Path) -> None:
    """Make the next reads come from the disk."""
    for file in files(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.access(DROP_CACHES, os.W_OK):
        try:
            DROP_CACHES.write_text("3")
        except OSError:  # in a container it may look writable; the advice above was given anyway
            return
