"""How much of a file is in the page cache."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.storage import durable, residency
from holdfast.storage.durable import Descriptor
from holdfast.storage.residency import cached_share

PAGES = 64


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Descriptor]:
    """A file that is on disk, and nowhere else."""
    with durable.open_directory(str(tmp_path)) as here:
        durable.write_file(here, "a", bytes(PAGES * mmap.PAGESIZE))
        with durable.open_file(here, "a") as opened:
            # What reads ahead would bring pages that nobody asked for.
            os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_RANDOM)
            os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            yield opened


def share(file: Descriptor) -> float:
    """Of the whole file; where the system keeps files in memory or does not tell, there is nothing to test."""
    found = cached_share(file, PAGES * mmap.PAGESIZE)
    if found == 1.0:
        pytest.skip("the system does not tell, or the file lives in memory")
    return found


def test_a_file_that_nobody_read(file: Descriptor) -> None:
    """Nothing of it is there."""
    assert share(file) == 0.0


def test_looking_reads_nothing(file: Descriptor) -> None:
    """It says the same the second time."""
    share(file)
    assert share(file) == 0.0


@pytest.mark.parametrize("pages", [1, 16, PAGES - 1])
def test_the_share_that_was_read(file: Descriptor, pages: int) -> None:
    """Page by page."""
    share(file)
    for page in range(pages):
        os.pread(file.fd, 1, page * mmap.PAGESIZE)
    assert share(file) == pages / PAGES


def test_a_file_that_was_read(file: Descriptor) -> None:
    """All of it."""
    os.pread(file.fd, PAGES * mmap.PAGESIZE, 0)
    assert cached_share(file, PAGES * mmap.PAGESIZE) == 1.0


class FailingLibrary:
    """A C library whose mincore fails."""

    def mincore(self, *args: Any) -> int:
        """Refuse."""
        return -1


@pytest.mark.parametrize("library", [None, object(), FailingLibrary()], ids=["none", "without mincore", "failing"])
def test_a_system_that_does_not_tell(file: Descriptor, monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    """Then it is read the ordinary way, as if all were there."""
    monkeypatch.setattr(residency, "_libc", library)
    assert cached_share(file, PAGES * mmap.PAGESIZE) == 1.0


@pytest.mark.parametrize("nbytes", [0, (PAGES + 1) * mmap.PAGESIZE])
def test_a_size_that_cannot_be_mapped(file: Descriptor, nbytes: int) -> None:
    """An empty file, or one that was cut meanwhile, is no error here."""
    assert cached_share(file, nbytes) == 1.0
